"""The launch tables: every tile and every split, with its reason; never autotuned at run time.

Tile widths and split counts set the order of summation, hence the bits of a result; a table keeps
them the same from run to run and from machine to machine of one architecture. `override` swaps an
entry for a search or a test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch

# Enough programs for two waves on the widest GPUs in use (132 multiprocessors on an H200, 160 and
# more on newer ones). A constant, not the machine's own count, so that the split, and with it the
# bits, is the same everywhere.
TARGET_PROGRAMS = 264

# The same in warps, for kernels of few warps a program: two waves of 32 warps a multiprocessor.
TARGET_WARPS = 8448

# tl.dot wants at least 16 along each reduced axis for 16-bit operands (8 for fp32, 4 for fp64).
_LEAST = 16


@dataclasses.dataclass(frozen=True)
class Tile:
    """One launch: channels and positions a program covers at a time, warps, pipeline stages.

    `registers` is what `launch.registers` allows a thread; None leaves it to the launcher.
    """

    block_c: int
    block_p: int
    num_warps: int
    num_stages: int
    registers: int | None = None


_overrides: dict[str, Tile] = {}


@contextlib.contextmanager
def override(**tiles: Tile) -> Iterator[None]:
    """Use these tiles, by kernel name, in place of the table's while the context lasts."""
    if unknown := set(tiles) - set(KERNELS):
        raise ValueError(f"tiles: expected names among {KERNELS}, got {sorted(unknown)}")
    previous = dict(_overrides)
    _overrides.update(tiles)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(previous)


def overridden() -> tuple[tuple[str, Tile], ...]:
    """What `override` has set, as something to compare."""
    return tuple(_overrides.items()) if _overrides else ()


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def tile(
    kernel: str,
    dtype: torch.dtype,
    channels: int,
    positions: int,
    hidden: int,
    channels_last: bool,
    precision: str = "ieee",
) -> Tile:
    """The table's entry for a kernel, cut down to the map where the map is smaller.

    Args:
        kernel: "pool_reduce", "gate", "gate_backward_reduce" or "input_gradient".
        dtype: of x.
        channels: C.
        positions: H * W.
        hidden: C // r, or 0 where the launch has no 1x1 reduction.
        channels_last: whether C is the dense axis.
        precision: of fp32 dots, "ieee" or "tf32".
    """
    entry = _overrides.get(kernel)
    return _tile(kernel, entry, dtype, channels, positions, hidden, channels_last, precision)


@functools.lru_cache(maxsize=4096)
def _tile(
    kernel: str,
    entry: Tile | None,
    dtype: torch.dtype,
    channels: int,
    positions: int,
    hidden: int,
    channels_last: bool,
    precision: str,
) -> Tile:
    if entry is None:
        entry = _TABLES[kernel](dtype.itemsize, hidden, channels_last, precision)
    return dataclasses.replace(
        entry,
        block_c=min(entry.block_c, max(next_power_of_2(channels), _LEAST)),
        block_p=min(entry.block_p, max(next_power_of_2(positions), _LEAST)),
    )


def block_hidden(kernel: str, dtype: torch.dtype, hidden: int) -> int:
    """The width of a hidden block: a power of two that tl.dot takes.

    At most 64, where 128 would spill, and 128 for the reduction of half types. A wider hidden layer
    (C = 2048 at r = 16) takes several blocks, and each reads x once more.
    """
    most = 128 if kernel == "pool_reduce" and dtype.itemsize == 2 else 64
    return min(max(next_power_of_2(hidden), _LEAST), most)


def channel_mlp_blocks(
    samples: int, hidden: int, batch_stats: bool, itemsize: int, backward: bool = False
) -> tuple[int, int, int, int]:
    """(BLOCK_N, BLOCK_C, BLOCK_H, num_warps) of the channel MLP whose programs hold the hidden
    layer of their samples; its accumulator has `itemsize`.

    BLOCK_N is the whole batch where it takes statistics. BLOCK_C, the channels of the logits that a
    program owns and of its input that it takes at a time, gives 8 to 32 programs at C of 256 to
    1024, and twice as many backward; fp64 spills at 32.
    """
    block_n = max(next_power_of_2(samples), _LEAST) if batch_stats else _LEAST
    block_h = block_whole(hidden)
    if backward and not batch_stats:  # mostly the whole batch, and no loop
        block_n = max(_LEAST, min(next_power_of_2(samples), 2048 // block_h))
    num_warps = 16 if block_h > 64 else 8 if block_n * block_h >= 4096 else 4
    block_c = 16 if itemsize == 8 or backward else 32
    if backward:  # more is live at once; fewer warps or wider blocks spill on one or another target
        num_warps = max(num_warps, 8)
    if entry := _overrides.get("channel_mlp"):
        block_c, num_warps = entry.block_c, entry.num_warps
    return block_n, block_c, block_h, num_warps


# The most samples whose columns a program of the channel MLP holds in registers: four of them, of 8
# channels or units, would fill half of a multiprocessor's registers at 1024, and spill backward.
MOST_COLUMN_SAMPLES = 512


def channel_mlp_in_steps(
    samples: int,
    channels: int,
    blocks: tuple[int, int, int, int],
    itemsize: int,
    backward: bool = False,
) -> bool:
    """Whether the channel MLP takes a launch a step, given its blocks in one and the bytes of an
    element of `pooled`: where one launch would be slow, or would not hold the hidden layer.

    Forward each program makes the hidden layer of its samples anew. On an H200 2^20 multiplications
    in a program take 36 us without tensor cores (fp16 at C = 256, N = 256), and a launch 3 us: one
    launch has up to an eighth of that, and half of it on tensor cores. Backward each program adds
    up a partial of the hidden layer's gradient from every block of channels: from L2, for up to
    `_READ_AGAIN_BYTES` in all.
    """
    block_n, block_c, block_h, _ = blocks
    if samples > MOST_COLUMN_SAMPLES:
        return False
    if block_n * block_h > (2048 if backward else 4096):
        return True
    if backward:
        partials = -(-channels // block_c)
        return not reads_again(partials * partials * samples * block_h * 4)
    return block_n * block_h * channels > (1 << 19 if itemsize == 2 else 1 << 17)


@dataclasses.dataclass(frozen=True)
class ProductTile:
    """A tile [block_n, block_u] of a product, summed over block_k at a time."""

    block_n: int
    block_u: int
    block_k: int
    num_warps: int
    num_stages: int


def channel_mlp_tile(half: bool) -> ProductTile:
    """Of the hidden layer, or of its gradient: N / 16 x h / 16 programs, 16 at C = 256 and N = 256
    and 64 at C = 1024. `half` says that both factors are of one half type, for tensor cores.

    Each walks all of C; the stages hide the latency of what is in L2. Without tensor cores half the
    samples: the multiplications take the time.
    """
    return ProductTile(16, 16, 128, 4, 3) if half else ProductTile(8, 16, 64, 4, 3)


def channel_mlp_columns(samples: int) -> tuple[int, int, int, int]:
    """(BLOCK_N, BLOCK_C, BLOCK_U, num_warps) of programs that own channels over the whole batch and
    take the hidden layer BLOCK_U units at a time.

    8 channels a program are 32 to 128 programs at C of 256 to 1024, and 32 bytes a row of fp32: a
    whole sector of L2.
    """
    block_n = max(next_power_of_2(samples), _LEAST)
    return block_n, 8, _LEAST, 16 if block_n >= 512 else 8 if block_n >= 128 else 4


def channel_mlp_gradient_tiles(itemsize: int) -> tuple[int, int, int]:
    """(samples of the hidden layer's gradient, channels of a weight's, samples or channels that a
    dot sums over) of a program: 64 programs of each at C = 1024 and more, where no layer's tile
    waits for the batch."""
    return 8, 32 if itemsize == 4 else 16, 64 if itemsize == 4 else 32


# What an inference reads a second time from L2 in place of a launch: at 4 TB/s it takes as long as
# one of 3 us. By arithmetic; what is right, a GPU must tell.
_READ_AGAIN_BYTES = 12 << 20


def reads_again(nbytes: int) -> bool:
    """Whether reading so many bytes again costs less than a launch would."""
    return nbytes <= _READ_AGAIN_BYTES


def mlp_blocks_beside_conv(samples: int, hidden: int, itemsize: int) -> tuple[int, int, int] | None:
    """`channel_mlp_blocks` (without warps) for inference, where the MLP shares a launch, and so
    its warps, with a convolution; None where it would spill."""
    block_n, block_c, block_h, _ = channel_mlp_blocks(samples, hidden, False, itemsize)
    if block_h > 128:
        return None
    return block_n, min(block_c, 16) if block_h > 64 else block_c, block_h


def block_whole(hidden: int) -> int:
    """The width of a block that holds a whole hidden layer."""
    return max(next_power_of_2(hidden), _LEAST)


def mlp_gate_tile(
    samples: int, channels: int, positions: int, hidden: int, row_bytes: int, whole_bytes: int
) -> tuple[Tile, int] | None:
    """Of the gate that computes the channel MLP for itself, and into how many parts a program's
    walk over the positions is cut; None where that reads more again than a launch costs, or where
    the hidden layer is wider than a program holds without spilling.

    Each program reads `whole_bytes`, the first layer and the pooled sample, and `row_bytes` of the
    second layer for each of its channels. Few and large blocks of channels read less again, many
    fill the GPU: the smallest that can be afforded, in as many parts as can be.
    """
    if hidden > 128:
        return None
    for block_c in (32, 64, 128):
        block_c = min(block_c, max(next_power_of_2(channels), _LEAST))
        block_p = min(4096 // block_c, max(next_power_of_2(positions), _LEAST))
        programs = samples * -(-channels // block_c)
        again = programs * (whole_bytes + block_c * row_bytes)
        if reads_again(again):
            splits = min(-(-positions // block_p), TARGET_PROGRAMS // programs)
            splits = max(1, min(splits, _READ_AGAIN_BYTES // max(again, 1)))
            return Tile(block_c, block_p, 8, 1, 64), splits
    return None


def spatial_tile(dtype: torch.dtype, positions: int, hidden: int, precision: str) -> Tile:
    """Of every kernel of the spatial branch: block_p positions, and all of the hidden channels;
    block_c is how many `taps` stand side by side.

    Args:
        dtype: of its maps.
        positions: N * H * W.
        hidden: their channels.
        precision: of fp32 dots, "ieee" or "tf32".
    """
    entry = _overrides.get("spatial_branch")
    return _spatial_tile(entry, dtype, positions, hidden, precision)


@functools.lru_cache(maxsize=4096)
def _spatial_tile(
    entry: Tile | None, dtype: torch.dtype, positions: int, hidden: int, precision: str
) -> Tile:
    if entry is None:
        entry = _spatial_branch(dtype.itemsize, hidden, precision, positions)
    block_p = min(entry.block_p, max(next_power_of_2(positions), _LEAST))
    return dataclasses.replace(entry, block_p=block_p)


def taps(tile: Tile) -> tuple[int, int]:
    """Of a 3x3 convolution, how many taps a dot takes side by side, padded to a power of two, and
    how many of these there are: a row of three, or one."""
    return (4, 3) if tile.block_c == 4 else (1, 1)


_WEIGHT_GRADIENT_BYTES = 4 << 20


def split_weight_gradient(count: int, hidden: int = 16) -> int:
    """Into how many parts the walk over all `count` tiles is cut in a dilated conv's dW.

    Each part owns a partial of dW, of 36 h^2 bytes: as many as fill the GPU, and no more than
    `_WEIGHT_GRADIENT_BYTES` of them.
    """
    most = max(16, min(256, _WEIGHT_GRADIENT_BYTES // (36 * hidden * hidden)))
    return max(1, min(count, most))


def split_channels(blocks: int, other_programs: int, channels: int = 0, hidden: int = 0) -> int:
    """Into how many parts a program's walk over C is cut: as many as fill the GPU, at most 8.

    Small maps and batches (7x7, 14x14, N of 1 or 2) have too few (sample, tile) pairs to occupy it.
    Each part of a reduction leaves `hidden` rows of fp32: no more than a quarter of C in all, or
    writing them and reading them again would rival a pass over x.
    """
    most = max(1, channels // (4 * hidden)) if hidden else 8
    return max(1, min(blocks, 8, most, TARGET_PROGRAMS // max(other_programs, 1)))


def split_walk(blocks: int, other_programs: int, num_warps: int) -> int:
    """Into how many parts the walk of the gate's reductions is cut: as many as fill the GPU, at
    most 8, for each leaves a partial sum of the whole dense axis."""
    return max(1, min(blocks, 8, TARGET_WARPS // num_warps // max(other_programs, 1)))


def split_tiles(tiles: int, other_programs: int, num_warps: int, partial_bytes: int) -> int:
    """Into how many parts the walk over all (sample, tile) pairs is cut in the input gradient.

    Each part owns a partial of dW0, of `partial_bytes`: no more of them than 256, or than fill the
    GPU in small programs, nor than 8 MB of them, a few percent of what the kernel moves at large
    batches; but as many as occupy every multiprocessor.
    """
    most = TARGET_WARPS // num_warps // other_programs
    most = min(most, 256, (8 << 20) // max(partial_bytes, 1))
    return max(1, min(tiles, max(most, -(-TARGET_PROGRAMS // other_programs))))


# What decides below is ahead-of-time compilation for sm_80, 90, 100 and 120 (tests/test_aot.py): no
# spills, and 128-bit access to x, so 8 half or 4 fp32 elements a thread at the least. Among the
# tiles that pass, float16 has those that were the fastest on an H200 (torch 2.11, Triton 3.6, batch
# 256, ResNet-50's three sites), or next to it where that one spills on another target. They are
# tiles of few warps, of which many run on a multiprocessor. Not timed: other types, pool_reduce in
# channels_last at 64 hidden channels, and the spatial branch of few positions or under 16 channels.


def _gate(itemsize: int, hidden: int, channels_last: bool, precision: str) -> Tile:
    # One read and one write and no reuse: 4096 elements over 128 threads are 32 a thread, four
    # 16-byte loads in flight each in half precision. The long side lies along the dense axis.
    if itemsize == 8:
        return Tile(128, 8, 4, 1) if channels_last else Tile(8, 128, 4, 1)
    return Tile(128, 32, 8, 1) if channels_last else Tile(32, 64, 4, 1)


def _gate_backward_reduce(itemsize: int, hidden: int, channels_last: bool, precision: str) -> Tile:
    # Two streams (dout, x) and both gradients are live, and one of the gradients is summed over
    # the walk element by element: 32 elements a thread of half types, 16 of fp32.
    if itemsize == 8:
        return Tile(64, 16, 4, 1) if channels_last else Tile(16, 64, 4, 1)
    if itemsize == 4:
        return Tile(64, 16, 2, 2) if channels_last else Tile(16, 64, 2, 2)
    return Tile(64, 32, 2, 2) if channels_last else Tile(16, 64, 2, 3, 128)


def _pool_reduce(itemsize: int, hidden: int, channels_last: bool, precision: str) -> Tile:
    # The accumulator is block_hidden x block_p in fp32; x's tile feeds the dot and the pooling.
    if itemsize == 8:
        return Tile(16, 32, 8, 1)
    if itemsize == 4:
        # Dots without tensor cores (ieee) keep both operands in registers.
        return Tile(32, 32 if precision == "ieee" and hidden > 16 else 64, 8, 1)
    if hidden > 64:
        return Tile(128, 64, 8, 1) if channels_last else Tile(64, 128, 8, 1)
    if hidden > 32:  # with 4 warps, as fast or faster, it spills on sm_80, 90 or 120
        return Tile(128, 128, 8, 2 if channels_last else 1)
    return Tile(128, 128, 4, 1)


def _input_gradient(itemsize: int, hidden: int, channels_last: bool, precision: str) -> Tile:
    # Live at once: W0's block, dW0's accumulator (block_hidden x block_c), dout, x and dx. More
    # warps share them, or a narrower block of channels, where fewer would spill.
    if itemsize == 8:
        return Tile(16, 16, 4, 1)
    if itemsize == 4:
        if precision == "ieee" and hidden > 16:  # 32x64 spills with the oldest Triton in two cases
            if channels_last:
                return Tile(32, 32, 4, 1) if hidden <= 32 else Tile(32, 32, 8, 1, 128)
            if hidden > 32:
                return Tile(16, 32, 8, 1) if hidden > 64 else Tile(16, 128, 16, 1)
        return Tile(32, 64, 8 if 16 < hidden <= 32 else 16, 1)
    if hidden > 64:
        return Tile(32, 64, 8, 1) if channels_last else Tile(32, 32, 8, 1)
    if hidden > 32:
        return Tile(64, 32, 4, 2) if channels_last else Tile(32, 64, 4, 2)
    if hidden > 16:  # NCHW's 64x64 in two stages was faster by a fiftieth; it spills on sm_80
        return Tile(64, 32, 4, 1) if channels_last else Tile(32, 64, 4, 1)
    return Tile(64, 64, 4, 1 if channels_last else 2)


# 256 tiles of 64: two waves of one program a multiprocessor.
_FEW_POSITIONS = 1 << 14


def _spatial_branch(itemsize: int, hidden: int, precision: str, positions: int) -> Tile:
    # The accumulator is hidden x block_p, and nine shifted tiles of the input pass through. Wider
    # tiles spill in the backward convolution, which applies a norm's gradient as it loads.
    if itemsize == 8:
        return Tile(1, 16, 8, 1) if hidden > 64 else Tile(1, 32, 4, 1)
    if itemsize == 2:
        # Fewer registers than the assembler would take, so that more programs run at a time.
        if hidden > 32:
            if hidden > 64:
                return Tile(1, 32, 4, 2)
            # Of few tiles twice as many, and of more warps: norms are applied as they load, and
            # would spill.
            return Tile(1, 64, 4, 3) if positions > _FEW_POSITIONS else Tile(1, 32, 8, 3)
        if hidden < 16:  # accesses are narrow, and their addresses many
            return Tile(1, 32, 4, 3, 128)
        return Tile(1, 64, 4, 3, 100 if hidden > 16 else 80)
    if precision == "ieee" and hidden > 16:
        return Tile(1, 16, 8, 1) if hidden > 32 else Tile(1, 32, 8, 1)
    if hidden > 32:
        return Tile(1, 32, 8, 2)
    if hidden > 16:
        return Tile(1, 32, 8, 1)
    return Tile(1, 128, 4, 1)


_TABLES = {
    "gate": _gate,
    "gate_backward_reduce": _gate_backward_reduce,
    "input_gradient": _input_gradient,
    "pool_reduce": _pool_reduce,
}

KERNELS = (*_TABLES, "channel_mlp", "spatial_branch")
"""The kernels whose launch `override` can set; the channel MLP has no positions, so no block_p, and
the spatial branch's kernels take all of their channels, so no block_c."""
