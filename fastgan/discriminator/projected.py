"""The projected discriminator: frozen backbones, frozen random mixing, trained heads.

Sauer et al. 2021 ("Projected GANs Converge Faster"); one list entry of logits per backbone.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.common.errors import UserError
from fastgan.common.noise import seeded
from fastgan.discriminator.augment import check_policy, diff_augment
from fastgan.discriminator.backbones import Backbone, load_backbone
from fastgan.discriminator.base import Discriminator
from fastgan.discriminator.heads import (
    EMBEDDING_WIDTH,
    ConditionalPatchHead,
    PatchHead,
    heads_compute_in,
)

WIDTHS = (64, 128, 256, 512)
# Of the mixed maps for a 224 pixel input, rounded up to powers of two, shallow to deep.
NOMINAL_SIZES = (128, 64, 32, 16)


class RandomProjection(nn.Module):
    """Mixes feature maps [N, channels[i], H_i, W_i], shallow to deep, each about half as large.

    Returns maps of the sizes of the next shallower ones (the first: twice its own) with
    `out_channels` channels: widths[0], then widths[:-1]. Parameters carry the published names;
    construct within `seeded`. Always frozen, in eval mode.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.out_channels = [widths[0], *widths[:-1]]
        for level, (in_channels, width) in enumerate(zip(channels, widths, strict=True)):
            self.add_module(f"layer{level}_ccm", nn.Conv2d(in_channels, width, 1))
        for level in reversed(range(len(widths))):
            mixing = _CrossScaleMixing(widths[level], self.out_channels[level])
            self.add_module(f"layer{level}_csm", mixing)
        self.requires_grad_(False).eval()

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Mixed maps, shallow to deep."""
        height, width = features[0].shape[2:]
        sizes = [(2 * height, 2 * width), *(x.shape[2:] for x in features[:-1])]
        mixed: list[Tensor] = []
        for level in reversed(range(len(features))):
            x = self.get_submodule(f"layer{level}_ccm")(features[level])
            if mixed:
                x = x + mixed[0]
            mixed.insert(0, self.get_submodule(f"layer{level}_csm")(x, sizes[level]))
        return mixed

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode whatever is asked."""
        return super().train(False)


class _CrossScaleMixing(nn.Module):
    """Upsampling (corners aligned) and a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        # By size, not by factor: some networks' maps do not halve exactly (25 to 12).
        x = F.interpolate(x, size, mode="bilinear", align_corners=True)
        return self.out_conv(x)


class ProjectedDiscriminator(Discriminator):
    """One branch (backbone, projection, four heads) per feature network.

    Logits [N, patches] per backbone: the heads' patches, shallow to deep, concatenated.
    `label_dim` 0 is unconditional. `embedding` [label_dim, width] starts the class embedding, of
    which every head trains its own copy; None starts from N(0, 1) with width 320 (published:
    EfficientNet-lite0's class means, see fastgan.discriminator.class_embedding). `augment`:
    policies of DiffAugment. Construct within `seeded`; `build_projected` does.
    """

    def __init__(
        self,
        backbones: Sequence[Backbone],
        label_dim: int = 0,
        embedding: Tensor | None = None,
        augment: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.augment = check_policy(augment)
        self.backbones, self.branches = nn.ModuleList(backbones), len(backbones)
        projections = [RandomProjection(backbone.channels) for backbone in backbones]
        self.projections = nn.ModuleList(projections)
        if not label_dim:
            embedding = None
        elif embedding is None:
            embedding = torch.randn(label_dim, EMBEDDING_WIDTH)
        # Published code takes the first rows of ImageNet's for any data: fishes for CIFAR's cars.
        assert embedding is None or embedding.shape[:-1] == (label_dim,), "a row for each class"
        self.heads = nn.ModuleList(_BranchHeads(p.out_channels, embedding) for p in projections)
        self._features_dtype: torch.dtype | None = None
        self.loaded_elsewhere = tuple(f"backbones.{i}.extractor" for i in range(len(backbones)))
        self.provenance = [backbone.provenance for backbone in backbones]

    def views(self, images: Tensor, generator: torch.Generator | None) -> list[Tensor]:
        if generator is None:
            return [images] * len(self.heads)
        return [diff_augment(images, self.augment, generator) for _ in self.heads]

    def features(self, index: int, view: Tensor, labels: Tensor | None) -> list[Tensor]:
        """One backbone's mixed maps, shallow to deep."""
        dtype = self._features_dtype
        # Feature networks are anybody's: autocast knows what must be float32 in them.
        with nullcontext() if dtype is None else torch.autocast(view.device.type, dtype):
            return self.projections[index](self.backbones[index](view))

    def judge(self, index: int, features: list[Tensor], labels: Tensor | None) -> Tensor:
        """One backbone's logits. Call fakes and reals apart: BatchNorm sees a batch."""
        return self.heads[index](features, labels)

    def compute_in(self, features: torch.dtype | None, heads: torch.dtype | None) -> None:
        self._features_dtype = features
        heads_compute_in(self.heads, heads)

    def store_frozen(self) -> None:
        if self._features_dtype is not None:
            for backbone in self.backbones:
                backbone.store(self._features_dtype)  # type: ignore[operator]

    def fold(self) -> int:
        return sum(backbone.fold() for backbone in self.backbones)  # type: ignore[operator]


class _BranchHeads(nn.Module):
    """One backbone's heads, one per mixed map, shallow to deep."""

    def __init__(self, channels: Sequence[int], embedding: Tensor | None) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            PatchHead(width, size)
            if embedding is None
            else ConditionalPatchHead(width, size, embedding)
            for width, size in zip(channels, NOMINAL_SIZES, strict=True)
        )

    def forward(self, maps: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        """All patches of an image side by side, [N, patches]."""
        heads = zip(self.levels, maps, strict=True)
        return torch.cat([head(x, labels).flatten(1) for head, x in heads], dim=1)


def build_projected(
    names: Sequence[str],
    weights: Mapping[str, str | None],
    label_dim: int = 0,
    embedding: Tensor | None = None,
    seed: int = 0,
    augment: Sequence[str] = (),
) -> ProjectedDiscriminator:
    """A discriminator on the CPU, a function of its arguments alone (all ranks build the same one).

    `weights` maps a backbone's name to None (timm's download), "random" or a file; absent = None.
    """
    if not names:
        raise UserError("no backbones, in the discriminator, at least one timm model expected")
    backbones = [load_backbone(name, weights.get(name), seed=seed) for name in names]
    with seeded(seed):
        return ProjectedDiscriminator(backbones, label_dim, embedding, augment)
