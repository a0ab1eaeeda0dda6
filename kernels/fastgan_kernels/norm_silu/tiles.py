"""What the kernels of group_norm_silu are made of: how a sample is cut, and the parts of a pass."""

from dataclasses import dataclass

from fastgan_kernels.runtime import cdiv, next_power_of_2, tl, triton

# Elements of 16 bits that 512 threads hold, between reading and writing them, without spills.
TWO_TILES = 24576
# CUDA's limit of a grid's second axis.
GRID_SAMPLES = 65_535


@dataclass(frozen=True)
class Plan:
    """How a sample is cut: channels per program, pixels per tile, one tile or several."""

    slab: int
    block: int
    resident: bool
    num_warps: int
    tail: int = 0
    """Channels that a second tile holds, where the slab's are no power of two; else 0."""
    swept_bytes: int = 0
    """Of x, and backward of dy, that a program reads twice; 0 where it is resident."""


@dataclass(frozen=True)
class Chip:
    """Multiprocessors, and bytes of the second-level cache that they share."""

    processors: int
    l2_bytes: int


A100 = Chip(108, 40 * 2**20)


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
    tail = slab - next_power_of_2(slab + 1) // 2
    held = tile(slab - tail) + tile(tail)
    if tail and held <= TWO_TILES and itemsize == 2 and not backward:
        return Plan(slab, block, True, 16, tail)
    # A program alone on its multiprocessor: what it reads twice should not leave the cache.
    warps = 16 if backward else 32
    swept = slab * pixels * itemsize * (2 if backward else 1)
    block = max(1, 256 * warps // next_power_of_2(slab))
    return Plan(slab, block, False, warps, swept_bytes=swept)


def chunks(samples: int, slabs: int, p: Plan, chip: Chip) -> list[slice]:
    """The samples of each launch, `slabs` programs per sample: all in one launch where they may be.

    Where the programs that run at a time, one per multiprocessor, sweep over more than the
    second-level cache holds, a launch has only as many as it does hold, of one sample at least.
    Chunks are about equal, so that the last one keeps as many multiprocessors busy as the others.
    """
    most = GRID_SAMPLES
    if chip.processors * p.swept_bytes > chip.l2_bytes:
        most = max(1, chip.l2_bytes // p.swept_bytes // slabs)
    count = cdiv(samples, most)
    return [slice(samples * i // count, samples * (i + 1) // count) for i in range(count)]


@triton.jit
def own_slab(pixels, channels, SLAB: tl.constexpr, SLAB_PAD: tl.constexpr):
    """The program's sample, its first element, its channels in slab and tensor, and their mask."""
    slab, n = tl.program_id(0), tl.program_id(1)
    base = n.to(tl.int64) * pixels * channels + slab * SLAB
    offs_s = tl.arange(0, SLAB_PAD)
    return n, base, offs_s, slab * SLAB + offs_s, offs_s < SLAB


@triton.jit
def per_channel(ptr, offs, mask, default, SLAB_PAD: tl.constexpr):
    """[SLAB_PAD] float32 parameters, or `default` where the op has none."""
    if ptr is None:
        value = tl.full((SLAB_PAD,), default, tl.float32)
    else:
        value = tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def affine(
    n, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row, offs_c, mask_c,
    SLAB_PAD: tl.constexpr,
):  # fmt: skip
    """a and b of z = a xhat + b, and gamma, beta, 1 + scale which they are made of."""
    gamma = per_channel(weight_ptr, offs_c, mask_c, 1.0, SLAB_PAD)
    beta = per_channel(bias_ptr, offs_c, mask_c, 0.0, SLAB_PAD)
    gain = 1.0 + per_channel(scale_ptr, n * scale_row + offs_c, mask_c, 0.0, SLAB_PAD)
    shift = per_channel(shift_ptr, n * shift_row + offs_c, mask_c, 0.0, SLAB_PAD)
    return gamma * gain, beta * gain + shift, gamma, beta, gain


@triton.jit
def place(start, offs_s, mask_c, pixels, channels, BLOCK: tl.constexpr):
    """Offsets from the slab's first element and mask of the tile that begins at pixel `start`."""
    offs_p = start + tl.arange(0, BLOCK)
    mask = (offs_p < pixels)[:, None] & mask_c[None, :]
    return offs_p[:, None] * channels + offs_s[None, :], mask


@triton.jit
def last_tile(pixels, BLOCK: tl.constexpr):
    """The pixel at which a sweep's last tile begins."""
    return (pixels - 1) // BLOCK * BLOCK


@triton.jit
def group_totals(v, GROUP: tl.constexpr, SLAB: tl.constexpr, SLAB_PAD: tl.constexpr):
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
def group_totals_of_two(v, w, GROUP: tl.constexpr, HEAD: tl.constexpr, TAIL_PAD: tl.constexpr):
    """The same for a slab of two tiles: v [HEAD] and, behind them, w [TAIL_PAD]."""
    group_v = tl.arange(0, HEAD) // GROUP
    group_w = (HEAD + tl.arange(0, TAIL_PAD)) // GROUP
    shared = group_v[:, None] == group_w[None, :]
    of_v = tl.where(group_v[:, None] == group_v[None, :], v[None, :], 0.0)
    of_w = tl.where(group_w[:, None] == group_w[None, :], w[None, :], 0.0)
    totals_v = tl.sum(of_v, axis=1) + tl.sum(tl.where(shared, w[None, :], 0.0), axis=1)
    totals_w = tl.sum(of_w, axis=1) + tl.sum(tl.where(shared, v[:, None], 0.0), axis=0)
    return totals_v, totals_w


@triton.jit
def moments(
    x_ptr, before, offs_s, mask_c, pixels, channels,
    BLOCK: tl.constexpr, SLAB_PAD: tl.constexpr, STOP: tl.constexpr,
):  # fmt: skip
    """Each channel's mean and sum of squared deviations, and the last tile of u."""
    if STOP is not None:
        offs, mask = place(0, offs_s, mask_c, pixels, channels, BLOCK)
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
            offs, mask = place(start, offs_s, mask_c, pixels, channels, BLOCK)
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
def store_y(y_ptr, offs, mask, u, mean, a, b, ACT: tl.constexpr):
    z = (u - mean[None, :]) * a[None, :] + b[None, :]
    y = z * tl.sigmoid(z) if ACT else z
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_statistics(
    mean_ptr, rstd_ptr, n, groups, offs_s, offs_c, mask_c, mean, rstd, GROUP: tl.constexpr
):  # fmt: skip
    """The first channel of each group writes the group's mean and rstd."""
    first = mask_c & (offs_s % GROUP == 0)
    offs_g = n * groups + offs_c // GROUP
    tl.store(mean_ptr + offs_g, mean, mask=first)
    tl.store(rstd_ptr + offs_g, rstd, mask=first)
