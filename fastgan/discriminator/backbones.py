"""Frozen ImageNet feature networks: images in [-1, 1] -> four feature maps, shallow to deep.

Levels (Projected GAN): VGG in front of max-pools 2 to 5; EfficientNets and other hierarchical
networks the last map at each of the four coarsest resolutions; ViTs the patch tokens after a
quarter, half, three quarters and all of the blocks, given a hierarchy by frozen random layers.

VGG16-BN is timm's: timm's `vgg16_bn.tv_in1k` holds torchvision's V1 tensors under torchvision's own
names (`features.*`; timm renames the classifier of a torchvision file while loading), so one route
serves all networks. The published levels `features[:13], [:23], [:33], [:43]` are timm's 1 to 4.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from fastgan_kernels import resize_normalize
from safetensors import safe_open
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastgan.common.errors import UserError, shown
from fastgan.common.files import file_sha256
from fastgan.common.libraries import import_timm
from fastgan.common.noise import seeded

RESOLUTION = 224
LEVELS = 4
# The deepest head halves a map of the grid's size once and then needs four pixels.
MIN_GRID = 8
VIT_CHANNELS = (96, 192, 384, 768)
# Their few numbers, a BatchNorm's variances first of all, lose most by rounding and cost least.
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
_CONV, _BATCH_NORM = torch.ops.aten.conv2d.default, torch.ops.aten.batch_norm.default
RANDOM = "random"
# Networks that exist in two conventions under one timm name. A file converted from TensorFlow says
# so by its metadata `input`: asymmetric padding, another BatchNorm eps, images scaled to [-1, 1].
_TENSORFLOW_INPUT = "(x - 0.5) / 0.5"
_TENSORFLOW_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "mobilenetv2_100": {"pad_type": "same", "bn_eps": 1e-3},
}


class Backbone(nn.Module):
    """A frozen feature network, always in eval mode.

    `channels`: of the four maps; `feature_dim`: of the deepest map of the pre-trained network
    itself; `provenance`: name, weights, sha256 of a local file, licence, timm's version.
    """

    def __init__(self, name: str, model: nn.Module, provenance: dict[str, str]) -> None:
        super().__init__()
        self.name, self.provenance = name, provenance
        cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        # timm's "fixed" marks networks bound to one input size, the ViTs first of all.
        self.fixed_size = bool(cfg.get("fixed_input_size"))
        self.size: int = cfg["input_size"][-1] if self.fixed_size else RESOLUTION
        self.mean: tuple[float, ...] = tuple(cfg["mean"])
        self.std: tuple[float, ...] = tuple(cfg["std"])
        info: list[dict[str, Any]] = model.feature_info  # type: ignore[assignment]
        indices = _level_indices(name, [level["reduction"] for level in info])
        self.channels = [info[i]["num_chs"] for i in indices]
        self.feature_dim = self.channels[-1]
        self.reassembly = nn.ModuleList(nn.Identity() for _ in indices)
        if len({level["reduction"] for level in info}) == 1:
            grid = self.size // info[0]["reduction"]
            if grid < MIN_GRID:
                raise UserError(
                    f"{name} has {grid} x {grid} patches, as discriminator backbone, "
                    f"a ViT with {MIN_GRID} x {MIN_GRID} or more expected"
                )
            self.reassembly = _vit_reassembly(self.feature_dim)
            self.channels = list(VIT_CHANNELS)
        self.extractor = _Extractor(model, indices)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Four maps [N, channels[i], H_i, W_i] for images [N, 1 or 3, H, W] in [-1, 1]."""
        maps = self.raw_features(images)
        return [layer(x) for layer, x in zip(self.reassembly, maps, strict=True)]

    def raw_features(self, images: Tensor) -> list[Tensor]:
        """The four maps of the pre-trained network itself, before a ViT's random layers."""
        return self.extractor(self._preprocess(images))

    def fold(self) -> int:
        """Makes the BatchNorms behind convolutions parts of them; how many. The maps stay."""
        weight = next(self.extractor.parameters())
        return fold_batch_norms(self.extractor, weight.new_zeros(1, 3, self.size, self.size))

    def store(self, dtype: torch.dtype) -> None:
        """Keeps the pre-trained weights in `dtype` from now on, but not those of norms."""
        for module in self.extractor.modules():
            if not isinstance(module, _NORMS):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode whatever is asked."""
        return super().train(False)

    def _preprocess(self, images: Tensor) -> Tensor:
        # Larger images stay as large, unless the network is bound to its size.
        size = self.size if self.fixed_size else max(self.size, images.shape[-1])
        weights = list(self.extractor.parameters())
        x = resize_normalize(images, self.mean, self.std, size, dtype=weights[0].dtype)
        # It answers in channels_last; which layout is computed in, the weights decide.
        return x.contiguous() if all(w.is_contiguous() for w in weights) else x


def load_backbone(name: str, weights: str | None = None, *, seed: int = 0) -> Backbone:
    """Any timm network with a feature hierarchy, or a ViT, frozen on the CPU.

    `weights`: None = timm's download; "random" = none; else a .safetensors or .pth file. `seed`
    draws what is random (a ViT's reassembly, "random" weights). Raises UserError for an unknown
    name, a network without four levels, a missing file, tensors that do not fit, no connection.
    """
    with seeded(seed):
        return Backbone(name, *create_model(name, weights))


class _Extractor(nn.Module):
    """The layers of a timm model up to the deepest level wanted, returning its maps as NCHW."""

    def __init__(self, model: nn.Module, indices: Sequence[int]) -> None:
        super().__init__()
        self.indices = list(indices)
        self.by_intermediates = hasattr(model, "forward_intermediates")
        if self.by_intermediates:
            model.prune_intermediate_layers(self.indices, prune_norm=True)  # type: ignore[operator]
        else:
            # Older timm releases know VGG's feature maps only this way.
            from timm.models import FeatureListNet

            model = FeatureListNet(model, tuple(self.indices), flatten_sequential=True)
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        if not self.by_intermediates:
            return self.model(x)
        return self.model.forward_intermediates(  # type: ignore[operator]
            x, indices=self.indices, norm=False, output_fmt="NCHW", intermediates_only=True
        )


def _level_indices(name: str, reductions: Sequence[int]) -> list[int]:
    """Which of timm's feature maps are the four levels, given each map's stride."""
    depth = len(reductions)
    if len(set(reductions)) == 1 and depth >= LEVELS:
        return [depth * (level + 1) // LEVELS - 1 for level in range(LEVELS)]
    last = {reduction: index for index, reduction in enumerate(reductions)}
    if name.startswith("vgg"):
        # timm's last VGG map is the output of the last max-pool, not of a convolution.
        last.popitem()
    if len(last) < LEVELS:
        raise UserError(
            f"{name} has feature maps at {len(last)} resolutions, as discriminator backbone, "
            f"a network with {LEVELS} (or a ViT) expected"
        )
    return list(last.values())[-LEVELS:]


def _vit_reassembly(width: int) -> nn.ModuleList:
    """Frozen random layers that spread a ViT's equal maps over strides 4, 8, 16 and 32."""
    resample = (
        nn.ConvTranspose2d(VIT_CHANNELS[0], VIT_CHANNELS[0], 4, stride=4),
        nn.ConvTranspose2d(VIT_CHANNELS[1], VIT_CHANNELS[1], 2, stride=2),
        nn.Identity(),
        nn.Conv2d(VIT_CHANNELS[3], VIT_CHANNELS[3], 3, stride=2, padding=1),
    )
    pairs = zip(VIT_CHANNELS, resample, strict=True)
    return nn.ModuleList(nn.Sequential(nn.Conv2d(width, out, 1), layer) for out, layer in pairs)


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
    if weights is not None:
        model, metadata = _from_file(name, Path(weights))
        found = {"weights": Path(weights).name, "sha256": file_sha256(weights)}
        return model, provenance | found | {"license": metadata.get("license", "unknown")}
    try:
        model = timm.create_model(name, pretrained=True)
    # timm, huggingface_hub and their HTTP clients raise many unrelated types here.
    except Exception as error:
        raise UserError(
            f"cannot download the weights of {name} ({_short(error)}), "
            f"give a local file as discriminator.weights.{name}"
        ) from error
    cfg = model.pretrained_cfg
    place = cfg.get("hf_hub_id") or cfg.get("url") or "unknown"
    found = {"weights": f"timm:{place}", "license": str(cfg.get("license", "unknown"))}
    return model, provenance | found


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
            f"weights do not fit the backbone {name} ({_short(error)}), in {path}, "
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
            f"cannot read backbone weights ({_short(error)}), at {path}, "
            "tensors saved as .safetensors or a weights-only .pth expected"
        ) from error
    # Training scripts wrap the state dict (DeiT's files: under `model`).
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"no state dict, in {path}, tensors by name expected")
    return dict(content), {}


def _short(error: Exception) -> str:
    return shown(" ".join(str(error).split()), 160)


@torch.no_grad()
def fold_batch_norms(module: nn.Module, example: Tensor) -> int:
    """Makes every BatchNorm that is proven to follow a convolution part of it; how many.

        bn(conv(x; w, b)) = conv(x; s w, s (b - mean) + beta),   s = gamma / sqrt(var + eps)

    In place, for a `module` in eval mode that stays there, with weights in float32 or float64;
    `example` is an input of any numbers. Proven means, in the graph of module(example): the
    convolution's output goes into the BatchNorm and nowhere else, both are called once, and the
    convolution's weight is a parameter as it stands. All others stay, and so does a network of
    which no graph can be made. Outputs and input gradients are the same to rounding.
    """
    assert not any(m.training for m in module.modules()), "eval mode expected"
    norms = any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    pairs = _foldable(module, example) if norms else []
    for conv, norm in pairs:
        dtype = conv.weight.dtype
        assert dtype in (torch.float32, torch.float64), "folded before weights are stored in less"
        # In float64, rounded once at the end.
        wide = copy.deepcopy(conv).double(), copy.deepcopy(norm).double()
        fused = fuse_conv_bn_eval(*wide).to(dtype)
        conv.weight, conv.bias = fused.weight, fused.bias
        # timm's BatchNorm also activates, and drops, which in eval mode is nothing.
        rest = norm.get_submodule("act") if hasattr(norm, "act") else nn.Identity().eval()
        for name, child in list(module.named_modules(remove_duplicate=False)):
            if child is norm:
                module.set_submodule(name, rest)
    return len(pairs)


def _foldable(module: nn.Module, example: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    try:
        exported = torch.export.export(module, (example,), strict=False)
    except Exception:  # it raises nearly anything on what it cannot trace
        return []
    signature = exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def owner(node: Node | None, key: str) -> nn.Module | None:
        """The only module that has the graph's input `node` as its `key`; None where it is used
        more than once, no module's or several modules' own, or the graph computes it."""
        if node is None or node.name not in names or len(node.users) != 1:
            return None
        path, _, last = names[node.name].rpartition(".")
        tensor = getattr(module.get_submodule(path), key, None)
        owners = [m for m in module.modules() if getattr(m, key, None) is tensor]
        return owners[0] if last == key and len(owners) == 1 else None

    found = []
    known = (nn.BatchNorm2d, import_timm().layers.BatchNormAct2d)  # others may do more besides
    for node in exported.graph.nodes:
        if node.target is not _BATCH_NORM or (source := node.args[0]).target is not _CONV:
            continue
        conv, norm = owner(source.args[1], "weight"), owner(node.args[3], "running_mean")
        if len(source.users) == 1 and isinstance(conv, nn.Conv2d) and type(norm) in known:
            found.append((conv, cast(nn.BatchNorm2d, norm)))
    return found
