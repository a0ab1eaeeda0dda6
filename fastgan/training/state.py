"""What an iteration reports, and the training state by name as checkpoints hold it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastgan.common.errors import UserError


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


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that get gradients, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached tensors under `prefix/name`."""
    return {f"{prefix}/{name}": tensor.detach() for name, tensor in tensors.items()}


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix/`, by the rest of their names."""
    start = prefix + "/"
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def checksum(*parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """float64 [networks]: the norms of each network's parameters, added up.

    Other bits anywhere almost always change a bit of it.
    """
    norms = [torch._foreach_norm([p.detach() for p in each.values()]) for each in parameters]
    return torch.stack([torch.stack(list(each)).double().sum() for each in norms])


@torch.no_grad()
def load_trainable(module: nn.Module, saved: Mapping[str, Tensor], what: str) -> None:
    """Copies saved values into the trainable parameters; UserError where the sets differ."""
    own = trainable(module)
    if {n: p.shape for n, p in own.items()} != {n: t.shape for n, t in saved.items()}:
        raise UserError(
            f"the checkpoint's {what} trains other parameters than this run's, "
            "the architecture and freeze.level it was saved with would fit"
        )
    for name, parameter in own.items():
        parameter.copy_(saved[name])


def rounds(n: int, size: int) -> Iterator[slice]:
    """Slices that cover n images, `size` at a time."""
    assert n % size == 0
    return (slice(start, start + size) for start in range(0, n, size))


def take(labels: Tensor | None, part: slice) -> Tensor | None:
    """The labels of one round, if there are labels."""
    return None if labels is None else labels[part]
