"""What a training step holds and reports: networks, optimisers, scalars; saved and restored."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastgan.common.distributed import World
from fastgan.common.errors import UserError
from fastgan.discriminator.base import Discriminator
from fastgan.models import Precond
from fastgan.training.updater import Updater


@dataclass
class StepResult:
    """What one iteration reports: scalars on the device, means over this process's images."""

    scalars: dict[str, Tensor]
    """By the names of the statistics file: Loss/G, Loss/D, Loss/R1 ..."""
    skipped: dict[str, Tensor] = field(default_factory=dict)
    """By update (G, D, R1): 1 where it was left out, something not being finite, else 0."""

    def __or__(self, other: "StepResult") -> "StepResult":
        """Both together."""
        return StepResult(self.scalars | other.scalars, self.skipped | other.skipped)


class TrainingStep:
    """A step of any kind of training, as the loop, checkpoints and engines see it.

    It trains `generator` by `update_g`, averages it into `average`, and in a GAN trains the heads
    of `discriminator` by `update_d`. `settling`: how many iterations of a kind (with or without
    R1) prepare something for the next.
    """

    settling = 1
    generator: Precond
    average: Precond
    update_g: Updater
    world: World
    discriminator: Discriminator | None = None
    update_d: Updater | None = None

    def run(self, reals: Tensor, labels: Tensor | None, iteration: int) -> StepResult:
        """One iteration on this process's real images [local, C, H, W] in [-1, 1].

        `labels` are one-hot [local, label_dim] or None. `iteration` counts from 0: everything
        random is a function of it.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """All that changes in training, except the average: for checkpoints."""
        state = _prefixed("generator", trainable(self.generator))
        state |= _prefixed("optimizer_g", self.update_g.state())
        if self.discriminator is not None and self.update_d is not None:
            state |= _prefixed("discriminator", self.discriminator.save_state())
            state |= _prefixed("optimizer_d", self.update_d.state())
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores `state`; UserError where it belongs to other networks."""
        _load_trainable(self.generator, _part_of(state, "generator"))
        self.update_g.load_state(_part_of(state, "optimizer_g"))
        if self.discriminator is not None and self.update_d is not None:
            self.discriminator.load_save_state(_part_of(state, "discriminator"))
            self.update_d.load_state(_part_of(state, "optimizer_d"))

    def blamed(self) -> dict[str, list[str]]:
        """The parameters whose gradients were not finite when an update was last left out."""
        updates = {"generator": self.update_g, "discriminator": self.update_d}
        return {name: update.blamed() for name, update in updates.items() if update is not None}

    def checksum(self) -> Tensor:
        """float64 [networks], the norms of each one's parameters added up: equal in all processes.

        Other bits anywhere almost always change a bit of it.
        """
        updates = [update for update in (self.update_g, self.update_d) if update is not None]
        norms = [torch._foreach_norm([p.detach() for p in u.parameters]) for u in updates]
        return torch.stack([torch.stack(list(each)).double().sum() for each in norms])


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that get gradients, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def rounds(size: int, *batches: Tensor | None) -> Iterator[tuple]:
    """Gradient accumulation: the batches together, `size` images at a time; None stays None."""
    n = next(len(batch) for batch in batches if batch is not None)
    assert n % size == 0
    for start in range(0, n, size):
        yield tuple(None if b is None else b[start : start + size] for b in batches)


@contextmanager
def standing_still(discriminator: Discriminator) -> Iterator[None]:
    """Inside, nothing in D asks for a gradient: a compiled backward would compute every one."""
    discriminator.requires_grad_(False)
    try:
        yield
    finally:
        discriminator.requires_grad_(True)


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor.detach() for name, tensor in tensors.items()}


def _part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = prefix + "/"
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


@torch.no_grad()
def _load_trainable(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    own = trainable(module)
    if {n: p.shape for n, p in own.items()} != {n: t.shape for n, t in saved.items()}:
        raise UserError(
            "the checkpoint's generator trains other parameters than this run's, "
            "the architecture and freeze.level it was saved with would fit"
        )
    for name, parameter in own.items():
        parameter.copy_(saved[name])
