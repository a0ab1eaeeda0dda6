"""What a feature extractor is, and what the extractors share."""

import os
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgan.errors import UserError
from fastgan.files import file_sha256


class FeatureExtractor(Protocol):
    """Maps uint8 images to feature vectors.

    name: appears in the metric's name. dim: length of a feature vector. resize: how images reach
    the network's size, in words. device: where it runs.
    """

    name: str
    dim: int
    resize: str
    device: torch.device

    def provenance(self) -> dict[str, Any]:
        """Name and sha256 of the weights, library: what makes two numbers comparable."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, C, H, W], C = 1 or 3, any device -> float features [N, dim] on `device`."""
        ...


def to_rgb(images: Tensor) -> Tensor:
    """Grey images [N, 1, H, W] repeated to three channels; RGB unchanged (as EDM's script)."""
    assert images.dtype == torch.uint8 and images.ndim == 4, (images.dtype, images.ndim)
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def verified_sha256(path: str | os.PathLike[str], expected: str | None) -> str:
    """sha256 of `path`. UserError: it is not the `expected` one (None: any)."""
    found = file_sha256(path)
    if expected is not None and found != expected.lower():
        raise UserError(f"sha256 is {found}, file {path}, right is {expected}")
    return found
