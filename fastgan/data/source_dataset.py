"""A zip or a folder as a dataset: every image held to the size and mode of the first."""

from pathlib import Path
from typing import Any

import numpy as np

from fastgan.data.decode import check_header, dataset_shape, decode_image, open_image
from fastgan.data.folder_source import FolderSource
from fastgan.data.image_source import MAX_ENTRY_BYTES, ImageSource
from fastgan.data.labels import label_dim_of
from fastgan.data.zip_source import ZipSource
from fastgan.errors import UserError

# Images whose header is checked on opening; the others are checked when they are read.
_HEADER_CHECKS = 512
# Keys of dataset.json that a number's provenance repeats.
_RECORDED = ("resampling", "source")


class SourceDataset:
    """The images of a zip or folder (an ImageDataset).

    Opening checks the index and the headers of up to 512 images spread evenly; each image is
    checked in full whenever it is read. Both raise UserError naming the entry.
    """

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self.name = source.path.name
        self.labels = source.labels
        self.label_dim = label_dim_of(source.labels)
        self.resolution, self.channels = shape_from(source, source.names[0])
        self._check_headers()

    def __len__(self) -> int:
        return len(self._source.names)

    def images(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [k, channels, resolution, resolution] of the images at int [k] `indices`."""
        shape = (len(indices), self.channels, self.resolution, self.resolution)
        batch = np.empty(shape, np.uint8)
        for row, index in enumerate(indices):
            name = self._source.names[index]
            batch[row] = read_image(self._source, name, self.resolution, self.channels)
        return batch

    def provenance(self) -> dict[str, Any]:
        """Name, size, recorded resampling, and a fingerprint of the contents."""
        metadata = self._source.metadata
        return {
            "dataset": self.name,
            "n": len(self),
            "resolution": self.resolution,
            "channels": self.channels,
            "resampling": "not recorded",
            **{key: metadata[key] for key in _RECORDED if key in metadata},
            "fingerprint": self._source.fingerprint(),
        }

    def _check_headers(self) -> None:
        count = min(len(self), _HEADER_CHECKS)
        for index in np.linspace(0, len(self) - 1, count).astype(int):
            name = self._source.names[index]
            where = self._source.where(name)
            data = self._source.read(name, entry_limit(self.resolution, self.channels))
            check_header(open_image(data, where), where, self.resolution, self.channels)


def open_source(path: str | Path) -> ImageSource:
    """The encoded images of a zip or a folder, not yet held to one size and mode."""
    path = Path(path)
    if path.is_dir():
        return FolderSource(path)
    if path.is_file():
        return ZipSource(path)
    raise UserError(f"no dataset at {path}, a zip, a folder of images or 'digits' expected")


def shape_from(source: ImageSource, name: str) -> tuple[int, int]:
    """(resolution, channels) that the entry `name` would set as a dataset's first image."""
    where = source.where(name)
    return dataset_shape(open_image(source.read(name), where), where)


def read_image(source: ImageSource, name: str, resolution: int, channels: int) -> np.ndarray:
    """uint8 [channels, resolution, resolution] of the entry `name`."""
    data = source.read(name, entry_limit(resolution, channels))
    return decode_image(data, source.where(name), resolution, channels)


def entry_limit(resolution: int, channels: int) -> int:
    """Bytes that an image of this size may take: its pixels several times over, plus metadata."""
    return min((1 << 20) + 8 * channels * resolution**2, MAX_ENTRY_BYTES)
