"""Resampling by 2 with a separable low-pass filter, added to a residual in the same pass.

    down: y[o] = sum_t f[t] x[2 o + t - pad],   up: its transpose times 2, in each direction

x [N, C, H, W] channels_last, f the taps over their sum (an even number of them), pad = (taps - 1)
// 2 zeros around the image: EDM's convolutions with [1, 1] (a mean, a repetition) or [1, 3, 3, 1].
With a residual: gain (residual + bias + scale resample(x)). The adjoint of down is a quarter of up,
that of up four times down, so that one op is its own derivative's derivative. Device memory is read
and written once: 2 B per element of x, of y and of the residual (bf16). Bound by memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan_kernels import dispatch
from fastgan_kernels.runtime import (
    cdiv,
    check_image,
    check_tensor,
    empty_image,
    launch,
    next_power_of_2,
    tl,
    to_channels_last,
    triton,
)

OP = "resample2x"


def resample2x_ref(
    x: Tensor,
    filter: Sequence[float],
    *,
    up: bool,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    gain: float = 1.0,
) -> Tensor:
    """The definition: a depthwise (transposed) convolution, in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return _finished(_convolved(wide, filter, up), residual, bias, gain).to(x.dtype)


def _convolved(x: Tensor, filter: Sequence[float], up: bool) -> Tensor:
    # Filled on the device: a CUDA graph holds no copy from the host.
    taps = torch.stack([x.new_full((), tap / sum(filter)) for tap in filter])
    channels, padding = x.shape[1], (len(filter) - 1) // 2
    kernel = torch.outer(taps, taps).expand(channels, 1, -1, -1)
    if up:
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)
    return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)


def _library(x: Tensor, filter: Sequence[float], up: bool) -> Tensor:
    """Two equal taps are a mean or a repetition, for which PyTorch has faster operators."""
    if len(filter) != 2 or filter[0] != filter[1]:
        return _convolved(x, filter, up)
    return F.interpolate(x, scale_factor=2) if up else F.avg_pool2d(x, 2)


def _finished(y: Tensor, residual: Tensor | None, bias: Tensor | None, gain: float) -> Tensor:
    if residual is not None:
        y = y + residual.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)[:, None, None]
    return y * gain


@triton.jit
def _source(out, tap, UP: tl.constexpr, PAD: tl.constexpr, TAPS: tl.constexpr):
    """Of output positions `out`: the input position that their `tap`-th tap reads, its weight."""
    if UP:
        # Every second tap falls between two input positions; which ones depends on the parity.
        odd = (out + PAD) % 2
        position = (out + PAD - odd) // 2 - tap
        weight = 2.0 * tl.where(odd == 1, TAPS[2 * tap + 1], TAPS[2 * tap])
    else:
        position = 2 * out + tap - PAD
        weight = tl.full(out.shape, TAPS[tap], tl.float32)
    return position, weight


@triton.jit
def _kernel(
    x_ptr, residual_ptr, bias_ptr, y_ptr, height, width, out_height, out_width, units, scale,
    gain, UP: tl.constexpr, TAPS: tl.constexpr, COUNT: tl.constexpr, PAD: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """BLOCK output pixels of one sample times BLOCK_C channels; the cache serves shared inputs."""
    # Triton sees by itself that 16 divides an argument, not that 8 does; loads of 16 bytes need it.
    channels = units * UNIT
    n = tl.program_id(2).to(tl.int64)
    offs_o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    out_y, out_x = offs_o // out_width, offs_o % out_width
    mask_c = offs_c < channels
    x_ptr += n * height * width * channels

    total = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for tap_y in tl.static_range(COUNT):
        in_y, weight_y = _source(out_y, tap_y, UP, PAD, TAPS)
        for tap_x in tl.static_range(COUNT):
            in_x, weight_x = _source(out_x, tap_x, UP, PAD, TAPS)
            inside = (in_y >= 0) & (in_y < height) & (in_x >= 0) & (in_x < width)
            offs = (in_y * width + in_x)[:, None] * channels + offs_c[None, :]
            mask = inside[:, None] & mask_c[None, :]
            tile = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            total += (weight_y * weight_x)[:, None] * tile
    total *= scale

    base = n * out_height * out_width * channels
    offs = offs_o[:, None] * channels + offs_c[None, :]
    mask = (offs_o < out_height * out_width)[:, None] & mask_c[None, :]
    if residual_ptr is not None:
        total += tl.load(residual_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + base + offs, (gain * total).to(y_ptr.dtype.element_ty), mask=mask)


def out_size(height: int, width: int, up: bool) -> tuple[int, int]:
    """Of an image resampled by 2."""
    return (2 * height, 2 * width) if up else (height // 2, width // 2)


def resample2x_launch(
    x: Tensor,
    taps: Sequence[float],
    up: bool,
    scale: float,
    residual: Tensor | None,
    bias: Tensor | None,
    gain: float,
) -> Tensor:
    """gain (residual + bias + scale resample(x)); of layouts that are not NHWC copies are taken."""
    x = to_channels_last(x)
    residual = None if residual is None else to_channels_last(residual)
    bias = None if bias is None else bias.contiguous()
    n, channels, height, width = x.shape
    out_height, out_width = out_size(height, width, up)
    y = empty_image(x, (n, channels, out_height, out_width))
    # Tiles of 2048 elements, 8 a thread: one load of 16 bytes per tap in 16 bits.
    block_c = min(64, next_power_of_2(channels))
    block, unit = 2048 // block_c, 8 if channels % 8 == 0 else 1
    launch(
        _kernel,
        (cdiv(out_height * out_width, block), cdiv(channels, block_c), n),
        *(x, residual, bias, y, height, width, out_height, out_width),
        *(channels // unit, scale, gain),
        UP=up,
        TAPS=tuple(tap / sum(taps) for tap in taps),
        COUNT=len(taps) // 2 if up else len(taps),
        PAD=(len(taps) - 1) // 2,
        **{"BLOCK": block, "BLOCK_C": block_c, "UNIT": unit},
        num_warps=8,
    )
    return y


_op = torch.library.custom_op("fastgan::resample2x", resample2x_launch, mutates_args=())


@_op.register_fake
def _(x, taps, up, scale, residual, bias, gain):
    n, channels, height, width = x.shape
    return empty_image(x, (n, channels, *out_size(height, width, up)))


def _setup(ctx, inputs, output):
    _, ctx.taps, ctx.up, ctx.scale, residual, bias, ctx.gain = inputs
    ctx.dtypes = [None if p is None else p.dtype for p in (residual, bias)]


def _backward(ctx, dy):
    dx = dresidual = dbias = None
    if ctx.needs_input_grad[0]:
        factor = ctx.scale * (4.0 if ctx.up else 0.25)
        dx = _op(dy, ctx.taps, not ctx.up, factor, None, None, ctx.gain)
    if ctx.needs_input_grad[4]:
        dresidual = (dy * ctx.gain).to(ctx.dtypes[0])
    if ctx.needs_input_grad[5]:
        dbias = (dy.float().sum(dim=(0, 2, 3)) * ctx.gain).to(ctx.dtypes[1])
    return dx, None, None, None, dresidual, dbias, None


_op.register_autograd(_backward, setup_context=_setup)


def resample2x(
    x: Tensor,
    filter: Sequence[float],
    *,
    up: bool,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    gain: float = 1.0,
) -> Tensor:
    """gain (residual + bias + x resampled by 2) for x [N, C, H, W].

    `filter`: an even number of taps, their sum not zero, whatever it is; residual [N, C, H', W'] in
    x's dtype is optional, bias [C] beside it too. Down needs even H and W. The result is
    channels_last, of other layouts copies are taken. It can be differentiated any number of times.
    ValueError names what does not fit.
    """
    check_image("x", x)
    taps = [float(tap) for tap in filter]
    if len(taps) % 2 or not sum(taps):
        raise ValueError(
            f"filter is {taps}, an even number of taps with a sum other than 0 would do"
        )
    n, channels, height, width = x.shape
    if not up and (height % 2 or width % 2):
        raise ValueError(f"x is {height} x {width}, even sides would halve")
    check_tensor("residual", residual, (n, channels, *out_size(height, width, up)), x)
    check_tensor("bias", bias, (channels,), x)
    if bias is not None and residual is None:
        raise ValueError("bias has no residual, the residual that it belongs to would do")
    chosen = dispatch.implementation(OP, x.device.type, x.dtype)
    if chosen == "reference":
        return resample2x_ref(x, taps, up=up, residual=residual, bias=bias, gain=gain)
    if chosen == "library":
        return _finished(_library(x, taps, up), residual, bias, gain)
    if residual is not None:
        residual = residual.expand(n, -1, -1, -1).to(x.dtype)
    return _op(x, taps, up, 1.0, residual, bias, gain)
