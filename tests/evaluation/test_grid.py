"""Grids, pixel by pixel."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan.models.sampling import save_grid


def _colours(n: int, channels: int) -> torch.Tensor:
    values = torch.arange(n * channels, dtype=torch.uint8).view(n, channels, 1, 1)
    return values.expand(n, channels, 5, 5).contiguous()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_cells_stand_row_by_row(tmp_path: Path, channels: int, mode: str) -> None:
    save_grid(_colours(5, channels), tmp_path / "grid.png", 3, scale=2)
    image = Image.open(tmp_path / "grid.png")
    assert image.mode == mode and image.size == (30, 20)
    pixels = np.asarray(image).reshape(20, 30, channels)
    for index in range(5):
        row, column = divmod(index, 3)
        cell = pixels[10 * row : 10 * row + 10, 10 * column : 10 * column + 10]
        assert (cell == np.arange(index * channels, (index + 1) * channels)).all()
    assert (pixels[10:, 20:] == 255).all()
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_labels_stand_left_of_their_rows(tmp_path: Path) -> None:
    images = _colours(4, 3)
    save_grid(images, tmp_path / "plain.png", 2, scale=4)
    save_grid(images, tmp_path / "labelled.png", 2, scale=4, row_labels=["real", ""])
    plain = np.asarray(Image.open(tmp_path / "plain.png"))
    labelled = np.asarray(Image.open(tmp_path / "labelled.png"))
    margin = labelled.shape[1] - plain.shape[1]
    gap = labelled.shape[0] - plain.shape[0]
    assert gap > 0
    np.testing.assert_array_equal(labelled[:20, margin:], plain[:20])
    np.testing.assert_array_equal(labelled[20 + gap :, margin:], plain[20:])
    assert (labelled[:20, :margin] < 128).any()
    assert (labelled[20:, :margin] == 255).all() and (labelled[20 : 20 + gap] == 255).all()
