"""Triton kernels of norm_silu_conv: implicit GEMM over NHWC, stride 1.

    y[p, o] = gain (sum over taps t, channels c of s[p + t, c] W[o, t, c]  + bias[o] + residual)
    s = silu(a x + b) with a and b by sample and channel, 0 outside of the image

The norm of the input is a read of x for its statistics and a tile's a x + b and SiLU between
loading it and multiplying it; s is never in memory. Without a and b it is a convolution of what the
norm's own kernel wrote. Backward the same loop runs over dy with the taps reversed, its epilogue
multiplies by SiLU' and sums for the norm's gradients; an elementwise pass makes dx of that. Bound
by arithmetic, 2 Cin k^2 FLOP per element of y.

Tiles belong to one sample each, so that a and b are vectors, and their sums can be written without
atomics. The loop takes all taps of a block of channels before the next block: the shifted tiles
that follow each other are almost the same rows of x, which the caches then hold, and so are a and
b. Triton's pipeline brings tiles from shared memory to registers and from there to the tensor
cores, it cannot write one back in between: normalising a tile once for all taps would need that.
Each tap activates its tile again, k^2 times per block of output channels, wherefore those are wide.
Programs of one tile of x are neighbours, so that it comes out of the second-level cache, where the
weights stay too.
"""

from fastgan_kernels.norm_silu.tiles import affine, per_channel
from fastgan_kernels.norm_silu_conv.sums import store_moments
from fastgan_kernels.runtime import HAS_TRITON, INTERPRETED, tl, triton

_INTERPRETED = tl.constexpr(INTERPRETED) if HAS_TRITON else None


@triton.jit
def _silu(z, TANH: tl.constexpr):
    """z sigmoid(z) = h tanh(h) + h with h = z / 2."""
    if TANH:
        h = 0.5 * z
        if _INTERPRETED:
            t = 2.0 * tl.sigmoid(z) - 1.0
        else:
            t = tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [h], dtype=tl.float32, is_pure=True, pack=1
            )
        s = h * t + h
    else:
        s = z * tl.sigmoid(z)
    return s


@triton.jit
def _own_tile(pixels, channels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The program's tile of all samples', its sample, pixels, their mask, its first channel."""
    across, tiles = tl.cdiv(channels, BLOCK_N), tl.cdiv(pixels, BLOCK_M)
    tile = tl.program_id(0) // across
    offs_m = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    return tile, tile // tiles, offs_m, offs_m < pixels, tl.program_id(0) % across * BLOCK_N


@triton.jit
def _own_part(
    n, offs_m, inside, first_n, part, pixels, channels, WIDE: tl.constexpr
):  # fmt: skip
    """Channels and elements of a tile's part of WIDE channels, each with its mask."""
    offs_n = first_n + part * WIDE + tl.arange(0, WIDE)
    mask_n = offs_n < channels
    offs = n.to(tl.int64) * pixels * channels + offs_m[:, None] * channels + offs_n[None, :]
    return offs_n, mask_n, offs, inside[:, None] & mask_n[None, :]


@triton.jit
def _convolve(
    source, weight, a_ptr, b_ptr, tile, n, offs_m, inside, first_n, height, width, depth, channels,
    SIZE: tl.constexpr, TRANSPOSED: tl.constexpr, TANH: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] sums over taps and `depth` channels of sample n of the source.

    As a tuple of one, or (2 PARTS) of the left and the right half: what an epilogue reads for a
    whole wide tile does not fit beside it into registers. With a and b the source is normalised and
    activated. The weight is [channels, taps, depth], TRANSPOSED [depth, taps, channels] with its
    taps in reverse.
    """
    taps: tl.constexpr = SIZE * SIZE
    first = tile % tl.cdiv(height * width, BLOCK_M) * BLOCK_M
    row, column = offs_m // width, offs_m % width
    offs_n, offs_k = first_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, tl.cdiv(depth, BLOCK_K) * taps):
        tap, start = step % taps, step // taps * BLOCK_K
        down, right = tap // SIZE - SIZE // 2, tap % SIZE - SIZE // 2
        if TRANSPOSED:
            down, right = -down, -right
        mask_m, mask_k = inside, offs_k < depth - start
        if SIZE > 1:
            mask_m = mask_m & (row + down >= 0) & (row + down < height)
            mask_m = mask_m & (column + right >= 0) & (column + right < width)
        if DESCRIPTORS:
            box = source.load([n, first // width + down, right, start])
            seen = box.reshape(BLOCK_M, BLOCK_K)
            # Behind the last channel this reads the next tap: beside zeros of the source, or in
            # columns that are not stored.
            if TRANSPOSED:
                factors = weight.load([start, tap * channels + first_n])
            else:
                factors = weight.load([first_n, tap * depth + start]).T
        else:
            # Advanced by scalars, so that the pipeline keeps one tile of offsets.
            pixel = n.to(tl.int64) * height * width + down * width + right
            offs = offs_m[:, None] * depth + offs_k[None, :]
            mask = mask_m[:, None] & mask_k[None, :]
            seen = tl.load(source + pixel * depth + start + offs, mask=mask, other=0.0)
            if TRANSPOSED:
                offs = offs_k[:, None] * (taps * channels) + offs_n[None, :]
                at = (start * taps + tap) * channels
            else:
                offs = offs_n[None, :] * (taps * depth) + offs_k[:, None]
                at = tap * depth + start
            mask = mask_k[:, None] & (offs_n < channels)[None, :]
            factors = tl.load(weight + at + offs, mask=mask, other=0.0)
        if a_ptr is not None:
            a = tl.load(a_ptr + n * depth + start + offs_k, mask=mask_k, other=0.0)
            b = tl.load(b_ptr + n * depth + start + offs_k, mask=mask_k, other=0.0)
            z = a[None, :] * seen.to(tl.float32) + b[None, :]
            # The padding is of what the convolution sees: 0, and not silu(b).
            seen = tl.where(mask_m[:, None], _silu(z, TANH), 0.0).to(factors.dtype)
        acc = tl.dot(seen, factors, acc, input_precision="ieee")
    if PARTS == 1:
        return (acc,)
    else:
        halves = tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2))
        return tl.split(tl.permute(halves, (0, 2, 1)))


@triton.jit
def convolution_kernel(
    source, weight, y_ptr, a_ptr, b_ptr, bias_ptr, residual_ptr, partial_ptr,
    height, width, cin, cout, apart, gain,
    SIZE: tl.constexpr, TANH: tl.constexpr, DESCRIPTORS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y, and per tile the moments of y as it is stored: what the next norm reads."""
    pixels = height * width
    tile, n, offs_m, inside, first_n = _own_tile(pixels, cout, BLOCK_M, BLOCK_N)
    parts = _convolve(
        source, weight, a_ptr, b_ptr, tile, n, offs_m, inside, first_n, height, width, cin, cout,
        SIZE, False, TANH, DESCRIPTORS, PARTS, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    wide: tl.constexpr = BLOCK_N // PARTS
    for part in tl.static_range(PARTS):
        offs_n, mask_n, offs, mask = _own_part(n, offs_m, inside, first_n, part, pixels, cout, wide)
        y = parts[part] + per_channel(bias_ptr, offs_n, mask_n, 0.0, wide)[None, :]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        y = (y * gain).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offs, y, mask=mask)
        if partial_ptr is not None:
            store_moments(
                partial_ptr, y.to(tl.float32), inside, offs_n, mask_n, tile, apart, cout
            )  # fmt: skip


@triton.jit
def convolution_input_grad_kernel(
    source, weight, x_ptr, dz_ptr, mean_ptr, rstd_ptr, partial_ptr,
    norm_weight_ptr, norm_bias_ptr, pre_shift_ptr, scale_ptr, shift_ptr,
    height, width, cin, cout, apart, gain, groups, pre_shift_row, scale_row, shift_row,
    SIZE: tl.constexpr, SUMS: tl.constexpr, DESCRIPTORS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dz, the gradient at a xhat + b, and per tile the sums of dz, dz xhat and (3 SUMS) xhat."""
    pixels = height * width
    tile, n, offs_m, inside, first_n = _own_tile(pixels, cin, BLOCK_M, BLOCK_N)
    parts = _convolve(
        source, weight, None, None, tile, n, offs_m, inside, first_n, height, width, cout, cin,
        SIZE, True, False, DESCRIPTORS, PARTS, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    wide: tl.constexpr = BLOCK_N // PARTS
    for part in tl.static_range(PARTS):
        offs_n, mask_n, offs, mask = _own_part(n, offs_m, inside, first_n, part, pixels, cin, wide)
        before = per_channel(pre_shift_ptr, n * pre_shift_row + offs_n, mask_n, 0.0, wide)
        a, b, _, _, _ = affine(
            n, norm_weight_ptr, norm_bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row,
            offs_n, mask_n, wide,
        )  # fmt: skip
        offs_g = n * groups + offs_n // (cin // groups)
        mean = tl.load(mean_ptr + offs_g, mask=mask_n, other=0.0)
        rstd = tl.load(rstd_ptr + offs_g, mask=mask_n, other=0.0)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        xhat = tl.where(mask, (x + (before - mean)[None, :]) * rstd[None, :], 0.0)
        z = a[None, :] * xhat + b[None, :]
        sigmoid = tl.sigmoid(z)
        # A box sees the image's last row also from below it.
        dz = gain * tl.where(mask, parts[part], 0.0) * sigmoid * (1.0 + z * (1.0 - sigmoid))
        tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        sums_ptr = partial_ptr + tile.to(tl.int64) * cin + offs_n
        tl.store(sums_ptr, tl.sum(dz, axis=0), mask=mask_n)
        tl.store(sums_ptr + apart, tl.sum(dz * xhat, axis=0), mask=mask_n)
        if SUMS == 3:
            tl.store(sums_ptr + 2 * apart, tl.sum(xhat, axis=0), mask=mask_n)
