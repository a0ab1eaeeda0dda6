"""A UNet's residual block with frozen convolutions, and the self-attention behind it.

    s = resample(silu(GroupNorm0(x))),  h = conv0(s),
    y = gain (conv1(silu(shift + GroupNorm1(h + pre_shift) (1 + scale))) + skip(resample(x)))

x [N, Cin, H, W], y [N, Cout, H', W'], H' = H, 2 H or H / 2; kept for backward: x, h and mean and
rstd [N, G] of both norms. The gain and the gradient along the skip enter the norms' backward
kernels instead of passes of their own, conv0's bias enters norm1's pre_shift and conv1's the final
addition. A 1x1 skip convolution commutes with resampling: it runs on the smaller side. Where a
convolution that normalises while it loads was measured to be faster (norm_silu_conv/plans.py), it
takes the place of norm and convolution, and the first one's sums over h are norm1's statistics.

Bound by the convolutions' arithmetic. Beside them, bytes per element of a block that keeps its size
(bf16): forward 14 (two norms read and write, the addition reads two and writes), backward 14 (both
norms read two and write one, one of them the skip's gradient too).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan_kernels import dispatch
from fastgan_kernels.attention import Attention, Conv, Norm, convolve, self_attention
from fastgan_kernels.frozen_conv import (
    check_frozen,
    frozen_conv2d_forward,
    frozen_conv2d_input_grad,
)
from fastgan_kernels.norm_silu import group_norm_silu
from fastgan_kernels.norm_silu.device import (
    Gradients,
    group_norm_silu_backward,
    group_norm_silu_forward,
)
from fastgan_kernels.norm_silu_conv.launch import (
    norm_silu_conv_backward,
    norm_silu_conv_forward,
    shape_of,
)
from fastgan_kernels.norm_silu_conv.plans import LIBRARY, Direction, Plan, Shape, plan_for
from fastgan_kernels.norm_silu_conv.sums import Affine, Moments
from fastgan_kernels.resample import out_size, resample2x, resample2x_launch
from fastgan_kernels.runtime import (
    channels_last_like,
    check_groups,
    check_image,
    check_tensor,
    empty_image,
    to_channels_last,
)

OP = "frozen_unet_block"
RESAMPLES = ("", "up", "down")


class Inputs(NamedTuple):
    """The op's arguments, in its order."""

    x: Tensor
    norm0_weight: Tensor
    norm0_bias: Tensor
    norm1_weight: Tensor
    norm1_bias: Tensor
    pre_shift: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    skip_weight: Tensor | None
    skip_bias: Tensor | None
    conv0_weight: Tensor
    conv0_bias: Tensor
    conv1_weight: Tensor
    conv1_bias: Tensor
    groups0: int
    groups1: int
    eps0: float
    eps1: float
    resample: str
    taps: list[float]
    gain: float

    @property
    def out_size(self) -> tuple[int, int]:
        """Pixels of y, down and across."""
        height, width = self.x.shape[2:]
        return out_size(height, width, self.resample == "up") if self.resample else (height, width)

    @property
    def after0(self) -> Affine:
        return Affine(self.norm0_weight, self.norm0_bias)

    @property
    def after1(self) -> Affine:
        """With what norm1 adds to h [N or 1 -> N, Cout] in float32: conv0's bias, the embedding."""
        bias = self.conv0_bias.float()[None]
        pre_shift = bias if self.pre_shift is None else bias + self.pre_shift.float()
        pre_shift = pre_shift.expand(len(self.x), -1)
        return Affine(self.norm1_weight, self.norm1_bias, pre_shift, self.scale, self.shift)


def frozen_unet_block_ref(*args: object, **options: object) -> Tensor:
    """The definition: the same block with every op as its own definition."""
    with dispatch.twice_differentiable():
        return frozen_unet_block(*args, **options)  # type: ignore[arg-type]


def _composed(i: Inputs, dropout: float) -> Tensor:
    """The block as its formula reads, of this package's ops and PyTorch's."""
    x, up = i.x, i.resample == "up"
    h = group_norm_silu(x, i.groups0, i.norm0_weight, i.norm0_bias, eps=i.eps0)
    if i.resample:
        h, x = (resample2x(v, i.taps, up=up) for v in (h, x))
    h = convolve(h, Conv(i.conv0_weight, i.conv0_bias))
    embedding: dict[str, Any] = {"pre_shift": i.pre_shift, "scale": i.scale, "shift": i.shift}
    h = group_norm_silu(h, i.groups1, i.norm1_weight, i.norm1_bias, eps=i.eps1, **embedding)
    h = F.dropout(h, dropout, training=dropout > 0)
    h = convolve(h, Conv(i.conv1_weight, i.conv1_bias))
    if i.skip_weight is not None:
        assert i.skip_bias is not None
        x = convolve(x, Conv(i.skip_weight, i.skip_bias))
    return (h + x) * i.gain


def _resampled(x: Tensor, i: Inputs) -> Tensor:
    if not i.resample:
        return x
    return resample2x_launch(x, i.taps, i.resample == "up", 1.0, None, None, 1.0)


def _resampled_back(dy: Tensor, i: Inputs) -> Tensor:
    """The adjoint of `_resampled`: the other direction, times four or a quarter."""
    if not i.resample:
        return dy
    up = i.resample == "up"
    return resample2x_launch(dy, i.taps, not up, 4.0 if up else 0.25, None, None, 1.0)


def _convolved(x: Tensor, weight: Tensor) -> Tensor:
    return frozen_conv2d_forward(x, weight, None, 1, weight.shape[-1] // 2)


def _convolved_back(dy: Tensor, weight: Tensor) -> Tensor:
    size = list(dy.shape[2:])
    return frozen_conv2d_input_grad(dy, weight, None, size, 1, weight.shape[-1] // 2)


def _plan(direction: Direction, x: Tensor, weight: Tensor) -> Plan:
    return plan_for(direction, x, shape_of(x, weight))


def forward(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and what backward reads beside x: h without conv0's bias, both norms' statistics."""
    first = LIBRARY if i.resample else _plan("forward", i.x, i.conv0_weight)
    cout, _, size, _ = i.conv1_weight.shape
    plan = plan_for("forward", i.x, Shape(cout, cout, *i.out_size, size))
    h, statistics0, of_h = _first_half(i, first, sums=plan.form == "fused")
    along, bias, pending = _skip(i)
    added = (None, None, 1.0) if pending else (bias, along, i.gain)
    y, statistics1, _ = norm_silu_conv_forward(
        *(h, i.groups1, i.conv1_weight, added[0], i.eps1, i.after1, *added[1:], plan), known=of_h
    )
    if pending:
        y = resample2x_launch(along, i.taps, i.resample == "up", 1.0, y, bias, i.gain)
    return y, h, statistics0, statistics1


def _first_half(i: Inputs, plan: Plan, *, sums: bool) -> tuple[Tensor, Tensor, Moments | None]:
    """h, norm0's statistics, and h's moments if they are asked for and conv0 summed them up."""
    if not i.resample:
        return norm_silu_conv_forward(
            *(i.x, i.groups0, i.conv0_weight, None, i.eps0, i.after0, None, 1.0, plan),
            sums=sums,
        )
    s, statistics = group_norm_silu_forward(
        i.x, i.groups0, i.norm0_weight, i.norm0_bias, i.eps0, None, None, None, True
    )
    return _convolved(_resampled(s, i), i.conv0_weight), statistics, None


def _skip(i: Inputs) -> tuple[Tensor, Tensor, bool]:
    """What is added to the branch, with which bias (conv1's too), and whether to resample it yet.

    In one pass behind the skip's convolution.
    """
    bias, along, pending = i.conv1_bias.float(), i.x, bool(i.resample)
    if i.skip_weight is not None:
        if i.resample == "down":
            along, pending = _resampled(along, i), False
        along = _convolved(along, i.skip_weight)
        bias = bias if i.skip_bias is None else bias + i.skip_bias.float()
    return along, bias, pending


def backward(
    dy: Tensor, i: Inputs, h: Tensor, statistics0: Tensor, statistics1: Tensor, wanted: str
) -> list[Tensor]:
    asked = frozenset(wanted.split())
    dy = channels_last_like(dy, i.x)
    found = _skip_gradients(dy, i, asked)
    of_norm1 = norm_silu_conv_backward(
        *(dy, h, statistics1, i.groups1, i.conv1_weight, i.after1, i.gain),
        frozenset({"x", *(asked & {"pre_shift", "scale", "shift"}), *_affine("1", asked)}),
        _plan("backward", h, i.conv1_weight),
    )
    assert of_norm1.x is not None
    of_norm0 = _first_half_gradients(of_norm1.x, i, statistics0, asked, found.get("x"))
    found |= {"x": of_norm0.x, "affine0": of_norm0.affine, "affine1": of_norm1.affine}
    for name in asked & {"pre_shift", "scale", "shift"}:
        found[name] = getattr(of_norm1, name).to(getattr(i, name).dtype)
    return [found[name] for name in wanted.split()]  # type: ignore[misc]


def _first_half_gradients(
    dh: Tensor, i: Inputs, statistics: Tensor, asked: frozenset[str], along: Tensor | None
) -> Gradients:
    """Of x, to which the gain times `along`, the skip's, is added, and of norm0's parameters."""
    wanted = frozenset({*(asked & {"x"}), *_affine("0", asked)})
    if not i.resample:
        return norm_silu_conv_backward(
            *(dh, i.x, statistics, i.groups0, i.conv0_weight, i.after0, 1.0, wanted),
            _plan("backward", i.x, i.conv0_weight),
            residual=along,
            residual_scale=i.gain,
        )
    return group_norm_silu_backward(
        _resampled_back(_convolved_back(dh, i.conv0_weight), i),
        *(i.x, statistics, i.groups0, i.norm0_weight, i.norm0_bias, None, None, None, True),
        wanted,
        residual=along,
        residual_scale=i.gain,
    )


def _affine(norm: str, asked: frozenset[str]) -> set[str]:
    return {"affine"} if f"affine{norm}" in asked else set()


def _skip_gradients(dy: Tensor, i: Inputs, asked: frozenset[str]) -> dict[str, Tensor | None]:
    """Gradients along the skip: of its parameters, and of x without the gain."""
    if i.skip_weight is None:
        return {"x": _resampled_back(dy, i)}
    found: dict[str, Tensor | None] = {}
    if "skip_bias" in asked:
        assert i.skip_bias is not None
        total = dy.sum(dim=(0, 2, 3), dtype=torch.float32)
        found["skip_bias"] = (i.gain * total).to(i.skip_bias.dtype)
    down = i.resample == "down"
    if i.resample == "up":
        dy = _resampled_back(dy, i)
    if "skip_weight" in asked:
        seen = _resampled(i.x, i) if down else i.x
        product = _pixels(dy).mT @ _pixels(seen) * i.gain
        found["skip_weight"] = product[:, :, None, None].contiguous()
    dx = _convolved_back(dy, i.skip_weight)
    return found | {"x": _resampled_back(dx, i) if down else dx}


def _pixels(x: Tensor) -> Tensor:
    """[N H W, C] view of a channels_last [N, C, H, W]."""
    return x.movedim(1, 3).flatten(0, 2)


_TYPES: dict[Any, str] = {Tensor: "Tensor", Tensor | None: "Tensor?", list[float]: "float[]"}
_SCHEMA = ", ".join(
    f"{_TYPES.get(kind) or kind.__name__} {name}" for name, kind in Inputs.__annotations__.items()
)
# One gradient of weight and bias together for each norm, see group_norm_silu_backward.
_GRADIENTS = ("x", "affine0", "affine1", "pre_shift", "scale", "shift", "skip_weight", "skip_bias")

_op = torch.library.custom_op(
    "fastgan::frozen_unet_block",
    lambda *args: forward(Inputs(*args)),
    mutates_args=(),
    schema=f"({_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "fastgan::frozen_unet_block_backward",
    lambda dy, h, statistics0, statistics1, wanted, *args: backward(
        dy, Inputs(*args), h, statistics0, statistics1, wanted
    ),
    mutates_args=(),
    schema="(Tensor dy, Tensor h, Tensor statistics0, Tensor statistics1, str wanted, "
    f"{_SCHEMA}) -> Tensor[]",
)


@_op.register_fake
def _(*args):
    i = Inputs(*args)
    n = len(i.x)
    y = empty_image(i.x, (n, len(i.conv1_weight), *i.out_size))
    statistics = (i.x.new_empty(2, n, g, dtype=torch.float32) for g in (i.groups0, i.groups1))
    return y, torch.empty_like(y), *statistics


@_backward_op.register_fake
def _(dy, h, statistics0, statistics1, wanted, *args):
    i = Inputs(*args)
    widths = {"affine0": i.x.shape[1], "affine1": h.shape[1]}
    return [
        i.x.new_empty(2, widths[name], dtype=torch.float32)
        if name in widths
        else torch.empty_like(getattr(i, name))
        for name in wanted.split()
    ]


def _setup(ctx, inputs, output):
    _, h, statistics0, statistics1 = output
    ctx.settings = inputs[14:]
    ctx.save_for_backward(h, statistics0, statistics1, *inputs[:14])


def _autograd(ctx, dy, *_):
    h, statistics0, statistics1, *tensors = ctx.saved_tensors
    i = Inputs(*tensors, *ctx.settings)
    needed = dict(zip(Inputs._fields, ctx.needs_input_grad, strict=True))
    needed["affine0"] = needed["norm0_weight"] or needed["norm0_bias"]
    needed["affine1"] = needed["norm1_weight"] or needed["norm1_bias"]
    wanted = [name for name in _GRADIENTS if needed[name]]
    arguments = (dy, h, statistics0, statistics1, " ".join(wanted), *i)
    found = dict(zip(wanted, _backward_op(*arguments), strict=True))
    for norm in "01":
        for row, part in enumerate(("weight", "bias")):
            name = f"norm{norm}_{part}"
            if needed[name]:
                found[name] = found[f"affine{norm}"][row].to(getattr(i, name).dtype)
    return tuple(found.get(name) for name in Inputs._fields)


_op.register_autograd(_autograd, setup_context=_setup)


def frozen_unet_block(
    x: Tensor,
    norm0: Norm,
    conv0: Conv,
    norm1: Norm,
    conv1: Conv,
    *,
    pre_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    skip: Conv | None = None,
    resample: str = "",
    filter: tuple[float, ...] = (1, 1),
    gain: float = 1.0,
    dropout: float = 0.0,
    attention: Attention | None = None,
) -> Tensor:
    """A UNet's residual block and, where given, the self-attention behind it.

    x [N, Cin, H, W]; conv0 [Cout, Cin, 3, 3], conv1 [Cout, Cout, 3, 3], skip [Cout, Cin, 1, 1] in
    x's dtype; pre_shift, scale, shift [N, Cout] from the embedding; `resample` "", "up" or "down"
    with the taps `filter`. One fused op when conv0 and conv1 are frozen and nothing is dropped;
    otherwise the same block composed of this package's ops and PyTorch's. ValueError names what
    does not fit.
    """
    check_image("x", x)
    if resample not in RESAMPLES:
        raise ValueError(f"resample is {resample!r}, one of {RESAMPLES} would do")
    arguments: list[Any] = [
        *(x, norm0.weight, norm0.bias, norm1.weight, norm1.bias, pre_shift, scale, shift),
        *((None, None) if skip is None else skip),
        *(*conv0, *conv1, norm0.groups, norm1.groups, norm0.eps, norm1.eps),
        *(resample, list(map(float, filter)), gain),
    ]
    i = Inputs(*arguments)
    frozen = not (conv0.trains or conv1.trains or dropout)
    if frozen and dispatch.implementation(OP, x.device.type, x.dtype) == "triton":
        y = _fused(i)
    else:
        y = _composed(i, dropout)
    return y if attention is None else self_attention(y, attention, gain)


def _fused(i: Inputs) -> Tensor:
    n, cin, cout = len(i.x), i.x.shape[1], len(i.conv1_weight)
    check_groups("norm0.groups", i.groups0, i.x)
    check_groups("norm1.groups", i.groups1, i.conv1_weight)
    shapes = {"conv0": (cout, cin, 3, 3), "conv1": (cout, cout, 3, 3), "skip": (cout, cin, 1, 1)}
    for name, shape in shapes.items():
        weight = getattr(i, f"{name}_weight")
        check_tensor(f"{name}.weight", weight, shape, i.x)
        if name != "skip":
            check_frozen(f"{name}.weight", weight, i.x)
            check_frozen(f"{name}.bias", getattr(i, f"{name}_bias"), i.x)
    embedding: dict[str, Any] = {}
    for name in ("pre_shift", "scale", "shift"):
        value = getattr(i, name)
        check_tensor(name, value, (n, cout), i.x)
        embedding[name] = None if value is None else value.expand(n, cout)
    return _op(*i._replace(x=to_channels_last(i.x), **embedding))[0]
