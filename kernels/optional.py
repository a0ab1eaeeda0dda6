"""Libraries that are used when they are installed: NVIDIA's apex, xformers.

Both are built against one CUDA and one torch; any exception at their import means absent. apex is
NVIDIA's source build; the package of that name on PyPI is another one.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def obstacle(name: str, device_type: str) -> str | None:
    """Why the library `name` cannot run on such a device, or None."""
    present = {"apex": apex_group_norm_class, "xformers": _xformers_function}[name]() is not None
    if not present:
        return f"{name} is not installed"
    return None if device_type == "cuda" else f"{name} needs a CUDA device"


@cache
def apex_group_norm_class() -> type[torch.nn.Module] | None:
    """apex's NHWC group normalisation, or None."""
    try:
        from apex.contrib.group_norm import GroupNorm
    except Exception:
        return None
    return GroupNorm


@cache
def fused_adam() -> type[torch.optim.Optimizer] | None:
    """apex's FusedAdam, or None."""
    try:
        from apex.optimizers import FusedAdam
    except Exception:
        return None
    return FusedAdam


@cache
def _xformers_function() -> Callable[..., Tensor] | None:
    # Imported only when asked for: it takes seconds.
    try:
        from xformers.ops import memory_efficient_attention
    except Exception:
        return None
    return memory_efficient_attention


@cache
def _apex_module(channels: int, groups: int, eps: float, act: bool) -> Any:
    make = apex_group_norm_class()
    assert make is not None
    return make(groups, channels, eps=eps, affine=True, act="silu" if act else "")


def apex_group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, act: bool
) -> Tensor:
    """GroupNorm, then SiLU if `act`, by apex; x [N, C, H, W] channels_last on CUDA."""
    channels = x.shape[1]
    parameters = {
        "weight": x.new_ones(channels) if weight is None else weight,
        "bias": x.new_zeros(channels) if bias is None else bias,
    }
    module = _apex_module(channels, num_groups, eps, act)
    return torch.func.functional_call(module, parameters, (x,))


def xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over [N, pixels, heads, d] by xformers."""
    run = _xformers_function()
    assert run is not None
    return run(q, k, v)
