"""Sums over pixels around norm_silu_conv: by tile first, then of a group, in a fixed order.

What sums are needed for: a norm's mean and rstd (of the convolution's input, and of its output for
the norm behind it), and the norm's gradients. A tile belongs to one sample; its sums lie in a
workspace [sums, N, tiles, C] in float32, which a program per sample and group adds up: no atomics.
Moments are a mean and the squared deviations from it, merged as in Chan et al. 1983.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan_kernels.norm_silu.device import Gradients
from fastgan_kernels.norm_silu.tiles import affine, per_channel
from fastgan_kernels.runtime import cdiv, launch, next_power_of_2, rows, tl, triton

# Of a tile where no convolution decides: 128 bytes of 16-bit channels a row.
CHANNELS = 64


@triton.jit
def store_moments(partial_ptr, v, inside, offs_c, mask_c, tile, apart, channels):
    """Mean and squared deviations of each channel of v [pixels, channels] of one tile.

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
    """The program's tile of all, its sample; its pixels, channels, elements, each with a mask."""
    tile, tiles = tl.program_id(0), tl.cdiv(pixels, BLOCK)
    n = tile // tiles
    offs_p = tile % tiles * BLOCK + tl.arange(0, BLOCK)
    offs_c = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    offs = n.to(tl.int64) * pixels * channels + offs_p[:, None] * channels + offs_c[None, :]
    inside, mask_c = offs_p < pixels, offs_c < channels
    return tile, n, inside, offs_c, mask_c, offs, inside[:, None] & mask_c[None, :]


@triton.jit
def _moments_kernel(
    x_ptr, partial_ptr, apart, pixels, channels, BLOCK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    tile, _, inside, offs_c, mask_c, offs, mask = _own_tile(pixels, channels, BLOCK, WIDE)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    store_moments(partial_ptr, x, inside, offs_c, mask_c, tile, apart, channels)


@triton.jit
def _own_group(pixels, channels, groups, WIDE: tl.constexpr, TILE: tl.constexpr):
    """The program's sample and group, its channels and their mask, the sample's tiles."""
    n, group = tl.program_id(0), channels // groups
    offs_s = tl.arange(0, WIDE)
    offs_c = tl.program_id(1) * group + offs_s
    return n, n * groups + tl.program_id(1), group, offs_c, offs_s < group, tl.cdiv(pixels, TILE)


@triton.jit
def _statistics_kernel(
    partial_ptr, mean_ptr, rstd_ptr, a_ptr, b_ptr,
    weight_ptr, bias_ptr, pre_shift_ptr, scale_ptr, shift_ptr,
    apart, pixels, channels, groups, pre_shift_row, scale_row, shift_row, eps,
    WIDE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, own, group, offs_c, mask_c, tiles = _own_group(pixels, channels, groups, WIDE, TILE)
    partial_ptr += n.to(tl.int64) * tiles * channels
    # Differences from the first tile, so that a large mean costs no digits.
    first = tl.load(partial_ptr + offs_c, mask=mask_c, other=0.0)
    more, squares = tl.zeros((WIDE,), tl.float32), tl.zeros((WIDE,), tl.float32)
    for start in range(0, tiles, BLOCK):
        offs_t = start + tl.arange(0, BLOCK)
        mask = (offs_t < tiles)[:, None] & mask_c[None, :]
        offs = offs_t[:, None] * channels + offs_c[None, :]
        away = tl.load(partial_ptr + offs, mask=mask, other=0.0) - first[None, :]
        inner = tl.load(partial_ptr + apart + offs, mask=mask, other=0.0)
        count = tl.minimum(pixels - offs_t * TILE, TILE)[:, None]
        more += tl.sum(tl.where(mask, count * away, 0.0), axis=0)
        squares += tl.sum(tl.where(mask, inner + count * away * away, 0.0), axis=0)
    more /= pixels
    before = per_channel(pre_shift_ptr, n * pre_shift_row + offs_c, mask_c, 0.0, WIDE)
    centre = first + more + before
    mean = tl.sum(tl.where(mask_c, centre, 0.0), axis=0) / group
    apart_from_mean = tl.where(mask_c, centre - mean, 0.0)
    squares += pixels * (apart_from_mean * apart_from_mean - more * more)
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / (group * pixels) + eps)
    tl.store(mean_ptr + own, mean)
    tl.store(rstd_ptr + own, rstd)
    if a_ptr is not None:
        a, b, _, _, _ = affine(
            n, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row, offs_c, mask_c,
            WIDE,
        )  # fmt: skip
        a *= rstd
        tl.store(a_ptr + n * channels + offs_c, a, mask=mask_c)
        tl.store(b_ptr + n * channels + offs_c, b + (before - mean) * a, mask=mask_c)


@triton.jit
def _gradients_kernel(
    partial_ptr, of_dz_ptr, of_x_ptr, constant_ptr, mean_ptr, rstd_ptr,
    dpre_shift_ptr, dscale_ptr, dshift_ptr, dweight_ptr, dbias_ptr,
    weight_ptr, bias_ptr, pre_shift_ptr, scale_ptr, shift_ptr,
    apart, pixels, channels, groups, pre_shift_row, scale_row, shift_row,
    WIDE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Also of_dz, of_x and the constant [N, C] with which dx is of_dz dz + of_x x + constant."""
    n, own, group, offs_c, mask_c, tiles = _own_group(pixels, channels, groups, WIDE, TILE)
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
    mean, rstd = tl.load(mean_ptr + own), tl.load(rstd_ptr + own)
    offs_nc = n * channels + offs_c
    if of_dz_ptr is not None:
        before = per_channel(pre_shift_ptr, n * pre_shift_row + offs_c, mask_c, 0.0, WIDE)
        of_x = -rstd * rstd * m2
        tl.store(of_dz_ptr + offs_nc, rstd * a, mask=mask_c)
        tl.store(of_x_ptr + offs_nc, tl.zeros((WIDE,), tl.float32) + of_x, mask=mask_c)
        tl.store(constant_ptr + offs_nc, of_x * (before - mean) - rstd * m1, mask=mask_c)
    if dpre_shift_ptr is not None:
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
    x_ptr, dz_ptr, dx_ptr, residual_ptr, of_dz_ptr, of_x_ptr, constant_ptr,
    pixels, channels, residual_scale, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    _, n, _, offs_c, mask_c, offs, mask = _own_tile(pixels, channels, BLOCK, WIDE)
    of_dz = tl.load(of_dz_ptr + n * channels + offs_c, mask=mask_c, other=0.0)
    of_x = tl.load(of_x_ptr + n * channels + offs_c, mask=mask_c, other=0.0)
    constant = tl.load(constant_ptr + n * channels + offs_c, mask=mask_c, other=0.0)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dz = tl.load(dz_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dx = of_dz[None, :] * dz + (of_x[None, :] * x + constant[None, :])
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dx += residual_scale * residual
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


class Affine(NamedTuple):
    """What follows the normalisation: [C] weight and bias, dense rows of [N, C] for the rest."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    pre_shift: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    def dense(self) -> "Affine":
        return Affine(self.weight, self.bias, *map(rows, self[2:]))

    @property
    def strides(self) -> list[int]:
        """From one sample's pre_shift, scale and shift to the next; 0 where all share a row."""
        return [0 if v is None else v.stride(0) for v in self[2:]]


class Moments(NamedTuple):
    """Sums [sums, N, tiles, C] of an image's tiles: of `block` pixels each, of `pixels` in all."""

    partial: Tensor
    block: int
    pixels: int


def workspace(sums: int, x: Tensor, block: int, channels: int) -> Moments:
    """Memory for the sums over tiles of `block` of x's pixels."""
    n, _, height, width = x.shape
    shape = (sums, n, cdiv(height * width, block), channels)
    partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    return Moments(partial, block, height * width)


def _start_by_tile(kernel: Any, x: Tensor, block: int, *args: Any) -> None:
    n, channels, height, width = x.shape
    grid = (n * cdiv(height * width, block), cdiv(channels, CHANNELS))
    launch(kernel, grid, *args, **{"BLOCK": block, "WIDE": CHANNELS, "num_warps": 8})


def _start_by_group(
    kernel: Any,
    of: Moments,
    groups: int,
    after: Affine,
    found: Iterable[Tensor | None],
    *eps: float,
) -> None:
    _, n, _, channels = of.partial.shape
    wide = max(16, next_power_of_2(channels // groups))
    launch(
        kernel,
        (n, groups),
        *(of.partial, *found, *after),
        *(of.partial.stride(0), of.pixels, channels, groups, *after.strides, *eps),
        **{"WIDE": wide, "TILE": of.block, "BLOCK": max(1, 1024 // wide), "num_warps": 4},
    )


def pixel_tile(x: Tensor) -> int:
    """Pixels of a tile, of 128 at most, where no convolution decides."""
    return min(128, next_power_of_2(x.shape[2] * x.shape[3]))


def moments(x: Tensor) -> Moments:
    """Mean and squared deviations of every tile (see pixel_tile) of x."""
    of = workspace(2, x, pixel_tile(x), x.shape[1])
    arguments = (x, of.partial, of.partial.stride(0), of.pixels, x.shape[1])
    _start_by_tile(_moments_kernel, x, of.block, *arguments)
    return of


def statistics(
    of: Moments, groups: int, eps: float, after: Affine, *, fused: bool = False
) -> tuple[Tensor, Tensor | None]:
    """mean and rstd [2, N, G] of what the moments are of, with `after`'s pre_shift added.

    `fused`: also a and b [2, N, C], with which the whole norm of x is a x + b.
    """
    _, n, _, channels = of.partial.shape
    found = of.partial.new_empty(2, n, groups)
    coefficients = of.partial.new_empty(2, n, channels) if fused else None
    written = (*found, *((None, None) if coefficients is None else coefficients))
    _start_by_group(_statistics_kernel, of, groups, after, written, eps)
    return found, coefficients


def gradients(
    of: Moments,
    x: Tensor,
    dz: Tensor,
    found: Tensor,
    after: Affine,
    wanted: frozenset[str],
    residual: Tensor | None,
    residual_scale: float,
) -> Gradients:
    """Those named in `wanted`, of the norm in front of dz; x's with residual_scale * residual.

    of: the sums over dz; found: mean and rstd [2, N, G] of x + pre_shift.
    """
    _, n, _, channels = of.partial.shape
    per_sample = {
        name: value.new_empty(n, channels) if name in wanted and value is not None else None
        for name, value in after._asdict().items()
        if name in ("pre_shift", "scale", "shift")
    }
    result = Gradients(**per_sample)
    rows_of_dx = of.partial.new_empty(3, n, channels) if "x" in wanted else None
    shares = of.partial.new_empty(2, n, channels) if "affine" in wanted else None
    written = [*((None, None, None) if rows_of_dx is None else rows_of_dx), *found]
    written += [*per_sample.values(), *((None, None) if shares is None else shares)]
    _start_by_group(_gradients_kernel, of, found.shape[2], after, written)
    if shares is not None:
        result.affine = shares.sum(dim=1)
    if rows_of_dx is not None:
        result.x = torch.empty_like(x)
        arguments = (x, dz, result.x, residual, *rows_of_dx, of.pixels, channels, residual_scale)
        _start_by_tile(_dx_kernel, x, pixel_tile(x), *arguments)
    return result
