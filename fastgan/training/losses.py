"""The losses as pure functions of logits: one value per image, reduced by the caller.

A discriminator answers with one [N, patches] tensor of logits per feature network. An image's loss
is the mean over a network's patches, summed over the networks.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Logits = Sequence[Tensor]
Kind = Literal["nonsaturating", "hinge"]
LossOf = Callable[[Logits, Kind], Tensor]


def _per_image(logits: Logits, elementwise: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([elementwise(patches).mean(1) for patches in logits]).sum(0)


def generator_loss(fake: Logits, kind: Kind = "nonsaturating") -> Tensor:
    """[N]: softplus(-D(G z)) (non-saturating) or -D(G z) (hinge)."""
    if kind == "hinge":
        return _per_image(fake, torch.neg)
    return _per_image(fake, lambda x: F.softplus(-x))


def real_loss(real: Logits, kind: Kind = "nonsaturating") -> Tensor:
    """[N]: softplus(-D(x)), or max(0, 1 - D(x)) for the hinge loss."""
    if kind == "hinge":
        return _per_image(real, lambda x: F.relu(1 - x))
    return _per_image(real, lambda x: F.softplus(-x))


def fake_loss(fake: Logits, kind: Kind = "nonsaturating") -> Tensor:
    """[N]: softplus(D(G z)), or max(0, 1 + D(G z)) for the hinge loss."""
    if kind == "hinge":
        return _per_image(fake, lambda x: F.relu(1 + x))
    return _per_image(fake, F.softplus)


def r1_penalty(logits: Logits, images: Tensor) -> Tensor:
    """[N]: squared norm of d(sum of all logits) / d image (Mescheder et al. 2018), unweighted.

    `images` is the leaf [N, C, H, W] in [-1, 1] that the logits were computed from; the graph is
    kept, so that the penalty can be differentiated for the discriminator's parameters.
    """
    total = torch.stack([patches.sum() for patches in logits]).sum()
    (gradient,) = torch.autograd.grad(total, images, create_graph=True)
    return gradient.square().sum((1, 2, 3))


def edm_loss(denoised: Tensor, clean: Tensor, sigma: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """[N]: EDM's weighted squared error (Karras et al. 2022) summed over pixels; sigma [N]."""
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * (denoised - clean).square().sum((1, 2, 3))


def mean_sign(logits: Logits) -> Tensor:
    """Mean over networks, images and patches of sign D: +-1 where D is sure, near 0 where not."""
    return torch.stack([patches.detach().sign().mean() for patches in logits]).mean()


def diversity(fakes: Tensor, reals: Tensor) -> Tensor:
    """How much the fakes of a batch differ from each other, relative to the reals, as a scalar.

    The pixels' standard deviations over the batch, averaged: about 1 for a good generator, 0 for
    one that has collapsed. Both [N, C, H, W] with N >= 2.
    """
    return fakes.std(0).mean() / reals.std(0).mean()
