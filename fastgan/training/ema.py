"""Exponential moving average of the trainable parameters, measured in images."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def ema_beta(batch: int, nimg: int, *, half_life: float, ramp: float | None = 0.05) -> float:
    """The decay of one update of `batch` images when `nimg` were seen before it.

    beta = 0.5^(batch / h), h = min(half_life, ramp x nimg) images: early averages forget quickly,
    and the first update copies (h = 0).
    """
    if ramp is not None:
        half_life = min(half_life, ramp * nimg)
    return 0.5 ** (batch / half_life) if half_life > 0 else 0.0


def averaged_copy(network: Module) -> Module:
    """A copy to average into; frozen parameters and buffers are shared with it, not copied."""
    frozen = [p for p in network.parameters() if not p.requires_grad]
    shared = {id(tensor): tensor for tensor in [*frozen, *network.buffers()]}
    return copy.deepcopy(network, memo=shared).requires_grad_(False).eval()


@torch.no_grad()
def update_ema(average: nn.Module, network: nn.Module, beta: Tensor) -> None:
    """average <- network + beta (average - network), over the parameters that train.

    `beta` is a scalar tensor in their dtype, beside them: a captured graph reads its value anew.
    """
    pairs = [
        (a, p)
        for a, p in zip(average.parameters(), network.parameters(), strict=True)
        if p.requires_grad
    ]
    averages: list[Tensor] = [a for a, _ in pairs]
    parameters: list[Tensor] = [p for _, p in pairs]
    torch._foreach_sub_(averages, parameters)
    torch._foreach_mul_(averages, beta)
    torch._foreach_add_(averages, parameters)
