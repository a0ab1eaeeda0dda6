"""Trained heads on the mixed feature maps (Projected GAN): patches of logits, one per level.

Spectral norm is torch.nn.utils.spectral_norm on purpose, not the newer parametrization: that one
warms up 15 power iterations and names its state differently. Constructors draw from the global
generator; wrap them in `seeded`.
"""

import math
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import spectral_norm

FINAL_SIZE = 8
# Channels by nominal map size; 8 is the size in front of the last convolution.
WIDTHS: Mapping[int, int] = {64: 64, 32: 128, 16: 256, 8: 512}
EMBEDDING_WIDTH = 320
PRODUCT_WIDTH = 64


class HeadConv2d(nn.Conv2d):
    """A convolution in `compute_dtype` (None: its parameters') of weights kept as they are.

    Explicit: on a GPU autocast would also round the power iteration of a spectral norm.
    """

    compute_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype or self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._conv_forward(x.to(dtype), self.weight.to(dtype), bias)


def heads_compute_in(heads: nn.Module, dtype: torch.dtype | None) -> None:
    """Sets what the convolutions of `heads` compute in; None: their parameters' dtype.

    Those that make logits, of one channel, stay in their parameters' dtype.
    """
    for module in heads.modules():
        if isinstance(module, HeadConv2d) and module.out_channels > 1:
            module.compute_dtype = dtype


class _Head(nn.Module):
    def train(self, mode: bool = True) -> Self:
        """Stays in train mode whatever is asked."""
        return super().train(True)


class PatchHead(_Head):
    """One unconditional head: maps [N, in_channels, H, W] -> logits [N, 1, h, w].

    Blocks of 4x4 stride-2 convolution, BatchNorm and LeakyReLU halve the map from `nominal_size`
    (a power of two) to 8, then a 4x4 convolution without padding. `nominal_size` only counts the
    blocks: real maps are somewhat smaller (112 for 128) or larger (VGG). BatchNorm is always in
    train mode, as published: fakes and reals must pass separately, and every pass moves the
    running statistics and the power iteration.
    """

    def __init__(
        self, in_channels: int, nominal_size: int, widths: Mapping[int, int] = WIDTHS
    ) -> None:
        super().__init__()
        blocks, channels = _down_blocks(in_channels, nominal_size, widths)
        self.main = nn.Sequential(*blocks, spectral_norm(HeadConv2d(channels, 1, 4, bias=False)))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits; `labels` are ignored, so that both heads are called alike."""
        return self.main(x)


class ConditionalPatchHead(_Head):
    """A head whose logits are inner products with a projected class embedding.

    `embedding` [classes, width] is copied and trained. Labels are one-hot [N, classes].
    """

    def __init__(
        self,
        in_channels: int,
        nominal_size: int,
        embedding: Tensor,
        widths: Mapping[int, int] = WIDTHS,
        product_width: int = PRODUCT_WIDTH,
    ) -> None:
        super().__init__()
        blocks, channels = _down_blocks(in_channels, nominal_size, widths)
        self.main = nn.Sequential(*blocks)
        self.cls = spectral_norm(HeadConv2d(channels, product_width, 4, bias=False))
        self.embed = nn.Embedding.from_pretrained(embedding.clone(), freeze=False)
        self.embed_proj = _ScaledLinear(embedding.shape[1], product_width)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [N, 1, h, w] for maps [N, in_channels, H, W] of classes `labels` [N, classes]."""
        assert labels is not None and labels.shape == (len(x), self.embed.num_embeddings)
        maps = self.cls(self.main(x)).to(self.embed.weight.dtype)
        weights = self.embed_proj(self.embed(labels.argmax(dim=1)))[:, :, None, None]
        return (maps * weights).sum(dim=1, keepdim=True) / math.sqrt(maps.shape[1])


class _DownBlock(nn.Module):
    """Halves the map: spectral-norm 4x4 stride-2 convolution, BatchNorm, LeakyReLU 0.2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        convolution = HeadConv2d(in_channels, out_channels, 4, stride=2, padding=1)
        self.main = nn.Sequential(
            spectral_norm(convolution), nn.BatchNorm2d(out_channels), nn.LeakyReLU(0.2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


class _ScaledLinear(nn.Module):
    """Linear, then LeakyReLU 0.2 times sqrt 2; weights N(0, 1), scaled at run time, bias 0."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / math.sqrt(self.weight.shape[1])
        return math.sqrt(2) * F.leaky_relu(F.linear(x, weight, self.bias), 0.2)


def _down_blocks(
    in_channels: int, nominal_size: int, widths: Mapping[int, int]
) -> tuple[list[_DownBlock], int]:
    """The blocks from nominal_size to 8, and the channels they end with."""
    blocks, channels, size = [], in_channels, nominal_size
    while size > FINAL_SIZE:
        size //= 2
        blocks.append(_DownBlock(channels, widths[size]))
        channels = widths[size]
    assert size == FINAL_SIZE, f"nominal size {nominal_size} does not halve down to {FINAL_SIZE}"
    return blocks, channels
