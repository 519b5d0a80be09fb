"""What the kernels of the spatial branch share on the device: statistics, norms, projection.

A norm over (n, p) takes two steps. Each program leaves a partial for its tile: of a map its sum and
centred sum of squares, of a gradient two plain sums. Whoever needs the norm merges all the partials
in a fixed order, each program for itself: a few kilobytes from L2 in exchange for a launch.
"""

import triton
import triton.language as tl


@triton.jit
def merge_statistics(
    partials,
    count,
    tiles,
    positions,
    block,
    N,
    units,
    in_h,
    hidden,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Mean and biased variance [BLOCK_H] from partials [2, count, hidden] (Chan's merge).

    Partial i holds `block` positions, or what is left of `positions` in the last of a sample's
    `tiles`.
    """
    total = N.to(ACC) * positions.to(ACC)
    mean = tl.zeros((BLOCK_H,), ACC)
    for start in range(0, count, BLOCK_T):
        i = start + tl.arange(0, BLOCK_T)
        mask = (i < count)[:, None] & in_h[None, :]
        mean += tl.sum(tl.load(partials + i[:, None] * hidden + units[None, :], mask, 0.0), axis=0)
    mean = mean / total
    squares = tl.zeros((BLOCK_H,), ACC)
    for start in range(0, count, BLOCK_T):
        i = start + tl.arange(0, BLOCK_T)
        mask = (i < count)[:, None] & in_h[None, :]
        at = i[:, None] * hidden + units[None, :]
        left = positions - (tiles - 1) * block
        n = tl.where(i % tiles == tiles - 1, left, block).to(ACC)[:, None]
        off = tl.load(partials + at, mask, 0.0) / n - mean[None, :]
        centred = tl.load(partials + count * hidden + at, mask, 0.0) + n * off * off
        squares += tl.sum(tl.where(mask, centred, 0.0), axis=0)
    return mean, squares / total


@triton.jit
def merge_sums(
    partials,
    count,
    units,
    in_h,
    hidden,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The two sums [BLOCK_H] of partials [2, count, hidden]."""
    first = tl.zeros((BLOCK_H,), ACC)
    second = tl.zeros((BLOCK_H,), ACC)
    for start in range(0, count, BLOCK_T):
        i = start + tl.arange(0, BLOCK_T)
        mask = (i < count)[:, None] & in_h[None, :]
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
    tiles,
    positions,
    block,
    N,
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
        mu, variance_ = merge_statistics(
            partials, count, tiles, positions, block, N, units, in_h, hidden, ACC, BLOCK_H, BLOCK_T
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
def tap_mask(row, column, down, right, H, W, in_p):
    """Which positions have the tap's neighbour inside of the map."""
    across = column + right
    along = row + down
    return in_p & (along >= 0) & (along < H) & (across >= 0) & (across < W)


@triton.jit
def relu(value):
    """A ReLU that lets NaN through, as torch's does."""
    return tl.where(value < 0, 0.0, value)


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
