"""Sums over pixels around norm_silu_conv: by tile first, then of a group, in a fixed order.

What sums are needed for: a norm's mean and rstd (of the convolution's input, and of its output for
the norm behind it), and the norm's gradients. A tile belongs to one sample; its sums lie in a
workspace [sums, N, tiles, C] in float32, which a program per sample and group adds up: no atomics.
Moments are a mean and the squared deviations from it, merged as in Chan et al. 1983.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastgan_kernels.norm_silu.tiles import affine, per_channel
from fastgan_kernels.runtime import cdiv, launch, next_power_of_2, rows, tl, triton

# Of a tile where no convolution decides: 128 bytes of 16-bit channels a row.
CHANNELS = 64


@triton.jit
def store_moments(
    partial_ptr, v, inside, offs_c, mask_c, tile, apart, pixels, channels,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of each channel of v [BLOCK pixels, channels] of one tile.

    tile: of all samples' tiles; inside: which of the pixels exist; apart: from one sum of the
    workspace to the next.
    """
    count = tl.sum(inside.to(tl.float32), axis=0)
    mean = tl.sum(tl.where(inside[:, None], v, 0.0), axis=0) / count
    away = tl.where(inside[:, None], v - mean[None, :], 0.0)
    partial_ptr += tile.to(tl.int64) * channels
    tl.store(partial_ptr + offs_c, mean, mask=mask_c)
    tl.store(partial_ptr + apart + offs_c, tl.sum(away * away, axis=0), mask=mask_c)


@triton.jit
def _own_tile(pixels, channels, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The program's tile of all, its sample, its pixels and channels with their masks, offsets."""
    tile, tiles = tl.program_id(0), tl.cdiv(pixels, BLOCK)
    n = tile // tiles
    offs_p = tile % tiles * BLOCK + tl.arange(0, BLOCK)
    offs_c = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    offs = n.to(tl.int64) * pixels * channels + offs_p[:, None] * channels + offs_c[None, :]
    return tile, n, offs_p < pixels, offs_c, offs_c < channels, offs


@triton.jit
def _moments_kernel(
    x_ptr, partial_ptr, apart, pixels, channels,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tile, _, inside, offs_c, mask_c, offs = _own_tile(pixels, channels, BLOCK, WIDE)
    x = tl.load(x_ptr + offs, mask=inside[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
    store_moments(partial_ptr, x, inside, offs_c, mask_c, tile, apart, pixels, channels, BLOCK)


@triton.jit
def _statistics_kernel(
    partial_ptr, mean_ptr, rstd_ptr, a_ptr, b_ptr,
    weight_ptr, bias_ptr, pre_shift_ptr, scale_ptr, shift_ptr,
    apart, pixels, channels, groups, pre_shift_row, scale_row, shift_row, eps,
    WIDE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, g = tl.program_id(0), tl.program_id(1)
    group = channels // groups
    offs_s = tl.arange(0, WIDE)
    offs_c, mask_c = g * group + offs_s, offs_s < group
    tiles = tl.cdiv(pixels, TILE)
    partial_ptr += n.to(tl.int64) * tiles * channels
    before = per_channel(pre_shift_ptr, n * pre_shift_row + offs_c, mask_c, 0.0, WIDE)
    # Differences from the first tile, so that a large mean costs no digits.
    first = tl.load(partial_ptr + offs_c, mask=mask_c, other=0.0)
    more = tl.zeros((WIDE,), tl.float32)
    for start in range(0, tiles, BLOCK):
        offs_t = start + tl.arange(0, BLOCK)
        mask = (offs_t < tiles)[:, None] & mask_c[None, :]
        mean = tl.load(
            partial_ptr + offs_t[:, None] * channels + offs_c[None, :], mask=mask, other=0.0
        )
        count = tl.minimum(pixels - offs_t * TILE, TILE)[:, None]
        more += tl.sum(tl.where(mask, count * (mean - first[None, :]), 0.0), axis=0)
    centre = first + more / pixels + before
    mean_of_group = tl.sum(tl.where(mask_c, centre, 0.0), axis=0) / group

    squares = tl.zeros((WIDE,), tl.float32)
    for start in range(0, tiles, BLOCK):
        offs_t = start + tl.arange(0, BLOCK)
        mask = (offs_t < tiles)[:, None] & mask_c[None, :]
        offs = offs_t[:, None] * channels + offs_c[None, :]
        away = tl.load(partial_ptr + offs, mask=mask, other=0.0) + before[None, :] - mean_of_group
        count = tl.minimum(pixels - offs_t * TILE, TILE)[:, None]
        inner = tl.load(partial_ptr + apart + offs, mask=mask, other=0.0)
        squares += tl.sum(tl.where(mask, inner + count * away * away, 0.0), axis=0)
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / (group * pixels) + eps)
    tl.store(mean_ptr + n * groups + g, mean_of_group)
    tl.store(rstd_ptr + n * groups + g, rstd)

    if a_ptr is not None:
        a, b, _, _, _ = affine(
            n, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row, offs_c, mask_c,
            WIDE,
        )  # fmt: skip
        a *= rstd
        tl.store(a_ptr + n * channels + offs_c, a, mask=mask_c)
        tl.store(b_ptr + n * channels + offs_c, b + (before - mean_of_group) * a, mask=mask_c)


@triton.jit
def _gradients_kernel(
    partial_ptr, m1_ptr, m2_ptr, rstd_ptr, dpre_shift_ptr, dscale_ptr, dshift_ptr, dweight_ptr,
    dbias_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    apart, pixels, channels, groups, scale_row, shift_row,
    WIDE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, g = tl.program_id(0), tl.program_id(1)
    group = channels // groups
    offs_s = tl.arange(0, WIDE)
    offs_c, mask_c = g * group + offs_s, offs_s < group
    tiles = tl.cdiv(pixels, TILE)
    partial_ptr += n.to(tl.int64) * tiles * channels
    sum_dz = tl.zeros((WIDE,), tl.float32)
    sum_dz_xhat, sum_xhat = sum_dz, sum_dz
    for start in range(0, tiles, BLOCK):
        offs_t = start + tl.arange(0, BLOCK)
        mask = (offs_t < tiles)[:, None] & mask_c[None, :]
        offs = offs_t[:, None] * channels + offs_c[None, :]
        sum_dz += tl.sum(tl.load(partial_ptr + offs, mask=mask, other=0.0), axis=0)
        sum_dz_xhat += tl.sum(tl.load(partial_ptr + apart + offs, mask=mask, other=0.0), axis=0)
        if dpre_shift_ptr is not None:
            third = tl.load(partial_ptr + 2 * apart + offs, mask=mask, other=0.0)
            sum_xhat += tl.sum(third, axis=0)
    a, _, gamma, beta, gain = affine(
        n, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row, offs_c, mask_c, WIDE
    )
    m1 = tl.sum(tl.where(mask_c, a * sum_dz, 0.0), axis=0) / (group * pixels)
    m2 = tl.sum(tl.where(mask_c, a * sum_dz_xhat, 0.0), axis=0) / (group * pixels)
    tl.store(m1_ptr + n * groups + g, m1)
    tl.store(m2_ptr + n * groups + g, m2)

    offs_nc = n * channels + offs_c
    if dpre_shift_ptr is not None:
        rstd = tl.load(rstd_ptr + n * groups + g)
        dpre_shift = rstd * (a * sum_dz - m1 * pixels - m2 * sum_xhat)
        tl.store(dpre_shift_ptr + offs_nc, dpre_shift, mask=mask_c)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + offs_nc, gamma * sum_dz_xhat + beta * sum_dz, mask=mask_c)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + offs_nc, sum_dz, mask=mask_c)
    if dweight_ptr is not None:
        # One sample's share: [N, C], summed over N by the launcher.
        tl.store(dweight_ptr + offs_nc, gain * sum_dz_xhat, mask=mask_c)
        tl.store(dbias_ptr + offs_nc, gain * sum_dz, mask=mask_c)


@triton.jit
def _dx_kernel(
    x_ptr, dz_ptr, dx_ptr, residual_ptr, mean_ptr, rstd_ptr, m1_ptr, m2_ptr,
    weight_ptr, pre_shift_ptr, scale_ptr,
    pixels, channels, groups, pre_shift_row, scale_row, residual_scale,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    _, n, inside, offs_c, mask_c, offs = _own_tile(pixels, channels, BLOCK, WIDE)
    before = per_channel(pre_shift_ptr, n * pre_shift_row + offs_c, mask_c, 0.0, WIDE)
    a, _, _, _, _ = affine(n, weight_ptr, None, scale_ptr, None, scale_row, 0, offs_c, mask_c, WIDE)
    offs_g = n * groups + offs_c // (channels // groups)
    mean = tl.load(mean_ptr + offs_g, mask=mask_c, other=0.0)
    rstd = tl.load(rstd_ptr + offs_g, mask=mask_c, other=0.0)
    m1 = tl.load(m1_ptr + offs_g, mask=mask_c, other=0.0)
    m2 = tl.load(m2_ptr + offs_g, mask=mask_c, other=0.0)
    mask = inside[:, None] & mask_c[None, :]
    u = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + before[None, :]
    dz = tl.load(dz_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    xhat = (u - mean[None, :]) * rstd[None, :]
    dx = rstd[None, :] * (a[None, :] * dz - m1[None, :] - xhat * m2[None, :])
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dx += residual_scale * residual
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Affine:
    """What follows the normalisation: [C] weight and bias, dense rows of [N, C] for the rest."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    pre_shift: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    def dense(self) -> "Affine":
        per_sample = (rows(v) for v in (self.pre_shift, self.scale, self.shift))
        return Affine(self.weight, self.bias, *per_sample)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.pre_shift, self.scale, self.shift

    @property
    def strides(self) -> tuple[int, int, int]:
        """From one sample's pre_shift, scale and shift to the next; 0 where all share a row."""
        before, scale, shift = (
            0 if v is None else v.stride(0) for v in (self.pre_shift, self.scale, self.shift)
        )
        return before, scale, shift


class Moments(NamedTuple):
    """Sums [sums, N, tiles, C] of an image's tiles: of `block` pixels each, of `pixels` in all."""

    partial: Tensor
    block: int
    pixels: int


def workspace(sums: int, x: Tensor, block: int, channels: int) -> Tensor:
    """[sums, N, tiles of `block` pixels, channels], float32."""
    n, _, height, width = x.shape
    shape = (sums, n, cdiv(height * width, block), channels)
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def pixel_tile(pixels: int) -> int:
    """Pixels of a tile, of 128 at most, where no convolution decides."""
    return min(128, next_power_of_2(pixels))


def moments(x: Tensor) -> Moments:
    """Mean and squared deviations of every tile (see pixel_tile) of x."""
    n, channels, height, width = x.shape
    block = pixel_tile(height * width)
    partial = workspace(2, x, block, channels)
    tiles = partial.shape[2]
    launch(
        _moments_kernel,
        (n * tiles, cdiv(channels, CHANNELS)),
        *(x, partial, partial.stride(0), height * width, channels),
        **{"BLOCK": block, "WIDE": CHANNELS, "num_warps": 8},
    )
    return Moments(partial, block, height * width)


def statistics(
    of: Moments, groups: int, eps: float, after: Affine | None = None, *, fused: bool = False
) -> tuple[Tensor, Tensor | None]:
    """mean and rstd [2, N, G] of what the moments are of, with `after`'s pre_shift added.

    `fused`: also a and b [2, N, C], with which the whole norm of x is a x + b.
    """
    after = after or Affine()
    _, n, _, channels = of.partial.shape
    found = of.partial.new_empty(2, n, groups)
    coefficients = of.partial.new_empty(2, n, channels) if fused else None
    launch(
        _statistics_kernel,
        (n, groups),
        *(of.partial, *found, *((None, None) if coefficients is None else coefficients)),
        *(*after.tensors, of.partial.stride(0), of.pixels, channels, groups, *after.strides, eps),
        **_plan(channels // groups, of.block),
    )
    return found, coefficients


def _plan(group: int, block: int) -> dict[str, int]:
    """Constexprs and warps of the kernels that add up a group's tiles of `block` pixels."""
    wide = max(16, next_power_of_2(group))
    return {"WIDE": wide, "TILE": block, "BLOCK": max(1, 1024 // wide), "num_warps": 4}


def reduce_gradients(
    of: Moments, groups: int, rstd: Tensor, after: Affine, *found: Tensor | None
) -> Tensor:
    """m1 and m2 [2, N, G], the means that dx needs, of the sums over dz.

    found: where the gradients of pre_shift, scale, shift, and by sample of weight and bias, go.
    """
    _, n, _, channels = of.partial.shape
    means = of.partial.new_empty(2, n, groups)
    _, scale_row, shift_row = after.strides
    launch(
        _gradients_kernel,
        (n, groups),
        *(of.partial, *means, rstd, *found, after.weight, after.bias, after.scale, after.shift),
        *(of.partial.stride(0), of.pixels, channels, groups, scale_row, shift_row),
        **_plan(channels // groups, of.block),
    )
    return means


def input_grad(
    x: Tensor,
    dz: Tensor,
    statistics: Tensor,
    means: Tensor,
    after: Affine,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
) -> Tensor:
    """dx of the norm for the gradient dz behind it, from the sums over dz, and the residual's."""
    n, channels, height, width = x.shape
    dx = torch.empty_like(x)
    groups, block = statistics.shape[2], pixel_tile(height * width)
    before_row, scale_row, _ = after.strides
    launch(
        _dx_kernel,
        (n * cdiv(height * width, block), cdiv(channels, CHANNELS)),
        *(x, dz, dx, residual, *statistics, *means, after.weight, after.pre_shift, after.scale),
        *(height * width, channels, groups, before_row, scale_row, residual_scale),
        **{"BLOCK": block, "WIDE": CHANNELS, "num_warps": 8},
    )
    return dx
