"""What the kernels share on the device: offsets, rounding, dots, the map M and its gradients."""

import triton
import triton.language as tl

from bam_kernels import env

# Triton's interpreter keeps bfloat16 as raw bits: dots on it are wrong, and fp32 is truncated to
# it instead of rounded to nearest even. Both are mended here and cost a compiled kernel nothing.
_INTERPRETED: tl.constexpr = tl.constexpr(env.triton_interpret())


@triton.jit
def map_offsets(rows, columns, outer_units, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Offsets [BLOCK_C, BLOCK_P] of channels `rows` and positions `columns` within one sample.

    The dense axis keeps its 32-bit block. The other is widened before it is multiplied: C * H * W
    alone may pass 2^31, and so may its stride, which comes in units of ALIGN.
    """
    if CHANNELS_LAST:
        return rows[:, None] + (columns.to(tl.int64) * outer_units * ALIGN)[None, :]
    else:
        return (rows.to(tl.int64) * outer_units * ALIGN)[:, None] + columns[None, :]


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """Round an accumulator to `dtype`, to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        wide = value.to(tl.float32)
        bits = wide.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = bits.to(tl.float32, bitcast=True)
        # The carry of a NaN's mantissa would run into its sign.
        value = tl.where(wide != wide, wide, rounded)
    return value.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in acc's type."""
    if _INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def relu(value):
    """A ReLU that lets NaN through, as torch's does."""
    if _INTERPRETED and value.dtype == tl.bfloat16:
        wide = value.to(tl.float32)
        value = narrow(tl.where(wide < 0, 0.0, wide), tl.bfloat16)
    elif value.dtype == tl.bfloat16:  # of which a maximum would be an fp32
        wide = value.to(tl.float32)
        zero = tl.zeros_like(wide)
        value = tl.maximum(wide, zero, propagate_nan=tl.PropagateNan.ALL).to(tl.bfloat16)
    else:  # an instruction for two halves
        zero = tl.zeros_like(value)
        value = tl.maximum(value, zero, propagate_nan=tl.PropagateNan.ALL)
    return value


@triton.jit
def product(a, b, acc):
    """acc + a @ b with exact products: on tensor cores where both are of one half type, else in
    acc's type and without them."""
    if a.dtype == b.dtype and (a.dtype == tl.float16 or a.dtype == tl.bfloat16):
        return dot(a, b, acc, "ieee")
    else:
        return dot(a.to(acc.dtype), b.to(acc.dtype), acc, "ieee")


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)); exp overflows to inf below, which gives the right 0."""
    return 1 / (1 + tl.exp(-z))


@triton.jit
def attention_map(c, s, COMBINE: tl.constexpr):
    """M (Eq. 2, Table 1b) from broadcastable logits, either of which may be None."""
    if c is None:
        return sigmoid(s)
    elif s is None:
        return sigmoid(c)
    elif COMBINE == "sum":
        return sigmoid(c + s)
    elif COMBINE == "product":
        return sigmoid(c * s)
    elif COMBINE == "max":
        return sigmoid(tl.maximum(c, s, propagate_nan=tl.PropagateNan.ALL))
    else:
        return sigmoid(c) + sigmoid(s)


@triton.jit
def _through_sigmoid(grad, z):
    m = sigmoid(z)
    return grad * (m * (1 - m))


@triton.jit
def logit_gradients(grad, c, s, COMBINE: tl.constexpr):
    """(d/dc, d/ds) of the map M, times `grad`, each still to be summed over the other's axis.

    "max" shares between equal logits and masks the loser, as torch.maximum does: an infinite grad
    gives 0 there, where a slope of 0 would give NaN.
    """
    if c is None:
        value = _through_sigmoid(grad, s)
        return value, value
    elif s is None:
        value = _through_sigmoid(grad, c)
        return value, value
    elif COMBINE == "sum":
        value = _through_sigmoid(grad, c + s)
        return value, value
    elif COMBINE == "product":
        value = _through_sigmoid(grad, c * s)
        return value * s, value * c
    elif COMBINE == "max":
        value = _through_sigmoid(grad, tl.maximum(c, s, propagate_nan=tl.PropagateNan.ALL))
        shared = tl.where(c == s, value * 0.5, value)
        return tl.where(c < s, 0.0, shared), tl.where(s < c, 0.0, shared)
    else:
        return _through_sigmoid(grad, c), _through_sigmoid(grad, s)
