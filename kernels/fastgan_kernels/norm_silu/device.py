"""Triton kernels of group_norm_silu, and what starts them.

A program owns one sample and a slab of whole groups, so that programs share nothing: no atomics,
the same bits every time. Where the slab fits into registers it is read once. A larger one is swept
twice, backwards the second time, so that what was read last is found first. Only the slabs of the
programs that run at the same time have to stay in the cache for device memory to see a single
read; where the cache holds fewer, the batch is launched in chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastgan_kernels.norm_silu.tiles import (
    A100,
    Chip,
    Plan,
    affine,
    chunks,
    group_totals,
    group_totals_of_two,
    last_tile,
    moments,
    own_slab,
    per_channel,
    place,
    plan,
    store_statistics,
    store_y,
)
from fastgan_kernels.runtime import channels_last_like, launch, next_power_of_2, rows, tl, triton


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, mean_ptr, rstd_ptr, pre_shift_ptr, scale_ptr, shift_ptr, weight_ptr, bias_ptr,
    pixels, channels, groups, pre_shift_row, scale_row, shift_row, eps,
    GROUP: tl.constexpr, SLAB: tl.constexpr, SLAB_PAD: tl.constexpr, BLOCK: tl.constexpr,
    STOP: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    n, base, offs_s, offs_c, mask_c = own_slab(pixels, channels, SLAB, SLAB_PAD)
    x_ptr += base
    y_ptr += base
    before = per_channel(pre_shift_ptr, n * pre_shift_row + offs_c, mask_c, 0.0, SLAB_PAD)
    u, channel_mean, squares = moments(
        x_ptr, before, offs_s, mask_c, pixels, channels, BLOCK, SLAB_PAD, STOP
    )
    mean = group_totals(channel_mean, GROUP, SLAB, SLAB_PAD) / GROUP
    away = channel_mean - mean
    squares = group_totals(squares + away * away * pixels, GROUP, SLAB, SLAB_PAD)
    rstd = 1.0 / tl.sqrt(squares / (GROUP * pixels) + eps)
    # Only now: until here the registers hold the slab.
    a, b, _, _, _ = affine(
        n, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row, offs_c, mask_c,
        SLAB_PAD,
    )  # fmt: skip

    if STOP is not None:
        offs, mask = place(0, offs_s, mask_c, pixels, channels, BLOCK)
        store_y(y_ptr, offs, mask, u, mean, a * rstd, b, ACT)
    else:
        for done in range(0, pixels, BLOCK):
            start = last_tile(pixels, BLOCK) - done
            offs, mask = place(start, offs_s, mask_c, pixels, channels, BLOCK)
            u = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + before[None, :]
            store_y(y_ptr, offs, mask, u, mean, a * rstd, b, ACT)
    store_statistics(mean_ptr, rstd_ptr, n, groups, offs_s, offs_c, mask_c, mean, rstd, GROUP)


@triton.jit
def _two_tile_forward_kernel(
    x_ptr, y_ptr, mean_ptr, rstd_ptr, pre_shift_ptr, scale_ptr, shift_ptr, weight_ptr, bias_ptr,
    pixels, channels, groups, pre_shift_row, scale_row, shift_row, eps,
    GROUP: tl.constexpr, SLAB: tl.constexpr, HEAD: tl.constexpr, TAIL_PAD: tl.constexpr,
    BLOCK: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """One read of a slab of, say, 24 channels: as tiles of 16 and of 8, which need no padding."""
    n, base, offs_h, chan_h, mask_h = own_slab(pixels, channels, SLAB, HEAD)
    offs_t = HEAD + tl.arange(0, TAIL_PAD)
    chan_t, mask_t = tl.program_id(0) * SLAB + offs_t, offs_t < SLAB
    x_ptr += base
    y_ptr += base
    before_h = per_channel(pre_shift_ptr, n * pre_shift_row + chan_h, mask_h, 0.0, HEAD)
    before_t = per_channel(pre_shift_ptr, n * pre_shift_row + chan_t, mask_t, 0.0, TAIL_PAD)
    u_h, mean_h, squares_h = moments(
        x_ptr, before_h, offs_h, mask_h, pixels, channels, BLOCK, HEAD, BLOCK
    )
    u_t, mean_t, squares_t = moments(
        x_ptr, before_t, offs_t, mask_t, pixels, channels, BLOCK, TAIL_PAD, BLOCK
    )

    away_h, away_t = mean_h, mean_t
    mean_h, mean_t = group_totals_of_two(mean_h / GROUP, mean_t / GROUP, GROUP, HEAD, TAIL_PAD)
    away_h -= mean_h
    away_t -= mean_t
    squares_h += away_h * away_h * pixels
    squares_t += away_t * away_t * pixels
    squares_h, squares_t = group_totals_of_two(squares_h, squares_t, GROUP, HEAD, TAIL_PAD)
    rstd_h = 1.0 / tl.sqrt(squares_h / (GROUP * pixels) + eps)
    rstd_t = 1.0 / tl.sqrt(squares_t / (GROUP * pixels) + eps)

    a, b, _, _, _ = affine(
        n, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row, chan_h, mask_h, HEAD
    )
    offs, mask = place(0, offs_h, mask_h, pixels, channels, BLOCK)
    store_y(y_ptr, offs, mask, u_h, mean_h, a * rstd_h, b, ACT)
    a, b, _, _, _ = affine(
        n, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row, chan_t, mask_t,
        TAIL_PAD,
    )  # fmt: skip
    offs, mask = place(0, offs_t, mask_t, pixels, channels, BLOCK)
    store_y(y_ptr, offs, mask, u_t, mean_t, a * rstd_t, b, ACT)
    store_statistics(mean_ptr, rstd_ptr, n, groups, offs_h, chan_h, mask_h, mean_h, rstd_h, GROUP)
    store_statistics(mean_ptr, rstd_ptr, n, groups, offs_t, chan_t, mask_t, mean_t, rstd_t, GROUP)


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
def _store_dx(dx_ptr, residual_ptr, offs, mask, dz, xhat, a, rstd, m1, m2, residual_scale):
    """rstd (a dz - m1 - xhat m2), plus what comes to x along the residual."""
    dx = rstd[None, :] * (a[None, :] * dz - m1[None, :] - xhat * m2[None, :])
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dx += residual_scale * residual
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    x_ptr, dy_ptr, mean_ptr, rstd_ptr, pre_shift_ptr, scale_ptr, shift_ptr, residual_ptr,
    dx_ptr, dpre_shift_ptr, dscale_ptr, dshift_ptr, dweight_ptr, dbias_ptr, weight_ptr, bias_ptr,
    pixels, channels, groups, pre_shift_row, scale_row, shift_row, grad_scale, residual_scale,
    GROUP: tl.constexpr, SLAB: tl.constexpr, SLAB_PAD: tl.constexpr, BLOCK: tl.constexpr,
    STOP: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    n, base, offs_s, offs_c, mask_c = own_slab(pixels, channels, SLAB, SLAB_PAD)
    x_ptr += base
    dy_ptr += base
    before = per_channel(pre_shift_ptr, n * pre_shift_row + offs_c, mask_c, 0.0, SLAB_PAD)
    a, b, gamma, beta, gain = affine(
        n, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row, offs_c, mask_c,
        SLAB_PAD,
    )  # fmt: skip
    offs_g = n * groups + offs_c // GROUP
    mean = tl.load(mean_ptr + offs_g, mask=mask_c, other=0.0)
    rstd = tl.load(rstd_ptr + offs_g, mask=mask_c, other=0.0)

    # All gradients but dx are functions of these sums over the pixels.
    if STOP is not None:
        offs, mask = place(0, offs_s, mask_c, pixels, channels, BLOCK)
        dz, xhat = _dz_and_xhat(
            x_ptr, dy_ptr, offs, mask, before, mean, rstd, a, b, grad_scale, ACT
        )  # fmt: skip
        sum_dz, sum_dz_xhat = tl.sum(dz, axis=0), tl.sum(dz * xhat, axis=0)
        sum_xhat = tl.sum(tl.where(mask, xhat, 0.0), axis=0)
    else:
        all_dz = tl.zeros((BLOCK, SLAB_PAD), tl.float32)
        all_dz_xhat, all_xhat = all_dz, all_dz
        for start in range(0, pixels, BLOCK):
            offs, mask = place(start, offs_s, mask_c, pixels, channels, BLOCK)
            dz, xhat = _dz_and_xhat(
                x_ptr, dy_ptr, offs, mask, before, mean, rstd, a, b, grad_scale, ACT
            )  # fmt: skip
            all_dz += dz
            all_dz_xhat += dz * xhat
            all_xhat += tl.where(mask, xhat, 0.0)
        sum_dz, sum_dz_xhat = tl.sum(all_dz, axis=0), tl.sum(all_dz_xhat, axis=0)
        sum_xhat = tl.sum(all_xhat, axis=0)
    m1 = group_totals(a * sum_dz, GROUP, SLAB, SLAB_PAD) / (GROUP * pixels)
    m2 = group_totals(a * sum_dz_xhat, GROUP, SLAB, SLAB_PAD) / (GROUP * pixels)

    offs_nc = n * channels + offs_c
    if dpre_shift_ptr is not None:
        dpre_shift = rstd * (a * sum_dz - m1 * pixels - m2 * sum_xhat)
        tl.store(dpre_shift_ptr + offs_nc, dpre_shift, mask=mask_c)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + offs_nc, gamma * sum_dz_xhat + beta * sum_dz, mask=mask_c)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + offs_nc, sum_dz, mask=mask_c)
    if dweight_ptr is not None:
        # One sample's share of dbeta and dgamma: [N, C], summed over N by the launcher.
        tl.store(dbias_ptr + offs_nc, gain * sum_dz, mask=mask_c)
        tl.store(dweight_ptr + offs_nc, gain * sum_dz_xhat, mask=mask_c)

    if dx_ptr is not None:
        dx_ptr += base
        if residual_ptr is not None:
            residual_ptr += base
        if STOP is not None:
            offs, mask = place(0, offs_s, mask_c, pixels, channels, BLOCK)
            _store_dx(dx_ptr, residual_ptr, offs, mask, dz, xhat, a, rstd, m1, m2, residual_scale)
        else:
            for done in range(0, pixels, BLOCK):
                start = last_tile(pixels, BLOCK) - done
                offs, mask = place(start, offs_s, mask_c, pixels, channels, BLOCK)
                dz, xhat = _dz_and_xhat(
                    x_ptr, dy_ptr, offs, mask, before, mean, rstd, a, b, grad_scale, ACT
                )  # fmt: skip
                _store_dx(
                    dx_ptr, residual_ptr, offs, mask, dz, xhat, a, rstd, m1, m2, residual_scale
                )  # fmt: skip


@cache
def chip(device: torch.device) -> Chip:
    """The device's figures; an A100's, which are the smaller ones, where it is no CUDA device."""
    if device.type != "cuda":
        return A100
    properties = torch.cuda.get_device_properties(device)
    return Chip(properties.multi_processor_count, properties.L2_cache_size)


def _start(
    kernel: Any,
    p: Plan,
    num_groups: int,
    act: bool,
    per_sample: Sequence[Tensor | None],
    *shared: Any,
) -> None:
    """One launch after the other, each on a chunk of the batch; mostly a single one.

    per_sample: the kernel's first arguments, x and all else whose first axis is the batch's.
    """
    x = per_sample[0]
    assert x is not None
    slabs = x.shape[1] // p.slab
    constants: dict[str, Any] = {"SLAB": p.slab, "BLOCK": p.block, "ACT": act}
    constants["GROUP"] = x.shape[1] // num_groups
    if p.tail:
        constants |= {"HEAD": p.slab - p.tail, "TAIL_PAD": next_power_of_2(p.tail)}
    else:
        # A loop of known length one disappears.
        stop = p.block if p.resident else None
        constants |= {"SLAB_PAD": next_power_of_2(p.slab), "STOP": stop}
    found = chunks(len(x), slabs, p, chip(x.device))
    for chunk in found:
        part = per_sample
        if len(found) > 1:
            part = [None if tensor is None else tensor[chunk] for tensor in per_sample]
        grid = (slabs, chunk.stop - chunk.start)
        launch(kernel, grid, *part, *shared, **constants, num_warps=p.num_warps)


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
    _start(
        _two_tile_forward_kernel if p.tail else _forward_kernel,
        *(p, num_groups, act),
        (x, y, *statistics, pre_shift, scale, shift),
        *(weight, bias, height * width, channels, num_groups),
        *(_row(pre_shift), _row(scale), _row(shift), eps),
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


def empty_gradients(
    wanted: frozenset[str],
    x: Tensor,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Gradients:
    """Memory for the gradients named in `wanted`."""
    found = Gradients()
    if "x" in wanted:
        found.x = torch.empty_like(x)
    if "affine" in wanted:
        found.affine = x.new_empty(2, x.shape[1], dtype=torch.float32)
    for name, value in (("pre_shift", pre_shift), ("scale", scale), ("shift", shift)):
        if name in wanted and value is not None:
            setattr(found, name, value.new_empty(x.shape[:2]))
    return found


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
    found = empty_gradients(wanted, x, pre_shift, scale, shift)
    by_sample = None if found.affine is None else found.affine.new_empty(2, n, channels)
    dweight, dbias = (None, None) if by_sample is None else by_sample
    pre_shift, scale, shift = rows(pre_shift), rows(scale), rows(shift)
    inputs = (x, dy, *statistics, pre_shift, scale, shift, residual)
    _start(
        _backward_kernel,
        *(p, num_groups, act),
        (*inputs, found.x, found.pre_shift, found.scale, found.shift, dweight, dbias),
        *(weight, bias, height * width, channels, num_groups),
        *(_row(pre_shift), _row(scale), _row(shift), grad_scale, residual_scale),
    )
    if by_sample is not None:
        torch.sum(by_sample, dim=1, out=found.affine)
    return found


def _row(value: Tensor | None) -> int:
    """From one sample's parameters to the next one's; 0 where all samples share one row."""
    return 0 if value is None else value.stride(0)
