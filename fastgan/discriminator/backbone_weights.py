"""timm models with weights from timm's download or a local file, loaded strictly."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastgan.errors import UserError
from fastgan.vision import import_timm

RANDOM = "random"
# Networks that exist in two conventions under one timm name. A file converted from TensorFlow says
# so by its metadata `input`: asymmetric padding, another BatchNorm eps, images scaled to [-1, 1].
_TENSORFLOW_INPUT = "(x - 0.5) / 0.5"
_TENSORFLOW_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "mobilenetv2_100": {"pad_type": "same", "bn_eps": 1e-3},
}


def create_model(name: str, weights: str | None) -> tuple[nn.Module, dict[str, str]]:
    """The full timm model (its `pretrained_cfg` gives mean, std, size) and its provenance.

    `weights`: None = timm's download; "random"; else a file. Raises UserError as `load_backbone`.
    """
    timm = import_timm()
    if not timm.is_model(name):
        raise UserError(
            f"no such backbone {name!r}, in the discriminator's backbones, a timm model name such "
            "as tf_efficientnet_lite0, vgg16_bn or deit_base_distilled_patch16_224 expected"
        )
    provenance = {"backbone": name, "timm": timm.__version__}
    if weights == RANDOM:
        model = timm.create_model(name, pretrained=False)
        return model, provenance | {"weights": RANDOM}
    if weights is None:
        model = _download(name)
        return model, provenance | _origin(model.pretrained_cfg)  # type: ignore[arg-type]
    model, metadata = _from_file(name, Path(weights))
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    found = {"weights": Path(weights).name, "sha256": digest}
    return model, provenance | found | {"license": metadata.get("license", "unknown")}


def _download(name: str) -> nn.Module:
    try:
        return import_timm().create_model(name, pretrained=True)
    # timm, huggingface_hub and their HTTP clients raise many unrelated types here.
    except Exception as error:
        raise UserError(
            f"cannot download the weights of {name} ({_first_line(error)}), "
            f"give a local file as discriminator.weights.{name}"
        ) from error


def _origin(cfg: dict[str, Any]) -> dict[str, str]:
    place = cfg.get("hf_hub_id") or cfg.get("url") or "unknown"
    return {"weights": f"timm:{place}", "license": str(cfg.get("license", "unknown"))}


def _from_file(name: str, path: Path) -> tuple[nn.Module, dict[str, str]]:
    tensors, metadata = _read_tensors(path)
    arguments: Mapping[str, Any] = {}
    overlay: dict[str, Any] = {"state_dict": tensors}
    if name in _TENSORFLOW_ARGUMENTS and metadata.get("input", "").endswith(_TENSORFLOW_INPUT):
        arguments = _TENSORFLOW_ARGUMENTS[name]
        overlay |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    # We read the file and hand timm the tensors: older timm releases unpickle a .pth without
    # restriction. The whole model loads strictly; timm's features_only would not.
    try:
        model = import_timm().create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments
        )
    except (RuntimeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(
            f"weights do not fit the backbone {name} ({_first_line(error)}), in {path}, "
            f"exactly the tensors of timm's {name} expected"
        ) from error
    model.pretrained_cfg.pop("state_dict")
    return model, metadata


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name and the file's metadata (empty for .pth), without unpickling objects."""
    if not path.is_file():
        raise UserError(f"no backbone weights, at {path}, a .safetensors or .pth file expected")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        content = torch.load(path, map_location="cpu", weights_only=True)
    # On a broken file torch's restricted unpickler raises whatever its bytes happen to provoke.
    except Exception as error:
        raise UserError(
            f"cannot read backbone weights ({_first_line(error)}), at {path}, "
            "tensors saved as .safetensors or a weights-only .pth expected"
        ) from error
    return _tensors_of(content, path), {}


def _tensors_of(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict, also where a training script wrapped it (DeiT's files: under `model`)."""
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"no state dict, in {path}, tensors by name expected")
    return dict(content)


def _first_line(error: Exception, limit: int = 160) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + "..."
