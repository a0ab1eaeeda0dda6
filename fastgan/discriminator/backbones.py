"""Frozen ImageNet feature networks: images in [-1, 1] -> four feature maps, shallow to deep.

Levels (Projected GAN): VGG in front of max-pools 2 to 5; EfficientNets and other hierarchical
networks the last map at each of the four coarsest resolutions; ViTs the patch tokens after a
quarter, half, three quarters and all of the blocks, given a hierarchy by frozen random layers.

VGG16-BN is timm's: timm's `vgg16_bn.tv_in1k` holds torchvision's V1 tensors under torchvision's own
names (`features.*`; timm renames the classifier of a torchvision file while loading), so one route
serves all networks. The published levels `features[:13], [:23], [:33], [:43]` are timm's 1 to 4.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastgan.discriminator.backbone_weights import create_model
from fastgan.discriminator.fold import fold_batch_norms
from fastgan.errors import UserError
from fastgan.seeding import seeded
from kernels import resize_normalize

RESOLUTION = 224
LEVELS = 4
# The deepest head halves a map of the grid's size once and then needs four pixels.
MIN_GRID = 8
VIT_CHANNELS = (96, 192, 384, 768)
# Their few numbers, a BatchNorm's variances first of all, lose most by rounding and cost least.
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


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
            _check_grid(name, self.size // info[0]["reduction"])
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
        if self.by_intermediates(model):
            model.prune_intermediate_layers(self.indices, prune_norm=True)  # type: ignore[operator]
        else:
            # Older timm releases know VGG's feature maps only this way.
            from timm.models import FeatureListNet

            model = FeatureListNet(model, tuple(self.indices), flatten_sequential=True)
        self.model = model

    @staticmethod
    def by_intermediates(model: nn.Module) -> bool:
        return hasattr(model, "forward_intermediates")

    def forward(self, x: Tensor) -> list[Tensor]:
        if not self.by_intermediates(self.model):
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


def _check_grid(name: str, grid: int) -> None:
    if grid < MIN_GRID:
        raise UserError(
            f"{name} has {grid} x {grid} patches, as discriminator backbone, "
            f"a ViT with {MIN_GRID} x {MIN_GRID} or more expected"
        )


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
