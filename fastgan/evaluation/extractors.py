"""Feature extractors by name."""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgan.common.errors import UserError
from fastgan.common.files import require_file
from fastgan.evaluation.classifiers import ResNet56Features, load_classifier
from fastgan.evaluation.features import FeatureExtractor, PixelPca, verified_sha256
from fastgan.evaluation.networks import CleanInceptionFeatures, InceptionFeatures, TimmFeatures

_CHOICES = "inception, clean, timm:MODEL, resnet56, classifier:FILE or pca:DIM"


class ClassifierFeatures:
    """The features of fastgan's own digit classifier.

    The object from `fastgan.evaluation.classifiers.load_classifier(path)` has an int attribute
    `dim` and maps uint8 [N, C, H, W] to features [N, dim].
    """

    name = "classifier"
    resize = "none"

    def __init__(
        self,
        weights: str | os.PathLike[str],
        device: torch.device | str,
        expected_sha256: str | None = None,
    ) -> None:
        path = require_file(weights, "the classifier's weights (.safetensors)")
        self.device = torch.device(device)
        self._sha256 = verified_sha256(path, expected_sha256)
        self._file = path.name
        self._net = load_classifier(path).to(self.device)
        self.dim = int(self._net.dim)

    def provenance(self) -> dict[str, Any]:
        return {"name": self.name, "weights_file": self._file, "weights_sha256": self._sha256}

    def __call__(self, images: Tensor) -> Tensor:
        return self._net(images.to(self.device))


def load_extractor(
    spec: str,
    *,
    device: torch.device | str,
    weights: str | os.PathLike[str] | None = None,
    data: Tensor | np.ndarray | None = None,
    expected_sha256: str | None = None,
) -> FeatureExtractor:
    """The extractor that `spec` names, on `device`.

    inception: published FIDs (weights: inception-2015-12-05.pt). clean: clean-fid's resize.
    timm:MODEL: pooled features of a timm model (weights: local file, or downloaded by timm).
    resnet56: CIFAR-10 classifier (weights: .safetensors). classifier:FILE: the demo's digit
    classifier. pca:DIM: pixel PCA of `data`, the reference images, uint8 [N, C, H, W].
    expected_sha256: what the weights' file must hash to, checked before it is opened.
    UserError: unknown spec; weights or data missing; weights that do not fit.
    """
    kind, _, argument = spec.partition(":")
    if kind in ("inception", "clean") and not argument:
        network = InceptionFeatures if kind == "inception" else CleanInceptionFeatures
        return network(weights, device, expected_sha256)
    if kind == "resnet56" and not argument:
        if weights is None:
            raise UserError(
                "no weights given, option `weights` of extractor resnet56, "
                "give the .safetensors file of a CIFAR-10 ResNet-56"
            )
        return ResNet56Features(weights, device, expected_sha256)
    if kind == "timm" and argument:
        return TimmFeatures(argument, device, weights, expected_sha256)
    if kind == "classifier" and argument:
        return ClassifierFeatures(argument, device, expected_sha256)
    if kind == "pca" and argument.isdecimal():
        return PixelPca.fit(_reference_images(data, spec), int(argument), device)
    raise UserError(f"unknown extractor {spec!r}, option `extractor`, right is {_CHOICES}")


def _reference_images(data: Tensor | np.ndarray | None, spec: str) -> Tensor:
    if data is None or len(data) == 0:
        raise UserError(
            f"no images to fit to, extractor {spec}, give the reference as a dataset or as images"
        )
    return torch.as_tensor(data)
