"""Feature extractors by name."""

import os

import numpy as np
import torch
from torch import Tensor

from fastgan.common.errors import UserError
from fastgan.common.files import file_sha256, require_file
from fastgan.evaluation.classifiers import ClassifierFeatures, ResNet56Features
from fastgan.evaluation.features import FeatureExtractor, PixelPca
from fastgan.evaluation.networks import CleanInceptionFeatures, InceptionFeatures, TimmFeatures

_CHOICES = "inception, clean, timm:MODEL, resnet56, classifier:FILE or pca:DIM"


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
    expected_sha256: what the file `weights` must hash to, checked before it is opened.
    UserError: unknown spec; weights or data missing; weights that do not fit.
    """
    if expected_sha256 is not None:
        found = file_sha256(require_file(weights or "", f"the weights of {spec}"))
        if found != expected_sha256.lower():
            raise UserError(f"sha256 is {found}, file {weights}, right is {expected_sha256}")
    kind, _, argument = spec.partition(":")
    if kind in ("inception", "clean") and not argument:
        network = InceptionFeatures if kind == "inception" else CleanInceptionFeatures
        return network(weights, device)
    if kind == "resnet56" and not argument:
        if weights is None:
            raise UserError(
                "no weights given, option `weights` of extractor resnet56, "
                "give the .safetensors file of a CIFAR-10 ResNet-56"
            )
        return ResNet56Features(weights, device)
    if kind == "timm" and argument:
        return TimmFeatures(argument, device, weights)
    if kind == "classifier" and argument:
        return ClassifierFeatures(argument, device)
    if kind == "pca" and argument.isdecimal():
        if data is None or len(data) == 0:
            raise UserError(
                f"no images to fit to, extractor {spec}, "
                "give the reference as a dataset or as images"
            )
        return PixelPca.fit(torch.as_tensor(data), int(argument), device)
    raise UserError(f"unknown extractor {spec!r}, option `extractor`, right is {_CHOICES}")
