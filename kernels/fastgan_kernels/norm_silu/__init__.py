"""Group normalisation with SiLU, the embedding's shift and scale folded in: forward and backward.

    u = x + pre_shift,  xhat = (u - mean) rstd,  z = shift + (gamma xhat + beta) (1 + scale),
    y = silu(z)  (or z)

x [N, C, H, W], statistics over the H W pixels of a sample's group of C / G channels. Saves x and
mean and rstd [N, G] for the backward pass, nothing else. Bytes per element over device memory
(bf16): forward 4 (read x, write y), backward 6 (read x and dy, write dx). Bound by memory. The
kernels and what starts them are in device.py, how they cut a sample in tiles.py.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan_kernels import dispatch
from fastgan_kernels.norm_silu.device import (
    empty_gradients,
    group_norm_silu_backward,
    group_norm_silu_forward,
)
from fastgan_kernels.runtime import check_groups, check_image, check_tensor, to_channels_last

OP = "group_norm_silu"


def group_norm_silu_ref(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    pre_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = True,
) -> Tensor:
    """The definition, in float32 at least; the result is rounded to x's dtype once, at its end."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    arguments = (num_groups, weight, bias, eps, pre_shift, scale, shift, act)
    return _composed(_group_norm, wide, *arguments).to(x.dtype)


def _composed(
    norm: Callable[..., Tensor],
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act: bool,
) -> Tensor:
    """All in x's dtype; `norm` also activates where nothing comes in between."""
    pre_shift, scale, shift = (
        None if value is None else value.to(x.dtype)[:, :, None, None]
        for value in (pre_shift, scale, shift)
    )
    last = scale is None and shift is None
    u = x if pre_shift is None else x + pre_shift
    z = norm(u, num_groups, weight, bias, eps, act and last)
    if scale is not None:
        z = z * (1 + scale)
    if shift is not None:
        z = z + shift
    return F.silu(z) if act and not last else z


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, act: bool
) -> Tensor:
    """PyTorch's operators with the parameters in x's dtype."""
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    z = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(z) if act else z


def apex_group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, act: bool
) -> Tensor:
    """GroupNorm, then SiLU if `act`, by apex's NHWC kernel; x [N, C, H, W] on CUDA."""
    x, channels = to_channels_last(x), x.shape[1]
    parameters = {
        "weight": x.new_ones(channels) if weight is None else weight,
        "bias": x.new_zeros(channels) if bias is None else bias,
    }
    module = _apex_module(channels, num_groups, eps, act)
    return torch.func.functional_call(module, parameters, (x,))


@cache
def _apex_module(channels: int, groups: int, eps: float, act: bool) -> torch.nn.Module:
    make = dispatch.apex_group_norm_class()
    assert make is not None
    return make(groups, channels, eps=eps, affine=True, act="silu" if act else "")


def _backward_named(*arguments):
    names = arguments[-1].split()
    found = group_norm_silu_backward(*arguments[:-1], wanted=frozenset(names))
    return [getattr(found, name) for name in names]


_op = torch.library.custom_op("fastgan::group_norm_silu", group_norm_silu_forward, mutates_args=())
_backward_op = torch.library.custom_op(
    "fastgan::group_norm_silu_backward",
    _backward_named,
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor statistics, int num_groups, Tensor? weight, Tensor? bias, "
    "Tensor? pre_shift, Tensor? scale, Tensor? shift, bool act, str wanted) -> Tensor[]",
)


@_op.register_fake
def _(x, num_groups, *_):
    return torch.empty_like(x), x.new_empty(2, x.shape[0], num_groups, dtype=torch.float32)


@_backward_op.register_fake
def _(dy, x, statistics, num_groups, weight, bias, pre_shift, scale, shift, act, wanted):
    found = empty_gradients(frozenset(wanted.split()), x, pre_shift, scale, shift)
    return [getattr(found, name) for name in wanted.split()]


_ARGUMENTS = ("x", "num_groups", "weight", "bias", "eps", "pre_shift", "scale", "shift", "act")


def _setup(ctx, inputs, output):
    x, ctx.num_groups, weight, bias, _, pre_shift, scale, shift, ctx.act = inputs
    ctx.save_for_backward(x, output[1], weight, bias, pre_shift, scale, shift)


def _backward(ctx, dy, _):
    x, statistics, weight, bias, *per_sample = ctx.saved_tensors
    needed = dict(zip(_ARGUMENTS, ctx.needs_input_grad, strict=True))
    needed["affine"] = needed["weight"] or needed["bias"]
    names = ("x", "affine", "pre_shift", "scale", "shift")
    wanted = [name for name in names if needed[name]]
    arguments = (dy, x, statistics, ctx.num_groups, weight, bias, *per_sample, ctx.act)
    found = dict(zip(wanted, _backward_op(*arguments, " ".join(wanted)), strict=True))
    for row, (name, parameter) in enumerate((("weight", weight), ("bias", bias))):
        if needed[name]:
            found[name] = found["affine"][row].to(parameter.dtype)
    return tuple(found.get(name) for name in _ARGUMENTS)


_op.register_autograd(_backward, setup_context=_setup)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    pre_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = True,
) -> Tensor:
    """act(shift + GroupNorm(x + pre_shift) (1 + scale)) for x [N, C, H, W]; SiLU if `act`.

    weight, bias: [C]; pre_shift, scale, shift: [N, C] ([1, C] serves all samples); any of float32,
    bfloat16, float16, whatever x is. Statistics are float32. The result has x's dtype and is
    channels_last; x in another layout is copied first. ValueError names what does not fit.
    """
    check_image("x", x)
    check_groups("num_groups", num_groups, x)
    n, channels = x.shape[:2]
    for name, value in (("weight", weight), ("bias", bias)):
        check_tensor(name, value, (channels,), x)
    for name, value in (("pre_shift", pre_shift), ("scale", scale), ("shift", shift)):
        check_tensor(name, value, (n, channels), x)
    chosen = dispatch.implementation(OP, x.device.type, x.dtype)
    if chosen == "triton":
        before, scale, shift = (
            None if v is None else v.expand(n, channels) for v in (pre_shift, scale, shift)
        )
        x = to_channels_last(x)
        return _op(x, num_groups, weight, bias, eps, before, scale, shift, act)[0]
    norm = apex_group_norm if chosen == "apex" else _group_norm
    wide = x.to(torch.promote_types(x.dtype, torch.float32)) if chosen == "reference" else x
    arguments = (num_groups, weight, bias, eps, pre_shift, scale, shift, act)
    return _composed(norm, wide, *arguments).to(x.dtype)
