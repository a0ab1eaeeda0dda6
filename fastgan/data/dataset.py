"""What training and evaluation know of a dataset, and how one is opened."""

from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from PIL import Image

from fastgan.common.errors import UserError
from fastgan.data.sources import SourceDataset, open_source

Split = Literal["train", "val", "test"]
RESOLUTION = 16  # of the digits
_SUBSET_SEED = 0
_SPLIT_SEED = 20240
_SIZES = {"train": 997, "val": 400, "test": 400}
_DIGITS: dict[str, Split] = {"digits": "train", **{f"digits/{s}": s for s in get_args(Split)}}


class ImageDataset(Protocol):
    """Square uint8 images of one size in a fixed order, perhaps with labels.

    `labels` is int64 [n] (classes), float32 [n, label_dim] (vectors) or None; `label_dim` is the
    largest class + 1, the length of the vectors, or 0. `name` is for people.
    """

    name: str
    resolution: int
    channels: int
    label_dim: int
    labels: np.ndarray | None

    def __len__(self) -> int: ...

    def images(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [k, channels, resolution, resolution] of the images at int [k] `indices`."""
        ...

    def provenance(self) -> dict[str, Any]:
        """What identifies the data beside a number computed from it; JSON types only."""
        ...


def open_dataset(path: str | Path, *, max_images: int | None = None) -> ImageDataset:
    """Opens a zip, a folder, or the embedded `digits`, `digits/val`, `digits/test`.

    `max_images` keeps a fixed random subset in the dataset's order (smaller subsets lie inside
    larger ones) and leaves `label_dim` as it is. Raises UserError naming the file or entry.
    """
    if max_images is not None and max_images < 1:
        raise UserError(f"max_images={max_images}, dataset {path}, at least 1 expected")
    split = _DIGITS.get(str(path))
    dataset: ImageDataset
    dataset = Digits(split) if split else SourceDataset(open_source(path))
    if max_images is None or max_images >= len(dataset):
        return dataset
    return _Subset(dataset, subset_indices(len(dataset), max_images))


def subset_indices(total: int, size: int) -> np.ndarray:
    """int64 [min(size, total)], sorted: a fixed random subset, nested in every larger one."""
    order = np.random.default_rng(_SUBSET_SEED).permutation(total)
    return np.sort(order[:size])


class _Subset:
    """Some images of a dataset, under the dataset's own label_dim."""

    def __init__(self, whole: ImageDataset, indices: np.ndarray) -> None:
        self._whole, self._indices = whole, indices
        self.name = whole.name
        self.resolution, self.channels = whole.resolution, whole.channels
        self.label_dim = whole.label_dim
        self.labels = None if whole.labels is None else whole.labels[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def images(self, indices: np.ndarray) -> np.ndarray:
        return self._whole.images(self._indices[indices])

    def provenance(self) -> dict[str, Any]:
        subset = {"n": len(self), "subset_of": len(self._whole), "subset_seed": _SUBSET_SEED}
        return self._whole.provenance() | subset


class Digits:
    """scikit-learn's digits, 8 x 8 in 17 grey levels, upsampled to 16 x 16 (Pillow's bicubic)."""

    resolution = RESOLUTION
    channels = 1
    label_dim = 10

    def __init__(self, split: Split = "train") -> None:
        from sklearn.datasets import load_digits

        source = load_digits()
        chosen = _split_indices(source.target)[split]
        self.name = f"digits/{split}"
        self.labels: np.ndarray | None = source.target[chosen].astype(np.int64)
        images = [_upsample(image) for image in source.images[chosen]]
        self.all_images: np.ndarray = np.stack(images)[:, None]

    def __len__(self) -> int:
        return len(self.all_images)

    def images(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [k, 1, 16, 16]."""
        return self.all_images[indices]

    def provenance(self) -> dict[str, Any]:
        return {
            "dataset": self.name,
            "n": len(self),
            "resolution": RESOLUTION,
            "resampling": "bicubic 8 -> 16",
            "split_seed": _SPLIT_SEED,
        }


def _upsample(levels: np.ndarray) -> np.ndarray:
    grey = Image.fromarray(np.round(levels * (255 / 16)).astype(np.uint8))
    return np.asarray(grey.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC))


def _split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Fixed disjoint index sets that deal every class out in proportion."""
    rng = np.random.default_rng(_SPLIT_SEED)
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    # Dealing the class-sorted list out by low-discrepancy ranks keeps every split balanced.
    rank = np.argsort((np.arange(len(labels)) * 0.6180339887498949) % 1.0, kind="stable")
    dealt = by_class[rank]
    parts = np.split(dealt, np.cumsum(list(_SIZES.values()))[:-1])
    return {split: np.sort(part) for split, part in zip(_SIZES, parts, strict=True)}
