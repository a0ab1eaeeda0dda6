"""Pooled features of any timm model: the input of its classifier."""

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.errors import UserError
from fastgan.evaluation.features import to_rgb, verified_sha256
from fastgan.files import require_file
from fastgan.vision import import_timm


class TimmFeatures:
    """timm's `model` with its own mean, std and input size, images resized bilinearly.

    weights: a local file (.safetensors, or a .pth of plain tensors); None lets timm download them.
    """

    def __init__(
        self,
        model: str,
        device: torch.device | str,
        weights: str | os.PathLike[str] | None = None,
        expected_sha256: str | None = None,
    ) -> None:
        timm = import_timm()
        if not timm.is_model(model):
            raise UserError(
                f"no timm model {model!r}, extractor timm:{model}, "
                "right is a name of timm.list_models()"
            )
        self.name = model
        self.device = torch.device(device)
        overlay, self._weights = _weights(timm, weights, expected_sha256)
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


def _weights(
    timm: Any, weights: str | os.PathLike[str] | None, expected_sha256: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """timm's overlay that makes it load `weights`, and their provenance."""
    if weights is None:
        return {}, {}
    path = require_file(weights, "the timm model's weights")
    sha256 = verified_sha256(path, expected_sha256)
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
    provenance = {"weights_tag": "local", "weights_file": path.name, "weights_sha256": sha256}
    return {"state_dict": state}, provenance


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
