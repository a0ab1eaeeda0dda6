"""What starts norm_silu_conv's kernels, or the library's and the norm's own, as a plan says."""

from typing import Any

import torch
from torch import Tensor

from fastgan_kernels.frozen_conv import frozen_conv2d_forward, frozen_conv2d_input_grad
from fastgan_kernels.norm_silu.device import (
    Gradients,
    group_norm_silu_backward,
    group_norm_silu_forward,
)
from fastgan_kernels.norm_silu_conv.device import convolution_input_grad_kernel, convolution_kernel
from fastgan_kernels.norm_silu_conv.plans import LIBRARY, Plan, Shape
from fastgan_kernels.norm_silu_conv.sums import (
    Affine,
    Moments,
    gradients,
    moments,
    statistics,
    workspace,
)
from fastgan_kernels.runtime import cdiv, channels_last_like, descriptor, launch, tl, triton


def shape_of(x: Tensor, weight: Tensor) -> Shape:
    """What plans are chosen by."""
    _, cin, height, width = x.shape
    return Shape(cin, len(weight), height, width, weight.shape[2])


def norm_silu_conv_forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    after: Affine,
    residual: Tensor | None,
    gain: float,
    plan: Plan = LIBRARY,
    *,
    known: Moments | None = None,
    sums: bool = False,
) -> tuple[Tensor, Tensor, Moments | None]:
    """y; mean and rstd [2, N, G] of x + pre_shift; with `sums` the moments of y, if it has any.

    known: x's moments, where what wrote x summed them up.
    """
    after = after.dense()
    if plan.form == "fused":
        found, coefficients = statistics(known or moments(x), num_groups, eps, after, fused=True)
        y, of_y = _convolution(x, coefficients, weight, bias, residual, gain, plan, sums)
        return y, found, of_y
    s, found = group_norm_silu_forward(x, num_groups, *after[:2], eps, *after[2:], True)
    if plan.form == "behind":
        y, of_y = _convolution(s, None, weight, bias, residual, gain, plan, sums)
        return y, found, of_y
    return _library_convolution(s, weight, bias, residual, gain), found, None


def _library_convolution(
    s: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gain: float
) -> Tensor:
    padding = weight.shape[2] // 2
    if residual is None:
        y = frozen_conv2d_forward(s, weight, None if bias is None else bias.to(s.dtype), 1, padding)
        return y if gain == 1 else y * gain
    y = frozen_conv2d_forward(s, weight, None, 1, padding)
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return _add_scaled(y, residual, bias, gain)


def _convolution(
    source: Tensor,
    coefficients: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gain: float,
    plan: Plan,
    sums: bool,
) -> tuple[Tensor, Moments | None]:
    """y, and its moments; coefficients: a and b [2, N, Cin] of the norm where it is fused."""
    n, _, height, width = source.shape
    y = source.new_empty(n, len(weight), height, width).to(memory_format=torch.channels_last)
    of_y = workspace(2, y, plan.m, len(weight)) if sums else None
    partial, apart = (None, 0) if of_y is None else (of_y.partial, of_y.partial.stride(0))
    a, b = (None, None) if coefficients is None else coefficients
    _start(
        *(convolution_kernel, source, weight, plan),
        *((y, a, b, bias, residual, partial), (apart, gain)),
        TANH=plan.tanh,
        PARTS=1 if plan.m * plan.n < 4096 * plan.warps else 2,
    )
    return y, of_y


def norm_silu_conv_backward(
    dy: Tensor,
    x: Tensor,
    found: Tensor,
    num_groups: int,
    weight: Tensor,
    after: Affine,
    gain: float,
    wanted: frozenset[str],
    plan: Plan = LIBRARY,
    *,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
) -> Gradients:
    """The gradients named in `wanted` (fields of Gradients; `affine` is of the norm's weight and
    bias) for dy, from x and the mean and rstd that forward found.

    residual: [N, Cin, H, W] of which residual_scale times is added to the gradient of x.
    """
    after, dy = after.dense(), channels_last_like(dy, x)
    if plan.form == "library":
        ds = frozen_conv2d_input_grad(dy, weight, None, list(x.shape[2:]), 1, weight.shape[2] // 2)
        return group_norm_silu_backward(
            *(ds, x, found, num_groups, *after, True, wanted),
            grad_scale=gain,
            residual=residual,
            residual_scale=residual_scale,
        )
    dz, sums = torch.empty_like(x), 3 if "pre_shift" in wanted else 2
    of_dz = workspace(sums, x, plan.m, x.shape[1])
    _start(
        *(convolution_input_grad_kernel, dy, weight, plan),
        (x, dz, *found, of_dz.partial, *after),
        (of_dz.partial.stride(0), gain, num_groups, *after.strides),
        SUMS=sums,
        PARTS=1 if plan.m * plan.n < 2048 * plan.warps else 2,
    )
    residual = None if residual is None else channels_last_like(residual, x)
    return gradients(of_dz, x, dz, found, after, wanted, residual, residual_scale)


def _start(
    kernel: Any,
    source: Tensor,
    weight: Tensor,
    plan: Plan,
    pointers: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    **constants: Any,
) -> None:
    """A program for each tile of pixels and channels, of source and weight by the plan's loads."""
    n, depth, height, width = source.shape
    cout, cin, size, _ = weight.shape
    transposed = kernel is convolution_input_grad_kernel
    grid = n * cdiv(height * width, plan.m) * cdiv(cin if transposed else cout, plan.n)
    read: tuple[Any, Any] = source, weight
    # Addresses that are no multiple of 16 bytes descriptors would not take.
    descriptors = plan.descriptors and not (source.data_ptr() % 16 or weight.data_ptr() % 16)
    if descriptors:
        box, factors = [1, plan.m // width, width, plan.k], [plan.n, plan.k]
        read = (
            descriptor(source, [n, height, width, depth], box),
            descriptor(weight, [cout, size * size * cin], factors[::-1] if transposed else factors),
        )
    launch(
        kernel,
        (grid,),
        *(*read, *pointers, height, width, cin, cout, *numbers),
        SIZE=size,
        DESCRIPTORS=descriptors,
        BLOCK_M=plan.m,
        BLOCK_N=plan.n,
        BLOCK_K=plan.k,
        num_warps=plan.warps,
        num_stages=plan.stages,
        **constants,
    )


@triton.jit
def _add_kernel(a_ptr, b_ptr, bias_ptr, y_ptr, elements, channels, gain, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    total = tl.load(a_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(b_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(bias_ptr + offs % channels, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, (gain * total).to(y_ptr.dtype.element_ty), mask=mask)


def _add_scaled(a: Tensor, b: Tensor, bias: Tensor, gain: float) -> Tensor:
    """gain (a + b + bias), rounded once; a and b dense channels_last of one dtype."""
    y, block = torch.empty_like(a), 4096
    grid = (cdiv(a.numel(), block),)
    launch(_add_kernel, grid, a, b, bias, y, a.numel(), a.shape[1], gain, BLOCK=block, num_warps=8)
    return y
