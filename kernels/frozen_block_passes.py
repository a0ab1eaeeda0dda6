"""The two passes of a frozen UNet block: what runs, and what is kept in between.

The gain and the gradient along the skip enter the norms' backward kernels instead of passes of
their own, conv0's bias enters norm1's pre_shift and conv1's the final addition. A 1x1 skip
convolution commutes with resampling: it runs on the smaller side. Where a convolution that
normalises while it loads was measured to be faster (conv_table.py), it takes the place of norm and
convolution, and the first one's sums over h are norm1's statistics.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.conv_plans import LIBRARY, Direction, Plan, Shape
from kernels.conv_table import plan_for
from kernels.frozen_conv import frozen_conv2d_forward, frozen_conv2d_input_grad
from kernels.layout import channels_last_like
from kernels.norm_silu_conv_launch import (
    norm_silu_conv_backward,
    norm_silu_conv_forward,
    shape_of,
)
from kernels.norm_silu_conv_sums import Affine, Moments
from kernels.norm_silu_triton import (
    Gradients,
    group_norm_silu_backward,
    group_norm_silu_forward,
)
from kernels.resample import resample2x_launch


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


def _pre_shift(i: Inputs) -> Tensor:
    """What norm1 adds to h [N or 1 -> N, Cout] in float32: conv0's bias and the embedding."""
    bias = i.conv0_bias.float()[None]
    return (bias if i.pre_shift is None else bias + i.pre_shift.float()).expand(len(i.x), -1)


def _affine0(i: Inputs) -> Affine:
    return Affine(i.norm0_weight, i.norm0_bias)


def _affine1(i: Inputs) -> Affine:
    return Affine(i.norm1_weight, i.norm1_bias, _pre_shift(i), i.scale, i.shift)


def _plan(direction: Direction, x: Tensor, weight: Tensor) -> Plan:
    return plan_for(direction, x, shape_of(x, weight))


def forward(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and what backward reads beside x: h without conv0's bias, both norms' statistics."""
    first = LIBRARY if i.resample else _plan("forward", i.x, i.conv0_weight)
    plan = plan_for("forward", i.x, _shape_of_second(i))
    h, statistics0, of_h = _first_half(i, first, sums=plan.form == "fused")
    along, bias, pending = _skip(i)
    after = _affine1(i)
    arguments = (h, i.groups1, i.conv1_weight)
    if not pending:
        y, statistics1, _ = norm_silu_conv_forward(
            *arguments, bias, i.eps1, after, along, i.gain, plan, known=of_h
        )
        return y, h, statistics0, statistics1
    branch, statistics1, _ = norm_silu_conv_forward(
        *arguments, None, i.eps1, after, None, 1.0, plan, known=of_h
    )
    y = resample2x_launch(along, i.taps, i.resample == "up", 1.0, branch, bias, i.gain)
    return y, h, statistics0, statistics1


def _shape_of_second(i: Inputs) -> Shape:
    height, width = i.x.shape[2:]
    if i.resample:
        height, width = (2 * s if i.resample == "up" else s // 2 for s in (height, width))
    cout, _, size, _ = i.conv1_weight.shape
    return Shape(cout, cout, height, width, size)


def _first_half(i: Inputs, plan: Plan, *, sums: bool) -> tuple[Tensor, Tensor, Moments | None]:
    """h, norm0's statistics, and h's moments if they are asked for and conv0 summed them up."""
    if not i.resample:
        return norm_silu_conv_forward(
            *(i.x, i.groups0, i.conv0_weight, None, i.eps0, _affine0(i), None, 1.0, plan),
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
        *(dy, h, statistics1, i.groups1, i.conv1_weight, _affine1(i), i.gain),
        frozenset({"x", *(asked & {"pre_shift", "scale", "shift"}), *_affine("1", asked)}),
        _plan("backward", h, i.conv1_weight),
    )
    assert of_norm1.x is not None
    of_norm0 = _first_half_gradients(of_norm1.x, i, statistics0, asked, found.get("x"))
    found |= {"x": of_norm0.x, "affine0": of_norm0.affine, "affine1": of_norm1.affine}
    for name, value in (("pre_shift", i.pre_shift), ("scale", i.scale), ("shift", i.shift)):
        if name in asked and value is not None:
            found[name] = getattr(of_norm1, name).to(value.dtype)
    return [found[name] for name in wanted.split()]  # type: ignore[misc]


def _first_half_gradients(
    dh: Tensor, i: Inputs, statistics: Tensor, asked: frozenset[str], along: Tensor | None
) -> Gradients:
    """Of x, to which the gain times `along`, the skip's, is added, and of norm0's parameters."""
    wanted = frozenset({*(asked & {"x"}), *_affine("0", asked)})
    if not i.resample:
        return norm_silu_conv_backward(
            *(dh, i.x, statistics, i.groups0, i.conv0_weight, _affine0(i), 1.0, wanted),
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
