"""The embedded digits: what they hold, and that nobody's new version changes it unnoticed."""

import hashlib
from typing import Literal, get_args

import numpy as np
import pytest

from fastgan.data import open_dataset
from fastgan.data.dataset import Digits, Split

SIZES = {"train": 997, "val": 400, "test": 400}
# sha256 of the bytes of images and labels; another Pillow or scikit-learn must not move them.
CONTENT = {
    "train": (
        "ac377e1042a134b4b09510d7e5953785b02914e924015f7c62cd5bbd512a6f3d",
        "4a480c5ed25e01939c2e3f75646e3a1e5cac63dd9b83978fa8588c17e681bad5",
    ),
    "val": (
        "f68d5afa3de12d9538fee3e51c1e071ce576ea14c967a87e01daa8751adc64e2",
        "7ea8c74af90c24aef872143559114027b56aa5a8b53678423013e63539d8c931",
    ),
    "test": (
        "e76b377ace5b50026a18ce839657ba6244dc9c08fcc5a4dec8e5ac7d26e40032",
        "f40bf5cb71185658cb92beb9b8bc23be7355e06609e4998e2abcd3c75e5e0e54",
    ),
}


@pytest.fixture(scope="module")
def splits() -> dict[str, Digits]:
    return {split: Digits(split) for split in get_args(Split)}


def labels(digits: Digits) -> np.ndarray:
    assert digits.labels is not None
    return digits.labels


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_content(splits: dict[str, Digits], split: Literal["train", "val", "test"]) -> None:
    digits = splits[split]
    assert digits.all_images.shape == (SIZES[split], 1, 16, 16) and len(digits) == SIZES[split]
    assert digits.all_images.dtype == np.uint8 and labels(digits).dtype == np.int64
    parts = digits.all_images, labels(digits)
    found = tuple(hashlib.sha256(part.tobytes()).hexdigest() for part in parts)
    assert found == CONTENT[split]


def test_the_names_open_them(splits: dict[str, Digits]) -> None:
    for name, split in (("digits", "train"), ("digits/val", "val"), ("digits/test", "test")):
        dataset = open_dataset(name)
        assert (len(dataset), dataset.label_dim, dataset.resolution) == (SIZES[split], 10, 16)
        assert (dataset.name, dataset.provenance()["n"]) == (f"digits/{split}", SIZES[split])
        assert np.array_equal(dataset.images(np.array([3, 0])), splits[split].all_images[[3, 0]])
    assert open_dataset("digits/test", max_images=9).images(np.arange(9)).shape == (9, 1, 16, 16)
