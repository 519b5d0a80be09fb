"""How the spatial branch's small maps lie and are cut, its norms, and the partials between them."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from bam_kernels.backends.triton import configs
from bam_kernels.backends.triton.device_math import map_offsets
from bam_kernels.backends.triton.launch import (
    accumulator,
    accumulator_dtype,
    cdiv,
    conv_precision,
    launch,
    registers,
)
from bam_kernels.backends.triton.spatial_math import (
    merge_statistics,
    merge_sums,
    store_statistics,
)


@triton.jit(do_not_specialize=["positions", "tiles", "count"])
def _statistics_kernel(
    source,
    partials,
    positions,
    tiles,
    count,
    hidden,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The partials of a map that is there already: the reduction's output."""
    pid = tl.program_id(0)
    n = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    columns = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    units = tl.arange(0, BLOCK_H)
    in_h = units < hidden
    mask = in_h[:, None] & (columns < positions)[None, :]
    at = map_offsets(units, columns, hidden if CHANNELS_LAST else positions, 1, CHANNELS_LAST)
    value = tl.load(source + n * hidden * positions + at, mask=mask, other=0.0).to(ACC)
    n_in_tile = tl.minimum(positions - tile * BLOCK_P, BLOCK_P)
    store_statistics(value, mask, n_in_tile, partials, pid, count, units, in_h, hidden, ACC)


@triton.jit(do_not_specialize=["N", "positions", "tiles", "count", "block"])
def _merge_kernel(
    partials,
    merged,
    N,
    positions,
    tiles,
    count,
    block,
    hidden,
    CENTRED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Many partials to one, where each consumer merging them for itself would read too much."""
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_h = units < hidden
    if CENTRED:
        first, second = merge_statistics(
            partials, count, tiles, positions, block, N, units, in_h, hidden, ACC, BLOCK_H, BLOCK_T
        )
        total = N.to(ACC) * positions.to(ACC)
        first *= total
        second *= total
    else:
        first, second = merge_sums(partials, count, units, in_h, hidden, ACC, BLOCK_H, BLOCK_T)
    tl.store(merged + units, first, mask=in_h)
    tl.store(merged + hidden + units, second, mask=in_h)


_MOST_PARTIALS = 128
"""Above this, partials are merged by a launch of their own: every consumer reads all of them."""


@dataclasses.dataclass(slots=True)
class Map:
    """How the branch's small maps [N, h, H, W] lie and are cut: dense, all alike."""

    n: int
    h: int
    w: int
    hidden: int
    channels_last: bool
    dtype: torch.dtype
    device: torch.device
    tile: configs.Tile

    @property
    def positions(self) -> int:
        return self.h * self.w

    @property
    def tiles(self) -> int:
        """Tiles of one sample."""
        return cdiv(self.positions, self.tile.block_p)

    @property
    def count(self) -> int:
        """Tiles, programs and partials of a whole map."""
        return self.n * self.tiles

    @property
    def block_h(self) -> int:
        return configs.block_whole(self.hidden)

    @property
    def block_k(self) -> int:
        """Hidden channels of a dot's reduction, or of dW's columns, at a time."""
        return min(self.block_h, 32)

    def workspace(self, *shape: int) -> Tensor:
        """Uninitialised, in the accumulator's type."""
        return torch.empty(shape, dtype=accumulator_dtype(self.dtype), device=self.device)

    def empty(self) -> Tensor:
        """An uninitialised [N, h, H, W] map of this layout."""
        fmt = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.empty(
            (self.n, self.hidden, self.h, self.w),
            dtype=self.dtype,
            device=self.device,
            memory_format=fmt,
        )

    def constants(self) -> dict[str, object]:
        """The compile-time arguments that every kernel of the branch has.

        A thread may take as many registers as there are, unless the table says less: left to
        itself the assembler keeps to fewer, on one target or another, and spills for it.
        """
        num_warps = self.tile.num_warps
        return {
            "CHANNELS_LAST": self.channels_last,
            "ACC": accumulator(self.dtype),
            "BLOCK_P": self.tile.block_p,
            "BLOCK_H": self.block_h,
            "num_warps": num_warps,
            "num_stages": self.tile.num_stages,
            **registers(self.tile.registers or 255, num_warps),
        }

    @property
    def block_t(self) -> int:
        """Partials merged at a time."""
        return max(16, min(64, 1024 // self.block_h))


def map_of(reduced: Tensor) -> tuple[Map, Tensor]:
    """The layout of reduced [N, h, H, W], and reduced itself, dense."""
    n, hidden, h, w = reduced.shape
    channels_last = not reduced.is_contiguous() and reduced.is_contiguous(
        memory_format=torch.channels_last
    )
    if not channels_last:
        reduced = reduced.contiguous()
    tile = configs.spatial_tile(
        reduced.dtype, h * w, hidden, channels_last, conv_precision(reduced.dtype)
    )
    m = Map(n, h, w, hidden, channels_last, reduced.dtype, reduced.device, tile)
    return m, reduced


@dataclasses.dataclass(slots=True)
class Norm:
    """A batch norm: its vectors [h], or [1] for the last; batch statistics are not known yet."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    variance: Tensor | None
    batch_stats: bool
    eps: float

    def known(self, statistics: Tensor | None) -> Norm:
        """The same norm with the statistics [2, h] that a forward took, None if it took none."""
        if statistics is None:
            return self
        return dataclasses.replace(self, mean=statistics[0], variance=statistics[1])


def norms_of(
    gammas: list[Tensor],
    betas: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    batch_stats: list[bool],
    eps: list[float],
) -> list[Norm]:
    """From the operator's lists; means and variances are those of the norms that use them."""
    known = iter(zip(means, variances, strict=True))
    norms = []
    for i, batch in enumerate(batch_stats):
        mean, variance = (None, None) if batch else next(known)
        affine_ = (gammas[i].contiguous(), betas[i].contiguous()) if gammas else (None, None)
        norms.append(Norm(*affine_, mean, variance, batch, eps[i]))
    return norms


@dataclasses.dataclass(frozen=True)
class Partials:
    """Partials [2, count, h] of two sums over (n, p), as kernels take them."""

    data: Tensor
    count: int
    tiles: int
    positions: int
    block: int

    def arguments(self) -> dict[str, int]:
        """The run-time arguments of a consumer."""
        return {
            "partial_count": self.count,
            "partial_tiles": self.tiles,
            "partial_positions": self.positions,
            "partial_block": self.block,
        }


NO_PARTIALS = dict.fromkeys(
    ("partial_count", "partial_tiles", "partial_positions", "partial_block"), 0
)


def settle(data: Tensor, m: Map, width: int, centred: bool) -> Partials:
    """The partials that programs over all tiles of `m` left, merged where they are too many."""
    block = m.tile.block_p
    if m.count <= _MOST_PARTIALS:
        return Partials(data, m.count, m.tiles, m.positions, block)
    merged = m.workspace(2, 1, width)
    launch(_merge_kernel, (cdiv(width, 16),),
        data, merged, m.n, m.positions, m.tiles, m.count, block, width,
        CENTRED=centred, ACC=accumulator(m.dtype), BLOCK_H=16, BLOCK_T=128, num_warps=8,
    )  # fmt: skip
    # One tile of all positions of all samples; the consumer's count is N * positions either way.
    return Partials(merged, 1, 1, m.n * m.positions, block)


def statistics_of(m: Map, source: Tensor) -> Partials:
    partials = m.workspace(2, m.count, m.hidden)
    constants = m.constants()
    launch(
        _statistics_kernel,
        (m.count,),
        source,
        partials,
        m.positions,
        m.tiles,
        m.count,
        m.hidden,
        **constants,
    )
    return settle(partials, m, m.hidden, centred=True)
