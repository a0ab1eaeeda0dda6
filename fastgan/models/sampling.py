"""From noise to images: the one-step and N-step generators, EDM's Heun sampler; grids of them."""

import os
from itertools import pairwise

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastgan.common.files import replace_atomically
from fastgan.models import SIGMA_INIT, Precond

SIGMA_MIN = 0.002
RHO = 7.0
# Pixels between the rows of a grid that have labels.
_GAP = 6


def rho_grid(
    n: int, *, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_INIT, rho: float = RHO
) -> list[float]:
    """n noise levels from sigma_max to sigma_min (Karras et al. 2022, Eq. 5), without the 0."""
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(first + i / max(n - 1, 1) * (last - first)) ** rho for i in range(n)]


def few_step(
    network: Precond,
    z: Tensor,
    class_labels: Tensor | None = None,
    *,
    steps: int = 1,
    mid_sigma: float | None = None,
) -> Tensor:
    """The generator with `steps` network evaluations; z [N, C, H, W] standard normal -> images.

    Euler steps between the first `steps` of the steps + 1 points of the rho = 7 grid 80 ... 0.002;
    the last denoised image is the result. `mid_sigma` gives the second point of two steps by hand
    (published: 0.8). Gradients flow through all evaluations.
    """
    levels = rho_grid(steps + 1)[:steps]
    if mid_sigma is not None:
        assert steps == 2
        levels[1] = mid_sigma
    x = levels[0] * z
    for sigma, following in pairwise(levels):
        denoised = network(x, x.new_full((1,), sigma), class_labels)
        x = denoised + (following / sigma) * (x - denoised)
    return network(x, x.new_full((1,), levels[-1]), class_labels)


@torch.no_grad()
def heun(
    network: Precond,
    z: Tensor,
    class_labels: Tensor | None = None,
    *,
    steps: int = 18,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_INIT,
    rho: float = RHO,
) -> Tensor:
    """EDM's deterministic sampler (Karras et al. 2022, Algorithm 1), 2 steps - 1 evaluations.

    z [N, C, H, W] standard normal -> images in float64. The state is float64, the network sees
    float32 (or its own wider dtype), as in the published sampler.
    """
    sigmas = [*rho_grid(steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho), 0.0]
    masters = next(network.parameters()).dtype

    def slope(x: Tensor, sigma: float) -> Tensor:
        level = x.new_full((1,), sigma).to(masters)
        return (x - network(x.to(masters), level, class_labels).double()) / sigma

    x = z.double() * sigmas[0]
    for now, following in pairwise(sigmas):
        before = slope(x, now)
        ahead = x + (following - now) * before
        if following > 0:
            ahead = x + (following - now) * (before + slope(ahead, following)) / 2
        x = ahead
    return x


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 as published: the truncation of clip(127.5 x + 128, 0, 255)."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)


def save_grid(
    images: Tensor,
    path: str | os.PathLike[str],
    columns: int,
    *,
    row_labels: list[str] | None = None,
    scale: int = 1,
) -> None:
    """Writes uint8 images [N, C, H, W] (C = 1 or 3) row by row as one PNG, atomically.

    scale: whole-number enlargement by repeating pixels. row_labels: one text per row, on white to
    the left, with white between the rows. A last row that is not full is filled with white.
    """
    canvas = _tile(images, columns, scale)
    if row_labels is not None:
        canvas = _with_labels(canvas, row_labels, images.shape[2] * scale)
    with replace_atomically(path) as file:
        canvas.save(file, format="PNG")


def _tile(images: Tensor, columns: int, scale: int) -> Image.Image:
    array = images.cpu().numpy()
    assert array.dtype == np.uint8 and array.ndim == 4 and array.shape[1] in (1, 3), array.shape
    assert columns > 0 and scale > 0 and len(array) > 0, (columns, scale, len(array))
    n, c, h, w = array.shape
    rows = -(-n // columns)
    cells = np.full((rows * columns, c, h, w), 255, dtype=np.uint8)
    cells[:n] = array
    grid = cells.reshape(rows, columns, c, h, w).transpose(0, 3, 1, 4, 2)
    grid = grid.reshape(rows * h, columns * w, c).repeat(scale, axis=0).repeat(scale, axis=1)
    return Image.fromarray(grid[:, :, 0] if c == 1 else np.ascontiguousarray(grid))


def _with_labels(grid: Image.Image, labels: list[str], height: int) -> Image.Image:
    """The rows of `grid` apart, right of a white column wide enough for their labels."""
    assert len(labels) * height == grid.height, (len(labels), height, grid.height)
    font = ImageFont.load_default()
    margin = int(max(font.getlength(label) for label in labels)) + 2 * _GAP
    size = (margin + grid.width, grid.height + _GAP * (len(labels) - 1))
    canvas = Image.new(grid.mode, size, "white")
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(labels):
        top = row * (height + _GAP)
        canvas.paste(grid.crop((0, row * height, grid.width, (row + 1) * height)), (margin, top))
        draw.text((_GAP, top + height / 2), label, fill="black", font=font, anchor="lm")
    return canvas
