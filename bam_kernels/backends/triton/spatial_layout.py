"""How the spatial branch's small maps lie and are cut, its norms, and the partials between them."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from bam_kernels.backends.triton import configs
from bam_kernels.backends.triton.device_math import narrow, relu
from bam_kernels.backends.triton.launch import (
    accumulator,
    accumulator_dtype,
    cdiv,
    compute_capability,
    conv_precision,
    launch,
    registers,
)
from bam_kernels.backends.triton.spatial_math import (
    input_affine,
    merge_statistics,
    merge_sums,
    tile_offsets,
    tile_positions,
    tile_start,
)


@triton.jit(do_not_specialize=["total", "count", "block", "group", "groups"])
def _merge_kernel(
    partials,
    merged,
    total,
    count,
    block,
    group,
    groups,
    hidden,
    CENTRED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """`group` partials to one each, where consumers merging them all would read too much.

    Grid: (blocks of channels, groups).
    """
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_h = units < hidden
    index = tl.program_id(1)
    begin = index * group
    end = tl.minimum(begin + group, count)
    if CENTRED:
        first, second, values = merge_statistics(
            partials, begin, end, count, total, block, units, in_h, hidden, ACC, BLOCK_H, BLOCK_T
        )
        first *= values
        second *= values
    else:
        first, second = merge_sums(
            partials, begin, end, count, units, in_h, hidden, ACC, BLOCK_H, BLOCK_T
        )
    tl.store(merged + index * hidden + units, first, mask=in_h)
    tl.store(merged + (groups + index) * hidden + units, second, mask=in_h)


@triton.jit(do_not_specialize=["total", "count", "partial_count", "partial_block"])
def _activate_kernel(
    source,
    out,
    partials,
    statistics,
    mean,
    variance,
    gamma,
    beta,
    total,
    count,
    partial_count,
    partial_block,
    hidden,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """relu(norm(source)), a tile a program."""
    first, own, in_p, _ = tile_positions(tl.program_id(0), total, BLOCK_P)
    units = tl.arange(0, BLOCK_H)
    in_h = units < hidden
    mu, scale, shift = input_affine(
        partials, partial_count, partial_block, total, statistics, mean, variance, gamma, beta,
        units, in_h, hidden, EPS, ACC, BLOCK_H, BLOCK_T,
    )  # fmt: skip
    mask = in_h[:, None] & in_p[None, :]
    at = tile_offsets(units, own, hidden)
    value = tl.load(source + tile_start(first, hidden) + at, mask=mask, other=0.0).to(ACC)
    value = relu((value - mu[:, None]) * scale[:, None] + shift[:, None])
    tl.store(out + tile_start(first, hidden) + at, narrow(value, out.dtype.element_ty), mask=mask)


_FEW_TILES = 256
"""Up to so many, a convolution applies the norm in front of it as it loads, for each of its taps
anew; beyond, that takes longer than a pass over the map and its launch."""

_MOST_PARTIALS = 128
"""Above this, partials are merged by launches of their own: every consumer reads all of them."""

_GROUPS = 64
"""Into so many first, each by a program, and these into one: two short launches take less time than
a program that walks over thousands."""


@dataclasses.dataclass(slots=True)
class Map:
    """How the branch's small maps [N, h, H, W] lie and are cut: all alike, as channels_last."""

    n: int
    h: int
    w: int
    hidden: int
    dtype: torch.dtype
    device: torch.device
    tile: configs.Tile

    @property
    def positions(self) -> int:
        """Of one sample."""
        return self.h * self.w

    @property
    def total(self) -> int:
        """Positions of all samples."""
        return self.n * self.h * self.w

    @property
    def count(self) -> int:
        """Tiles, programs and partials of a whole map."""
        return cdiv(self.total, self.tile.block_p)

    @property
    def block_h(self) -> int:
        return configs.block_whole(self.hidden)

    @property
    def block_k(self) -> int:
        """Hidden channels of a dot's reduction, or of dW's columns, at a time."""
        if self.dtype.itemsize == 2:
            return min(self.block_h, 64)
        return min(self.block_h, 32) if self.block_h < 64 else 16

    @property
    def wraps(self) -> bool:
        """Whether a tile may be longer than a sample."""
        return self.positions < self.tile.block_p

    @property
    def taps(self) -> tuple[int, int]:
        """(taps that a dot takes side by side, of which there are so many) in a convolution."""
        return configs.taps(self.tile)

    def workspace(self, *shape: int) -> Tensor:
        """Uninitialised, in the accumulator's type."""
        return torch.empty(shape, dtype=accumulator_dtype(self.dtype), device=self.device)

    def empty(self, channels_last: bool = True) -> Tensor:
        """An uninitialised [N, h, H, W] map."""
        fmt = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty(
            (self.n, self.hidden, self.h, self.w),
            dtype=self.dtype,
            device=self.device,
            memory_format=fmt,
        )

    def empty_packed(self, convs: int) -> Tensor:
        """Uninitialised weights [convs, 9, h, h]."""
        return torch.empty(
            (convs, 9, self.hidden, self.hidden), dtype=self.dtype, device=self.device
        )

    @staticmethod
    def lies_well(reduced: Tensor) -> bool:
        """Whether a map lies as the branch's own do."""
        return reduced.is_contiguous(memory_format=torch.channels_last)

    def sizes(self) -> dict[str, int]:
        """The run-time extents that every kernel of the branch has."""
        return {"total": self.total, "count": self.count, "hidden": self.hidden}

    def constants(self) -> dict[str, object]:
        """The compile-time arguments that every kernel of the branch has."""
        return {
            "ACC": accumulator(self.dtype),
            "BLOCK_P": self.tile.block_p,
            "BLOCK_H": self.block_h,
            "num_warps": self.tile.num_warps,
            "num_stages": self.tile.num_stages,
            **self.registers(),
        }

    def registers(self, least: int = 0) -> dict[str, int]:
        """The launch option that lets a thread take as many registers as the table says, and at
        least so many.

        As many as there are where it says nothing: left to itself the assembler keeps to fewer, on
        one target or another, and spills for it. So too where a norm is applied as inputs load, and
        from compute capability 10 on, where the table's would spill.
        """
        limit = self.tile.registers
        if limit is None or self.count <= _FEW_TILES or compute_capability() >= 100:
            limit = 255
        return registers(max(limit, least), self.tile.num_warps)

    @property
    def block_t(self) -> int:
        """Partials merged at a time."""
        return max(16, min(64, 1024 // self.block_h))


def map_of(reduced: Tensor) -> tuple[Map, Tensor]:
    """The layout of reduced [N, h, H, W], and reduced itself, dense in either memory format."""
    n, hidden, h, w = reduced.shape
    if not (reduced.is_contiguous() or Map.lies_well(reduced)):
        reduced = reduced.contiguous(memory_format=torch.channels_last)
    tile = configs.spatial_tile(reduced.dtype, n * h * w, hidden, conv_precision(reduced.dtype))
    return Map(n, h, w, hidden, reduced.dtype, reduced.device, tile), reduced


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
    """Partials [2, count, h] of two sums over (n, p), of `block` positions each but the last."""

    data: Tensor
    count: int
    block: int

    def arguments(self) -> dict[str, int]:
        """The run-time arguments of a consumer."""
        return {"partial_count": self.count, "partial_block": self.block}


NO_PARTIALS = {"partial_count": 0, "partial_block": 0}


def settle(data: Tensor, m: Map, width: int, centred: bool) -> Partials:
    """The partials that programs over all tiles of `m` left, merged where they are too many."""
    found = Partials(data, m.count, m.tile.block_p)
    if found.count > _MOST_PARTIALS:
        found = _merged(found, m, width, centred, cdiv(found.count, _GROUPS))
        found = _merged(found, m, width, centred, found.count)
    return found


def _merged(partials: Partials, m: Map, width: int, centred: bool, group: int) -> Partials:
    """Each `group` of partials as one."""
    groups = cdiv(partials.count, group)
    merged = m.workspace(2, groups, width)
    launch(_merge_kernel, (cdiv(width, 16), groups),
        partials.data, merged, m.total, partials.count, partials.block, group, groups, width,
        CENTRED=centred, ACC=accumulator(m.dtype), BLOCK_H=16, BLOCK_T=64, num_warps=4,
    )  # fmt: skip
    return Partials(merged, groups, partials.block * group)


def norm_apart(m: Map, norm: Norm | None) -> bool:
    """Whether a convolution's norm has a pass of its own."""
    return norm is not None and m.count > _FEW_TILES


def activate(
    m: Map, source: Tensor, norm: Norm, partials: Partials | None, statistics: Tensor | None
) -> Tensor:
    """relu(norm(source)) as a map of its own; with partials their merged statistics are left."""
    out = m.empty()
    known = partials is None
    launch(
        _activate_kernel,
        (m.count,),
        source,
        out,
        None if known else partials.data,
        None if known else statistics,
        norm.mean if known else None,
        norm.variance if known else None,
        norm.gamma,
        norm.beta,
        EPS=norm.eps,
        BLOCK_T=m.block_t,
        **m.sizes(),
        **(NO_PARTIALS if known else partials.arguments()),
        **m.constants(),
    )
    return out
