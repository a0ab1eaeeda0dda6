"""Triton kernels of group_norm_silu, and what starts them.

A program owns one sample and a slab of whole groups, so that programs share nothing: no atomics,
the same bits every time. Where the slab fits into registers it is read once. A larger one is swept
twice; only the slabs of the programs that run at the same time have to stay in the cache for device
memory to see a single read. Bytes per element over device memory (bf16): forward 4 (read x, write
y), backward 6 (read x and dy, write dx). Bound by memory.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.layout import channels_last_like, rows
from kernels.runtime import launch, next_power_of_2, tl, triton


@triton.jit
def _slab(pixels, channels, SLAB: tl.constexpr, SLAB_PAD: tl.constexpr):
    """The program's sample, its first element, its channels in slab and tensor, and their mask."""
    slab, n = tl.program_id(0), tl.program_id(1)
    base = n.to(tl.int64) * pixels * channels + slab * SLAB
    offs_s = tl.arange(0, SLAB_PAD)
    return n, base, offs_s, slab * SLAB + offs_s, offs_s < SLAB


@triton.jit
def _per_channel(ptr, offs, mask, default, SLAB_PAD: tl.constexpr):
    """[SLAB_PAD] float32 parameters, or `default` where the op has none."""
    if ptr is None:
        value = tl.full((SLAB_PAD,), default, tl.float32)
    else:
        value = tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def _affine(
    n, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row, offs_c, mask_c,
    SLAB_PAD: tl.constexpr,
):  # fmt: skip
    """a and b of z = a xhat + b, and gamma, beta, 1 + scale which they are made of."""
    gamma = _per_channel(weight_ptr, offs_c, mask_c, 1.0, SLAB_PAD)
    beta = _per_channel(bias_ptr, offs_c, mask_c, 0.0, SLAB_PAD)
    gain = 1.0 + _per_channel(scale_ptr, n * scale_row + offs_c, mask_c, 0.0, SLAB_PAD)
    shift = _per_channel(shift_ptr, n * shift_row + offs_c, mask_c, 0.0, SLAB_PAD)
    return gamma * gain, beta * gain + shift, gamma, beta, gain


@triton.jit
def _place(start, offs_s, mask_c, pixels, channels, BLOCK: tl.constexpr):
    """Offsets from the slab's first element and mask of the tile that begins at pixel `start`."""
    offs_p = start + tl.arange(0, BLOCK)
    mask = (offs_p < pixels)[:, None] & mask_c[None, :]
    return offs_p[:, None] * channels + offs_s[None, :], mask


@triton.jit
def _group_totals(v, GROUP: tl.constexpr, SLAB: tl.constexpr, SLAB_PAD: tl.constexpr):
    """For every channel of the slab the sum of v over the channels of its group."""
    group = tl.arange(0, SLAB_PAD) // GROUP
    if SLAB_PAD <= 128:
        same = group[:, None] == group[None, :]
        totals = tl.sum(tl.where(same, v[None, :], 0.0), axis=1)
    else:
        totals = tl.zeros((SLAB_PAD,), tl.float32)
        for g in tl.static_range(SLAB // GROUP):
            inside = group == g
            totals = tl.where(inside, tl.sum(tl.where(inside, v, 0.0), axis=0), totals)
    return totals


@triton.jit
def _moments(
    x_ptr, before, offs_s, mask_c, pixels, channels,
    BLOCK: tl.constexpr, SLAB_PAD: tl.constexpr, STOP: tl.constexpr,
):  # fmt: skip
    """Each channel's mean and sum of squared deviations, and the last tile of u."""
    if STOP is not None:
        offs, mask = _place(0, offs_s, mask_c, pixels, channels, BLOCK)
        u = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + before[None, :]
        total = tl.sum(tl.where(mask, u, 0.0), axis=0) / pixels
        away = tl.where(mask, u - total[None, :], 0.0)
        squares = tl.sum(away * away, axis=0)
    else:
        # Welford's recurrence at each position of the tile, merged at the end (Chan et al. 1983).
        u = tl.zeros((BLOCK, SLAB_PAD), tl.float32)
        means = tl.zeros((BLOCK, SLAB_PAD), tl.float32)
        deviations = tl.zeros((BLOCK, SLAB_PAD), tl.float32)
        seen = 0.0
        for start in range(0, pixels, BLOCK):
            offs, mask = _place(start, offs_s, mask_c, pixels, channels, BLOCK)
            u = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + before[None, :]
            seen += 1.0
            step = tl.where(mask, u - means, 0.0)
            means += step / seen
            deviations += step * (u - means)
        # The last tile may be partial: its positions beyond the image have seen one pixel less.
        count = ((pixels - tl.arange(0, BLOCK) + BLOCK - 1) // BLOCK).to(tl.float32)[:, None]
        total = tl.sum(means * count, axis=0) / pixels
        away = means - total[None, :]
        squares = tl.sum(deviations + away * away * count, axis=0)
    return u, total, squares


@triton.jit
def _store_y(y_ptr, offs, mask, u, mean, a, b, ACT: tl.constexpr):
    z = (u - mean[None, :]) * a[None, :] + b[None, :]
    y = z * tl.sigmoid(z) if ACT else z
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, statistics_ptr, weight_ptr, bias_ptr, pre_shift_ptr, scale_ptr, shift_ptr,
    pixels, channels, groups, pre_shift_row, scale_row, shift_row, eps,
    GROUP: tl.constexpr, SLAB: tl.constexpr, SLAB_PAD: tl.constexpr, BLOCK: tl.constexpr,
    STOP: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    n, base, offs_s, offs_c, mask_c = _slab(pixels, channels, SLAB, SLAB_PAD)
    x_ptr += base
    y_ptr += base
    before = _per_channel(pre_shift_ptr, n * pre_shift_row + offs_c, mask_c, 0.0, SLAB_PAD)
    a, b, _, _, _ = _affine(
        n, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row, offs_c, mask_c,
        SLAB_PAD,
    )  # fmt: skip

    u, channel_mean, squares = _moments(
        x_ptr, before, offs_s, mask_c, pixels, channels, BLOCK, SLAB_PAD, STOP
    )
    mean = _group_totals(channel_mean, GROUP, SLAB, SLAB_PAD) / GROUP
    away = channel_mean - mean
    squares = _group_totals(squares + away * away * pixels, GROUP, SLAB, SLAB_PAD)
    rstd = 1.0 / tl.sqrt(squares / (GROUP * pixels) + eps)

    if STOP is not None:
        offs, mask = _place(0, offs_s, mask_c, pixels, channels, BLOCK)
        _store_y(y_ptr, offs, mask, u, mean, a * rstd, b, ACT)
    else:
        for start in range(0, pixels, BLOCK):
            offs, mask = _place(start, offs_s, mask_c, pixels, channels, BLOCK)
            u = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + before[None, :]
            _store_y(y_ptr, offs, mask, u, mean, a * rstd, b, ACT)
    # The first channel of each group writes the group's statistics.
    first = mask_c & (offs_s % GROUP == 0)
    offs_g = n * groups + offs_c // GROUP
    tl.store(statistics_ptr + offs_g, mean, mask=first)
    tl.store(statistics_ptr + tl.num_programs(1) * groups + offs_g, rstd, mask=first)


@triton.jit
def _dz_and_xhat(
    x_ptr, dy_ptr, offs, mask, before, mean, rstd, a, b, grad_scale, ACT: tl.constexpr
):  # fmt: skip
    """The gradient in front of the activation and the normalised input, of one tile."""
    u = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + before[None, :]
    dz = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32) * grad_scale
    xhat = (u - mean[None, :]) * rstd[None, :]
    if ACT:
        z = a[None, :] * xhat + b[None, :]
        sigmoid = tl.sigmoid(z)
        dz *= sigmoid * (1.0 + z * (1.0 - sigmoid))
    return dz, xhat


@triton.jit
def _store_dx(
    dx_ptr, residual_ptr, offs, mask, dz, xhat, a, rstd, m1, m2, residual_scale
):  # fmt: skip
    """rstd (a dz - m1 - xhat m2), plus what comes to x along the residual."""
    dx = rstd[None, :] * (a[None, :] * dz - m1[None, :] - xhat * m2[None, :])
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dx += residual_scale * residual
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    x_ptr, dy_ptr, statistics_ptr, weight_ptr, bias_ptr, pre_shift_ptr, scale_ptr, shift_ptr,
    residual_ptr, dx_ptr, dpre_shift_ptr, dscale_ptr, dshift_ptr, partial_ptr,
    pixels, channels, groups, pre_shift_row, scale_row, shift_row, grad_scale, residual_scale,
    GROUP: tl.constexpr, SLAB: tl.constexpr, SLAB_PAD: tl.constexpr, BLOCK: tl.constexpr,
    STOP: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    n, base, offs_s, offs_c, mask_c = _slab(pixels, channels, SLAB, SLAB_PAD)
    x_ptr += base
    dy_ptr += base
    before = _per_channel(pre_shift_ptr, n * pre_shift_row + offs_c, mask_c, 0.0, SLAB_PAD)
    a, b, gamma, beta, gain = _affine(
        n, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row, offs_c, mask_c,
        SLAB_PAD,
    )  # fmt: skip
    offs_g = n * groups + offs_c // GROUP
    mean = tl.load(statistics_ptr + offs_g, mask=mask_c, other=0.0)
    offs_g += tl.num_programs(1) * groups
    rstd = tl.load(statistics_ptr + offs_g, mask=mask_c, other=0.0)

    # All gradients but dx are functions of these sums over the pixels.
    if STOP is not None:
        offs, mask = _place(0, offs_s, mask_c, pixels, channels, BLOCK)
        dz, xhat = _dz_and_xhat(
            x_ptr, dy_ptr, offs, mask, before, mean, rstd, a, b, grad_scale, ACT
        )  # fmt: skip
        sum_dz, sum_dz_xhat = tl.sum(dz, axis=0), tl.sum(dz * xhat, axis=0)
        sum_xhat = tl.sum(tl.where(mask, xhat, 0.0), axis=0)
    else:
        all_dz = tl.zeros((BLOCK, SLAB_PAD), tl.float32)
        all_dz_xhat, all_xhat = all_dz, all_dz
        for start in range(0, pixels, BLOCK):
            offs, mask = _place(start, offs_s, mask_c, pixels, channels, BLOCK)
            dz, xhat = _dz_and_xhat(
                x_ptr, dy_ptr, offs, mask, before, mean, rstd, a, b, grad_scale, ACT
            )  # fmt: skip
            all_dz += dz
            all_dz_xhat += dz * xhat
            all_xhat += tl.where(mask, xhat, 0.0)
        sum_dz, sum_dz_xhat = tl.sum(all_dz, axis=0), tl.sum(all_dz_xhat, axis=0)
        sum_xhat = tl.sum(all_xhat, axis=0)
    m1 = _group_totals(a * sum_dz, GROUP, SLAB, SLAB_PAD) / (GROUP * pixels)
    m2 = _group_totals(a * sum_dz_xhat, GROUP, SLAB, SLAB_PAD) / (GROUP * pixels)

    offs_nc = n * channels + offs_c
    if dpre_shift_ptr is not None:
        dpre_shift = rstd * (a * sum_dz - m1 * pixels - m2 * sum_xhat)
        tl.store(dpre_shift_ptr + offs_nc, dpre_shift, mask=mask_c)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + offs_nc, gamma * sum_dz_xhat + beta * sum_dz, mask=mask_c)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + offs_nc, sum_dz, mask=mask_c)
    if partial_ptr is not None:
        # One sample's share of dgamma and dbeta: [2, N, C], summed over N by the launcher.
        tl.store(partial_ptr + offs_nc, gain * sum_dz_xhat, mask=mask_c)
        offs_nc += tl.num_programs(1) * channels
        tl.store(partial_ptr + offs_nc, gain * sum_dz, mask=mask_c)

    if dx_ptr is not None:
        dx_ptr += base
        if residual_ptr is not None:
            residual_ptr += base
        if STOP is not None:
            offs, mask = _place(0, offs_s, mask_c, pixels, channels, BLOCK)
            _store_dx(
                dx_ptr, residual_ptr, offs, mask, dz, xhat, a, rstd, m1, m2, residual_scale
            )  # fmt: skip
        else:
            for start in range(0, pixels, BLOCK):
                offs, mask = _place(start, offs_s, mask_c, pixels, channels, BLOCK)
                dz, xhat = _dz_and_xhat(
                    x_ptr, dy_ptr, offs, mask, before, mean, rstd, a, b, grad_scale, ACT
                )  # fmt: skip
                _store_dx(
                    dx_ptr, residual_ptr, offs, mask, dz, xhat, a, rstd, m1, m2, residual_scale
                )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How a sample is cut: channels per program, pixels per tile, one tile or several."""

    slab: int
    block: int
    resident: bool
    num_warps: int


def plan(pixels: int, channels: int, groups: int, itemsize: int, *, backward: bool) -> Plan:
    """Slabs of whole groups whose rows start at 16-byte boundaries, where the channels allow it.

    Tiles and warps are what compiles without spilling registers: 16 elements per thread; backward,
    where two tiles are held, 32 of bfloat16 and 8 of float32.
    """
    group, vector = channels // groups, 16 // itemsize
    slabs = [k * group for k in range(1, groups + 1) if groups % k == 0]
    aligned = [slab for slab in slabs if slab % vector == 0] or slabs
    # 32 bytes, the unit of device memory, or more; the group sums favour narrow slabs.
    wide = [slab for slab in aligned if slab * itemsize >= 32] or aligned[-1:]
    block = next_power_of_2(pixels)

    def tile(slab: int) -> int:
        return block * next_power_of_2(slab)

    fitting = [slab for slab in wide if tile(slab) * itemsize <= 16384 and slab <= 128]
    slab = max(fitting, default=wide[0])
    if tile(slab) * itemsize <= 32768 and slab <= 128:
        per_warp = (1024 if itemsize == 2 else 256) if backward else 512
        return Plan(slab, block, True, max(1, tile(slab) // per_warp))
    warps = 8 if slab <= 64 else 16
    return Plan(slab, max(1, 256 * warps // next_power_of_2(slab)), False, warps)


def _constants(p: Plan, group: int, act: bool) -> dict[str, Any]:
    return {
        "GROUP": group,
        "SLAB": p.slab,
        "SLAB_PAD": next_power_of_2(p.slab),
        "BLOCK": p.block,
        # A loop of known length one disappears.
        "STOP": p.block if p.resident else None,
        "ACT": act,
        "num_warps": p.num_warps,
    }


def group_norm_silu_forward(
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
    """y like x (channels_last); mean and rstd of x + pre_shift as [2, N, G] in float32."""
    n, channels, height, width = x.shape
    p = plan(height * width, channels, num_groups, x.element_size(), backward=False)
    y = torch.empty_like(x)
    statistics = torch.empty(2, n, num_groups, dtype=torch.float32, device=x.device)
    pre_shift, scale, shift = rows(pre_shift), rows(scale), rows(shift)
    launch(
        _forward_kernel,
        (channels // p.slab, n),
        *(x, y, statistics, weight, bias, pre_shift, scale, shift),
        *(height * width, channels, num_groups),
        *(_row(pre_shift), _row(scale), _row(shift), eps),
        **_constants(p, channels // num_groups, act),
    )
    return y, statistics


@dataclass
class Gradients:
    """What backward was asked for; the rest is None."""

    x: Tensor | None = None
    affine: Tensor | None = None
    """Of weight and of bias, [2, C] in float32."""
    pre_shift: Tensor | None = None
    """[N, C], as are the next two, in the dtype of what they belong to."""
    scale: Tensor | None = None
    shift: Tensor | None = None


def group_norm_silu_backward(
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
    wanted: frozenset[str],
    *,
    residual: Tensor | None = None,
    grad_scale: float = 1.0,
    residual_scale: float = 1.0,
) -> Gradients:
    """The gradients named in `wanted` (fields of Gradients), for grad_scale * dy.

    `residual`: a second gradient that arrives at x; residual_scale times it is added to dx.
    """
    n, channels, height, width = x.shape
    p = plan(height * width, channels, num_groups, x.element_size(), backward=True)
    dy = channels_last_like(dy, x)
    residual = None if residual is None else channels_last_like(residual, x)
    found = Gradients(x=torch.empty_like(x) if "x" in wanted else None)
    for name, value in (("pre_shift", pre_shift), ("scale", scale), ("shift", shift)):
        if name in wanted and value is not None:
            setattr(found, name, value.new_empty(n, channels))
    partial = None
    if "affine" in wanted:
        partial = torch.empty(2, n, channels, dtype=torch.float32, device=x.device)
    pre_shift, scale, shift = rows(pre_shift), rows(scale), rows(shift)
    launch(
        _backward_kernel,
        (channels // p.slab, n),
        *(x, dy, statistics, weight, bias, pre_shift, scale, shift, residual),
        *(found.x, found.pre_shift, found.scale, found.shift, partial),
        *(height * width, channels, num_groups),
        *(_row(pre_shift), _row(scale), _row(shift), grad_scale, residual_scale),
        **_constants(p, channels // num_groups, act),
    )
    if partial is not None:
        found.affine = partial.sum(dim=1)
    return found


def _row(value: Tensor | None) -> int:
    """From one sample's parameters to the next one's; 0 where all samples share one row."""
    return 0 if value is None else value.stride(0)
