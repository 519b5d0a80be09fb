"""Random modules on random maps: the C++ backend against float64, within the one table.

BAM_KERNELS_FUZZ_EXAMPLES sets how many (100 by default; 2000 for a full run); what fails is
printed as the smallest case that still does. Cases are well-conditioned by construction, so that
the table holds as it is: enough samples behind batch statistics, randomised running statistics and
affine parameters, and for half types hidden units clear of their kinks.
"""

from __future__ import annotations

import dataclasses
import math
import os
from functools import partial

import pytest
import torch
from cases import COMBINES, DTYPES, PRESETS
from kinks import NoClearInputError, module_and_input, without_kinks
from test_cpp_parity import cpp, run, threads  # noqa: F401 - a fixture of every test here
from test_module import gathered, randomize, rounded_step, twin
from tolerances import PARITY, Errors, Sway
from torch import Tensor, nn

from bam_kernels import BAM, explain

hypothesis = pytest.importorskip("hypothesis", reason="pip install hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

EXAMPLES = int(os.environ.get("BAM_KERNELS_FUZZ_EXAMPLES", "100"))
F64 = torch.float64

# How a map lies in a larger one: the order of its axes in memory, room before and behind it along
# each axis (N, C, H, W), and steps over every second element.
ORDERS = ((0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3), (0, 1, 3, 2), (2, 3, 0, 1))


@dataclasses.dataclass(frozen=True)
class Lie:
    """Where a map lies in memory."""

    order: tuple[int, ...]
    room: tuple[int, ...]
    steps: tuple[int, ...]

    def make(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Normal values of this shape, laid out so."""
        big = [n * k + 2 * r for n, k, r in zip(shape, self.steps, self.room, strict=True)]
        memory = torch.randn([big[axis] for axis in self.order]).to(dtype)
        x = memory.permute([self.order.index(axis) for axis in range(4)])
        for axis, (n, k, r) in enumerate(zip(shape, self.steps, self.room, strict=True)):
            x = x.narrow(axis, r, n * k)
        x = x[:: self.steps[0], :: self.steps[1], :: self.steps[2], :: self.steps[3]]
        assert tuple(x.shape) == shape
        return x


@dataclasses.dataclass(frozen=True)
class Case:
    """A module, a map, and how it is run."""

    shape: tuple[int, int, int, int]
    options: tuple[tuple[str, object], ...]
    dtype: torch.dtype
    lie: Lie
    dout_lie: Lie
    mode: str
    threads: int
    seed: int


lies = st.builds(
    Lie,
    st.sampled_from(ORDERS),
    st.tuples(*[st.sampled_from((0, 0, 1, 3))] * 4),
    st.tuples(*[st.sampled_from((1, 1, 1, 2))] * 4),
)
dense = st.builds(Lie, st.sampled_from(ORDERS[:2]), st.just((0,) * 4), st.just((1,) * 4))


@st.composite
def cases(draw) -> Case:
    mode = draw(st.sampled_from(("inference", "eval", "train", "train_no_grad")))
    # A norm with batch statistics takes away what scales its input: with one unit in front of it
    # nearly the whole gradient, and with few values behind it nearly everything.
    train = mode.startswith("train")
    channels = draw(st.integers(16 if train else 1, 80))
    n = draw(st.integers(0, 5)) + (8 if train else 0)
    h, w = (draw(st.integers(3 if train else 1, 20)) for _ in "hw")
    dtype = draw(st.sampled_from(DTYPES))
    preset = draw(st.sampled_from(PRESETS))
    branches = draw(st.sampled_from(((True, True), (True, True), (True, False), (False, True))))
    options = {
        "reduction": draw(st.integers(1, min(channels // 4 if train else channels, 20))),
        "dilation": draw(st.integers(1, 6)),
        "num_dilated": draw(st.integers(0, 3)),
        "mlp_layers": draw(st.sampled_from((1, 1, 0, 2))),
        "combine": draw(st.sampled_from((None, *COMBINES))),
        "channel": branches[0],
        "spatial": branches[1],
        "residual": draw(st.booleans()),
        "preset": preset,
        "norm_hidden": draw(st.sampled_from((None, True, False))),
        "norm_final": draw(st.sampled_from((None, True, False))),
    }
    return Case(
        (n, channels, h, w),
        tuple(options.items()),
        dtype,
        draw(st.one_of(dense, lies)),
        draw(st.one_of(dense, lies)),
        mode,
        draw(st.integers(1, 3)),
        draw(st.integers(0, 2**31 - 1)),
    )


def make_module(case: Case) -> nn.Module:
    module = BAM(case.shape[1], **dict(case.options), dtype=case.dtype)
    randomize(module)
    return without_kinks(module) if case.dtype.itemsize == 2 else module


def check(case: Case) -> None:
    """Ours within the table of float64, or as near as eager is in the case's dtype."""
    torch.manual_seed(case.seed)
    train = case.mode.startswith("train")

    def pair() -> tuple[nn.Module, nn.Module]:
        ours = make_module(case)
        return ours, twin(ours, F64).train(train)

    x = case.lie.make(case.shape, case.dtype)
    if x.numel() > 0:
        ours, truth, x = module_and_input(pair, lambda: case.lie.make(case.shape, case.dtype))
    else:
        ours, truth = pair()
    eager = twin(ours, case.dtype)
    noise = case.dout_lie.make(case.shape, case.dtype)
    dout = noise if train else (noise * 0).add_(x * (1 + 0.5 * torch.randn_like(x)))
    assert explain(ours.train(train), x).backend == ("cpp" if case.shape[0] else "reference")
    with threads(case.threads):
        found = run(ours, x, dout, case.mode)
        want = run(truth, x.double(), dout.double(), case.mode)
        peer = run(eager, x, dout, case.mode)
    assert list(found) == list(want)
    assert found["out"].shape == x.shape and found["out"].dtype == x.dtype
    for key in want:
        if key.endswith("num_batches_tracked"):
            assert found[key] == want[key], key
    if case.shape[0] == 0:  # plain PyTorch's, whose empty maps lie as they like
        return
    for fmt in (torch.contiguous_format, torch.channels_last):
        if x.is_contiguous(memory_format=fmt):
            assert found["out"].is_contiguous(memory_format=fmt)
    scales = {k: v.norm().item() for k, v in want.items() if k.startswith("d") and v is not None}
    scales = scales or {"": 1.0}
    found, want, peer = (gathered(each, scales) for each in (found, want, peer))
    call = partial(run, mode=case.mode)
    again = partial(rounded_step, truth, x, dout, case.dtype, call)
    sway = Sway(lambda: gathered(again(), scales), want)
    errors = Errors()
    for key, b in want.items():
        if key in scales and key != "dx" and not comparable(case, key, b):
            continue
        errors.add(key, found[key], b, peer[key], sway, key in scales and key != "dx")
    errors.check(peers=False) if case.dtype == F64 else None


def comparable(case: Case, key: str, gradient: Tensor) -> bool:
    """Whether a parameter's gradient has digits to compare, in training.

    A final norm takes away what scales its input: nearly all of the projection's gradient where one
    unit or none is on in front of it; at a width of 8 and more there are others. A few numbers that
    sum noise over the map have digits in float64 alone.
    """
    if case.mode != "train":
        return True
    if key.endswith("project.weight") and gradient.numel() < 8:
        return False
    return case.dtype == F64 or gradient.numel() >= 8


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(case=cases())
def test_random_modules(case):
    try:
        check(case)
    except NoClearInputError:
        # So many hidden units that in float32 one is always near its kink: float64 compares them.
        check(dataclasses.replace(case, dtype=F64))


@settings(
    max_examples=max(EXAMPLES // 2, 1),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 80), st.integers(1, 20), st.integers(1, 20)),
    lie=lies,
    dtype=st.sampled_from(DTYPES),
    logits_dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    which=st.sampled_from(("cs", "c", "s")),
    combine=st.sampled_from(COMBINES),
    residual=st.booleans(),
    scale=st.sampled_from((0.5, 3.0, 30.0, 1e3)),
    count=st.integers(1, 3),
    seed=st.integers(0, 2**31 - 1),
)
def test_random_gates(
    shape, lie, dtype, logits_dtypes, which, combine, residual, scale, count, seed
):
    """The gate on logits of any size, dtype and stride, with and without gradients."""
    from test_cpp_parity import gradients
    from tolerances import relative_error

    from bam_kernels import functional, reference

    torch.manual_seed(seed)
    n, ch, h, w = shape
    x = lie.make(shape, dtype)
    c = s = None
    if "c" in which:
        c = (scale * torch.randn(ch, n).t()).to(logits_dtypes[0])
    if "s" in which:
        s = (scale * torch.randn(n, 1, w, h).transpose(2, 3)).to(logits_dtypes[1])
    dout = x * (1 + 0.5 * torch.randn_like(x))
    options = (combine, residual)
    with threads(count):
        found = gradients(functional.gate, (x, c, s), dout, *options)
        with torch.inference_mode():
            out = functional.gate(x, c, s, *options)
    wide = [None if t is None else t.double() for t in (x, c, s)]
    want = gradients(reference.gate, wide, dout.double(), *options)
    assert torch.equal(out, found["out"])
    # The size of the largest logit: what float32 loses of it the map has as its relative error.
    sizes = [t.abs().max().item() for t in wide[1:] if t is not None]
    largest = math.prod(sizes) if combine == "product" else sum(sizes)
    if "c" in which and "s" in which:  # as one vector: a lone sum over the map may cancel
        for each in (found, want):
            each["dlogits"] = torch.cat([each.pop(key).double().flatten() for key in ("dc", "ds")])
    for key, b in want.items():
        # Logits are taken to float32 for an x of less than float64.
        narrowest = max(PARITY[t] for t in (dtype, *logits_dtypes)) if key == "dlogits" else 0.0
        bound = max(PARITY[found[key].dtype], narrowest, 2e-6 if dtype != F64 else 0.0)
        bound *= max(1.0, largest / 3)
        if key not in ("out", "dx"):  # 1 - M of a gate nearly open has lost as many digits
            bound *= max(1.0, math.exp(min(largest, 20.0)) / 16)
        # Below its normal range a type has few digits, or none.
        tiny = max(torch.finfo(t).tiny for t in (dtype, *logits_dtypes)) * b.numel() ** 0.5
        if b.norm() > max(tiny, 1e-30) and (key in ("out", "dx") or scale <= 3):
            assert relative_error(found[key], b) <= bound, key
