"""A frozen convolution that normalises and activates its input while it loads it.

    y = gain (conv2d(s, W) + b + residual),  s = silu(shift + GroupNorm(x + pre_shift) (1 + scale))

x [N, Cin, H, W], W [Cout, Cin, k, k] with k 1 or 3, stride 1, padding k // 2: y [N, Cout, H, W].
Saves x and the mean and rstd [N, G] of its groups for the backward pass; W does not train. With
Triton s is never in memory: x is read for its statistics and by the convolution, y is written, and
backward dy and x are read, and dz, the gradient in front of SiLU, is written and read once more.
Bound by arithmetic: 2 Cin k^2 FLOP per element of y. The library's form is cuDNN's convolution
behind group_norm_silu.
"""

from typing import Any, NamedTuple

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
from fastgan_kernels.norm_silu_conv.plans import OP, plan_for
from fastgan_kernels.norm_silu_conv.sums import Affine
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


_SCHEMA = (
    "Tensor x, int num_groups, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias,"
    " float eps, Tensor? pre_shift, Tensor? scale, Tensor? shift, Tensor? residual, float gain"
)
_PER_SAMPLE = ("pre_shift", "scale", "shift")


def _forward(*arguments):
    i = _Inputs(*arguments)
    plan = plan_for("forward", i.x, shape_of(i.x, i.weight))
    given = (i.x, i.num_groups, i.weight, i.bias, i.eps, i.after, i.residual, i.gain)
    return norm_silu_conv_forward(*given, plan)[:2]


def _gradients(dy, statistics, wanted, *arguments):
    i = _Inputs(*arguments)
    plan = plan_for("backward", i.x, shape_of(i.x, i.weight))
    given = (dy, i.x, statistics, i.num_groups, i.weight, i.after, i.gain)
    found = norm_silu_conv_backward(*given, frozenset(wanted.split()), plan)
    return [getattr(found, name) for name in wanted.split()]


_op = torch.library.custom_op(
    "fastgan::norm_silu_conv",
    _forward,
    mutates_args=(),
    schema=f"({_SCHEMA}) -> (Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "fastgan::norm_silu_conv_backward",
    _gradients,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor statistics, str wanted, {_SCHEMA}) -> Tensor[]",
)


@_op.register_fake
def _(*arguments):
    i = _Inputs(*arguments)
    y = i.x.new_empty(len(i.x), len(i.weight), *i.x.shape[2:])
    statistics = i.x.new_empty(2, len(i.x), i.num_groups, dtype=torch.float32)
    return y.contiguous(memory_format=torch.channels_last), statistics


@_backward_op.register_fake
def _(dy, statistics, wanted, *arguments):
    i = _Inputs(*arguments)
    of_affine = i.x.new_empty(2, i.x.shape[1], dtype=torch.float32)
    return [
        of_affine if name == "affine" else torch.empty_like(getattr(i, name))
        for name in wanted.split()
    ]


def _setup(ctx, inputs, output):
    i = _Inputs(*inputs)
    ctx.numbers = {"num_groups": i.num_groups, "eps": i.eps, "gain": i.gain}
    ctx.residual_dtype = None if i.residual is None else i.residual.dtype
    # Backward reads neither of the two.
    without = dict.fromkeys((*ctx.numbers, "bias", "residual"))
    ctx.save_for_backward(output[1], *i._replace(**without))


def _backward(ctx, dy, _):
    statistics, *saved = ctx.saved_tensors
    i, needs = _Inputs(*saved)._replace(**ctx.numbers), _Inputs(*ctx.needs_input_grad)
    asked = {name: getattr(needs, name) for name in ("x", *_PER_SAMPLE)}
    asked["affine"] = needs.norm_weight or needs.norm_bias
    wanted = [name for name in asked if asked[name]]
    found = {}
    if wanted:
        gradients = _backward_op(dy, statistics, " ".join(wanted), *i)
        found = dict(zip(wanted, gradients, strict=True))
    for row, name in enumerate(("norm_weight", "norm_bias")):
        if getattr(needs, name):
            found[name] = found["affine"][row].to(getattr(i, name).dtype)
    if needs.residual:
        found["residual"] = (dy * i.gain).to(ctx.residual_dtype)
    return tuple(found.get(name) for name in _Inputs._fields)


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
    return _library(i) if chosen == "library" else _op(*_dense(i))[0]


def _library(i: _Inputs) -> Tensor:
    """PyTorch's convolution behind whatever runs group_norm_silu here."""
    embedding = {name: getattr(i, name) for name in _PER_SAMPLE}
    s = group_norm_silu(i.x, i.num_groups, i.norm_weight, i.norm_bias, eps=i.eps, **embedding)
    y = frozen_conv2d(s, i.weight, i.bias, padding=i.weight.shape[-1] // 2)
    y = y if i.residual is None else y + i.residual.to(y.dtype)
    return to_channels_last(y if i.gain == 1 else y * i.gain)


def _dense(i: _Inputs) -> _Inputs:
    """Images in the layout that the kernels read; a row of the embedding for every sample."""
    images = {"x": i.x, "weight": i.weight, "residual": i.residual}
    dense: dict[str, Any] = {
        k: None if v is None else to_channels_last(v) for k, v in images.items()
    }
    for name in _PER_SAMPLE:
        value = getattr(i, name)
        dense[name] = None if value is None else value.expand(i.x.shape[:2])
    return i._replace(**dense)


def _check(i: _Inputs) -> None:
    check_image("x", i.x)
    check_groups("num_groups", i.num_groups, i.x)
    n, cin, *size = i.x.shape
    if i.weight.ndim != 4 or i.weight.shape[1] != cin or i.weight.shape[2:] not in ((1, 1), (3, 3)):
        wanted = f"['Cout', {cin}, k, k] with k 1 or 3"
        raise ValueError(f"weight has shape {list(i.weight.shape)}, {wanted} would fit x")
    cout = len(i.weight)
    for name in ("norm_weight", "norm_bias"):
        check_tensor(name, getattr(i, name), (cin,), i.x)
    for name in _PER_SAMPLE:
        check_tensor(name, getattr(i, name), (n, cin), i.x)
    check_tensor("bias", i.bias, (cout,), i.x)
    if i.residual is not None and tuple(i.residual.shape) != (n, cout, *size):
        shape = list(i.residual.shape)
        raise ValueError(f"residual has shape {shape}, {[n, cout, *size]} would fit y")
    check_tensor("residual", i.residual, (n, cout, *size), i.x)
    check_frozen("weight", i.weight, i.x)
    check_frozen("bias", i.bias, i.x)
