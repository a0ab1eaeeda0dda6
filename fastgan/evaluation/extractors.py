"""Feature extractors by name; among them Inception-v3 of published FIDs, and any network of timm's.

Inception's file (of 2015-12-05), which clean-fid wraps, is a TorchScript program: loading it runs
code from whoever made it. Hence it is never downloaded here, its sha256 stands in every result, and
a known one can be demanded.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.common.errors import UserError
from fastgan.common.files import file_sha256, require_file
from fastgan.common.libraries import import_optional, import_timm, import_torchvision
from fastgan.evaluation.classifiers import ClassifierFeatures, ResNet56Features
from fastgan.evaluation.features import Device, FeatureExtractor, FromFile, PixelPca, to_rgb
from fastgan.evaluation.frechet import Where

FILE_NAME = "inception-2015-12-05.pt"
_PURPOSE = "the Inception extractors"
URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{FILE_NAME}"
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


class InceptionFeatures(FromFile):
    """The paper protocol: uint8 images at their own size, TensorFlow's resize inside the network.

    weights: the file inception-2015-12-05.pt or its folder.
    """

    name = "inception"
    dim = 2048
    resize = "TensorFlow 1 bilinear to 299, inside the network"
    _resize_inside = True

    def __init__(self, weights: Where | None, device: Device) -> None:
        path = _locate(weights)
        super().__init__(path, device)
        import_torchvision()
        library = import_optional("cleanfid.inception_torchscript", _PURPOSE, "eval")
        try:
            net = library.InceptionV3W(
                str(path.parent), download=False, resize_inside=self._resize_inside
            )
        except RuntimeError as error:
            raise UserError(
                f"no TorchScript program, file {path}, download it again from {URL}"
            ) from error
        self._net = net.to(self.device).eval()

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, 1 or 3, H, W] -> [N, 2048]."""
        return self._net(to_rgb(images).to(self.device))


class CleanInceptionFeatures(InceptionFeatures):
    """clean-fid's "clean" mode: the same network behind Pillow's antialiased bicubic resize.

    Published as a second column; never comparable with the paper protocol's numbers.
    """

    name = "clean"
    resize = "Pillow bicubic to 299 per channel in float32, clipped to 0-255, not rounded"
    _resize_inside = False

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, 1 or 3, H, W] -> [N, 2048]."""
        resize = import_optional("cleanfid.resize", _PURPOSE, "eval").build_resizer("clean")
        nhwc = np.stack([resize(i) for i in to_rgb(images).permute(0, 2, 3, 1).cpu().numpy()])
        return self._net(torch.from_numpy(nhwc).permute(0, 3, 1, 2).to(self.device))


def _locate(weights: Where | None) -> Path:
    if weights is None:
        raise UserError(
            "no Inception weights given, option `weights`, "
            f"download {URL} and give the path of that file"
        )
    path = os.path.join(weights, FILE_NAME) if os.path.isdir(weights) else weights
    found = require_file(path, f"{FILE_NAME}, downloaded from {URL}")
    if found.name != FILE_NAME:
        raise UserError(f"unexpected name, file {found}, clean-fid wants it named {FILE_NAME}")
    return found


class TimmFeatures:
    """timm's `model` with its own mean, std and input size, images resized bilinearly.

    weights: a local file (.safetensors, or a .pth of plain tensors); None lets timm download them.
    """

    def __init__(self, model: str, device: Device, weights: Where | None = None) -> None:
        timm = import_timm()
        if not timm.is_model(model):
            raise UserError(
                f"no timm model {model!r}, extractor timm:{model}, "
                "right is a name of timm.list_models()"
            )
        self.name = model
        self.device = torch.device(device)
        overlay, self._weights = _weights(timm, weights)
        self._net = _create(timm, model, overlay, weights).to(self.device)
        config = self._net.pretrained_cfg
        self._weights.setdefault("weights_tag", f"{config.get('hf_hub_id') or config.get('url')}")
        self._size = config["input_size"][-1]
        self._mean = torch.tensor(config["mean"], device=self.device)[:, None, None]
        self._std = torch.tensor(config["std"], device=self.device)[:, None, None]
        self.resize = f"bilinear to {self._size}, antialiased where images are larger"
        with torch.no_grad():
            self.dim = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1]

    def provenance(self) -> dict[str, Any]:
        return {"name": self.name, **self._weights}

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, 1 or 3, H, W] -> [N, dim]."""
        x = to_rgb(images).to(self.device).float() / 255
        size = (self._size, self._size)
        x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        maps = self._net.forward_features((x - self._mean) / self._std)
        return self._net.forward_head(maps, pre_logits=True).flatten(1)


def _weights(timm: Any, weights: Where | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """timm's overlay that makes it load `weights`, and their provenance."""
    if weights is None:
        return {}, {}
    path = require_file(weights, "the timm model's weights")
    # Read here with weights_only, since older timm versions unpickle what `file=` names.
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # a stranger's file: safetensors and torch raise many kinds
        raise UserError(
            f"not readable as tensors ({type(error).__name__}), file {path}, "
            "give a .safetensors file"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"holds more than named tensors, file {path}, give a .safetensors file")
    facts = {"weights_file": path.name, "weights_sha256": file_sha256(path)}
    return {"state_dict": state}, {"weights_tag": "local", **facts}


def _create(timm: Any, model: str, overlay: dict[str, Any], weights: Any) -> Any:
    """The model with its classifier, so that timm loads strictly; the global RNG stays as it is."""
    try:
        with torch.random.fork_rng(devices=[]):
            net = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        where = f"file {weights}" if weights is not None else "timm's download"
        raise UserError(
            f"weights of {model} could not be loaded ({reason}), {where}, "
            "give a local file that fits this model"
        ) from error
    return net.eval().requires_grad_(False)
