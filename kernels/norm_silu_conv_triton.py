"""Triton kernels of norm_silu_conv, and what starts them: implicit GEMM over NHWC, stride 1.

    y[p, o] = gain (sum over taps t, channels c of s[p + t, c] W[o, t, c]  + bias[o] + residual)
    s = silu(a x + b) with a and b by sample and channel, 0 outside of the image

The norm of the input is a read of x for its statistics and a tile's a x + b and SiLU between
loading it and multiplying it; s is never in memory. Backward the same loop runs over dy with the
taps reversed, its epilogue multiplies by SiLU' and sums for the norm's gradients; an elementwise
pass makes dx of that. Bound by arithmetic, 2 Cin k^2 FLOP per element of y.

Tiles belong to one sample each, so that a and b are vectors, and their sums can be written without
atomics. The loop takes all taps of a block of channels before the next block: the shifted tiles
that follow each other are almost the same rows of x, which the first-level cache then holds, and so
are a and b. Triton's pipeline brings tiles from shared memory to registers and from there to the
tensor cores, it cannot write one back in between: normalising a tile once for all taps would need
that. Each tap activates its tile again, k^2 times per block of output channels, wherefore
those are wide. Programs of one tile of x are neighbours, so that it comes out of the second-level
cache, where the weights stay too.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.layout import channels_last_like
from kernels.norm_silu_conv_sums import (
    Affine,
    input_grad,
    moments,
    pixel_tile,
    reduce_gradients,
    statistics,
    store_moments,
    workspace,
)
from kernels.norm_silu_tiles import affine, per_channel
from kernels.norm_silu_triton import Gradients
from kernels.runtime import cdiv, launch, next_power_of_2, tl, triton


@dataclass(frozen=True)
class Tiles:
    """Pixels and output channels of a program, input channels of a step, warps, stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# Forward and input gradient by architecture: what compiles without spilling a register in
# triton 3.6 and 3.7; nothing was measured. The input gradient's epilogue holds x beside the sums,
# hence its narrower tile.
SIXTEEN_BITS = {
    (8, 0): (Tiles(128, 256, 32, 8, 3), Tiles(128, 64, 64, 8, 3)),
    (9, 0): (Tiles(128, 256, 32, 8, 4), Tiles(128, 64, 64, 8, 3)),
}
# Without tensor cores: these multiply float32 as TF32 only.
FLOAT32 = Tiles(32, 64, 16, 4, 2)


def tiles_for(
    architecture: tuple[int, int], dtype: torch.dtype, pixels: int, cout: int, cin: int
) -> tuple[Tiles, Tiles]:
    """Of forward and input gradient, cut to small images and few channels."""
    both = SIXTEEN_BITS.get(architecture, SIXTEEN_BITS[8, 0])
    if dtype == torch.float32:
        both = (FLOAT32, FLOAT32)
    forward, backward = both
    return _cut(forward, pixels, cout, cin), _cut(backward, pixels, cin, cout)


def _cut(t: Tiles, pixels: int, cout: int, cin: int) -> Tiles:
    # On images of fewer pixels half the warps, four of which multiply 64 rows on sm_90; each would
    # hold twice as much of the weight.
    part = 1 if pixels > t.m // 2 else 2
    m, n, k = (
        max(16, min(most, next_power_of_2(there)))
        for most, there in ((t.m // part, pixels), (t.n // part, cout), (t.k, cin))
    )
    return Tiles(m, n, k, t.warps // part, t.stages)


@triton.jit
def _own_tile(pixels, width, channels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The program's tile of all and its sample; pixels with row, column, mask; channels, mask."""
    across, tiles = tl.cdiv(channels, BLOCK_N), tl.cdiv(pixels, BLOCK_M)
    tile = tl.program_id(0) // across
    offs_m = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, mask_n = offs_m < pixels, offs_n < channels
    return tile, tile // tiles, offs_m, offs_m // width, offs_m % width, inside, offs_n, mask_n


@triton.jit
def _convolve(
    source_ptr, a_ptr, b_ptr, weight_ptr, offs_m, row, column, inside, offs_n, mask_n,
    height, width, depth, channels, SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] sums over taps and `depth` channels of the source, one sample's.

    With a and b the source is x and the weight lies as [channels, taps, depth]; without, dy and
    [depth, taps, channels], whose taps are passed in reverse.
    """
    taps: tl.constexpr = SIZE * SIZE
    offs_k = tl.arange(0, BLOCK_K)
    offs = offs_m[:, None] * depth + offs_k[None, :]
    if a_ptr is None:
        offs_w = offs_k[:, None] * (taps * channels) + offs_n[None, :]
    else:
        offs_w = offs_n[None, :] * (taps * depth) + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(depth, BLOCK_K) * taps):
        tap, start = step % taps, step // taps * BLOCK_K
        mask_k = offs_k < depth - start
        down, right = tap // SIZE - SIZE // 2, tap % SIZE - SIZE // 2
        if a_ptr is None:
            down, right = -down, -right
        mask_m = inside
        if SIZE > 1:
            mask_m = mask_m & (row + down >= 0) & (row + down < height)
            mask_m = mask_m & (column + right >= 0) & (column + right < width)
        shifted_ptr = source_ptr + (down * width + right) * depth + start
        tile = tl.load(shifted_ptr + offs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        mask = mask_k[:, None] & mask_n[None, :]
        if a_ptr is None:
            tap_ptr = weight_ptr + (start * taps + tap) * channels
            weight = tl.load(tap_ptr + offs_w, mask=mask, other=0.0)
        else:
            weight = tl.load(weight_ptr + tap * depth + start + offs_w, mask=mask, other=0.0)
            a = tl.load(a_ptr + start + offs_k, mask=mask_k, other=0.0)
            b = tl.load(b_ptr + start + offs_k, mask=mask_k, other=0.0)
            z = a[None, :] * tile.to(tl.float32) + b[None, :]
            # The padding is of what the convolution sees: 0, and not silu(b).
            tile = tl.where(mask_m[:, None], z * tl.sigmoid(z), 0.0).to(weight.dtype)
        acc = tl.dot(tile, weight, acc, input_precision="ieee")
    return acc


@triton.jit
def _convolution_kernel(
    x_ptr, weight_ptr, y_ptr, a_ptr, b_ptr, bias_ptr, residual_ptr, partial_ptr,
    height, width, cin, cout, apart, gain,
    SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pixels = height * width
    tile, n, offs_m, row, column, inside, offs_n, mask_n = _own_tile(
        pixels, width, cout, BLOCK_M, BLOCK_N
    )
    x_ptr += n.to(tl.int64) * pixels * cin
    a_ptr += n * cin
    b_ptr += n * cin
    y = _convolve(
        x_ptr, a_ptr, b_ptr, weight_ptr, offs_m, row, column, inside, offs_n, mask_n,
        height, width, cin, cout, SIZE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    y += per_channel(bias_ptr, offs_n, mask_n, 0.0, BLOCK_N)[None, :]
    base = n.to(tl.int64) * pixels * cout
    offs, mask = offs_m[:, None] * cout + offs_n[None, :], inside[:, None] & mask_n[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
    y = (y * gain).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + base + offs, y, mask=mask)
    if partial_ptr is not None:
        # Of y as it is stored: what the next norm reads.
        store_moments(
            partial_ptr, y.to(tl.float32), inside, offs_n, mask_n, tile, apart, pixels,
            cout, BLOCK_M,
        )  # fmt: skip


@triton.jit
def _convolution_input_grad_kernel(
    dy_ptr, weight_ptr, x_ptr, dz_ptr, mean_ptr, rstd_ptr, partial_ptr,
    norm_weight_ptr, norm_bias_ptr, pre_shift_ptr, scale_ptr, shift_ptr,
    height, width, cin, cout, groups, apart, pre_shift_row, scale_row, shift_row, gain,
    SIZE: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dz, the gradient at a x + b, and per tile the sums of dz, dz xhat and (3 SUMS) xhat."""
    pixels = height * width
    tile, n, offs_m, row, column, inside, offs_n, mask_n = _own_tile(
        pixels, width, cin, BLOCK_M, BLOCK_N
    )
    dy_ptr += n.to(tl.int64) * pixels * cout
    ds = _convolve(
        dy_ptr, None, None, weight_ptr, offs_m, row, column, inside, offs_n, mask_n,
        height, width, cout, cin, SIZE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    before = per_channel(pre_shift_ptr, n * pre_shift_row + offs_n, mask_n, 0.0, BLOCK_N)
    a, b, _, _, _ = affine(
        n, norm_weight_ptr, norm_bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row, offs_n,
        mask_n, BLOCK_N,
    )  # fmt: skip
    offs_g = n * groups + offs_n // (cin // groups)
    mean = tl.load(mean_ptr + offs_g, mask=mask_n, other=0.0)
    rstd = tl.load(rstd_ptr + offs_g, mask=mask_n, other=0.0)
    base = n.to(tl.int64) * pixels * cin
    offs, mask = offs_m[:, None] * cin + offs_n[None, :], inside[:, None] & mask_n[None, :]
    x = tl.load(x_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
    xhat = tl.where(mask, (x + (before - mean)[None, :]) * rstd[None, :], 0.0)
    z = a[None, :] * xhat + b[None, :]
    sigmoid = tl.sigmoid(z)
    # Outside of the image ds is 0.
    dz = gain * ds * sigmoid * (1.0 + z * (1.0 - sigmoid))
    tl.store(dz_ptr + base + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    partial_ptr += tile.to(tl.int64) * cin
    tl.store(partial_ptr + offs_n, tl.sum(dz, axis=0), mask=mask_n)
    tl.store(partial_ptr + apart + offs_n, tl.sum(dz * xhat, axis=0), mask=mask_n)
    if SUMS == 3:
        tl.store(partial_ptr + 2 * apart + offs_n, tl.sum(xhat, axis=0), mask=mask_n)


@cache
def architecture(device: torch.device) -> tuple[int, int]:
    """The device's; an A100's, whose tiles are the smaller ones, where it is no CUDA device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def norm_silu_conv_forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    after: Affine,
    residual: Tensor | None,
    gain: float,
    next_groups: int,
    next_eps: float,
    arch: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y; mean and rstd [2, N, G] of x + pre_shift; those of y's `next_groups` groups, if any."""
    n, cin, height, width = x.shape
    cout, _, size, _ = weight.shape
    after, pixels = after.dense(), height * width
    found, coefficients = statistics(
        moments(x), pixels, pixel_tile(pixels), num_groups, eps, after, fused=True
    )
    assert coefficients is not None
    t, _ = tiles_for(arch or architecture(x.device), x.dtype, pixels, cout, cin)
    y = x.new_empty(n, cout, height, width).to(memory_format=torch.channels_last)
    partial = workspace(2, x, t.m, cout) if next_groups else None
    launch(
        _convolution_kernel,
        (n * cdiv(pixels, t.m) * cdiv(cout, t.n),),
        *(x, weight, y, *coefficients, bias, residual, partial, height, width, cin, cout),
        *(0 if partial is None else partial.stride(0), gain),
        **{"SIZE": size, "BLOCK_M": t.m, "BLOCK_N": t.n, "BLOCK_K": t.k},
        num_warps=t.warps,
        num_stages=t.stages,
    )
    if partial is None:
        return y, found, found.new_empty(2, n, 0)
    return y, found, statistics(partial, pixels, t.m, next_groups, next_eps)[0]


def norm_silu_conv_backward(
    dy: Tensor,
    x: Tensor,
    found: Tensor,
    num_groups: int,
    weight: Tensor,
    after: Affine,
    gain: float,
    wanted: frozenset[str],
    arch: tuple[int, int] | None = None,
) -> Gradients:
    """The gradients named in `wanted` (fields of Gradients; `affine` is of the norm's weight and
    bias) for dy, from x and the mean and rstd that forward found."""
    n, cin, height, width = x.shape
    cout, _, size, _ = weight.shape
    after, pixels, dy = after.dense(), height * width, channels_last_like(dy, x)
    _, t = tiles_for(arch or architecture(x.device), x.dtype, pixels, cout, cin)
    dz = torch.empty_like(x)
    partial = workspace(3 if "pre_shift" in wanted else 2, x, t.m, cin)
    launch(
        _convolution_input_grad_kernel,
        (n * cdiv(pixels, t.m) * cdiv(cin, t.n),),
        *(dy, weight, x, dz, *found, partial, *after.tensors, height, width, cin, cout),
        *(num_groups, partial.stride(0), *after.strides, gain),
        **{"SIZE": size, "SUMS": len(partial)},
        **{"BLOCK_M": t.m, "BLOCK_N": t.n, "BLOCK_K": t.k},
        num_warps=t.warps,
        num_stages=t.stages,
    )
    result = Gradients()
    for name in ("pre_shift", "scale", "shift"):
        value = getattr(after, name)
        if name in wanted and value is not None:
            setattr(result, name, value.new_empty(n, cin))
    shares = found.new_empty(2, n, cin) if "affine" in wanted else None
    means = reduce_gradients(
        *(partial, pixels, t.m, num_groups, found[1], after),
        *(result.pre_shift, result.scale, result.shift),
        *((None, None) if shares is None else shares),
    )
    if shares is not None:
        result.affine = shares.sum(dim=1)
    if "x" in wanted:
        result.x = input_grad(x, dz, found, means, after)
    return result
