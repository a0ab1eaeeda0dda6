"""A discriminator that needs no download: heads on the pre-trained denoiser's own encoder.

A denoiser's encoder at a low noise level is a feature network for exactly the data at hand. Small
stride-2 heads read one map per encoder resolution, and one head reads the pixels.
"""

import copy
import math
from typing import Self

import torch
from torch import Tensor, nn

from fastgan.common.noise import seeded
from fastgan.discriminator.augment import check_policy, diff_augment
from fastgan.discriminator.base import Discriminator
from fastgan.discriminator.heads import HeadConv2d, heads_compute_in
from fastgan.models import Precond
from fastgan.models.layers import cast_frozen

FINAL_SIZE = 4


class DiffusionDiscriminator(Discriminator):
    """Logits [N, patches] as a single list entry: all heads together count like one backbone.

    `network`: the pre-trained denoiser; its frozen copy here stays as it is while the generator
    trains, in eval mode (dropout off). `image_shape`: (channels, height, width). `sigma`: the noise
    level that the network is told; images get no noise. `width`: of the heads. With `label_dim`
    every head adds the inner product of its pooled features with a class embedding (Miyato & Koyama
    2018) to its logits.
    """

    loaded_elsewhere = ("network",)
    network: Precond

    def __init__(
        self,
        network: Precond,
        image_shape: tuple[int, int, int],
        sigma: float = 0.2,
        width: int = 32,
        label_dim: int = 0,
        seed: int = 0,
        augment: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.sigma, self.label_dim, self.augment = sigma, label_dim, check_policy(augment)
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.provenance = [{"backbone": "diffusion encoder", "sigma": str(sigma)}]
        example = next(network.parameters()).new_zeros(1, *image_shape)
        with torch.no_grad(), seeded(seed):
            self.heads = nn.ModuleList(
                _StrideHead(x.shape[1], x.shape[-1], width, label_dim)
                for x in self.features(0, example, None)
            )
        self.heads.to(example.device)

    def views(self, images: Tensor, generator: torch.Generator | None) -> list[Tensor]:
        return [images if generator is None else diff_augment(images, self.augment, generator)]

    def features(self, index: int, view: Tensor, labels: Tensor | None) -> list[Tensor]:
        """The encoder's maps, shallow to deep, then the pixels."""
        classes = labels if self.label_dim else None
        return [*self.network.features(view, self.sigma, class_labels=classes), view]

    def judge(self, index: int, features: list[Tensor], labels: Tensor | None) -> Tensor:
        heads = zip(self.heads, features, strict=True)
        return torch.cat([head(x, labels).flatten(1) for head, x in heads], dim=1)

    def compute_in(self, features: torch.dtype | None, heads: torch.dtype | None) -> None:
        self.network.compute_dtype = features
        heads_compute_in(self.heads, heads)

    def store_frozen(self) -> None:
        if self.network.compute_dtype is not None:
            cast_frozen(self.network, self.network.compute_dtype)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.network.eval()
        return self


class _StrideHead(nn.Module):
    """4x4 stride-2 convolutions with LeakyReLU 0.2 down to about 4x4, then a 3x3 one to logits."""

    def __init__(self, in_channels: int, size: int, width: int, label_dim: int) -> None:
        super().__init__()
        assert size >= 2, "a map of one pixel cannot be halved"
        blocks: list[nn.Module] = []
        while size > FINAL_SIZE or not blocks:
            blocks += [HeadConv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            in_channels, size = width, size // 2
        self.main = nn.Sequential(*blocks)
        self.out = HeadConv2d(width, 1, 3, padding=1)
        self.embed = nn.Linear(label_dim, width, bias=False) if label_dim else None

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Logits [N, 1, h, w] for maps [N, in_channels, H, W] and one-hot labels."""
        x = self.main(x)
        logits = self.out(x)
        if self.embed is None:
            return logits
        assert labels is not None and labels.shape[1] == self.embed.in_features
        pooled = x.to(logits.dtype).mean(dim=(2, 3))
        match = (self.embed(labels.to(logits.dtype)) * pooled).sum(dim=1)
        return logits + match[:, None, None, None] / math.sqrt(x.shape[1])
