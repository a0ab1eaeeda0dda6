"""Group normalisation with SiLU, the embedding's shift and scale folded in: forward and backward.

    u = x + pre_shift,  xhat = (u - mean) rstd,  z = shift + (gamma xhat + beta) (1 + scale),
    y = silu(z)  (or z)

x [N, C, H, W], statistics over the H W pixels of a sample's group of C / G channels. Saves x and
mean and rstd [N, G] for the backward pass, nothing else.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan_kernels import dispatch
from fastgan_kernels.dispatch import apex_group_norm
from fastgan_kernels.norm_silu.device import group_norm_silu_backward, group_norm_silu_forward
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
    norm = partial(_group_norm, num_groups=num_groups, weight=weight, bias=bias, eps=eps)
    return _around(norm, wide, pre_shift, scale, shift, act).to(x.dtype)


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """PyTorch's operator with the parameters in x's dtype."""
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    return F.group_norm(x, num_groups, weight, bias, eps)


def _around(
    norm: Callable[[Tensor], Tensor],
    x: Tensor,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act: bool,
) -> Tensor:
    """act(shift + norm(x + pre_shift) (1 + scale)), all in x's dtype."""

    def per_pixel(value: Tensor) -> Tensor:
        return value.to(x.dtype)[:, :, None, None]

    z = norm(x if pre_shift is None else x + per_pixel(pre_shift))
    if scale is not None:
        z = z * (1 + per_pixel(scale))
    if shift is not None:
        z = z + per_pixel(shift)
    return F.silu(z) if act else z


def _apex(
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
    """NVIDIA apex's NHWC kernel, with its own SiLU where nothing comes in between."""
    fused = act and scale is None and shift is None
    norm = partial(
        apex_group_norm, num_groups=num_groups, weight=weight, bias=bias, eps=eps, act=fused
    )
    return _around(norm, to_channels_last(x), pre_shift, scale, shift, act and not fused)


@torch.library.custom_op("fastgan::group_norm_silu", mutates_args=())
def _op(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act: bool,
) -> tuple[Tensor, Tensor]:
    return group_norm_silu_forward(x, num_groups, weight, bias, eps, pre_shift, scale, shift, act)


@_op.register_fake
def _(x, num_groups, *_):
    return torch.empty_like(x), x.new_empty(2, x.shape[0], num_groups, dtype=torch.float32)


@torch.library.custom_op("fastgan::group_norm_silu_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act: bool,
    wanted: str,
) -> list[Tensor]:
    found = group_norm_silu_backward(
        *(dy, x, statistics, num_groups, weight, bias, pre_shift, scale, shift, act),
        frozenset(wanted.split()),
    )
    return [getattr(found, name) for name in wanted.split()]


@_backward_op.register_fake
def _(dy, x, statistics, num_groups, weight, bias, pre_shift, scale, shift, act, wanted):
    shapes = {
        "x": lambda: torch.empty_like(x),
        "affine": lambda: x.new_empty(2, x.shape[1], dtype=torch.float32),
        "pre_shift": lambda: pre_shift.new_empty(pre_shift.shape),
        "scale": lambda: scale.new_empty(scale.shape),
        "shift": lambda: shift.new_empty(shift.shape),
    }
    return [shapes[name]() for name in wanted.split()]


def _setup(ctx, inputs, output):
    x, ctx.num_groups, weight, bias, _, pre_shift, scale, shift, ctx.act = inputs
    ctx.save_for_backward(x, output[1], weight, bias, pre_shift, scale, shift)


def _backward(ctx, dy, _):
    x, statistics, weight, bias, *per_sample = ctx.saved_tensors
    of_x, _, of_weight, of_bias, _, of_pre_shift, of_scale, of_shift, _ = ctx.needs_input_grad
    needed = {"x": of_x, "affine": of_weight or of_bias}
    needed |= {"pre_shift": of_pre_shift, "scale": of_scale, "shift": of_shift}
    wanted = [name for name, asked in needed.items() if asked]
    arguments = (dy, x, statistics, ctx.num_groups, weight, bias, *per_sample, ctx.act)
    found = dict(zip(wanted, _backward_op(*arguments, " ".join(wanted)), strict=True))
    affine = found.get("affine")
    dweight = affine[0].to(weight.dtype) if of_weight else None
    dbias = affine[1].to(bias.dtype) if of_bias else None
    rest = (found.get("pre_shift"), found.get("scale"), found.get("shift"))
    return found.get("x"), None, dweight, dbias, None, *rest, None


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
    if chosen == "reference":
        return group_norm_silu_ref(
            x,
            num_groups,
            weight,
            bias,
            eps=eps,
            pre_shift=pre_shift,
            scale=scale,
            shift=shift,
            act=act,
        )
    if chosen == "library":
        norm = partial(_group_norm, num_groups=num_groups, weight=weight, bias=bias, eps=eps)
        return _around(norm, x, pre_shift, scale, shift, act)
    if chosen == "apex":
        return _apex(x, num_groups, weight, bias, eps, pre_shift, scale, shift, act)
    per_sample = (None if v is None else v.expand(n, channels) for v in (pre_shift, scale, shift))
    return _op(to_channels_last(x), num_groups, weight, bias, eps, *per_sample, act)[0]
