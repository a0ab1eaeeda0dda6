"""The embedded default data: scikit-learn's 1,797 hand-written digits as 16 x 16 grey images.

Three fixed, class-balanced splits: the models learn from `train`, settings are chosen on `val`,
numbers are reported on `test`.
"""

from typing import Any, Literal

import numpy as np
from PIL import Image

Split = Literal["train", "val", "test"]
RESOLUTION = 16
_SIZES = {"train": 997, "val": 400, "test": 400}
_SPLIT_SEED = 20240


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
        self.all_images: np.ndarray = np.stack(
            [_upsample(image) for image in source.images[chosen]]
        )[:, None]

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
    bounds = np.cumsum([_SIZES["train"], _SIZES["val"], _SIZES["test"]])
    train, val, test = np.split(dealt, bounds[:-1])
    return {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}
