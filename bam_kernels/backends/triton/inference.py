"""Inference of a whole module from known statistics: k + 2 launches for k dilated convolutions.

Pooling and reduction; the first convolution, with the channel MLP beside it; the other ones, the
last of which makes the projection and its norm; the gate. Sums in parts are added up by those who
read them. Without a spatial branch the gate computes the MLP for itself: two launches.

Norms are applied from their statistics as they are now: nothing is folded and kept.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from bam_kernels import layout
from bam_kernels.backends.triton import configs
from bam_kernels.backends.triton.channel_mlp import channel_mlp_forward, dense, mlp_block
from bam_kernels.backends.triton.gate import gate_forward
from bam_kernels.backends.triton.inference_layers import Layer, Module, linear_arguments
from bam_kernels.backends.triton.launch import (
    accumulator_dtype,
    cdiv,
    conv_precision,
    device_guard,
    launch,
    triton_dtype,
)
from bam_kernels.backends.triton.mlp_gate import mlp_gate_forward
from bam_kernels.backends.triton.pool_reduce import Parts, pool_reduce_parts, whole
from bam_kernels.backends.triton.replay import replayed
from bam_kernels.backends.triton.spatial_branch import launch_project
from bam_kernels.backends.triton.spatial_conv import (
    conv_tile,
    norm_arguments,
    projection_arguments,
)
from bam_kernels.backends.triton.spatial_layout import Map
from bam_kernels.backends.triton.spatial_pack import launch_pack, packings

# --- kernels ----------------------------------------------------------------------------------

_SIZES = ["N", "H", "W", "positions", "total", "mlp_programs", "mlp_channel_blocks", "pooled_tiles"]


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
    total,
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
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TAPS: tl.constexpr,
    USED: tl.constexpr,
    WRAPS: tl.constexpr,
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
    the other. Grid: the MLP's blocks, then tiles."""
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
            final_beta, H, W, positions, total, 0, 0, 0, hidden, DILATION, EPS, NEXT_EPS, FINAL_EPS,
            PRECISION, ACC, BLOCK_P, BLOCK_H, BLOCK_K, BLOCK_T, TAPS, USED, WRAPS, SPLITS, DTYPE,
        )  # fmt: skip


# --- launchers ----------------------------------------------------------------------------------


@replayed
def bam_forward(x: Tensor, params: list[Tensor], options: list[int], eps: list[float]) -> Tensor:
    """A whole module whose batch norms have known statistics; x [N, C, H, W], out alike.

    The parameters' order is csrc/operators.h's; the channel MLP has one hidden layer.
    """
    module = Module.read(params, options, eps)
    x = layout.walkable(x)
    if module.reduce is not None:
        c, s = _logits(x, module)
        return gate_forward(x, c, s, module.combine, module.residual)
    parts = pool_reduce_parts(x, None, None, True)
    out = mlp_gate_forward(x, parts, module.channel, module.residual)
    if out is None:
        c = _channel_logits(whole(x, parts, 0, None).pooled, module.channel)
        out = gate_forward(x, c, None, module.combine, module.residual)
    return out


def _logits(x: Tensor, module: Module) -> tuple[Tensor | None, Tensor]:
    """Both branches' logits, with the one launch that reads x."""
    n, _, h, w = x.shape
    hidden = module.reduce.weight.shape[0]
    tile = configs.spatial_tile(x.dtype, n * h * w, hidden, conv_precision(x.dtype))
    m = Map(n, h, w, hidden, x.dtype, x.device, tile)
    packed, todo = packings(m, [conv.weight for conv in module.convs])
    parts = pool_reduce_parts(
        x, module.reduce.weight.flatten(1).to(x.dtype), module.reduce.bias, bool(module.channel),
        channels_last=True, packing=todo[0] if todo else None,
    )  # fmt: skip
    beside = bool(module.channel and module.convs)
    mlp = _mlp(x, module, parts) if beside else None
    parts = whole(
        x, parts, hidden, module.reduce.bias,
        pooled=mlp is None,
        reduced=not module.convs or not configs.reads_again(_taps_bytes(m, parts)),
    )  # fmt: skip
    if beside and mlp is None:
        mlp = _mlp(x, module, parts)  # which no longer has to add up parts
    logits = m.workspace(n, 1, h, w)
    channel = None if mlp is None else mlp.logits
    if module.channel and mlp is None:
        channel = _channel_logits(parts.pooled, module.channel)
    with device_guard(x):
        for packing in todo[1:]:
            launch_pack(m, packing)
        if not module.convs:
            project = module.project
            projection = projection_arguments(
                None, project.weight.flatten(), project.bias, project.norm, logits=logits
            )
            launch_project(m, parts.reduced, module.last, None, None, projection)
        source = parts.reduced
        for i, conv in enumerate(module.convs):
            first, last = i == 0, i == len(module.convs) - 1
            out = None if last else m.empty()
            _launch_conv(
                m, source, packed[i], conv, module, out, logits if last else None,
                splits=parts.splits if first else 1, mlp=mlp if first else None,
            )  # fmt: skip
            source = out
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
    """The channel MLP as a part of another launch: its result, programs and arguments."""

    logits: Tensor
    programs: int
    arguments: dict[str, object]


def _mlp(x: Tensor, module: Module, parts: Parts) -> _Mlp | None:
    """None where a launch of its own is the better way."""
    n, c = x.shape[:2]
    hidden = module.channel[0].weight.shape[0]
    dtype = accumulator_dtype(x.dtype)
    found = configs.mlp_blocks_beside_conv(n, hidden, dtype.itemsize)
    if found is None:
        return None
    block_n, block_c, block_h = found
    blocks = cdiv(c, block_c)
    # Each block adds the parts of its samples up for itself.
    if parts.tiles > 1 and not configs.reads_again(parts.pooled.nbytes * blocks):
        return None
    logits = torch.empty((n, c), dtype=dtype, device=x.device)
    programs = cdiv(n, block_n) * blocks
    arguments = {
        "pooled": parts.pooled,
        "mlp_logits": logits,
        "channels": c,
        "mlp_hidden": hidden,
        "mlp_programs": programs,
        "mlp_channel_blocks": blocks,
        "pooled_tiles": parts.tiles if parts.tiles > 1 else None,
        "MLP": True,
        "MLP_BLOCK_N": block_n,
        "MLP_BLOCK_C": block_c,
        "MLP_BLOCK_H": block_h,
        **linear_arguments(module.channel, "mlp_"),
    }
    return _Mlp(logits, programs, arguments)


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
    packed: Tensor,
    conv: Layer,
    module: Module,
    out: Tensor | None,
    logits: Tensor | None,
    splits: int,
    mlp: _Mlp | None,
) -> None:
    """One convolution; the last one, given the logits, makes the projection too."""
    last = logits is not None
    following = module.last if last else None
    project = module.project if last else None
    final = project.norm if last else None
    programs = m.count + (0 if mlp is None else mlp.programs)
    constants = m.constants()
    if splits > 1:  # a stage holds every part: three would be more than an sm_86 or sm_120 has
        constants["num_stages"] = min(2, m.tile.num_stages)
    constants.update(m.registers(96))  # the MLP beside it, and sums of parts, take more
    launch(
        _conv_mlp_kernel,
        (programs,),
        source,
        dense(module.reduce.bias) if splits > 1 else None,
        packed,
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
        total=m.total,
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
        TAPS=m.taps[0],
        USED=m.taps[1],
        WRAPS=m.wraps,
        **(_NO_MLP if mlp is None else mlp.arguments),
        **constants,
    )
