"""What the kernels of the spatial branch share on the device: tiles, taps, statistics, norms.

Its maps lie as [N * H * W, h], positions one behind the other and their channels dense. A tile is
BLOCK_P positions, whichever samples they belong to: none is cut short but the last.

A norm over (n, p) takes two steps. Each program leaves a partial for its tile: of a map its sum and
centred sum of squares, of a gradient two plain sums. Whoever needs the norm merges all the partials
in a fixed order, each program for itself: a few kilobytes from L2 in exchange for a launch.
"""

import triton
import triton.language as tl

from bam_kernels.backends.triton.device_math import relu


@triton.jit
def tile_positions(pid, total, BLOCK_P: tl.constexpr):
    """(first position, the tile's own, which of them there are, how many) of tile `pid`.

    The first is a scalar of `total`'s type, the others [BLOCK_P] of 32 bits, counted from it.
    """
    first = tl.cast(pid, total.dtype) * BLOCK_P  # a loop's index may be a plain number
    own = tl.arange(0, BLOCK_P)
    count = tl.minimum(total - first, BLOCK_P).to(tl.int32)
    return first, own, own < count, count


@triton.jit
def tile_start(first, hidden):
    """Where a tile begins in a map: 64 bits."""
    return first.to(tl.int64) * hidden


@triton.jit
def tile_coordinates(first, own, positions, W, WRAPS: tl.constexpr):
    """(row, column) in their samples of positions `own` behind `first`.

    WRAPS says that a tile may be longer than a sample. Divisions are what this costs.
    """
    p = (first % positions).to(tl.int32) + own
    if WRAPS:
        p = p % positions
    else:
        p = tl.where(p < positions, p, p - positions)
    row = p // W
    return row, p - row * W


@triton.jit
def tile_offsets(units, own, hidden):
    """Offsets [units, positions] behind a tile's first position: of 32 bits, as a tile is small."""
    return units[:, None] + (own * hidden)[None, :]


@triton.jit
def _turned_offsets(first, own, units, positions, hidden):
    """Offsets [units, positions] in a map that lies as NCHW."""
    p = (first % positions).to(tl.int32) + own
    n = (first // positions + p // positions).to(tl.int64)
    at = n * hidden * positions + p % positions
    return at[None, :] + units.to(tl.int64)[:, None] * positions


@triton.jit
def load_map(source, first, own, units, mask, positions, hidden, TURNED: tl.constexpr):
    """A tile [units, positions] of a map; TURNED, of one that lies as NCHW."""
    if TURNED:
        at = _turned_offsets(first, own, units, positions, hidden)
        value = tl.load(source + at, mask=mask, other=0.0)
    else:
        at = tile_offsets(units, own, hidden)
        value = tl.load(source + tile_start(first, hidden) + at, mask=mask, other=0.0)
    return value


@triton.jit
def store_map(out, value, first, own, units, mask, positions, hidden, TURNED: tl.constexpr):
    """A tile [units, positions] into a map; TURNED, into one that lies as NCHW."""
    if TURNED:
        tl.store(out + _turned_offsets(first, own, units, positions, hidden), value, mask=mask)
    else:
        at = tile_offsets(units, own, hidden)
        tl.store(out + tile_start(first, hidden) + at, value, mask=mask)


@triton.jit
def tap_steps(hidden, USED: tl.constexpr, NORM: tl.constexpr, DTYPE: tl.constexpr):
    """How many steps of `USED` taps there are.

    Of wide types, and with a norm, a number that the compiler does not know: nine steps unrolled
    keep so many masks and addresses that registers spill.
    """
    if NORM or DTYPE == tl.float32 or DTYPE == tl.float64:
        return tl.minimum(9 // USED, hidden * 9)
    else:
        return 9 // USED


@triton.jit
def taps(step, lane, USED: tl.constexpr, DILATION: tl.constexpr):
    """(rows down, columns right) to the neighbours of `USED` taps a step, `lane` of them."""
    tap = step * USED + lane
    return (tap // 3 - 1) * DILATION, (tap % 3 - 1) * DILATION


@triton.jit
def tap_mask(row, column, down, right, H, W):
    """Which positions have the taps' neighbours inside of the map: [taps, positions]."""
    along = (row[None, :] + down[:, None]).to(tl.uint32)  # what is negative is beyond
    across = (column[None, :] + right[:, None]).to(tl.uint32)
    return (along < tl.cast(H, tl.uint32)) & (across < tl.cast(W, tl.uint32))


@triton.jit
def merge_statistics(
    partials,
    begin,
    end,
    count,
    total,
    block,
    units,
    in_h,
    hidden,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """(mean, biased variance [BLOCK_H], values) of partials `begin` to `end` of [2, count, hidden].

    Chan's merge. Partial i holds `block` values of each channel, or in the last what is left of
    `total`.
    """
    values = (tl.minimum(end * block, total) - begin * block).to(ACC)
    mean = tl.zeros((BLOCK_H,), ACC)
    for start in range(begin, end, BLOCK_T):
        i = start + tl.arange(0, BLOCK_T)
        mask = (i < end)[:, None] & in_h[None, :]
        mean += tl.sum(tl.load(partials + i[:, None] * hidden + units[None, :], mask, 0.0), axis=0)
    mean = mean / values
    squares = tl.zeros((BLOCK_H,), ACC)
    for start in range(begin, end, BLOCK_T):
        i = start + tl.arange(0, BLOCK_T)
        mask = (i < end)[:, None] & in_h[None, :]
        at = i[:, None] * hidden + units[None, :]
        n = tl.where(i == count - 1, total - (count - 1) * block, block).to(ACC)[:, None]
        off = tl.load(partials + at, mask, 0.0) / n - mean[None, :]
        centred = tl.load(partials + count * hidden + at, mask, 0.0) + n * off * off
        squares += tl.sum(tl.where(mask, centred, 0.0), axis=0)
    return mean, squares / values, values


@triton.jit
def merge_sums(
    partials,
    begin,
    end,
    count,
    units,
    in_h,
    hidden,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The two sums [BLOCK_H] of partials `begin` to `end` of [2, count, hidden]."""
    first = tl.zeros((BLOCK_H,), ACC)
    second = tl.zeros((BLOCK_H,), ACC)
    for start in range(begin, end, BLOCK_T):
        i = start + tl.arange(0, BLOCK_T)
        mask = (i < end)[:, None] & in_h[None, :]
        at = i[:, None] * hidden + units[None, :]
        first += tl.sum(tl.load(partials + at, mask, 0.0), axis=0)
        second += tl.sum(tl.load(partials + count * hidden + at, mask, 0.0), axis=0)
    return first, second


@triton.jit
def merge_scalar_sums(partials, count, ACC: tl.constexpr):
    """The two sums of partials [2, count] of one channel."""
    first = tl.zeros((128,), ACC)
    second = tl.zeros((128,), ACC)
    for start in range(0, count, 128):
        i = start + tl.arange(0, 128)
        first += tl.load(partials + i, mask=i < count, other=0.0)
        second += tl.load(partials + count + i, mask=i < count, other=0.0)
    return tl.sum(first, axis=0), tl.sum(second, axis=0)


@triton.jit
def total_of(values):
    """The sum of values [BLOCK_P], as a tensor of one.

    Triton 3.6 cannot compile the sum of a vector that comes from a dot on sm_100's tensor cores to
    a scalar ("parent layout must have at least rank >= 2").
    """
    return tl.sum(values[None, :], axis=1)


@triton.jit
def store_total(pointer, total):
    tl.store(pointer + tl.arange(0, 1), total)


@triton.jit
def store_statistics(
    value, mask, n, partials, index, count, units, in_h, hidden, ACC: tl.constexpr
):
    """The partial of one tile: sums and centred sums of squares of value [BLOCK_H, BLOCK_P]."""
    total = tl.sum(tl.where(mask, value, 0.0), axis=1)
    off = tl.where(mask, value - (total / n.to(ACC))[:, None], 0.0)
    tl.store(partials + index * hidden + units, total, mask=in_h)
    tl.store(partials + (count + index) * hidden + units, tl.sum(off * off, axis=1), mask=in_h)


@triton.jit
def store_sums(first, second, partials, index, count, units, in_h, hidden):
    """The partial of one tile of a gradient: two sums [BLOCK_H]."""
    tl.store(partials + index * hidden + units, first, mask=in_h)
    tl.store(partials + (count + index) * hidden + units, second, mask=in_h)


@triton.jit
def affine(
    mean, variance, gamma, beta, units, in_h, EPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """(mean, 1 / std, scale, shift) [BLOCK_H] of a norm with known statistics.

    It is (z - mean) * scale + shift; where `mean` is None there is no norm, and that is z.
    """
    mu = tl.zeros((BLOCK_H,), ACC)
    rstd = mu + 1.0
    scale = mu + 1.0
    shift = mu
    if mean is not None:
        mu = tl.load(mean + units, mask=in_h, other=0.0).to(ACC)
        rstd = 1 / tl.sqrt(tl.load(variance + units, mask=in_h, other=1.0).to(ACC) + EPS)
        scale, shift = _scale_shift(rstd, gamma, beta, units, in_h, ACC, BLOCK_H)
    return mu, rstd, scale, shift


@triton.jit
def _scale_shift(rstd, gamma, beta, units, in_h, ACC: tl.constexpr, BLOCK_H: tl.constexpr):
    scale = rstd
    shift = tl.zeros((BLOCK_H,), ACC)
    if gamma is not None:
        scale = rstd * tl.load(gamma + units, mask=in_h, other=0.0).to(ACC)
    if beta is not None:
        shift = tl.load(beta + units, mask=in_h, other=0.0).to(ACC)
    return scale, shift


@triton.jit
def input_affine(
    partials,
    count,
    block,
    total,
    statistics,
    mean,
    variance,
    gamma,
    beta,
    units,
    in_h,
    hidden,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """(mean, scale, shift) of the norm in front: from partials, or from known statistics.

    From partials, program 0 leaves mean and variance in `statistics` [2, hidden].
    """
    if partials is not None:
        mu, variance_, _ = merge_statistics(
            partials, 0, count, count, total, block, units, in_h, hidden, ACC, BLOCK_H, BLOCK_T
        )
        if tl.program_id(0) == 0:
            tl.store(statistics + units, mu, mask=in_h)
            tl.store(statistics + hidden + units, variance_, mask=in_h)
        rstd = 1 / tl.sqrt(variance_ + EPS)
        scale, shift = _scale_shift(rstd, gamma, beta, units, in_h, ACC, BLOCK_H)
    else:
        mu, rstd, scale, shift = affine(mean, variance, gamma, beta, units, in_h, EPS, ACC, BLOCK_H)
    return mu, scale, shift


@triton.jit
def project(value, mu, scale, shift, units, in_h, project_weight, project_bias, ACC: tl.constexpr):
    """(norm's output u, wp . relu(u) + bp): the last 1x1 convolution, [BLOCK_H, BLOCK_P] to P."""
    u = (value - mu[:, None]) * scale[:, None] + shift[:, None]
    weight = tl.load(project_weight + units, mask=in_h, other=0.0).to(ACC)
    active = tl.where(in_h[:, None], relu(u), 0.0)
    q = tl.sum(active * weight[:, None], axis=0)
    if project_bias is not None:
        q += tl.load(project_bias).to(ACC)
    return u, active, weight, q


@triton.jit
def scalar_affine(mean, variance, gamma, beta, EPS: tl.constexpr, ACC: tl.constexpr):
    """(mean, 1 / std, scale, shift) of the last norm, whose only channel has known statistics."""
    mu = tl.load(mean).to(ACC)
    rstd = 1 / tl.sqrt(tl.load(variance).to(ACC) + EPS)
    scale = rstd
    shift = mu * 0
    if gamma is not None:
        scale = rstd * tl.load(gamma).to(ACC)
    if beta is not None:
        shift = tl.load(beta).to(ACC)
    return mu, rstd, scale, shift
