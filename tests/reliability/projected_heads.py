"""What a projected discriminator changes and keeps besides parameters, in small."""

import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from fastgan.common.noise import seeded
from fastgan.discriminator.augment import diff_augment
from fastgan.discriminator.base import Discriminator


class ProjectedHeads(Discriminator):
    """Buffers of spectral norm and BatchNorm, and frozen random mixing; float64."""

    loaded_elsewhere = ()
    provenance: list[dict[str, str]] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        with seeded(7):
            self.mixing = nn.Conv2d(1, 4, 3).requires_grad_(False)
            head = [spectral_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6), nn.LeakyReLU(0.2)]
            self.heads = nn.ModuleList([nn.Sequential(*head, spectral_norm(nn.Conv2d(6, 1, 2)))])
        self.double()

    def compute_in(self, features: torch.dtype | None, heads: torch.dtype | None) -> None:
        """In what it is made of."""

    def views(self, images: Tensor, generator: torch.Generator | None) -> list[Tensor]:
        return [images if generator is None else diff_augment(images, ("color",), generator)]

    def features(self, index: int, view: Tensor, labels: Tensor | None) -> list[Tensor]:
        return [self.mixing(view)]

    def judge(self, index: int, features: list[Tensor], labels: Tensor | None) -> Tensor:
        return self.heads[index](features[0]).flatten(1)
