"""Image grids as PNG, with a label before each row."""

import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastgan.common.files import replace_atomically

_GAP = 6


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
