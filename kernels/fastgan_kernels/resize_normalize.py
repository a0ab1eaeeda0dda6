"""Images in [-1, 1] -> what a pre-trained backbone takes: normalised, three channels, S x S.

    y = B(((x + 1) / 2 - mean) / std) = scale B(x) + offset,
    scale = 1 / (2 std),  offset = (1/2 - mean) / std

x [N, 1 or 3, H, W], y [N, 3, S, S] channels_last. B is bilinear interpolation without antialiasing
(align_corners=False); its weights sum to one, so that it may come first. One channel serves as all
three. The adjoint B^T(scale dy) gathers, so that it gives the same bits every time.
Bytes over device memory per element of y (bf16): forward 2 (write y), backward 2 (read dy), as long
as x is small beside y. A row of dx needs about 2 S / H rows of dy; it shares half of them with the
next row, whose program finds them in the cache. Bound by memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan_kernels import dispatch
from fastgan_kernels.runtime import (
    cdiv,
    check_dtype,
    check_image,
    empty_image,
    launch,
    next_power_of_2,
    tl,
    to_channels_last,
    triton,
)

OP = "resize_normalize"
# A program of the adjoint holds whole rows; larger images are no backbone's.
LARGEST = 1024


def resize_normalize_ref(
    x: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    size: int = 224,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The definition, in float32 at least; rounded to `dtype` (x's if None) once, at its end."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).expand(-1, 3, -1, -1)
    images = zip(wide.split(1, dim=1), mean, std, strict=True)
    normal = torch.cat([((image + 1) / 2 - m) / s for image, m, s in images], dim=1)
    return to_channels_last(_interpolate(normal, size).to(dtype or x.dtype))


def _interpolate(x: Tensor, size: int) -> Tensor:
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


def _library(
    x: Tensor, scale: list[float], offset: list[float], size: int, dtype: torch.dtype
) -> Tensor:
    """Normalised where it is small, then enlarged in `dtype` by PyTorch's operator."""
    images = zip(x.expand(-1, 3, -1, -1).split(1, dim=1), scale, offset, strict=True)
    normal = torch.cat([image * a + b for image, a, b in images], dim=1).to(dtype)
    return to_channels_last(_interpolate(to_channels_last(normal), size))


@triton.jit
def _position(offs_o, length, SIZE: tl.constexpr):
    """Where output pixels sample the input, in units of 1 / (2 SIZE) pixels: integers are exact."""
    position = tl.maximum((2 * offs_o + 1) * length - SIZE, 0)
    return tl.minimum(position, 2 * SIZE * (length - 1))


@triton.jit
def _window(offs_i, length, SIZE: tl.constexpr):
    """The first output pixel to which input pixels contribute, and the one behind the last."""
    first = tl.maximum(2 * SIZE * offs_i - SIZE + length, 0) // (2 * length)
    stop = (2 * SIZE * offs_i + 3 * SIZE + length - 1) // (2 * length)
    return first, tl.minimum(stop, SIZE)


@triton.jit
def _weight(position, offs_i, SIZE: tl.constexpr):
    """The share of input pixel `offs_i` in what is sampled at `position`: a hat function."""
    away = tl.abs(position - 2 * SIZE * offs_i)
    return tl.maximum(2 * SIZE - away, 0).to(tl.float32) / (2 * SIZE)


@triton.jit
def _of_channel(offs_c, first, second, third):
    return tl.where(offs_c == 0, first, tl.where(offs_c == 1, second, third))


@triton.jit
def _between(left_ptr, pixel_stride, of_right, mask, mask_right):
    """A row of x, interpolated along its width."""
    left = tl.load(left_ptr, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(left_ptr + pixel_stride, mask=mask_right, other=0.0).to(tl.float32)
    return left + of_right * (right - left)


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, sample_stride, channel_stride, row_stride, pixel_stride, height, width,
    scale0, scale1, scale2, offset0, offset1, offset2,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    # A row of y is one run of memory, pixel after pixel.
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < 3 * SIZE
    offs_c = offs % 3
    scale = _of_channel(offs_c, scale0, scale1, scale2)
    offset = _of_channel(offs_c, offset0, offset1, offset2)
    across = _position(offs // 3, width, SIZE)
    left = across // (2 * SIZE)
    of_right = _weight(across, left + 1, SIZE)
    # At the right border, where there is none, its share is zero.
    mask_right = mask & (left < width - 1)
    x_ptr += n * sample_stride + offs_c.to(tl.int64) * channel_stride
    x_ptr += left.to(tl.int64) * pixel_stride

    y_ptr += n * SIZE * SIZE * 3 + offs
    begin = tl.program_id(1) * ROWS
    seen = -1
    upper = tl.zeros((BLOCK,), tl.float32)
    lower = tl.zeros((BLOCK,), tl.float32)
    for oy in range(begin, min(begin + ROWS, SIZE)):
        down = _position(oy, height, SIZE)
        top = down // (2 * SIZE)
        # Enlarging, several rows of y lie between the same two rows of x.
        if top != seen:
            top_ptr = x_ptr + top.to(tl.int64) * row_stride
            bottom_ptr = x_ptr + tl.minimum(top + 1, height - 1).to(tl.int64) * row_stride
            upper = _between(top_ptr, pixel_stride, of_right, mask, mask_right)
            lower = _between(bottom_ptr, pixel_stride, of_right, mask, mask_right)
            seen = top
        y = upper + _weight(down, top + 1, SIZE) * (lower - upper)
        y = (y * scale + offset).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + oy * SIZE * 3, y, mask=mask)


@triton.jit
def _adjoint_kernel(
    dy_ptr, dx_ptr, height, width, scale0, scale1, scale2,
    SIZE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROW: tl.constexpr,
    TAPS: tl.constexpr,
):  # fmt: skip
    iy, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < 3 * SIZE
    dy_ptr += n * SIZE * SIZE * 3 + offs
    # Along the height first, whole rows of dy at a time ...
    total = tl.zeros((BLOCK,), tl.float32)
    first, stop = _window(iy, height, SIZE)
    for oy in tl.range(first, stop, loop_unroll_factor=4):
        dy = tl.load(dy_ptr + oy * SIZE * 3, mask=mask, other=0.0).to(tl.float32)
        total += _weight(_position(oy, height, SIZE), iy, SIZE) * dy
    total *= _of_channel(offs % 3, scale0, scale1, scale2)

    # ... then along the width, [taps, elements of dx]; a grey pixel's taps are of all channels.
    offs_x, tap = tl.arange(0, ROW), tl.arange(0, TAPS)[:, None]
    ix = offs_x // CHANNELS
    first, stop = _window(ix, width, SIZE)
    if CHANNELS == 1:
        ox, offs_c = first[None, :] + tap // 3, tap % 3
    else:
        ox, offs_c = first[None, :] + tap, (offs_x % 3)[None, :]
    inside = ox < stop[None, :]
    weight = _weight(_position(ox, width, SIZE), ix[None, :], SIZE)
    taken = tl.reshape(tl.where(inside, ox * 3 + offs_c, 0), (TAPS * ROW,))
    taken = tl.reshape(tl.gather(total, taken, 0), (TAPS, ROW))
    dx = tl.sum(tl.where(inside, weight * taken, 0.0), axis=0)
    dx_ptr += (n * height + iy) * width * CHANNELS + offs_x
    tl.store(dx_ptr, dx.to(dx_ptr.dtype.element_ty), mask=offs_x < width * CHANNELS)


def resize_normalize_forward(
    x: Tensor, scale: list[float], offset: list[float], size: int, dtype: torch.dtype
) -> Tensor:
    """scale B(x) + offset in `dtype`, [N, 3, size, size]; x in any layout."""
    n, _, height, width = x.shape
    y = empty_image(x, (n, 3, size, size), dtype)
    # Programs of one warp, 8 elements of a row per thread, leave the fewest threads idle at the end
    # of a row; several rows of y per program reuse what was interpolated across.
    block, count = 256, 16
    launch(
        _forward_kernel,
        (cdiv(3 * size, block), cdiv(size, count), n),
        *(x, y, *x.expand(-1, 3, -1, -1).stride(), height, width, *scale, *offset),
        **{"SIZE": size, "BLOCK": block, "ROWS": count},
        num_warps=1,
    )
    return y


def resize_normalize_adjoint(
    dy: Tensor, scale: list[float], channels: int, height: int, width: int, dtype: torch.dtype
) -> Tensor:
    """B^T(scale dy) in `dtype`, [N, channels, height, width]; the sum over dy's channels if 1."""
    dy = to_channels_last(dy)
    n, _, _, size = dy.shape
    dx = empty_image(dy, (n, channels, height, width), dtype)
    block = next_power_of_2(3 * size)
    taps = min(size, cdiv(2 * size, width)) * (3 // channels)
    launch(
        _adjoint_kernel,
        (height, n),
        *(dy, dx, height, width, *scale),
        **{"SIZE": size, "CHANNELS": channels, "BLOCK": block},
        **{"ROW": next_power_of_2(width * channels), "TAPS": next_power_of_2(taps)},
        num_warps=max(1, min(8, block // 256)),
    )
    return dx


_op = torch.library.custom_op(
    "fastgan::resize_normalize", resize_normalize_forward, mutates_args=()
)
_adjoint_op = torch.library.custom_op(
    "fastgan::resize_normalize_adjoint", resize_normalize_adjoint, mutates_args=()
)


@_op.register_fake
def _(x, scale, offset, size, dtype):
    return empty_image(x, (x.shape[0], 3, size, size), dtype)


@_adjoint_op.register_fake
def _(dy, scale, channels, height, width, dtype):
    return empty_image(dy, (dy.shape[0], channels, height, width), dtype)


def _setup(ctx, inputs, output):
    x, ctx.scale, *_ = inputs
    ctx.shape, ctx.dtype = x.shape[1:], x.dtype


def _backward(ctx, dy):
    return _adjoint_op(dy, ctx.scale, *ctx.shape, ctx.dtype), None, None, None, None


def _adjoint_setup(ctx, inputs, output):
    dy, ctx.scale, *_ = inputs
    ctx.size, ctx.dtype = dy.shape[-1], dy.dtype


def _adjoint_backward(ctx, ddx):
    """The adjoint's adjoint: the op without its offset."""
    return _op(ddx, ctx.scale, [0.0] * 3, ctx.size, ctx.dtype), None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup)
_adjoint_op.register_autograd(_adjoint_backward, setup_context=_adjoint_setup)


def resize_normalize(
    x: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    size: int = 224,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """((x + 1) / 2 - mean) / std as three channels of size x size pixels, bilinear, no antialias.

    x [N, 1 or 3, H, W] in any layout (none is copied); mean, std: one number per channel of the
    result, which is channels_last and in `dtype` (x's if None). Twice differentiable. Images of
    more than 1024 pixels a side go to PyTorch's operator. ValueError names what does not fit.
    """
    check_image("x", x)
    dtype = dtype or x.dtype
    check_dtype("dtype", dtype)
    if x.shape[1] not in (1, 3):
        raise ValueError(f"x has {x.shape[1]} channels, 1 or 3 would do")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name} has {len(values)} values, 3 would do")
    if not all(s > 0 for s in std):
        raise ValueError(f"std is {list(std)}, positive numbers would do")
    if size < 1:
        raise ValueError(f"size is {size}, 1 or more would do")
    chosen = dispatch.implementation(OP, x.device.type, torch.promote_types(x.dtype, dtype))
    if chosen == "reference":
        return resize_normalize_ref(x, mean, std, size, dtype=dtype)
    scale = [0.5 / s for s in std]
    offset = [(0.5 - m) / s for m, s in zip(mean, std, strict=True)]
    if chosen == "library" or max(size, *x.shape[2:]) > LARGEST:
        return _library(x, scale, offset, size, dtype)
    return _op(x, scale, offset, size, dtype)
