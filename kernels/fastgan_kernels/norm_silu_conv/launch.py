"""What starts norm_silu_conv's kernels, or the library's and the norm's own, as a plan says."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastgan_kernels.frozen_conv import frozen_conv2d_forward, frozen_conv2d_input_grad
from fastgan_kernels.norm_silu.device import (
    Gradients,
    group_norm_silu_backward,
    group_norm_silu_forward,
)
from fastgan_kernels.norm_silu.tiles import A100
from fastgan_kernels.norm_silu_conv.device import convolution_input_grad_kernel, convolution_kernel
from fastgan_kernels.norm_silu_conv.plans import LIBRARY, Plan, Shape
from fastgan_kernels.norm_silu_conv.sums import (
    Affine,
    Moments,
    input_grad,
    moments,
    reduce_gradients,
    statistics,
    workspace,
)
from fastgan_kernels.runtime import (
    INTERPRETED,
    cdiv,
    channels_last_like,
    descriptor,
    launch,
    tl,
    triton,
)


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
        assert coefficients is not None
        y, of_y = _convolution(x, coefficients, weight, bias, residual, gain, plan, sums)
        return y, found, of_y
    s, found = group_norm_silu_forward(
        *(x, num_groups, after.weight, after.bias, eps),
        *(after.pre_shift, after.scale, after.shift, True),
    )
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
    return add_scaled(y, residual, bias, gain)


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
    n, cin, height, width = source.shape
    cout, _, size, _ = weight.shape
    pixels = height * width
    y = source.new_empty(n, cout, height, width).to(memory_format=torch.channels_last)
    of_y = Moments(workspace(2, source, plan.m, cout), plan.m, pixels) if sums else None
    programs = n * cdiv(pixels, plan.m) * cdiv(cout, plan.n)
    read, options = _sources(source, weight, plan, transposed=False)
    launch(
        convolution_kernel,
        _grid(programs, plan, source.device),
        *(*read, y, *((None, None) if coefficients is None else coefficients), bias, residual),
        *((None, programs) if of_y is None else (of_y.partial, programs)),
        *(height, width, cin, cout, 0 if of_y is None else of_y.partial.stride(0), gain),
        **{"SIZE": size, "TANH": plan.tanh, "INTERPRETED": INTERPRETED},
        PARTS=1 if plan.m * plan.n < 4096 * plan.warps else 2,
        **options,
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
            *(ds, x, found, num_groups, after.weight, after.bias, after.pre_shift),
            *(after.scale, after.shift, True, wanted),
            grad_scale=gain,
            residual=residual,
            residual_scale=residual_scale,
        )
    dz, of_dz = _convolution_input_grad(
        dy, x, found, num_groups, weight, after, gain, plan, 3 if "pre_shift" in wanted else 2
    )
    result = Gradients()
    for name in ("pre_shift", "scale", "shift"):
        value = getattr(after, name)
        if name in wanted and value is not None:
            setattr(result, name, value.new_empty(x.shape[:2]))
    shares = found.new_empty(2, *x.shape[:2]) if "affine" in wanted else None
    means = reduce_gradients(
        *(of_dz, num_groups, found[1], after, result.pre_shift, result.scale, result.shift),
        *((None, None) if shares is None else shares),
    )
    if shares is not None:
        result.affine = shares.sum(dim=1)
    if "x" in wanted:
        residual = None if residual is None else channels_last_like(residual, x)
        result.x = input_grad(x, dz, found, means, after, residual, residual_scale)
    return result


def _convolution_input_grad(
    dy: Tensor,
    x: Tensor,
    found: Tensor,
    num_groups: int,
    weight: Tensor,
    after: Affine,
    gain: float,
    plan: Plan,
    sums: int,
) -> tuple[Tensor, Moments]:
    """dz, the gradient in front of SiLU, and per tile the 2 or 3 sums that gradients need."""
    n, cin, height, width = x.shape
    cout, _, size, _ = weight.shape
    pixels = height * width
    dz, of_dz = torch.empty_like(x), Moments(workspace(sums, x, plan.m, cin), plan.m, pixels)
    programs = n * cdiv(pixels, plan.m) * cdiv(cin, plan.n)
    read, options = _sources(dy, weight, plan, transposed=True)
    launch(
        convolution_input_grad_kernel,
        _grid(programs, plan, x.device),
        *(*read, x, dz, *found, of_dz.partial, *after.tensors, programs, height, width, cin, cout),
        *(num_groups, of_dz.partial.stride(0), *after.strides, gain),
        **{"SIZE": size, "SUMS": sums, "PARTS": 1 if plan.m * plan.n < 2048 * plan.warps else 2},
        **options,
    )
    return dz, of_dz


def _sources(
    source: Tensor, weight: Tensor, plan: Plan, *, transposed: bool
) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """What the loop reads, as tensors or descriptors, and its constexprs, warps and stages."""
    loads = plan.loads
    if source.data_ptr() % 16 or weight.data_ptr() % 16:  # descriptors would not take them
        loads = "pointers"
    read: tuple[Any, Any] = source, weight
    if loads != "pointers":
        n, depth, height, width = source.shape
        images, block = [n * height * width, depth], [plan.m, plan.k]
        if loads == "boxes":
            images, block = [n, height, width, depth], [1, plan.m // width, width, plan.k]
        matrix = [len(weight), weight[0].numel()]
        factors = [plan.k, plan.n] if transposed else [plan.n, plan.k]
        read = descriptor(source, images, block), descriptor(weight, matrix, factors)
    options: dict[str, Any] = {"num_warps": plan.warps, "num_stages": plan.stages}
    options |= {"BLOCK_M": plan.m, "BLOCK_N": plan.n, "BLOCK_K": plan.k, "LOADS": loads}
    return read, options | {"SPECIALIZED": plan.specialized, "FLATTEN": plan.persistent > 0}


def _grid(programs: int, plan: Plan, device: torch.device) -> tuple[int]:
    most = plan.persistent * _processors(device) if plan.persistent else programs
    return (min(most, programs),)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return A100.processors
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _add_kernel(a_ptr, b_ptr, bias_ptr, y_ptr, elements, channels, gain, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    total = tl.load(a_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(b_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(bias_ptr + offs % channels, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, (gain * total).to(y_ptr.dtype.element_ty), mask=mask)


def add_scaled(a: Tensor, b: Tensor, bias: Tensor, gain: float) -> Tensor:
    """gain (a + b + bias), rounded once; a and b dense channels_last of one dtype."""
    y = torch.empty_like(a)
    block = 4096
    grid = (cdiv(a.numel(), block),)
    launch(_add_kernel, grid, a, b, bias, y, a.numel(), a.shape[1], gain, BLOCK=block, num_warps=8)
    return y
