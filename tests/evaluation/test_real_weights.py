"""Published accuracy of the real CIFAR-10 ResNet-56, where its weights and the data lie.

FASTGAN_WEIGHTS and FASTGAN_DATA name the folders; without the files there is nothing to run.
"""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan.evaluation.extractors import load_extractor

_WEIGHTS = Path(os.environ.get("FASTGAN_WEIGHTS", "weights")) / "resnet56_cifar10.safetensors"
_IMAGES = Path(os.environ.get("FASTGAN_DATA", "data")) / "cifar10-32x32-test.zip"
_PAIRS = [(_WEIGHTS, _IMAGES)] if _WEIGHTS.is_file() and _IMAGES.is_file() else []


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "images"), _PAIRS)
def test_resnet56_accuracy(weights: Path, images: Path) -> None:
    extractor = load_extractor("resnet56", device="cpu", weights=weights)
    correct = 0
    with zipfile.ZipFile(images) as archive:
        labels = json.loads(archive.read("dataset.json"))["labels"]
        for start in range(0, len(labels), 500):
            part = labels[start : start + 500]
            pixels = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name, _ in part]
            batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
            classes = torch.tensor([label for _, label in part])
            correct += int((extractor.predict(batch) == classes).sum())
    assert len(labels) == 10000
    assert correct == 9339
