"""From noise to images: the one-step and N-step generators, and EDM's Heun sampler."""

from itertools import pairwise

import torch
from torch import Tensor

from fastgan.models import SIGMA_INIT, Precond

SIGMA_MIN = 0.002
RHO = 7.0


def rho_grid(
    n: int, *, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_INIT, rho: float = RHO
) -> list[float]:
    """n noise levels from sigma_max to sigma_min (Karras et al. 2022, Eq. 5), without the 0."""
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(first + i / max(n - 1, 1) * (last - first)) ** rho for i in range(n)]


def few_step(
    network: Precond,
    z: Tensor,
    class_labels: Tensor | None = None,
    *,
    steps: int = 1,
    mid_sigma: float | None = None,
) -> Tensor:
    """The generator with `steps` network evaluations; z [N, C, H, W] standard normal -> images.

    Euler steps between the first `steps` of the steps + 1 points of the rho = 7 grid 80 ... 0.002;
    the last denoised image is the result. `mid_sigma` gives the second point of two steps by hand
    (published: 0.8). Gradients flow through all evaluations.
    """
    levels = rho_grid(steps + 1)[:steps]
    if mid_sigma is not None:
        assert steps == 2
        levels[1] = mid_sigma
    x = levels[0] * z
    for sigma, following in pairwise(levels):
        denoised = network(x, x.new_full((1,), sigma), class_labels)
        x = denoised + (following / sigma) * (x - denoised)
    return network(x, x.new_full((1,), levels[-1]), class_labels)


@torch.no_grad()
def heun(
    network: Precond,
    z: Tensor,
    class_labels: Tensor | None = None,
    *,
    steps: int = 18,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_INIT,
    rho: float = RHO,
) -> Tensor:
    """EDM's deterministic sampler (Karras et al. 2022, Algorithm 1), 2 steps - 1 evaluations.

    z [N, C, H, W] standard normal -> images in float64. The state is float64, the network sees
    float32 (or its own wider dtype), as in the published sampler.
    """
    sigmas = [*rho_grid(steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho), 0.0]
    masters = next(network.parameters()).dtype

    def slope(x: Tensor, sigma: float) -> Tensor:
        level = x.new_full((1,), sigma).to(masters)
        return (x - network(x.to(masters), level, class_labels).double()) / sigma

    x = z.double() * sigmas[0]
    for now, following in pairwise(sigmas):
        before = slope(x, now)
        ahead = x + (following - now) * before
        if following > 0:
            ahead = x + (following - now) * (before + slope(ahead, following)) / 2
        x = ahead
    return x


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 as published: the truncation of clip(127.5 x + 128, 0, 255)."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)
