"""A frozen convolution that normalises and activates its input while it loads it.

    y = gain (conv2d(s, W) + b + residual),  s = silu(shift + GroupNorm(x + pre_shift) (1 + scale))

x [N, Cin, H, W], W [Cout, Cin, k, k] with k 1 or 3, stride 1, padding k // 2: y [N, Cout, H, W].
Saves x and the mean and rstd [N, G] of its groups for the backward pass; W does not train. With
Triton s is never in memory: x is read for its statistics and by the convolution, y is written, and
backward dy and x are read, and dz, the gradient in front of SiLU, is written and read once more.
Bound by arithmetic: 2 Cin k^2 FLOP per element of y. The library's form is cuDNN's convolution
behind group_norm_silu.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan_kernels import dispatch
from fastgan_kernels.frozen_conv import check_frozen, frozen_conv2d
from fastgan_kernels.norm_silu import group_norm_silu, group_norm_silu_ref
from fastgan_kernels.norm_silu_conv.launch import (
    norm_silu_conv_backward,
    norm_silu_conv_forward,
    shape_of,
)
from fastgan_kernels.norm_silu_conv.sums import Affine, moments, statistics
from fastgan_kernels.norm_silu_conv.table import OP, plan_for
from fastgan_kernels.runtime import check_groups, check_image, check_tensor, to_channels_last


class _Inputs(NamedTuple):
    """The op's arguments, in its order."""

    x: Tensor
    num_groups: int
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    weight: Tensor
    bias: Tensor | None
    eps: float
    pre_shift: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None
    gain: float

    @property
    def after(self) -> Affine:
        return Affine(self.norm_weight, self.norm_bias, self.pre_shift, self.scale, self.shift)

    def norm(self) -> dict:
        """The arguments of group_norm_silu by name."""
        names = ("pre_shift", "scale", "shift", "x", "num_groups", "eps")
        found = {name: getattr(self, name) for name in names}
        return found | {"weight": self.norm_weight, "bias": self.norm_bias}


def norm_silu_conv_ref(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    pre_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    gain: float = 1.0,
) -> Tensor:
    """The definition, in float32 at least; the result is rounded to x's dtype once, at its end."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    s = group_norm_silu_ref(
        wide,
        num_groups,
        norm_weight,
        norm_bias,
        eps=eps,
        pre_shift=pre_shift,
        scale=scale,
        shift=shift,
    )
    weight, bias = weight.to(s.dtype), None if bias is None else bias.to(s.dtype)
    y = F.conv2d(s, weight, bias, padding=weight.shape[-1] // 2)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return (gain * y).to(x.dtype)


def group_statistics_ref(
    y: Tensor, groups: int, eps: float, pre_shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """mean and rstd [N, G] over the groups of y + pre_shift [N, C], in float32 at least."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    if pre_shift is not None:
        wide = wide + pre_shift.to(wide.dtype)[:, :, None, None]
    variance, mean = torch.var_mean(wide.reshape(len(y), groups, -1), dim=2, correction=0)
    return mean, (variance + eps).rsqrt()


def _library(i: _Inputs) -> Tensor:
    """PyTorch's convolution behind whatever runs group_norm_silu here."""
    s = group_norm_silu(**i.norm())
    y = frozen_conv2d(s, i.weight, i.bias, padding=i.weight.shape[-1] // 2)
    y = y if i.residual is None else y + i.residual.to(y.dtype)
    return to_channels_last(y if i.gain == 1 else y * i.gain)


@torch.library.custom_op("fastgan::norm_silu_conv", mutates_args=())
def _op(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    gain: float,
    next_groups: int,
    next_eps: float,
    next_pre_shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and rstd of x's and (unless next_groups is 0) of y's groups."""
    after = Affine(norm_weight, norm_bias, pre_shift, scale, shift)
    plan = plan_for("forward", x, shape_of(x, weight))
    y, found, of_y = norm_silu_conv_forward(
        *(x, num_groups, weight, bias, eps, after, residual, gain, plan), sums=next_groups > 0
    )
    if not next_groups:
        return y, found, found.new_empty(2, len(x), 0)
    behind = Affine(pre_shift=next_pre_shift).dense()
    return y, found, statistics(of_y or moments(y), next_groups, next_eps, behind)[0]


@_op.register_fake
def _(x, num_groups, norm_weight, norm_bias, weight, *rest):
    n, _, height, width = x.shape
    y = x.new_empty(n, weight.shape[0], height, width).to(memory_format=torch.channels_last)
    found, of_y = (x.new_empty(2, n, g, dtype=torch.float32) for g in (num_groups, rest[-3]))
    return y, found, of_y


@torch.library.custom_op("fastgan::norm_silu_conv_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    gain: float,
    wanted: str,
) -> list[Tensor]:
    after = Affine(norm_weight, norm_bias, pre_shift, scale, shift)
    plan = plan_for("backward", x, shape_of(x, weight))
    found = norm_silu_conv_backward(
        dy, x, statistics, num_groups, weight, after, gain, frozenset(wanted.split()), plan
    )
    return [getattr(found, name) for name in wanted.split()]


@_backward_op.register_fake
def _(dy, x, statistics, num_groups, norm_weight, norm_bias, weight, pre_shift, scale, shift, *_):
    wanted = _[-1]
    shapes = {
        "x": lambda: torch.empty_like(x),
        "affine": lambda: x.new_empty(2, x.shape[1], dtype=torch.float32),
        "pre_shift": lambda: pre_shift.new_empty(pre_shift.shape),
        "scale": lambda: scale.new_empty(scale.shape),
        "shift": lambda: shift.new_empty(shift.shape),
    }
    return [shapes[name]() for name in wanted.split()]


def _setup(ctx, inputs, output):
    i = _Inputs(*inputs[:12])
    ctx.num_groups, ctx.gain = i.num_groups, i.gain
    ctx.residual_dtype = None if i.residual is None else i.residual.dtype
    per_sample = (i.pre_shift, i.scale, i.shift)
    ctx.save_for_backward(i.x, output[1], i.norm_weight, i.norm_bias, i.weight, *per_sample)


def _backward(ctx, dy, *_):
    x, statistics, norm_weight, norm_bias, weight, *per_sample = ctx.saved_tensors
    needs = _Inputs(*ctx.needs_input_grad[:12])
    needed = {"x": needs.x, "affine": needs.norm_weight or needs.norm_bias}
    needed |= {name: getattr(needs, name) for name in ("pre_shift", "scale", "shift")}
    wanted = [name for name, asked in needed.items() if asked]
    found = {}
    if wanted:
        arguments = (ctx.num_groups, norm_weight, norm_bias, weight, *per_sample, ctx.gain)
        gradients = _backward_op(dy, x, statistics, *arguments, " ".join(wanted))
        found = dict(zip(wanted, gradients, strict=True))
    affine = found.get("affine")
    of_residual = (dy * ctx.gain).to(ctx.residual_dtype) if needs.residual else None
    return (
        found.get("x"),
        None,
        affine[0].to(norm_weight.dtype) if needs.norm_weight else None,
        affine[1].to(norm_bias.dtype) if needs.norm_bias else None,
        *(None, None, None),
        *(found.get(name) for name in ("pre_shift", "scale", "shift")),
        of_residual,
        *(None, None, None, None),
    )


_op.register_autograd(_backward, setup_context=_setup)


def norm_silu_conv(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    pre_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    gain: float = 1.0,
) -> Tensor:
    """gain (conv2d(silu(shift + GroupNorm(x + pre_shift) (1 + scale)), weight) + bias + residual).

    x [N, Cin, H, W]; weight [Cout, Cin, k, k], k 1 or 3, and bias [Cout] in x's dtype: they are
    frozen, padding is k // 2. norm_weight, norm_bias [Cin]; pre_shift, scale, shift [N, Cin]
    ([1, Cin] serves all samples); residual [N, Cout, H, W]. The result has x's dtype and is
    channels_last; x and residual in another layout are copied first. ValueError names what does
    not fit, and a convolution's parameter that asks for a gradient, which it would not get.
    """
    after = (pre_shift, scale, shift, residual, gain)
    i = _Inputs(x, num_groups, norm_weight, norm_bias, weight, bias, eps, *after)
    _check(i)
    chosen = dispatch.implementation(OP, x.device.type, x.dtype)
    if chosen == "reference":
        return norm_silu_conv_ref(**i._asdict())
    return _library(i) if chosen == "library" else _op(*_dense(i), 0, 0.0, None)[0]


def norm_silu_conv_statistics(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    next_groups: int,
    next_eps: float,
    next_pre_shift: Tensor | None = None,
    eps: float,
    pre_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    gain: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """norm_silu_conv's y, and mean and rstd [N, next_groups] of y + next_pre_shift, in float32.

    For the norm behind it, which need not read y for them, and what it adds first [N, Cout]; they
    carry no gradient, as a norm's backward pass takes them to be functions of its input.
    """
    after = (pre_shift, scale, shift, residual, gain)
    i = _Inputs(x, num_groups, norm_weight, norm_bias, weight, bias, eps, *after)
    _check(i)
    if next_groups < 1 or weight.shape[0] % next_groups:
        raise ValueError(
            f"next_groups {next_groups} does not divide the {weight.shape[0]} channels of y"
        )
    n, cout = len(x), len(weight)
    check_tensor("next_pre_shift", next_pre_shift, (n, cout), x)
    before = None if next_pre_shift is None else next_pre_shift.detach().expand(n, cout)
    if dispatch.implementation(OP, x.device.type, x.dtype) in ("triton", "tuned"):
        y, _, found = _op(*_dense(i), next_groups, next_eps, before)
        mean, rstd = found.detach()
        return y, mean, rstd
    y = norm_silu_conv(**i._asdict())
    return y, *group_statistics_ref(y.detach(), next_groups, next_eps, before)


def _dense(i: _Inputs) -> _Inputs:
    """Images in the layout that the kernels read; a row of the embedding for every sample."""
    n, cin = i.x.shape[:2]
    before, scale, shift = (
        None if v is None else v.expand(n, cin) for v in (i.pre_shift, i.scale, i.shift)
    )
    return i._replace(
        x=to_channels_last(i.x),
        weight=to_channels_last(i.weight),
        residual=None if i.residual is None else to_channels_last(i.residual),
        pre_shift=before,
        scale=scale,
        shift=shift,
    )


def _check(i: _Inputs) -> None:
    check_image("x", i.x)
    check_groups("num_groups", i.num_groups, i.x)
    n, cin, *size = i.x.shape
    if i.weight.ndim != 4 or i.weight.shape[1] != cin or i.weight.shape[2:] not in ((1, 1), (3, 3)):
        wanted = f"['Cout', {cin}, k, k] with k 1 or 3"
        raise ValueError(f"weight has shape {list(i.weight.shape)}, {wanted} would fit x")
    cout = i.weight.shape[0]
    for name in ("norm_weight", "norm_bias"):
        check_tensor(name, getattr(i, name), (cin,), i.x)
    for name in ("pre_shift", "scale", "shift"):
        check_tensor(name, getattr(i, name), (n, cin), i.x)
    check_tensor("bias", i.bias, (cout,), i.x)
    if i.residual is not None and tuple(i.residual.shape) != (n, cout, *size):
        shape = list(i.residual.shape)
        raise ValueError(f"residual has shape {shape}, {[n, cout, *size]} would fit y")
    check_tensor("residual", i.residual, (n, cout, *size), i.x)
    check_frozen("weight", i.weight, i.x)
    check_frozen("bias", i.bias, i.x)
