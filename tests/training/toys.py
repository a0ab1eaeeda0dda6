"""The smallest things that the training code accepts: discriminators that tell what they saw."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.common.distributed import World
from fastgan.common.noise import seeded
from fastgan.discriminator.base import Discriminator
from fastgan.discriminator.diffusion_features import DiffusionDiscriminator
from fastgan.models import Precond
from fastgan.models.freeze import freeze
from fastgan.training.edm_step import EdmSettings, EdmStep
from fastgan.training.step import PlainStep, StepSettings
from fastgan.training.updater import averaged_copy
from tests.conftest import TINY, live_network

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
SHAPE = (1, 8, 8)


@dataclass
class Call:
    """What a discriminator was asked."""

    images: Tensor
    labels: Tensor | None
    augmented: bool
    for_r1: bool


class Watched(Discriminator):
    """Two networks of 3 and 2 patches: a small smooth one and, with BatchNorm, a second one."""

    branches = 2
    loaded_elsewhere = ()
    provenance: list[dict[str, str]] = []  # noqa: RUF012

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        pixels = SHAPE[0] * SHAPE[1] * SHAPE[2]
        second: list[nn.Module] = [nn.Linear(pixels, 4)]
        second += [nn.BatchNorm1d(4)] if batch_norm else []
        self.heads = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(pixels, 5), nn.Softplus(), nn.Linear(5, 3)),
                nn.Sequential(*second, nn.Softplus(), nn.Linear(4, 2)),
            ]
        )
        self.calls: list[Call] = []
        self.judged: list[Tensor] = []

    def compute_in(self, features: torch.dtype | None, heads: torch.dtype | None) -> None:
        """In what it is made of."""

    def store_frozen(self) -> None:
        """Nothing is frozen."""

    def views(self, images: Tensor, generator: torch.Generator | None) -> list[Tensor]:
        leaf = images.requires_grad and images.is_leaf
        self.calls.append(Call(images.detach().clone(), None, generator is not None, leaf))
        return [images, images]

    def features(self, index: int, view: Tensor, labels: Tensor | None) -> list[Tensor]:
        self.calls[-1].labels = labels
        return [view]

    def judge(self, index: int, features: list[Tensor], labels: Tensor | None) -> Tensor:
        self.judged.append(features[0].detach().clone())
        return self.heads[index](features[0].flatten(1))


def watched(batch_norm: bool = False) -> Watched:
    with seeded(5):
        return Watched(batch_norm).double()


def settings(**changes: object) -> StepSettings:
    defaults = {
        "seed": 3,
        "batch": 4,
        "batch_gpu": 4,
        "total_images": 1000,
        "lr_g": 1e-3,
        "lr_d": 2e-3,
        "r1_gamma": 10.0,
    }
    return StepSettings(**(defaults | changes))  # type: ignore[arg-type]


def generator(level: int = 1, label_dim: int = 0, dtype: torch.dtype = torch.float64) -> Precond:
    network = live_network({**TINY, "label_dim": label_dim}).to(dtype).train()
    freeze(network, level)
    return network


def gan_step(
    discriminator: Discriminator | None = None,
    *,
    kind: type[PlainStep] = PlainStep,
    level: int = 1,
    label_dim: int = 0,
    dtype: torch.dtype = torch.float64,
    augment: tuple[str, ...] = (),
    world: World = ALONE,
    **changes: object,
) -> PlainStep:
    """A step; without a discriminator, heads (no BatchNorm) on the tiny network itself."""
    network = generator(level, label_dim, dtype)
    if discriminator is None:
        discriminator = diffusion_heads(network, augment)
    average = averaged_copy(network)
    return kind(network, average, discriminator, settings(**changes), world)


def edm_step(world: World = ALONE, dropout: float = 0.0, **changes: object) -> EdmStep:
    """A float64 step of EDM pre-training on the tiny network, two images a round."""
    config = {**TINY, "precond": "EDMPrecond", "dropout": dropout}
    network = live_network(config).double()
    defaults = {"seed": 3, "batch": 4, "batch_gpu": 2, "lr": 1e-3, "beta2": 0.999}
    settings = EdmSettings(**(defaults | {"lr_factor": lambda nimg: 1.0} | changes))  # type: ignore[arg-type]
    return EdmStep(network, averaged_copy(network), settings, world)


def diffusion_heads(network: Precond, augment: tuple[str, ...] = ()) -> Discriminator:
    heads = DiffusionDiscriminator(
        network, SHAPE, width=4, label_dim=network.label_dim, augment=augment
    )
    return heads.to(next(network.parameters()).dtype).train()


def reals(iteration: int, n: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(1000 + iteration)
    return torch.rand(n, *SHAPE, generator=draw, dtype=torch.float64).to(dtype) * 2 - 1


def one_hot(iteration: int, label_dim: int, n: int = 4) -> Tensor:
    draw = torch.Generator().manual_seed(2000 + iteration)
    return F.one_hot(torch.randint(label_dim, (n,), generator=draw), label_dim).double()


def run(step: PlainStep, iterations: int, label_dim: int = 0, n: int = 4) -> dict[str, Tensor]:
    """Runs the iterations 0, 1, ...; returns the sums of what they reported."""
    totals: dict[str, Tensor] = {}
    for k in range(iterations):
        labels = one_hot(k, label_dim, n) if label_dim else None
        for name, value in step.run(reals(k, n), labels, k).scalars.items():
            totals[name] = totals.get(name, torch.zeros(())) + value
    return totals


def everything(step: PlainStep | EdmStep) -> dict[str, Tensor]:
    """All that an iteration changes, copied."""
    average = {f"average/{n}": t for n, t in step.average.state_dict().items()}
    return {n: t.detach().clone() for n, t in {**step.state(), **average}.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], *, atol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.shape == b[name].shape, name
        difference = (tensor - b[name]).abs().max().item() if tensor.numel() else 0.0
        assert difference <= atol, (name, difference)
