"""What a feature extractor is, what the extractors share, and the pixels' principal components."""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgan.common.errors import UserError
from fastgan.common.files import file_sha256
from fastgan.evaluation.frechet import FeatureStatistics

# An eigendecomposition of 64x64 RGB pixels takes minutes; beyond, nobody would wait for it.
_MAX_PIXELS = 12288
_CHUNK = 1024
Device = torch.device | str


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


class FromFile:
    """What extractors share whose weights are one file: its name and sha256 are the provenance."""

    name: str

    def __init__(self, path: Path, device: Device) -> None:
        self.device = torch.device(device)
        self._file, self._sha256 = path.name, file_sha256(path)

    def provenance(self) -> dict[str, Any]:
        return {"name": self.name, "weights_file": self._file, "weights_sha256": self._sha256}


def to_rgb(images: Tensor) -> Tensor:
    """Grey images [N, 1, H, W] repeated to three channels; RGB unchanged (as EDM's script)."""
    assert images.dtype == torch.uint8 and images.ndim == 4, (images.dtype, images.ndim)
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


class PixelPca:
    """The first `dim` principal components of images in model space, x / 127.5 - 1."""

    resize = "none"

    def __init__(self, mean: Tensor, components: Tensor, fitted_on: dict[str, Any]) -> None:
        """mean float64 [P], components float64 [dim, P] with orthonormal rows."""
        self.dim = len(components)
        self.name = f"pca{self.dim}"
        self.device = components.device
        self._mean, self._components, self._fitted_on = mean, components, fitted_on

    @classmethod
    def fit(cls, images: Tensor, dim: int, device: Device = "cpu") -> "PixelPca":
        """Components of uint8 images [N, C, H, W], in float64, largest variance first.

        A component's entry of largest magnitude is positive, which fixes the sign.
        UserError: dim below 1 or above C H W or N - 1; more than 12288 pixels.
        """
        pixels = images[0].numel()
        if not 1 <= dim <= min(pixels, len(images) - 1) or pixels > _MAX_PIXELS:
            raise UserError(
                f"{dim} components of {len(images)} images with {pixels} values, "
                f"extractor pca:{dim}, right is 1 to min(values, images - 1), "
                f"with at most {_MAX_PIXELS} values"
            )
        statistics = FeatureStatistics(pixels, device)
        for chunk in images.split(_CHUNK):
            statistics.update(_flatten(chunk.to(device)))
        vectors = torch.linalg.eigh(statistics.covariance).eigenvectors
        components = vectors.flip(1).T[:dim]
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        digest = hashlib.sha256(images.cpu().contiguous().numpy().tobytes()).hexdigest()
        fitted_on = {"n": len(images), "pixels_sha256": digest}
        return cls(statistics.mean, components * largest.sign(), fitted_on)

    def provenance(self) -> dict[str, Any]:
        return {"name": self.name, "fitted_on": self._fitted_on}

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, C, H, W] -> float64 [N, dim]. UserError: another image size."""
        if images[0].numel() != len(self._mean):
            raise UserError(
                f"images with {images[0].numel()} values, given to the extractor {self.name}, "
                f"right is {len(self._mean)}, the size it was fitted to"
            )
        return (_flatten(images.to(self.device)) - self._mean) @ self._components.T


def _flatten(images: Tensor) -> Tensor:
    assert images.dtype == torch.uint8 and images.ndim == 4, (images.dtype, images.ndim)
    return images.flatten(1).to(torch.float64) / 127.5 - 1
