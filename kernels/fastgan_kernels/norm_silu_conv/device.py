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
weights stay too; a persistent program takes every so many-th, which keeps that order.
"""

from fastgan_kernels.norm_silu.tiles import affine, per_channel
from fastgan_kernels.norm_silu_conv.sums import store_moments
from fastgan_kernels.runtime import tl, triton


@triton.jit
def _silu(z, TANH: tl.constexpr, INTERPRETED: tl.constexpr):
    """z sigmoid(z) = h tanh(h) + h with h = z / 2."""
    if TANH:
        h = 0.5 * z
        if INTERPRETED:
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
def _own_tile(index, pixels, channels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tile `index`: its pixels' tile of all samples' and sample; pixels, mask; first channel."""
    across, tiles = tl.cdiv(channels, BLOCK_N), tl.cdiv(pixels, BLOCK_M)
    tile = index // across
    offs_m = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    return tile, tile // tiles, offs_m, offs_m < pixels, index % across * BLOCK_N


@triton.jit
def _source_tile(
    source, n, first, offs_m, offs_k, down, right, start, mask_m, height, width, depth,
    LOADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_K] of sample n's pixels `down` and `right` of the tile's.

    By boxes 0 outside of the image, by rows whatever lies there, by pointers 0 where not mask_m.
    """
    if LOADS == "boxes":
        at = [n, first // width + down, right, start]
        tile = source.load(at).reshape(BLOCK_M, BLOCK_K)
    elif LOADS == "rows":
        tile = source.load([(n * height + down) * width + right + first, start])
    else:
        # Advanced by scalars, so that the pipeline keeps one tile of offsets.
        source += n.to(tl.int64) * height * width * depth + (down * width + right) * depth + start
        offs = offs_m[:, None] * depth + offs_k[None, :]
        mask = mask_m[:, None] & (offs_k < depth - start)[None, :]
        tile = tl.load(source + offs, mask=mask, other=0.0)
    return tile


@triton.jit
def _weight_tile(
    weight, tap, start, offs_k, offs_n, mask_n, first_n, depth, channels,
    TAPS: tl.constexpr, TRANSPOSED: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K, BLOCK_N] of a weight [channels, taps, depth], or else [depth, taps, channels].

    Descriptors may read the next tap behind the last channel: beside a source tile's zeros or in
    columns that are not stored.
    """
    if LOADS != "pointers":
        if TRANSPOSED:
            tile = weight.load([start, tap * channels + first_n])
        else:
            tile = weight.load([first_n, tap * depth + start]).T
    else:
        mask = (offs_k < depth - start)[:, None] & mask_n[None, :]
        if TRANSPOSED:
            offs = offs_k[:, None] * (TAPS * channels) + offs_n[None, :]
            tile = tl.load(weight + (start * TAPS + tap) * channels + offs, mask=mask, other=0.0)
        else:
            offs = offs_n[None, :] * (TAPS * depth) + offs_k[:, None]
            tile = tl.load(weight + tap * depth + start + offs, mask=mask, other=0.0)
    return tile


@triton.jit
def _convolve(
    source, weight, a_ptr, b_ptr, tile, n, offs_m, inside, first_n, height, width, depth, channels,
    SIZE: tl.constexpr, TRANSPOSED: tl.constexpr, TANH: tl.constexpr, INTERPRETED: tl.constexpr,
    LOADS: tl.constexpr, SPECIALIZED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] sums over taps and `depth` channels of sample n of the source.

    With a and b the source is normalised and activated; TRANSPOSED its taps are passed in reverse.
    """
    taps: tl.constexpr = SIZE * SIZE
    first = tile % tl.cdiv(height * width, BLOCK_M) * BLOCK_M
    row, column = offs_m // width, offs_m % width
    offs_n, offs_k = first_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    mask_n = offs_n < channels
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = tl.cdiv(depth, BLOCK_K) * taps
    for step in tl.range(0, steps, warp_specialize=SPECIALIZED):
        tap, start = step % taps, step // taps * BLOCK_K
        down, right = tap // SIZE - SIZE // 2, tap % SIZE - SIZE // 2
        if TRANSPOSED:
            down, right = -down, -right
        mask_m = inside
        if SIZE > 1:
            mask_m = mask_m & (row + down >= 0) & (row + down < height)
            mask_m = mask_m & (column + right >= 0) & (column + right < width)
        seen = _source_tile(
            source, n, first, offs_m, offs_k, down, right, start, mask_m, height, width, depth,
            LOADS, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        factors = _weight_tile(
            weight, tap, start, offs_k, offs_n, mask_n, first_n, depth, channels,
            taps, TRANSPOSED, LOADS,
        )  # fmt: skip
        if a_ptr is not None:
            mask_k = offs_k < depth - start
            a = tl.load(a_ptr + n * depth + start + offs_k, mask=mask_k, other=0.0)
            b = tl.load(b_ptr + n * depth + start + offs_k, mask=mask_k, other=0.0)
            z = a[None, :] * seen.to(tl.float32) + b[None, :]
            # The padding is of what the convolution sees: 0, and not silu(b).
            s = tl.where(mask_m[:, None], _silu(z, TANH, INTERPRETED), 0.0)
            seen = s.to(factors.dtype)
        elif LOADS == "rows":
            seen = tl.where(mask_m[:, None], seen, 0.0)
        acc = tl.dot(seen, factors, acc, input_precision="ieee")
    return acc


@triton.jit
def _parts(v, PARTS: tl.constexpr):
    """[M, N] as a tuple of itself, or (2 PARTS) of its left and right [M, N / 2].

    What the epilogue reads for a whole wide tile does not fit beside it into registers.
    """
    m: tl.constexpr = v.shape[0]
    n: tl.constexpr = v.shape[1]
    if PARTS == 1:
        return (v,)
    else:
        return tl.split(tl.permute(tl.reshape(v, (m, 2, n // 2)), (0, 2, 1)))


@triton.jit
def _finish(
    y, y_ptr, bias_ptr, residual_ptr, partial_ptr, tile, n, offs_m, inside, first_n,
    pixels, cout, apart, gain,
):  # fmt: skip
    """Adds, scales and stores sums [M, some channels from first_n on], and their moments."""
    offs_n = first_n + tl.arange(0, y.shape[1])
    mask_n = offs_n < cout
    y += per_channel(bias_ptr, offs_n, mask_n, 0.0, y.shape[1])[None, :]
    base = n.to(tl.int64) * pixels * cout
    offs, mask = offs_m[:, None] * cout + offs_n[None, :], inside[:, None] & mask_n[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
    y = (y * gain).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + base + offs, y, mask=mask)
    if partial_ptr is not None:
        # Of y as it is stored: what the next norm reads.
        store_moments(
            partial_ptr, y.to(tl.float32), inside, offs_n, mask_n, tile, apart, pixels, cout,
            y.shape[0],
        )  # fmt: skip


@triton.jit
def convolution_kernel(
    source, weight, y_ptr, a_ptr, b_ptr, bias_ptr, residual_ptr, partial_ptr,
    programs, height, width, cin, cout, apart, gain,
    SIZE: tl.constexpr, TANH: tl.constexpr, INTERPRETED: tl.constexpr, LOADS: tl.constexpr,
    SPECIALIZED: tl.constexpr, FLATTEN: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pixels = height * width
    for index in tl.range(tl.program_id(0), programs, tl.num_programs(0), flatten=FLATTEN):
        tile, n, offs_m, inside, first_n = _own_tile(index, pixels, cout, BLOCK_M, BLOCK_N)
        y = _convolve(
            source, weight, a_ptr, b_ptr, tile, n, offs_m, inside, first_n,
            height, width, cin, cout, SIZE, False, TANH, INTERPRETED, LOADS, SPECIALIZED,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        parts = _parts(y, PARTS)
        for i in tl.static_range(PARTS):
            _finish(
                parts[i], y_ptr, bias_ptr, residual_ptr, partial_ptr, tile, n, offs_m, inside,
                first_n + i * (BLOCK_N // PARTS), pixels, cout, apart, gain,
            )  # fmt: skip


@triton.jit
def _finish_input_grad(
    ds, x_ptr, dz_ptr, mean_ptr, rstd_ptr, partial_ptr,
    norm_weight_ptr, norm_bias_ptr, pre_shift_ptr, scale_ptr, shift_ptr,
    tile, n, offs_m, inside, first_n,
    pixels, cin, groups, apart, pre_shift_row, scale_row, shift_row, gain, SUMS: tl.constexpr,
):  # fmt: skip
    """dz of ds [M, some channels from first_n on], and its sums."""
    wide: tl.constexpr = ds.shape[1]
    offs_n = first_n + tl.arange(0, wide)
    mask_n = offs_n < cin
    before = per_channel(pre_shift_ptr, n * pre_shift_row + offs_n, mask_n, 0.0, wide)
    a, b, _, _, _ = affine(
        n, norm_weight_ptr, norm_bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row,
        offs_n, mask_n, wide,
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
    # A box sees the image's last row also from below it.
    dz = gain * tl.where(mask, ds, 0.0) * sigmoid * (1.0 + z * (1.0 - sigmoid))
    tl.store(dz_ptr + base + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    sums_ptr = partial_ptr + tile.to(tl.int64) * cin + offs_n
    tl.store(sums_ptr, tl.sum(dz, axis=0), mask=mask_n)
    tl.store(sums_ptr + apart, tl.sum(dz * xhat, axis=0), mask=mask_n)
    if SUMS == 3:
        tl.store(sums_ptr + 2 * apart, tl.sum(xhat, axis=0), mask=mask_n)


@triton.jit
def convolution_input_grad_kernel(
    source, weight, x_ptr, dz_ptr, mean_ptr, rstd_ptr, partial_ptr,
    norm_weight_ptr, norm_bias_ptr, pre_shift_ptr, scale_ptr, shift_ptr,
    programs, height, width, cin, cout, groups, apart, pre_shift_row, scale_row, shift_row, gain,
    SIZE: tl.constexpr, SUMS: tl.constexpr, LOADS: tl.constexpr, SPECIALIZED: tl.constexpr,
    FLATTEN: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dz, the gradient at a x + b, and per tile the sums of dz, dz xhat and (3 SUMS) xhat."""
    pixels = height * width
    for index in tl.range(tl.program_id(0), programs, tl.num_programs(0), flatten=FLATTEN):
        tile, n, offs_m, inside, first_n = _own_tile(index, pixels, cin, BLOCK_M, BLOCK_N)
        ds = _convolve(
            source, weight, None, None, tile, n, offs_m, inside, first_n,
            height, width, cout, cin, SIZE, True, False, False, LOADS, SPECIALIZED,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        parts = _parts(ds, PARTS)
        for i in tl.static_range(PARTS):
            _finish_input_grad(
                parts[i], x_ptr, dz_ptr, mean_ptr, rstd_ptr, partial_ptr,
                norm_weight_ptr, norm_bias_ptr, pre_shift_ptr, scale_ptr, shift_ptr,
                tile, n, offs_m, inside, first_n + i * (BLOCK_N // PARTS),
                pixels, cin, groups, apart, pre_shift_row, scale_row, shift_row, gain, SUMS,
            )  # fmt: skip
