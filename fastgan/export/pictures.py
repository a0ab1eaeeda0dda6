"""What the weights draw: a grid to look at, and what rounding them changes."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgan import build
from fastgan import config as cfg
from fastgan.errors import UserError
from fastgan.evaluation.grid import save_grid
from fastgan.models import Precond

CPU = torch.device("cpu")
ROWS = COLUMNS = 8
_WIDTH = 128  # of an image in the grid, in pixels
_BATCH = 16


@dataclass(frozen=True)
class Difference:
    """Of two sets of `n` uint8 images: of their values, and the share of pixels that are equal."""

    n: int
    mean: float
    largest: int
    equal_pixels: float


def is_generator(network: Precond) -> bool:
    """Whether it has D2O's shifted preconditioning, so that one step makes an image."""
    return network.eps > 0


def sampler(network: Precond) -> cfg.SamplerConfig:
    """How its images are drawn: one step of a generator, 18 of Heun's of a denoiser."""
    if is_generator(network):
        return cfg.SamplerConfig()
    return cfg.SamplerConfig(kind="heun", steps=18)


def require_pictures(network: Precond, where: Path) -> None:
    """UserError unless its images are grey or RGB."""
    channels = network.model.img_channels
    if channels not in (1, 3):
        raise UserError(f"images of {channels} channels, {where}, 1 or 3 would be right")


def draw(network: Precond, count: int) -> Tensor:
    """uint8 images [count, C, H, W] of the seeds 0, 1, ..., classes drawn as evaluation does."""
    sample = build.sample_fn(network, sampler(network), CPU)
    seeds = list(range(count))
    return torch.cat([sample(seeds[at : at + _BATCH]) for at in range(0, count, _BATCH)])


def write_grid(network: Precond, path: Path) -> None:
    """8 x 8 images of the seeds 0-63; a class for each row, spread over all of them."""
    classes = _class_of_row(network.label_dim)
    rows = []
    for row, one_class in enumerate(classes):
        sample = build.sample_fn(network, sampler(network), CPU, one_class=one_class)
        rows.append(sample(list(range(row * COLUMNS, (row + 1) * COLUMNS))))
    labels = [f"class {each}" for each in classes] if network.label_dim else None
    scale = max(1, _WIDTH // network.model.img_resolution)
    save_grid(torch.cat(rows), path, COLUMNS, row_labels=labels, scale=scale)


def difference(first: Tensor, second: Tensor) -> Difference:
    """Between uint8 images [N, C, H, W] of the same seeds."""
    assert first.shape == second.shape and first.dtype == second.dtype == torch.uint8
    apart = (first.int() - second.int()).abs()
    return Difference(
        n=len(first),
        mean=apart.double().mean().item(),
        largest=int(apart.max()),
        equal_pixels=(apart.amax(1) == 0).double().mean().item(),
    )


def _class_of_row(label_dim: int) -> list[int | None]:
    if label_dim > ROWS:
        return [row * label_dim // ROWS for row in range(ROWS)]
    return [row % label_dim if label_dim else None for row in range(ROWS)]
