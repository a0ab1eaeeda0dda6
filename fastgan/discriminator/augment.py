"""DiffAugment (Zhao et al. 2020): differentiable augmentation in front of a discriminator.

Off in the published runs. Each image draws its own numbers from an explicit generator, anew for
every backbone and pass. Images are [N, C, H, W] in [-1, 1]; nothing is clipped.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastgan.common.errors import UserError

SHIFT, CUTOUT = 1 / 8, 0.2


def diff_augment(images: Tensor, policy: Sequence[str], generator: torch.Generator) -> Tensor:
    """Applies the policies (color, translation, cutout) in the order given."""
    for name in policy:
        for transform in POLICIES[name]:
            images = transform(images, generator)
    return images


def check_policy(policy: Sequence[str]) -> tuple[str, ...]:
    """The policy as a tuple; UserError naming an unknown entry."""
    for name in policy:
        if name not in POLICIES:
            raise UserError(
                f"unknown augmentation {name!r}, in the discriminator's augment, "
                f"any of {', '.join(POLICIES)} expected"
            )
    return tuple(policy)


def brightness(images: Tensor, generator: torch.Generator) -> Tensor:
    """Adds U(-0.5, 0.5) to an image."""
    return images + _uniform(images, generator) - 0.5


def saturation(images: Tensor, generator: torch.Generator) -> Tensor:
    """Scales the distance from the pixel's channel mean by U(0, 2)."""
    grey = images.mean(dim=1, keepdim=True)
    return grey + (images - grey) * 2 * _uniform(images, generator)


def contrast(images: Tensor, generator: torch.Generator) -> Tensor:
    """Scales the distance from the image's mean by U(0.5, 1.5)."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (_uniform(images, generator) + 0.5)


def translation(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts by whole pixels, up to an eighth of the side either way; zeros come in."""
    n, _, height, width = images.shape
    rows, columns = (_shifted(n, size, generator).to(images.device) for size in (height, width))
    inside = _within(rows, height)[:, None, :, None] & _within(columns, width)[:, None, None, :]
    sample = torch.arange(n, device=images.device)[:, None, None]
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    moved = images.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2) * inside


def cutout(images: Tensor, generator: torch.Generator) -> Tensor:
    """Zeroes a square of a fifth of the side; its centre may lie on the border."""
    n, _, height, width = images.shape
    rows, columns = (_covered(n, size, generator).to(images.device) for size in (height, width))
    return images * ~(rows[:, None, :, None] & columns[:, None, None, :])


Transform = Callable[[Tensor, torch.Generator], Tensor]
POLICIES: dict[str, tuple[Transform, ...]] = {
    "color": (brightness, saturation, contrast),
    "translation": (translation,),
    "cutout": (cutout,),
}


def _uniform(images: Tensor, generator: torch.Generator) -> Tensor:
    """One U(0, 1) per image, [N, 1, 1, 1]."""
    draws = torch.rand(len(images), 1, 1, 1, generator=generator, device=generator.device)
    return draws.to(images)


def _integers(low: int, high: int, n: int, generator: torch.Generator) -> Tensor:
    """n integers from low to high, both included, as a column [n, 1]."""
    return torch.randint(low, high + 1, (n, 1), generator=generator, device=generator.device)


def _shifted(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Source coordinates [n, size] of a random shift."""
    most = int(size * SHIFT + 0.5)
    shift = _integers(-most, most, n, generator)
    return torch.arange(size, device=shift.device) + shift


def _within(coordinates: Tensor, size: int) -> Tensor:
    return (coordinates >= 0) & (coordinates < size)


def _covered(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Whether each coordinate [n, size] lies in a randomly centred interval of CUTOUT x size."""
    length = int(size * CUTOUT + 0.5)
    # An even interval has one more placement than an odd one that touches both borders.
    start = _integers(0, size - length % 2, n, generator) - length // 2
    return _within(torch.arange(size, device=start.device) - start, length)
