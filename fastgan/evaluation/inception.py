"""Inception-v3 (2015-12-05), the network of published FIDs, as clean-fid wraps it.

The file is a TorchScript program: loading it runs code from whoever made it. Hence it is never
downloaded here, its sha256 stands in every result, and a known one can be demanded.
"""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgan.errors import UserError
from fastgan.evaluation.features import to_rgb, verified_sha256
from fastgan.files import require_file
from fastgan.vision import import_torchvision

FILE_NAME = "inception-2015-12-05.pt"
URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{FILE_NAME}"


class InceptionFeatures:
    """The paper protocol: uint8 images at their own size, TensorFlow's resize inside the network.

    weights: the file inception-2015-12-05.pt or its folder.
    """

    name = "inception"
    dim = 2048
    resize = "TensorFlow 1 bilinear to 299, inside the network"
    _resize_inside = True

    def __init__(
        self,
        weights: str | os.PathLike[str] | None,
        device: torch.device | str,
        expected_sha256: str | None = None,
    ) -> None:
        path = _locate(weights)
        self.device = torch.device(device)
        self._sha256 = verified_sha256(path, expected_sha256)
        wrapper = _import_wrapper()
        try:
            net = wrapper(str(path.parent), download=False, resize_inside=self._resize_inside)
        except RuntimeError as error:
            raise UserError(
                f"no TorchScript program, file {path}, download it again from {URL}"
            ) from error
        self._net = net.to(self.device).eval()

    def provenance(self) -> dict[str, Any]:
        return {"name": self.name, "weights_file": FILE_NAME, "weights_sha256": self._sha256}

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
        resized = [_resize_channels(image) for image in to_rgb(images).cpu().numpy()]
        return self._net(torch.from_numpy(np.stack(resized)).to(self.device))


def _resize_channels(image: np.ndarray) -> np.ndarray:
    """uint8 [3, H, W] -> float32 [3, 299, 299]; Pillow resizes float images one at a time."""
    channels = [Image.fromarray(channel.astype(np.float32)) for channel in image]
    resized = [c.resize((299, 299), Image.Resampling.BICUBIC) for c in channels]
    return np.stack([np.asarray(c) for c in resized]).clip(0, 255)


def _locate(weights: str | os.PathLike[str] | None) -> Any:
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


def _import_wrapper() -> Any:
    """clean-fid's InceptionV3W, whose package imports torchvision."""
    import_torchvision()
    try:
        from cleanfid.inception_torchscript import InceptionV3W
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed, needed for the Inception extractors, "
            "install it with: pip install 'fastgan[eval]'"
        ) from error
    return InceptionV3W
