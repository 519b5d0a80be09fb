"""Inference of a whole module from known statistics: k + 2 launches for k dilated convolutions.

Pooling and reduction; the first convolution, with the channel MLP beside it; the other ones, the
last of which makes the projection and its norm; the gate. Sums in parts are added up by those who
read them. Without a spatial branch the gate computes the MLP for itself: two launches.

Norms are applied from their statistics as they are now: nothing is folded and kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from bam_kernels import layout
from bam_kernels.backends.triton import configs
from bam_kernels.backends.triton.channel_mlp import (
    channel_mlp_forward,
    dense,
    mlp_block,
    normalize,
)
from bam_kernels.backends.triton.device_math import map_offsets, narrow, sigmoid
from bam_kernels.backends.triton.gate import gate_forward
from bam_kernels.backends.triton.launch import (
    accumulator,
    accumulator_dtype,
    cdiv,
    conv_precision,
    device_guard,
    registers,
    triton_dtype,
    units,
    walk,
)
from bam_kernels.backends.triton.pool_reduce import Parts, pool_reduce_parts, whole
from bam_kernels.backends.triton.spatial_branch import launch_project
from bam_kernels.backends.triton.spatial_conv import (
    conv_tile,
    norm_arguments,
    projection_arguments,
    spread,
)
from bam_kernels.backends.triton.spatial_layout import Map, Norm
from bam_kernels.config import COMBINE_MODES

# --- kernels ----------------------------------------------------------------------------------

_SIZES = ["N", "H", "W", "positions", "tiles", "stride_out", "stride_in", "stride_tap"]
_SIZES += ["mlp_programs", "mlp_channel_blocks", "pooled_tiles"]


@triton.jit(do_not_specialize=_SIZES)
def _conv_mlp_kernel(
    source,
    source_bias,
    weight,
    bias,
    out,
    mean,
    variance,
    gamma,
    beta,
    next_mean,
    next_variance,
    next_gamma,
    next_beta,
    project_weight,
    project_bias,
    logits,
    final_mean,
    final_variance,
    final_gamma,
    final_beta,
    pooled,
    mlp_weight0,
    mlp_bias0,
    mlp_weight1,
    mlp_bias1,
    mlp_hidden_gamma,
    mlp_hidden_beta,
    mlp_hidden_mean,
    mlp_hidden_variance,
    mlp_gamma,
    mlp_beta,
    mlp_mean,
    mlp_variance,
    mlp_logits,
    N,
    H,
    W,
    positions,
    tiles,
    stride_out,
    stride_in,
    stride_tap,
    hidden,
    channels,
    mlp_hidden,
    mlp_programs,
    mlp_channel_blocks,
    pooled_tiles,
    DILATION: tl.constexpr,
    EPS: tl.constexpr,
    NEXT_EPS: tl.constexpr,
    FINAL_EPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MLP: tl.constexpr,
    MLP_HIDDEN_NORM: tl.constexpr,
    MLP_HIDDEN_EPS: tl.constexpr,
    MLP_NORM: tl.constexpr,
    MLP_EPS: tl.constexpr,
    MLP_BLOCK_N: tl.constexpr,
    MLP_BLOCK_C: tl.constexpr,
    MLP_BLOCK_H: tl.constexpr,
):
    """A dilated convolution and, where MLP says so, the channel MLP beside it: neither waits for
    the other. Grid: the MLP's blocks, then N x tiles."""
    pid = tl.program_id(0)
    if MLP:
        if pid < mlp_programs:
            mlp_block(
                pid, pooled, mlp_weight0, mlp_bias0, mlp_weight1, mlp_bias1, mlp_hidden_gamma,
                mlp_hidden_beta, mlp_hidden_mean, mlp_hidden_variance, mlp_gamma, mlp_beta,
                mlp_mean, mlp_variance, mlp_logits, None, None, None, None, None, N, channels,
                mlp_hidden, mlp_channel_blocks, pooled_tiles, positions, MLP_HIDDEN_NORM, False,
                MLP_HIDDEN_EPS, MLP_NORM, False, MLP_EPS, ACC, MLP_BLOCK_N, MLP_BLOCK_C,
                MLP_BLOCK_H,
            )  # fmt: skip
    if pid >= mlp_programs:
        conv_tile(
            pid - mlp_programs, source, source_bias, weight, bias, out, None, None, mean, variance,
            gamma, beta, None, next_mean, next_variance, next_gamma, next_beta, project_weight,
            project_bias, logits, None, None, None, final_mean, final_variance, final_gamma,
            final_beta, N, H, W, positions, tiles, 0, 0, 0, 0, 0, stride_out, stride_in,
            stride_tap, hidden, DILATION, EPS, NEXT_EPS, FINAL_EPS, CHANNELS_LAST, PRECISION, ACC,
            BLOCK_P, BLOCK_H, BLOCK_K, BLOCK_T, SPLITS, DTYPE,
        )  # fmt: skip


_GATE_SIZES = ["outer", "inner_units", "x_stride_n", "x_stride_outer", "out_stride_n"]
_GATE_SIZES += ["out_stride_outer", "channel_blocks", "splits", "tiles_per_split", "pooled_tiles"]


@triton.jit(do_not_specialize=_GATE_SIZES)
def _mlp_gate_kernel(
    x,
    out,
    pooled,
    weight0,
    bias0,
    weight1,
    bias1,
    hidden_gamma,
    hidden_beta,
    hidden_mean,
    hidden_variance,
    gamma,
    beta,
    mean,
    variance,
    outer,
    inner_units,
    x_stride_n,
    x_stride_outer,
    out_stride_n,
    out_stride_outer,
    hidden,
    channel_blocks,
    splits,
    tiles_per_split,
    pooled_tiles,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HIDDEN_NORM: tl.constexpr,
    HIDDEN_EPS: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_C channels of one sample, over its split of the positions; the MLP of the
    sample first, which every program computes for itself. Grid: samples x splits x blocks, flat."""
    inner = inner_units * ALIGN
    C = inner if CHANNELS_LAST else outer
    P = outer if CHANNELS_LAST else inner
    pid = tl.program_id(0)
    rows = (pid % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    rest = pid // channel_blocks
    split = rest % splits
    n = (rest // splits).to(tl.int64)
    in_c = rows < C
    units_h = tl.arange(0, BLOCK_H)
    in_h = units_h < hidden

    y = tl.zeros((BLOCK_H,), ACC)
    for start in range(0, C, BLOCK_K):
        ins = start + tl.arange(0, BLOCK_K)
        in_k = ins < C
        if pooled_tiles is None:
            a = tl.load(pooled + n * C + ins, mask=in_k, other=0.0).to(ACC)
        else:
            a = tl.zeros((BLOCK_K,), ACC)
            for tile in range(pooled_tiles):
                a += tl.load(pooled + (n * pooled_tiles + tile) * C + ins, mask=in_k, other=0.0)
            a = a / P.to(ACC)
        w = tl.load(
            weight0 + units_h[:, None] * C + ins[None, :],
            mask=in_h[:, None] & in_k[None, :],
            other=0.0,
        )
        y += tl.sum(w.to(ACC) * a[None, :], axis=1)
    if bias0 is not None:
        y += tl.load(bias0 + units_h, mask=in_h, other=0.0).to(ACC)
    if HIDDEN_NORM:
        mu = tl.load(hidden_mean + units_h, mask=in_h, other=0.0).to(ACC)
        sigma2 = tl.load(hidden_variance + units_h, mask=in_h, other=1.0).to(ACC)
        y = tl.sum(
            normalize(
                y[None, :], units_h, in_h, mu, sigma2, hidden_gamma, hidden_beta, HIDDEN_EPS, ACC
            ),
            axis=0,
        )
    y = tl.where(in_h, tl.where(y < 0, 0.0, y), 0.0)  # a ReLU that lets NaN through

    w = tl.load(
        weight1 + rows[:, None] * hidden + units_h[None, :],
        mask=in_c[:, None] & in_h[None, :],
        other=0.0,
    )
    c = tl.sum(w.to(ACC) * y[None, :], axis=1)
    if bias1 is not None:
        c += tl.load(bias1 + rows, mask=in_c, other=0.0).to(ACC)
    if NORM:
        mu = tl.load(mean + rows, mask=in_c, other=0.0).to(ACC)
        sigma2 = tl.load(variance + rows, mask=in_c, other=1.0).to(ACC)
        c = tl.sum(normalize(c[None, :], rows, in_c, mu, sigma2, gamma, beta, EPS, ACC), axis=0)
    m = sigmoid(c)[:, None]

    x += n * x_stride_n * ALIGN
    out += n * out_stride_n * ALIGN
    for tile in range(split * tiles_per_split, (split + 1) * tiles_per_split):
        columns = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = in_c[:, None] & (columns < P)[None, :]
        at = map_offsets(rows, columns, x_stride_outer, ALIGN, CHANNELS_LAST)
        value = tl.load(x + at, mask=mask).to(ACC)
        gated = value * m
        if RESIDUAL:
            gated += value
        at = map_offsets(rows, columns, out_stride_outer, ALIGN, CHANNELS_LAST)
        tl.store(out + at, narrow(gated, out.dtype.element_ty), mask=mask)


# --- the module's parameters --------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class Layer:
    """A linear layer or a convolution, and the norm behind or in front of it, if any."""

    weight: Tensor
    bias: Tensor | None
    norm: Norm | None


@dataclasses.dataclass(slots=True)
class Module:
    """What the operator `bam` is given, by branch; see csrc/operators.h.

    Norms stand behind the linear layers and the projection, and in front of the convolutions; the
    one in front of the projection is `last`.
    """

    combine: str
    residual: bool
    channel: tuple[Layer, ...]
    reduce: Layer | None
    convs: tuple[Layer, ...]
    last: Norm | None
    project: Layer | None
    dilation: int

    @classmethod
    def read(cls, params: list[Tensor], options: list[int], eps: list[float]) -> Module:
        """From the operator's flat lists."""
        tensors, numbers = iter(params), iter(eps)
        combine, residual, linears, hidden_norm, norm, spatial, convs, dilation = options[:8]
        spatial_hidden_norm, spatial_norm = options[8:10]
        channel = [
            _layer(tensors, numbers, bool(norm if i == linears - 1 else hidden_norm))
            for i in range(linears)
        ]
        reduce = last = project = None
        found: list[Layer] = []
        if spatial:
            reduce = _layer(tensors, numbers, False)
            for _ in range(convs):
                before = _norm(tensors, numbers) if spatial_hidden_norm else None
                conv = _layer(tensors, numbers, False)
                conv.norm = before
                found.append(conv)
            last = _norm(tensors, numbers) if spatial_hidden_norm else None
            project = _layer(tensors, numbers, bool(spatial_norm))
        return cls(
            COMBINE_MODES[combine], bool(residual), tuple(channel), reduce, tuple(found), last,
            project, dilation,
        )  # fmt: skip


def _given(t: Tensor) -> Tensor | None:
    return t if t.numel() else None


def _layer(tensors: Iterator[Tensor], numbers: Iterator[float], norm: bool) -> Layer:
    weight, bias = next(tensors), _given(next(tensors))
    return Layer(weight, bias, _norm(tensors, numbers) if norm else None)


def _norm(tensors: Iterator[Tensor], numbers: Iterator[float]) -> Norm:
    gamma, beta, mean, variance = (dense(_given(next(tensors))) for _ in range(4))
    return Norm(gamma, beta, mean, variance, False, next(numbers))


# --- launchers ----------------------------------------------------------------------------------


def bam_forward(x: Tensor, params: list[Tensor], options: list[int], eps: list[float]) -> Tensor:
    """A whole module whose batch norms have known statistics; x [N, C, H, W], out alike.

    The parameters' order is csrc/operators.h's; the channel MLP has one hidden layer.
    """
    module = Module.read(params, options, eps)
    x = layout.walkable(x)
    weight = None
    if module.reduce is not None:
        weight = module.reduce.weight.flatten(1).to(x.dtype)
    bias = None if module.reduce is None else module.reduce.bias
    parts = pool_reduce_parts(x, weight, bias, bool(module.channel))
    if module.reduce is None:
        return _channel_only(x, module, parts)
    c, s = _logits(x, module, parts)
    return gate_forward(x, c, s, module.combine, module.residual)


def _logits(x: Tensor, module: Module, parts: Parts) -> tuple[Tensor | None, Tensor]:
    """Both branches' logits behind the heads."""
    n, _, h, w = x.shape
    hidden = module.reduce.weight.shape[0]
    tile = configs.spatial_tile(
        x.dtype, h * w, hidden, parts.channels_last, conv_precision(x.dtype)
    )
    m = Map(n, h, w, hidden, parts.channels_last, x.dtype, x.device, tile)
    mlp = _mlp(x, module, parts) if module.channel and module.convs else None
    beside = mlp is not None and configs.reads_again(mlp.read_again)
    parts = whole(
        x, parts, hidden, module.reduce.bias,
        pooled=bool(module.channel) and not beside,
        reduced=not module.convs or not configs.reads_again(_taps_bytes(m, parts)),
    )  # fmt: skip
    logits = m.workspace(n, 1, h, w)
    channel = None
    if module.channel and not beside:
        channel = _channel_logits(parts.pooled, module.channel)
    final = module.project.norm
    projection = projection_arguments(
        None, module.project.weight.flatten(), module.project.bias, final, logits=logits
    )
    with device_guard(x):
        if not module.convs:
            launch_project(m, parts.reduced, module.last, None, None, projection)
        source = parts.reduced
        for i, conv in enumerate(module.convs):
            first, last = i == 0, i == len(module.convs) - 1
            out = None if last else m.empty()
            _launch_conv(
                m, source, conv, module, out, logits if last else None,
                splits=parts.splits if first else 1, mlp=mlp if first and beside else None,
            )  # fmt: skip
            source = out
    if beside:
        channel = mlp.logits
    return channel, logits


def _taps_bytes(m: Map, parts: Parts) -> int:
    """What the first convolution's nine taps read of the reduction's parts: three times all of
    them, as the taps of a row are in L1 when the first of them has been read."""
    return 3 * m.n * m.hidden * m.positions * parts.splits * parts.reduced.itemsize


def _channel_logits(pooled: Tensor, layers: tuple[Layer, ...]) -> Tensor:
    """The MLP in a launch of its own."""
    first, second = layers
    tensors, flags = [], []
    for layer in layers:
        norm = layer.norm
        named = ("gamma", "beta", "mean", "variance")
        tensors += [None if norm is None else getattr(norm, name) for name in named]
        flags += [norm is not None, False, 0.0 if norm is None else norm.eps]
    return channel_mlp_forward(
        pooled, first.weight, first.bias, second.weight, second.bias, *tensors, *flags
    )[0]


@dataclasses.dataclass(slots=True)
class _Mlp:
    """The channel MLP as a part of another launch: its arguments, programs and result.

    `read_again` is how many bytes its programs read together beyond what one launch that adds the
    parts up would.
    """

    logits: Tensor
    programs: int
    arguments: dict[str, object]
    read_again: int


def _mlp(x: Tensor, module: Module, parts: Parts) -> _Mlp:
    n, c = x.shape[:2]
    hidden = module.channel[0].weight.shape[0]
    logits = torch.empty((n, c), dtype=accumulator_dtype(x.dtype), device=x.device)
    block_n, block_c, block_h, _ = configs.channel_mlp_blocks(n, hidden, False, logits.itemsize)
    if block_h > 64:
        block_c = 16
    blocks = cdiv(c, block_c)
    arguments = {
        "pooled": parts.pooled,
        "mlp_logits": logits,
        "channels": c,
        "mlp_hidden": hidden,
        "mlp_programs": cdiv(n, block_n) * blocks,
        "mlp_channel_blocks": blocks,
        "pooled_tiles": parts.tiles if parts.tiles > 1 else None,
        "MLP": True,
        "MLP_BLOCK_N": block_n,
        "MLP_BLOCK_C": block_c,
        "MLP_BLOCK_H": block_h,
        **_linear_arguments(module.channel, "mlp_"),
    }
    again = parts.pooled.numel() * parts.pooled.itemsize * blocks if parts.tiles > 1 else 0
    return _Mlp(logits, arguments["mlp_programs"], arguments, again)


def _linear_arguments(layers: tuple[Layer, ...], prefix: str = "") -> dict[str, object]:
    """The MLP's tensors and norms by a kernel's names."""
    found: dict[str, object] = {}
    for i, (layer, part) in enumerate(zip(layers, ("hidden_", ""), strict=True)):
        norm, upper = layer.norm, (prefix + part).upper()
        found[f"{prefix}weight{i}"] = layer.weight.contiguous()
        found[f"{prefix}bias{i}"] = dense(layer.bias)
        for name in ("gamma", "beta", "mean", "variance"):
            vector = None if norm is None else getattr(norm, name)
            found[f"{prefix}{part}{name}"] = dense(vector)
        found[f"{upper}NORM"] = norm is not None
        found[f"{upper}EPS"] = 0.0 if norm is None else norm.eps
    return found


_NO_MLP = dict.fromkeys(
    (
        "pooled", "mlp_weight0", "mlp_bias0", "mlp_weight1", "mlp_bias1", "mlp_hidden_gamma",
        "mlp_hidden_beta", "mlp_hidden_mean", "mlp_hidden_variance", "mlp_gamma", "mlp_beta",
        "mlp_mean", "mlp_variance", "mlp_logits", "pooled_tiles",
    )
) | {
    "channels": 0, "mlp_hidden": 0, "mlp_programs": 0, "mlp_channel_blocks": 1, "MLP": False,
    "MLP_HIDDEN_NORM": False, "MLP_HIDDEN_EPS": 0.0, "MLP_NORM": False, "MLP_EPS": 0.0,
    "MLP_BLOCK_N": 16, "MLP_BLOCK_C": 16, "MLP_BLOCK_H": 16,
}  # fmt: skip


def _launch_conv(
    m: Map,
    source: Tensor,
    conv: Layer,
    module: Module,
    out: Tensor | None,
    logits: Tensor | None,
    splits: int,
    mlp: _Mlp | None,
) -> None:
    """One convolution; the last one, given the logits, makes the projection too."""
    weight, (stride_out, stride_in, stride_tap) = spread(conv.weight)
    last = logits is not None
    following = module.last if last else None
    project = module.project if last else None
    final = project.norm if last else None
    programs = m.count + (0 if mlp is None else mlp.programs)
    _conv_mlp_kernel[(programs,)](
        source,
        dense(module.reduce.bias) if splits > 1 else None,
        weight,
        dense(conv.bias),
        out,
        **norm_arguments(conv.norm),
        **norm_arguments(following, "next_"),
        project_weight=project.weight.flatten() if last else None,
        project_bias=project.bias if last else None,
        logits=logits,
        **norm_arguments(final, "final_"),
        N=m.n,
        H=m.h,
        W=m.w,
        positions=m.positions,
        tiles=m.tiles,
        stride_out=stride_out,
        stride_in=stride_in,
        stride_tap=stride_tap,
        hidden=m.hidden,
        DILATION=module.dilation,
        EPS=0.0 if conv.norm is None else conv.norm.eps,
        NEXT_EPS=0.0 if following is None else following.eps,
        FINAL_EPS=0.0 if final is None else final.eps,
        PRECISION=conv_precision(m.dtype),
        DTYPE=triton_dtype(m.dtype),
        SPLITS=splits,
        BLOCK_K=m.block_k,
        BLOCK_T=m.block_t,
        **(_NO_MLP if mlp is None else mlp.arguments),
        **m.constants(allowed=255),
    )


def _channel_only(x: Tensor, module: Module, parts: Parts) -> Tensor:
    """The gate of the channel branch alone (Squeeze-and-Excitation), the MLP within it."""
    n, c, h, w = x.shape
    weight = module.channel[0].weight
    hidden, block_h = weight.shape[0], configs.block_whole(weight.shape[0])
    row_bytes = hidden * module.channel[1].weight.itemsize
    whole_bytes = weight.numel() * weight.itemsize + parts.pooled.numel() // n * 4
    found = configs.mlp_gate_tile(n, c, h * w, row_bytes, whole_bytes)
    if found is None or block_h > 128:
        parts = whole(x, parts, 0, None)
        logits = _channel_logits(parts.pooled, module.channel)
        return gate_forward(x, logits, None, "sum", module.residual)
    t, splits = found
    blocks = cdiv(c, t.block_c)
    out = torch.empty_like(x)
    w = walk(x, out)
    tiles = cdiv(w.p, t.block_p)
    with device_guard(x):
        _mlp_gate_kernel[(w.n * splits * blocks,)](
            x,
            out,
            parts.pooled,
            **_linear_arguments(module.channel),
            outer=w.p if w.channels_last else w.c,
            inner_units=w.inner // w.align,
            **dict(zip(("x_stride_n", "x_stride_outer"), units(x, w), strict=True)),
            **dict(zip(("out_stride_n", "out_stride_outer"), units(out, w), strict=True)),
            hidden=hidden,
            channel_blocks=blocks,
            splits=splits,
            tiles_per_split=cdiv(tiles, splits),
            pooled_tiles=parts.tiles if parts.tiles > 1 else None,
            ALIGN=w.align,
            CHANNELS_LAST=w.channels_last,
            RESIDUAL=module.residual,
            ACC=accumulator(x.dtype),
            BLOCK_C=t.block_c,
            BLOCK_P=t.block_p,
            BLOCK_H=block_h,
            BLOCK_K=32,
            num_warps=t.num_warps,
            num_stages=t.num_stages,
            **({} if t.registers is None else registers(t.registers, t.num_warps)),
        )
    return out
