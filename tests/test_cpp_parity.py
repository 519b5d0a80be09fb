"""The C++ backend against plain PyTorch in float64, by norm(a - b) / norm(b) and the one table.

Four ways to run a module: ``inference`` (eval, no gradients), ``eval`` and ``train`` (forward and
backward), and ``train_no_grad`` (statistics of the batch, no gradients). Each has its own path.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from cases import COMBINES, DTYPES, PRESETS, make_map, memory_format, name
from kinks import module_and_input, without_kinks
from test_determinism import bits, same
from test_module import LONE, gathered, randomize, rounded_step, step, twin
from tolerances import PARITY, Errors, Sway, assert_parity, relative_error
from torch import Tensor, nn

import bam_kernels
from bam_kernels import BAM, SqueezeExcite, build_cpp, explain, functional, reference
from bam_kernels.backends import cpp_library

CPU = torch.device("cpu")
F64 = torch.float64
MODES = ("inference", "eval", "train", "train_no_grad")
ISAS = ("avx512", "avx2", "baseline")


def need_cpp() -> None:
    """Skip where the library is not built and the tools to build it are missing."""
    reason = cpp_library.why_not()
    if reason is None:
        return
    tools = build_cpp.find_toolchain()
    if isinstance(tools, list):
        pytest.skip(f"needs the C++ backend: {'; '.join(tools)}")
    pytest.fail(f"the C++ backend is not there, though it could be built: {reason}")


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch on this many threads; as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def cpp() -> Iterator[None]:
    """Every test of this file runs on the C++ backend."""
    need_cpp()
    with bam_kernels.use_backend("cpp"):
        yield


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels of one instruction set; skipped where the processor lacks it."""
    if not torch.ops.bam_kernels_cpp.set_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    try:
        yield request.param
    finally:
        torch.ops.bam_kernels_cpp.set_isa("auto")


def forward(module: nn.Module, x: Tensor, inference: bool) -> dict[str, Tensor]:
    """What a forward without gradients leaves behind: output and buffers."""
    with torch.inference_mode() if inference else torch.no_grad():
        out = module(x.detach())
    return {"out": out} | {key: b.clone() for key, b in module.named_buffers()}


def run(module: nn.Module, x: Tensor, dout: Tensor, mode: str) -> dict[str, Tensor]:
    """Everything that a call in this mode leaves behind."""
    module.train(mode.startswith("train"))
    if mode in ("eval", "train"):
        return step(module, x, dout)
    return forward(module, x, mode == "inference")


def compare(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str = "nchw",
    mode: str = "inference",
    draws: int = 1,
) -> None:
    """Ours against float64 and beside eager in `dtype`; the output's memory format is the input's.

    In eval mode dout lies along x, so that the logits' gradients are sums of one sign rather than
    of noise; in training it is noise, since batch statistics take such a common part away again.
    """
    train = mode.startswith("train")

    def pair() -> tuple[nn.Module, nn.Module]:
        ours = randomize(make()).train(train)
        if dtype.itemsize == 2:
            without_kinks(ours)
        return ours, twin(ours, F64)

    errors = Errors()
    for _ in errors.draws(draws, peers=draws >= 5):
        ours, truth, x = module_and_input(pair, lambda: make_map(shape, dtype, CPU, layout))
        eager = twin(ours, dtype)
        dout = torch.randn_like(x) if train else x * (1 + 0.5 * torch.randn_like(x))
        assert explain(ours, x).backend == "cpp"
        found = run(ours, x, dout, mode)
        assert found["out"].dtype == dtype
        assert found["out"].is_contiguous(memory_format=memory_format(layout))
        want, peer = run(truth, x.double(), dout.double(), mode), run(eager, x, dout, mode)
        assert list(found) == list(want)
        for key in want:
            if key.endswith("num_batches_tracked"):
                assert found[key] == want[key], key
        scales = {k: v.norm().item() for k, v in want.items() if k.startswith("d")} or {"": 1.0}
        found, want, peer = (gathered(each, scales) for each in (found, want, peer))
        call = partial(run, mode=mode)
        again = partial(rounded_step, truth, x, dout, dtype, call)
        sway = Sway(lambda again=again, scales=scales: gathered(again(), scales), want)
        for key, b in want.items():
            # A single number may sum noise over the map, in eval mode too where a product's
            # gradients have c's signs: in fewer digits than float64's its error is luck.
            if (b.numel() == 1 or key == LONE) and dtype != F64:
                continue
            errors.add(key, found[key], b, peer[key], sway, key in scales and key != "dx")


# --- whole modules ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("layout", ("nchw", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_parity(dtype, layout, preset, mode, isa, seed):
    make = lambda: BAM(100, preset=preset, dtype=dtype)  # noqa: E731
    compare(make, (8, 100, 9, 11), dtype, layout, mode, 1 if dtype == F64 else 5)


SHAPES = (
    (64, 64, 1, 1), (6, 37, 7, 7), (6, 16, 7, 9), (4, 100, 14, 14), (8, 48, 1, 17), (8, 48, 17, 1),
    (2, 64, 28, 28), (8, 33, 2, 3), (2, 256, 31, 5),
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("preset", PRESETS)
def test_shapes(preset, shape, isa, seed):
    """Odd sizes, H != W, one row, one column, one pixel; channels off and on the vectors' width."""
    for layout in ("nchw", "channels_last"):
        for dtype, mode in itertools.product((F64, torch.float32), ("inference", "eval")):
            make = lambda: BAM(shape[1], preset=preset, dtype=dtype)  # noqa: B023, E731
            compare(make, shape, dtype, layout, mode)
        # Wider inside: with a single unit on, a final norm takes the projection's gradient away.
        make = lambda: BAM(shape[1], 4, preset=preset, dtype=F64)  # noqa: E731
        compare(make, shape, F64, layout, "train")


@pytest.mark.parametrize("channels", (16, 37, 64, 100))
@pytest.mark.parametrize("reduction", (1, 4, 16))
def test_widths(reduction, channels, isa, seed):
    """Hidden layers of 1 to 100 channels."""
    for mode in ("inference", "train"):
        # Batch norms behind a single channel take its weight's gradient away, all but rounding.
        normed = mode == "inference" or channels // reduction > 1
        options = {"preset": "official", "norm_hidden": normed, "dtype": F64}
        make = lambda: BAM(channels, reduction, **options)  # noqa: B023, E731
        compare(make, (8, channels, 5, 6), F64, mode=mode)
        compare(make, (8, channels, 5, 6), F64, "channels_last", mode=mode)
    make = lambda: BAM(channels, reduction, dtype=torch.float32)  # noqa: E731
    compare(make, (8, channels, 5, 6), torch.float32)


@pytest.mark.parametrize("num_dilated", range(4))
@pytest.mark.parametrize("dilation", range(1, 7))
def test_dilations(dilation, num_dilated, isa, seed):
    """Taps that stay inside the map, and taps that all but one lie in the padding."""
    for shape, mode in itertools.product(((6, 32, 7, 9), (6, 32, 3, 20)), ("inference", "train")):
        make = lambda: BAM(32, 4, dilation=dilation, num_dilated=num_dilated, dtype=F64)  # noqa: E731
        compare(make, shape, F64, mode=mode)


OPTIONS = [
    *({"combine": combine} for combine in COMBINES),
    *({"combine": combine, "preset": "official"} for combine in COMBINES),
    *({"combine": combine, "residual": False} for combine in COMBINES),
    {"channel": False},
    {"spatial": False},
    {"channel": False, "residual": False},
    {"spatial": False, "residual": False, "preset": "official"},
    {"mlp_layers": 0},
    {"mlp_layers": 2},
    {"mlp_layers": 2, "preset": "official"},
    {"mlp_layers": 0, "norm_hidden": True},
    {"norm_hidden": True},
    {"norm_final": False},
    {"num_dilated": 0, "norm_final": False},
    {"preset": "official", "norm_final": True},
    {"reduction": 8, "dilation": 1},
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options, mode, seed):
    options = {"reduction": 4} | options
    for layout, dtype in (("nchw", F64), ("channels_last", F64), ("nchw", torch.float32)):
        if dtype == F64 or mode == "inference":
            make = lambda: BAM(40, **options, dtype=dtype)  # noqa: B023, E731
            compare(make, (8, 40, 6, 7), dtype, layout, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ("sliced", "sliced_channels_last", "strided"))
def test_sliced_inputs(layout, mode, seed):
    """Maps cut out of larger ones over N and C, and over W."""
    for dtype in (F64, torch.bfloat16):
        make = lambda: BAM(37, dtype=dtype)  # noqa: B023, E731
        compare(make, (8, 37, 9, 11), dtype, layout, mode, 1 if dtype == F64 else 3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_squeeze_excite(dtype, mode, seed):
    make = lambda: SqueezeExcite(40, 8, dtype=dtype)  # noqa: E731
    for layout in ("nchw", "channels_last"):
        compare(make, (8, 40, 6, 7), dtype, layout, mode, 1 if dtype == F64 else 5)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_any_order_of_the_axes(order, seed):
    """Memory that lies in any order: eager's values, in eager's memory format."""
    shape = (3, 32, 4, 5)
    module = randomize(BAM(32, 4, dtype=F64)).eval()
    memory = torch.randn([shape[i] for i in order], dtype=F64)
    x = memory.permute([order.index(i) for i in range(4)])
    assert x.shape == shape
    want = twin(module, F64)(x).detach()
    with torch.inference_mode():
        found = module(x)
    assert_parity("out", found, want)
    leaf = x.detach().requires_grad_()
    dout = torch.randn_like(x)
    (dx,) = torch.autograd.grad(module(leaf), leaf, dout)
    (want,) = torch.autograd.grad(twin(module, F64)(leaf), leaf, dout)
    assert_parity("dx", dx, want)
    for fmt in (torch.contiguous_format, torch.channels_last):
        if x.is_contiguous(memory_format=fmt):
            assert found.is_contiguous(memory_format=fmt)


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("kind", ("expanded", "other format", "sliced", "transposed"))
def test_incoming_gradients_in_any_layout(kind, train, seed):
    """out.sum().backward() has strides of zero; others lie unlike x."""
    module = randomize(BAM(20, 4, dtype=F64)).train(train)
    x = make_map((6, 20, 5, 7), F64, CPU)
    dout = {
        "expanded": torch.ones((), dtype=F64).expand(x.shape),
        "other format": make_map(x.shape, F64, CPU, "channels_last"),
        "sliced": make_map(x.shape, F64, CPU, "sliced"),
        "transposed": torch.randn(6, 20, 7, 5, dtype=F64).transpose(2, 3),
    }[kind]
    found, want = (step(each, x, dout) for each in (copy.deepcopy(module), twin(module, F64)))
    for key in ("out", "dx", "dspatial.reduce.weight", "dchannel.fc.0.weight"):
        assert relative_error(found[key], want[key]) < 1e-11, key


# --- batch norms ------------------------------------------------------------------------------


def norms(module: nn.Module) -> dict[str, nn.Module]:
    return {
        key: part
        for key, part in module.named_modules()
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)
    }


def assert_steps_agree(ours: nn.Module, steps: int, mode: str = "train") -> None:
    """Several calls of ours and of the reference leave the same behind, buffers too."""
    plain = twin(ours, F64)
    for _ in range(steps):
        x, dout = (make_map((6, 24, 5, 7), F64, CPU) for _ in "xd")
        found, want = (
            run_as_set(ours, x, dout, mode),
            run_as_set(plain, x, dout, mode),
        )
        assert list(found) == list(want)
        scale = max(v.norm().item() for v in want.values() if v.is_floating_point())
        for key, b in want.items():
            torch.testing.assert_close(
                found[key], b, rtol=1e-9, atol=1e-11 * scale, msg=lambda m, key=key: f"{key}: {m}"
            )
        ours.zero_grad(), plain.zero_grad()


def run_as_set(module: nn.Module, x: Tensor, dout: Tensor, mode: str) -> dict[str, Tensor]:
    """As `run`, and every norm's own mode stays."""
    return step(module, x, dout) if mode == "train" else forward(module, x, mode == "inference")


@pytest.mark.parametrize("mode", ("train", "train_no_grad"))
@pytest.mark.parametrize("momentum", (0.1, 0.7, None))
@pytest.mark.parametrize("preset", PRESETS)
def test_running_statistics(preset, momentum, mode, seed):
    """Three steps of every norm; a cumulative average for a momentum of None."""
    ours = randomize(BAM(24, 4, preset=preset, dtype=F64))
    for norm in norms(ours).values():
        norm.momentum = momentum
    before = copy.deepcopy(dict(ours.named_buffers()))
    assert_steps_agree(ours, 3, mode)
    for key, b in ours.named_buffers():
        assert not torch.equal(b, before[key])
        assert not key.endswith("num_batches_tracked") or b == 3


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=name)
def test_running_statistics_in_other_types(dtype, seed):
    """Those of a network's dtype and, in a half network, those kept in float32."""
    for wide in (False, True):
        ours = without_kinks(randomize(BAM(24, 4, dtype=dtype)))
        if wide:
            for norm in norms(ours).values():
                norm.float()
        truth = twin(ours, F64)
        x = make_map((8, 24, 9, 11), dtype, CPU)
        found = run(ours, x, x, "train_no_grad")
        want = run(truth, x.double(), x.double(), "train_no_grad")
        for key, b in want.items():
            if key.endswith(("running_mean", "running_var")):
                assert found[key].dtype == (torch.float32 if wide else dtype)
                assert relative_error(found[key], b) <= 4 * PARITY[dtype], key
        assert relative_error(found["out"], want["out"]) <= PARITY[dtype]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("preset", PRESETS)
def test_without_running_statistics(preset, mode, seed):
    """track_running_stats=False: the batch's statistics in both modes, and no buffers."""
    ours = randomize(BAM(24, 4, preset=preset, dtype=F64)).train(mode.startswith("train"))
    for norm in norms(ours).values():
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    assert not list(ours.buffers())
    assert_steps_agree(ours, 2, "train" if mode == "eval" else mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "frozen", ("channel.norm", "channel.hidden_norm.0", "spatial.norm", "spatial.hidden_norm.1")
)
def test_a_norm_with_a_mode_of_its_own(frozen, mode, seed):
    """One norm frozen in a training network, or training in an evaluated one."""
    ours = randomize(BAM(24, 4, norm_hidden=True, dtype=F64)).train(mode.startswith("train"))
    flipped = norms(ours)[frozen]
    flipped.train(not flipped.training)
    before = copy.deepcopy(norms(ours))
    assert_steps_agree(ours, 2, "train" if mode == "eval" else mode)
    for key, norm in norms(ours).items():
        changed = mode.startswith("train") != (key == frozen)
        assert torch.equal(norm.running_var, before[key].running_var) == (not changed), key


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", ("eps", "not affine", "no shift", "no bias", "no counter"))
def test_norms_and_layers_with_missing_parts(change, mode, seed):
    ours = randomize(BAM(24, 4, norm_hidden=True, dtype=F64)).train(mode.startswith("train"))
    for norm in norms(ours).values():
        if change == "eps":
            norm.eps = 0.3
        elif change in ("not affine", "no shift"):
            norm.bias = None
            norm.weight = norm.weight if change == "no shift" else None
        elif change == "no counter":
            norm.num_batches_tracked = None
    if change == "no bias":
        for layer in ours.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.bias = None
    assert_steps_agree(ours, 2, "train" if mode == "eval" else mode)


# --- the parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", (True, False))
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_gate(dtype, combine, residual, isa, seed):
    """Both logits and each alone, in every layout, forward and backward."""
    shape = (3, 37, 7, 9)
    for layout, which in itertools.product(("nchw", "channels_last", "sliced"), ("cs", "c", "s")):
        x = make_map(shape, dtype, CPU, layout)
        c = torch.randn(shape[:2]).to(dtype) if "c" in which else None
        s = torch.randn(3, 1, 7, 9).to(dtype) if "s" in which else None
        dout = x * (1 + 0.5 * torch.randn_like(x))
        found = gradients(functional.gate, (x, c, s), dout, combine, residual)
        wide = [None if t is None else t.double() for t in (x, c, s, dout)]
        want = gradients(reference.gate, wide[:3], wide[3], combine, residual)
        with torch.inference_mode():
            assert torch.equal(functional.gate(x, c, s, combine, residual), found["out"])
        for key, b in want.items():
            assert_parity(f"{which} {layout} {key}", found[key], b)
        assert found["out"].is_contiguous(memory_format=memory_format(layout))


def gradients(function, inputs, dout, *options) -> dict[str, Tensor]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    out = function(*leaves, *options)
    out.backward(dout)
    found = {"out": out.detach()}
    for key, leaf in zip(("dx", "dc", "ds"), leaves, strict=True):
        if leaf is not None:
            assert leaf.grad.dtype == leaf.dtype
            found[key] = leaf.grad
    return found


@pytest.mark.parametrize("x_dtype,logits", list(itertools.permutations(DTYPES, 2)), ids=name)
def test_gate_on_logits_of_another_dtype(x_dtype, logits, seed):
    """They are taken as they are, and their gradients come in their own dtype."""
    x = make_map((2, 20, 5, 6), x_dtype, CPU)
    c, s = torch.randn(2, 20).to(logits), torch.randn(2, 1, 5, 6).to(logits)
    found = gradients(functional.gate, (x, c, s), x)
    want = gradients(reference.gate, (x.double(), c.double(), s.double()), x.double())
    for key, b in want.items():
        bound = PARITY[torch.float32] if found[key].dtype == F64 else PARITY[found[key].dtype]
        assert relative_error(found[key], b) <= bound, key


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", ("nchw", "channels_last", "sliced", "strided"))
def test_pool_reduce(layout, dtype, isa, seed):
    for shape, hidden in (((3, 37, 7, 9), 5), ((2, 100, 1, 1), 6), ((2, 64, 4, 33), 16)):
        x = make_map(shape, dtype, CPU, layout) + 0.5  # means that are no sums of noise
        weight, bias = torch.randn(hidden, shape[1]).to(dtype), torch.randn(hidden).to(dtype)
        pooled, reduced = functional.pool_reduce(x, weight, bias)
        assert pooled.dtype == reduced.dtype == dtype
        assert_parity("pooled", pooled, x.double().mean((2, 3)))
        want = torch.einsum("hc,ncij->nhij", weight.double(), x.double())
        assert_parity("reduced", reduced, want + bias.double()[:, None, None])
        bare = functional.pool_reduce(x, weight[:, :, None, None])[1]
        assert_parity("reduced without bias", bare, want)
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        made = functional.pool_reduce(*leaves)
        douts = [torch.rand_like(t) + 0.5 for t in made]
        torch.autograd.backward(made, douts)
        wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
        y = torch.einsum("hc,ncij->nhij", wide[1], wide[0]) + wide[2][:, None, None]
        torch.autograd.backward([wide[0].mean((2, 3)), y], [t.double() for t in douts])
        for key, a, b in zip(("dx", "dweight", "dbias"), leaves, wide, strict=True):
            assert_parity(key, a.grad, b.grad)


# --- extremes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", (True, False))
@pytest.mark.parametrize("layout", ("nchw", "channels_last"))
@pytest.mark.parametrize("dtype", (F64, torch.float32), ids=name)
@pytest.mark.parametrize("combine", COMBINES)
def test_extreme_logits_and_inputs(combine, dtype, layout, residual, isa, seed):
    """Logits of +-1e4 and infinity; inputs with inf, NaN, -0, very small and large numbers."""
    x = make_map((2, 24, 3, 5), dtype, CPU, layout)
    special = [float("inf"), float("-inf"), float("nan"), -0.0, 1e-38, 3e38]
    x[0, :6, 0, 0] = torch.tensor(special, dtype=dtype)
    c, s = torch.randn(2, 24, dtype=dtype), torch.randn(2, 1, 3, 5, dtype=dtype)
    c[0, 6:12] = torch.tensor([1e4, -1e4, 1e4, -1e4, 80.0, -80.0], dtype=dtype)
    s[0, 0, 1] = torch.tensor([1e4, -1e4, 60.0, -60.0, 0.0], dtype=dtype)
    if combine == "product":
        # Every product saturated or of ordinary size: with factors of 1e4 and the other near zero a
        # gradient is a small difference of large numbers, in eager as well.
        c, s = (t + 0.5 * t.sign() for t in (c, s))
        s[0, 0, 1, 4] = 0.5
    c[1, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")], dtype=dtype)
    s[1, 0, 2, 0] = float("-inf")
    dout = torch.randn_like(x)
    found = gradients(functional.gate, (x, c, s), dout, combine, residual)
    want = gradients(reference.gate, (x, c, s), dout, combine, residual)
    for key, b in want.items():
        same(found[key], b, key)
    assert want["out"].isnan().any() and want["out"].isinf().any()
    for only in ("c", "s"):
        logits = (c, None) if only == "c" else (None, s)
        with torch.inference_mode():
            a = functional.gate(x, *logits, combine, residual)
        same(a, reference.gate(x, *logits, combine, residual), only)


@pytest.mark.parametrize("scale", (80.0, 1e2, 1e4, 1e30))
@pytest.mark.parametrize("combine", COMBINES)
def test_large_logits_of_a_module(combine, scale, isa, seed):
    """Saturated on both sides, past where exp(-c) exp(-s) overflows."""
    for dtype, mode in itertools.product((F64, torch.float32), ("inference", "eval")):
        module = randomize(BAM(32, 4, combine=combine, dtype=dtype))
        with torch.no_grad():
            for branch in (module.channel, module.spatial):
                branch.norm.weight.mul_(scale)
        x = make_map((3, 32, 5, 7), dtype, CPU)
        found, want = (run(m, x, x, mode)["out"] for m in (module, twin(module, dtype)))
        assert want.isfinite().all()
        # A logit's own rounding is `scale` times that of its dtype; only few are not saturated.
        rough = 1e-9 if dtype == F64 else 2e-3
        assert relative_error(found, want) < rough


@pytest.mark.parametrize("mode", ("inference", "eval", "train_no_grad"))
@pytest.mark.parametrize("preset", PRESETS)
def test_a_module_on_special_inputs(preset, mode, isa, seed):
    """inf and NaN reach what they reach in the reference, and in eval mode no other sample."""
    branches = ({}, {"channel": False}, {"spatial": False})
    dtypes = (torch.float32, F64)
    for layout, dtype, fewer in itertools.product(("nchw", "channels_last"), dtypes, branches):
        module = randomize(BAM(24, 4, preset=preset, dtype=dtype, **fewer))
        x = make_map((4, 24, 5, 7), dtype, CPU, layout)
        x[1, 2, 3, 4] = float("nan")
        x[2, 2, 3, 4] = float("inf")
        x[3, 3, 0, 0] = float("-inf")
        plain = twin(module, dtype)
        found, want = (run(each, x, x, mode) for each in (module, plain))
        for key in ("out", *(("dx",) if "dx" in want else ()), *dict(module.named_buffers())):
            same(found[key], want[key], key)
        if mode != "train_no_grad":
            assert want["out"][0].isfinite().all() and want["out"][1].isnan().any()


def test_subnormals_and_zeros(isa, seed):
    """Nothing is flushed: as the reference computes them; the sign of zero stays."""
    x = torch.zeros(2, 16, 3, 5)
    x[0] = 1e-40
    x[1, :, 0] = -0.0
    module = randomize(BAM(16, 4)).eval()
    with torch.inference_mode():
        found, want = module(x), twin(module, torch.float32)(x)
    same(found, want, "out")
    assert (found[0] > 0).all()
    assert torch.equal(found[1].signbit(), want[1].signbit())


# --- reproducibility --------------------------------------------------------------------------


def everything(
    module: nn.Module, state: dict, x: Tensor, dout: Tensor, mode: str
) -> dict[str, Tensor]:
    module.load_state_dict(state)
    module.zero_grad(set_to_none=True)
    found = run(module, x, dout, mode)
    return {key: t.clone() for key, t in found.items() if t.is_floating_point()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name)
def test_same_bits_and_any_number_of_threads(dtype, mode, seed):
    """Ten runs, the same bits, on 1 and on 2 threads; and 1, 2 and 3 agree to rounding."""
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-4
    for layout, n in (("nchw", 3), ("channels_last", 5)):
        module = randomize(BAM(64, 4, dtype=dtype))
        if dtype == torch.bfloat16:
            without_kinks(module)
        state = copy.deepcopy(module.state_dict())
        x = make_map((n, 64, 14, 14), dtype, CPU, layout)
        dout = torch.randn_like(x)
        firsts = []
        for count in (1, 2, 3):
            with threads(count):
                first = everything(module, state, x, dout, mode)
                for _ in range(9 if count < 3 else 0):
                    again = everything(module, state, x, dout, mode)
                    for key, b in first.items():
                        assert torch.equal(bits(again[key]), bits(b)), key
            firsts.append(first)
        for other in firsts[1:]:
            for key, b in firsts[0].items():
                # Gradients of single parameters may be sums of noise, of rounding alone.
                if not key.startswith("d") or key == "dx":
                    assert relative_error(other[key], b) < bound, key


def test_calls_from_several_threads_of_python(seed):
    """Scratch memory is a thread's own: eight callers at once get what one gets."""
    from concurrent.futures import ThreadPoolExecutor

    module = randomize(BAM(64, 4)).eval()
    maps = [torch.randn(4, 64, 9 + i, 14) for i in range(8)]

    def call(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return module(x)

    want = [call(x) for x in maps]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for a, b in zip(pool.map(call, maps), want, strict=True):
                assert torch.equal(a, b)


# --- autograd and autocast --------------------------------------------------------------------


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("preset", PRESETS)
def test_double_backward(preset, train, seed):
    """A gradient penalty: gradients of the norm of x's gradient, by x and every parameter."""
    module = randomize(BAM(20, 4, preset=preset, dtype=F64)).train(train)
    x = make_map((6, 20, 5, 7), F64, CPU)
    found = []
    for each in (copy.deepcopy(module), twin(module, F64)):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(each(leaf).square().sum(), leaf, create_graph=True)
        dx.square().sum().backward()
        found.append([leaf.grad, *(p.grad for p in each.parameters())])
    scale = max(g.norm() for g in found[1] if g is not None)
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * scale)


def test_gradgradcheck_of_the_gate(seed):
    leaves = [
        torch.randn(shape, dtype=F64, requires_grad=True)
        for shape in ((2, 4, 3, 2), (2, 4), (2, 1, 3, 2))
    ]
    for combine in COMBINES:
        call = lambda *t: functional.gate(*t, combine)  # noqa: B023, E731
        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("frozen", ("parameters", "input", "spatial", "channel", "reduce"))
def test_partly_frozen(frozen, seed):
    """Gradients of the rest are the same whatever is frozen."""
    module = randomize(BAM(24, 4, dtype=F64))
    found = []
    x = make_map((6, 24, 5, 7), F64, CPU)
    for each in (module, twin(module, F64)):
        leaf = x.detach().requires_grad_(frozen != "input")
        part = {"parameters": each, "reduce": each.spatial.reduce, "input": nn.Module()}
        part.get(frozen, getattr(each, frozen, None)).requires_grad_(False)
        each(leaf).square().sum().backward()
        found.append([leaf.grad, *(p.grad for p in each.parameters())])
    assert any(g is not None for g in found[0])
    scale = max(g.norm() for g in found[1] if g is not None)
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * scale)


@pytest.mark.parametrize("backward", ("outside", "inside"))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("x_dtype", (torch.float32, torch.bfloat16), ids=name)
def test_autocast(x_dtype, mode, backward, seed):
    """A float32 map stays float32 and a bfloat16 one bfloat16, on float32 parameters; the backward
    in front of the region's end too, as some scripts have it."""
    module = without_kinks(randomize(BAM(32, 4)))
    x = make_map((16, 32, 5, 7), x_dtype, CPU)
    dout = torch.randn_like(x)
    want = run(twin(module, F64), x.double(), dout.double(), mode)
    found, peer = (
        autocast_run(each, x, dout, mode, backward)
        for each in (module, twin(module, torch.float32))
    )
    assert found["out"].dtype == x_dtype
    for key in ("out", "dx") if "dx" in found else ("out",):
        assert found[key].dtype == x_dtype
        own = relative_error(peer[key].float(), want[key])
        assert relative_error(found[key], want[key]) < max(1e-2, 1.5 * own), key
    if "dx" in found:
        assert found["dchannel.fc.0.weight"].dtype == torch.float32


def autocast_run(
    module: nn.Module, x: Tensor, dout: Tensor, mode: str, backward: str
) -> dict[str, Tensor]:
    """As `run`, the forward under autocast; a backward inside of the region, or behind it."""
    module.train(mode.startswith("train"))
    with torch.autocast("cpu", torch.bfloat16):
        if backward == "inside" or mode in ("inference", "train_no_grad"):
            return run(module, x, dout, mode)
        leaf = x.detach().requires_grad_()
        out = module(leaf)
    out.backward(dout.to(out.dtype))
    grads = {f"d{key}": p.grad for key, p in module.named_parameters()}
    return {"out": out.detach(), "dx": leaf.grad} | grads


@pytest.mark.parametrize("mode", ("inference", "eval"))
def test_an_empty_batch(mode, seed):
    module = BAM(32, 4)
    x = torch.randn(0, 32, 5, 7)
    found = run(module, x, x, mode)
    assert found["out"].shape == x.shape
    assert functional.gate(x, torch.randn(0, 32), torch.randn(0, 1, 5, 7)).shape == x.shape
    assert functional.pool_reduce(x, torch.randn(2, 32))[1].shape == (0, 2, 5, 7)


def test_observers_see_the_logits(seed):
    """`attention_maps` and other observers get both branches' logits."""
    module = randomize(BAM(24, 4, dtype=F64)).eval()
    x = make_map((3, 24, 5, 7), F64, CPU)
    seen = []
    module.observer = lambda c, s: seen.append((c, s))
    with torch.inference_mode():
        module(x)
        twin(module, F64)(x)
    for a, b in zip(*seen, strict=True):
        assert_parity("logits", a, b)


@pytest.mark.parametrize("mode", ("inference", "train"))
def test_hooks_and_replaced_layers_are_called(mode, seed):
    """What the kernels would pass by runs as plain PyTorch."""
    module = randomize(BAM(24, 4, dtype=F64))
    x = make_map((6, 24, 5, 7), F64, CPU)
    want, calls = run(twin(module, F64), x, x, mode)["out"], []
    hooked = copy.deepcopy(module)
    hooked.channel.fc[0].register_forward_hook(lambda *_: calls.append(1))
    assert_parity("out", run(hooked, x, x, mode)["out"], want)
    assert calls == [1]

    class Twice(nn.Conv2d):
        def forward(self, y: Tensor) -> Tensor:
            return 2 * super().forward(y)

    module.spatial.dilated[0].__class__ = Twice
    want = run(twin(module, F64), x, x, mode)["out"]
    assert_parity("out", run(module, x, x, mode)["out"], want)
