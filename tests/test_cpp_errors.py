"""Bad input to the C++ backend: through the public interface, and to the raw operators themselves.

The interface raises TypeError or ValueError naming the argument before anything is computed. The
raw operators stand behind it and still never trust a tensor: a dtype, shape or stride that they
cannot take is a RuntimeError that names the tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from test_cpp_parity import need_cpp
from torch import Tensor

import bam_kernels
from bam_kernels import BAM, SqueezeExcite, functional

F64 = torch.float64
N, C, H, W, HIDDEN = 2, 8, 3, 4, 2


@pytest.fixture(autouse=True)
def cpp() -> Iterator[None]:
    """Every test of this file runs on the C++ backend."""
    need_cpp()
    with bam_kernels.use_backend("cpp"):
        yield


# --- the interface ----------------------------------------------------------------------------

BAD_MAPS = [
    ([[1.0]], TypeError, "x: expected a torch.Tensor, got list"),
    (None, TypeError, "x: expected a torch.Tensor, got NoneType"),
    (torch.randn(2, 32, 5), ValueError, r"x: expected 4 dimensions .* got \[2, 32, 5\]"),
    (
        torch.randn(1, 2, 32, 5, 5),
        ValueError,
        r"x: expected 4 dimensions .* got \[1, 2, 32, 5, 5\]",
    ),
    (torch.randn(2, 16, 5, 5), ValueError, "x: expected 32 channels, got 16"),
    (torch.ones(2, 32, 5, 5, dtype=torch.int64), TypeError, "x: expected one of .*torch.int64"),
    (torch.ones(2, 32, 5, 5, dtype=torch.complex64), TypeError, "got torch.complex64"),
    (torch.ones(2, 32, 5, 5, dtype=torch.bool), TypeError, "got torch.bool"),
    (torch.randn(2, 32, 0, 5), ValueError, r"H and W of at least 1, got shape \[2, 32, 0, 5\]"),
    (torch.randn(2, 32, 5, 5, dtype=F64), TypeError, "parameters' dtype torch.float32.*float64"),
    (torch.randn(2, 32, 5, 5).half(), TypeError, "parameters' dtype torch.float32.*float16"),
    (torch.randn(2, 32, 5, 5, device="meta"), ValueError, "x: .*parameters' device cpu, got meta"),
]


@pytest.mark.parametrize("train", (True, False), ids=("train", "inference"))
@pytest.mark.parametrize(("x", "error", "message"), BAD_MAPS, ids=lambda v: "")
def test_modules(x, error, message, train):
    for module in (BAM(32), BAM(32, preset="official"), SqueezeExcite(32)):
        module.train(train)
        before = {key: t.clone() for key, t in module.state_dict().items()}
        with torch.set_grad_enabled(train), pytest.raises(error, match=message):
            module(x)
        assert all(torch.equal(t, before[key]) for key, t in module.state_dict().items())


def test_a_map_of_the_wrong_device_says_which_the_backend_takes():
    with pytest.raises(bam_kernels.dispatch.BackendUnavailableError, match="CPU, not on 'meta'"):
        functional.gate(
            torch.randn(2, 8, 3, 4, device="meta"), torch.randn(2, 8, device="meta"), None
        )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": 1}, TypeError, "x: expected a torch.Tensor, got int"),
        ({"x": torch.randn(2, 8, 3)}, ValueError, "x: expected 4 dimensions"),
        ({"x": torch.ones(2, 8, 3, 4).int()}, TypeError, "x: expected one of float64"),
        ({"c": None, "s": None}, ValueError, "channel_logits, spatial_logits: expected at least"),
        (
            {"c": torch.randn(2, 9)},
            ValueError,
            r"channel_logits: expected shape \[2, 8\].*\[2, 9\]",
        ),
        ({"c": torch.randn(3, 8)}, ValueError, r"channel_logits: expected shape \[2, 8\]"),
        ({"c": torch.randn(2, 8, 1, 1)}, ValueError, r"channel_logits: .* got \[2, 8, 1, 1\]"),
        ({"c": torch.ones(2, 8).long()}, TypeError, "channel_logits: expected one of .*int64"),
        ({"c": torch.randn(2, 8, device="meta")}, ValueError, "channel_logits: .*got meta"),
        ({"s": torch.randn(2, 3, 4)}, ValueError, r"spatial_logits: expected .* got \[2, 3, 4\]"),
        ({"s": torch.randn(2, 1, 4, 3)}, ValueError, r"spatial_logits: .* got \[2, 1, 4, 3\]"),
        ({"s": torch.randn(2, 8, 3, 4)}, ValueError, r"spatial_logits: .* got \[2, 8, 3, 4\]"),
        ({"s": "map"}, TypeError, "spatial_logits: expected a torch.Tensor, got str"),
        ({"combine": "add"}, ValueError, "combine: expected one of sum, product, max.*'add'"),
        ({"combine": 0}, ValueError, "combine: expected one of sum"),
    ],
    ids=lambda v: "",
)
def test_gate(changes, error, message):
    given = {"x": torch.randn(2, 8, 3, 4), "c": torch.randn(2, 8), "s": torch.randn(2, 1, 3, 4)}
    with pytest.raises(error, match=message):
        functional.gate(*(given | {"combine": "sum"} | changes).values())


@pytest.mark.parametrize(
    ("weight", "bias", "error", "message"),
    [
        ("w", None, TypeError, "weight: expected a torch.Tensor, got str"),
        (torch.randn(2, 9), None, ValueError, r"weight: expected \[h, 8\].* got \[2, 9\]"),
        (torch.randn(8, 2), None, ValueError, r"weight: .* got \[8, 2\]"),
        (torch.randn(2, 8, 3, 3), None, ValueError, r"weight: .* got \[2, 8, 3, 3\]"),
        (torch.randn(2, 8).double(), None, TypeError, "weight: expected x's dtype torch.float32"),
        (torch.randn(2, 8, device="meta"), None, ValueError, "weight: .*x's device"),
        (torch.randn(2, 8), torch.randn(3), ValueError, r"bias: expected shape \[2\].* got \[3\]"),
        (torch.randn(2, 8), torch.randn(2).half(), TypeError, "bias: expected x's dtype"),
        (torch.randn(2, 8), 0.5, TypeError, "bias: expected a torch.Tensor, got float"),
    ],
    ids=lambda v: "",
)
def test_pool_reduce(weight, bias, error, message):
    with pytest.raises(error, match=message):
        functional.pool_reduce(torch.randn(2, 8, 3, 4), weight, bias)


@pytest.mark.parametrize("preset", ("paper", "official"))
def test_one_value_per_channel(preset):
    name = "channel.norm" if preset == "paper" else r"channel.hidden_norm.0"
    module = BAM(32, preset=preset)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=f"{name} .* batch 1"):
            module(torch.randn(1, 32, 5, 5))


@pytest.mark.parametrize("mode", ("inference", "eval", "train"))
@pytest.mark.parametrize(
    "path", ("spatial.reduce", "spatial.dilated.0", "spatial.project", "channel.fc.1")
)
def test_a_parameter_of_another_dtype(path, mode):
    """As torch's own layers refuse it; never a buffer that is read as what it is not."""
    module = BAM(32, 4).train(mode == "train")
    module.get_submodule(path).double()
    x = torch.randn(4, 32, 5, 5)
    with torch.inference_mode(mode == "inference"), pytest.raises((TypeError, RuntimeError)):
        bam_kernels.reference.BAM.forward(module, x)
    with torch.inference_mode(mode == "inference"):
        try:
            out = module(x)
        except (TypeError, RuntimeError):
            return
    # The kernels may take weights of any dtype; then the numbers are right.
    plain = bam_kernels.reference.BAM(32, 4).train(mode == "train")
    plain.load_state_dict(module.state_dict())
    with bam_kernels.use_backend("reference"), torch.no_grad():
        want = plain.double()(x.double())
    assert (out.double() - want).norm() < 1e-5 * want.norm()


# --- raw operators ----------------------------------------------------------------------------


def made(*shape: int) -> Tensor:
    return torch.randn(shape)


def bam_params(convolutions: int = 2) -> dict[str, Tensor]:
    """The parameters of a module without hidden norms, in the operator's order."""

    def norm(name: str, n: int) -> dict[str, Tensor]:
        return {
            f"{name} gamma": made(n),
            f"{name} beta": made(n),
            f"{name} mean": made(n),
            f"{name} var": torch.rand(n) + 0.5,
        }

    params = {
        "fc.0": made(HIDDEN, C), "fc.0 bias": made(HIDDEN),
        "fc.1": made(C, HIDDEN), "fc.1 bias": made(C), **norm("channel", C),
        "reduce": made(HIDDEN, C), "reduce bias": made(HIDDEN),
    }  # fmt: skip
    for i in range(convolutions):
        params |= {f"conv.{i}": made(HIDDEN, HIDDEN, 3, 3), f"conv.{i} bias": made(HIDDEN)}
    params |= {"project": made(1, HIDDEN), "project bias": made(1)}
    return params | norm("spatial", 1)


# combine, residual, linear layers, channel norm_hidden and norm_final, spatial, convolutions,
# dilation, spatial norm_hidden and norm_final, hidden width
OPTIONS = [0, 1, 2, 0, 1, 1, 2, 2, 0, 1, HIDDEN]


def operators() -> dict[str, dict[str, object]]:
    """By operator, arguments that it takes."""
    x, dout, c, s = made(N, C, H, W), made(N, C, H, W), made(N, C), made(N, 1, H, W)
    weight, bias = made(HIDDEN, C), made(HIDDEN)
    spatial = {
        "reduced": made(N, HIDDEN, H, W),
        "weights": [made(HIDDEN, HIDDEN, 3, 3) for _ in range(2)],
        "biases": [made(HIDDEN) for _ in range(2)],
        "project_weight": made(HIDDEN),
        "project_bias": made(1),
        "gammas": [made(1)],
        "betas": [made(1)],
        "means": [],
        "variances": [],
    }
    channel = [
        made(HIDDEN, C), made(HIDDEN), made(C, HIDDEN), made(C), made(HIDDEN), made(HIDDEN),
        made(HIDDEN), torch.rand(HIDDEN) + 0.5, made(C), made(C), made(C), torch.rand(C) + 0.5,
    ]  # fmt: skip
    # The hidden norm takes the batch's statistics, the last one those that it has.
    norms = {"norms": [True, True, True, False], "eps": [1e-5, 1e-5]}
    options = {
        "hidden_norm": False, "norm": True, "batch_stats": [True], "eps": [1e-5], "dilation": 2,
    }  # fmt: skip
    sums = torch.rand(2) + 0.5
    return {
        "bam_forward": {
            "x": x, "out": torch.empty_like(x), "params": list(bam_params().values()),
            "options": list(OPTIONS), "eps": [1e-5, 1e-5],
        },
        "pool_reduce": {
            "x": x, "weight": weight, "bias": bias,
            "pooled": torch.empty(N, C), "reduced": torch.empty(N, HIDDEN, H, W),
        },
        "gate_forward": {
            "x": x, "c": c, "s": s, "out": torch.empty_like(x), "combine": 0, "residual": True,
        },
        "gate_gradient": {
            "dout": dout, "x": x, "c": c, "s": s,
            "dc": torch.empty(N, C), "ds": torch.empty(N, 1, H, W), "combine": 0,
        },
        "input_gradient": {
            "dout": dout, "x": x, "c": c, "s": s, "dpooled": made(N, C),
            "dreduced": made(N, HIDDEN, H, W), "weight": weight, "dx": torch.empty_like(x),
            "dweight": torch.empty(HIDDEN, C), "dbias": torch.empty(HIDDEN),
            "combine": 0, "residual": True,
        },
        "channel_forward": {
            "pooled": made(N, C), "params": channel, "logits": torch.empty(N, C),
            "kept": torch.empty(N, HIDDEN),
            "taken": [torch.empty(n) for n in (HIDDEN, HIDDEN, 0, 0)], **norms,
        },
        "channel_backward": {
            "dlogits": made(N, C), "kept": made(N, HIDDEN), "pooled": made(N, C),
            "params": channel, "grads": [torch.empty_like(t) for t in (made(N, C), *channel[:6],
            *channel[8:10])], **norms,
        },
        "spatial_forward": {
            **spatial, "logits": torch.empty(N, 1, H, W), "statistics": sums.clone(), **options,
        },
        "spatial_backward": {
            "dlogits": s, "statistics": sums, **spatial,
            "dreduced": torch.empty(N, HIDDEN, H, W),
            "dconvolutions": torch.empty(2 * HIDDEN * (9 * HIDDEN + 1)),
            "dprojection": torch.empty(HIDDEN + 1), "dnorms": torch.empty(2), **options,
        },
        "update_running": {
            "means": [made(C)], "variances": [torch.rand(C)], "counters": [torch.tensor(3)],
            "batch_means": [made(C)], "batch_variances": [torch.rand(C)],
            "counts": [10], "momenta": [0.1],
        },
    }  # fmt: skip


def call(operator: str, arguments: dict[str, object]) -> None:
    getattr(torch.ops.bam_kernels_cpp, operator)(*arguments.values())


def longer(t: Tensor) -> Iterator[Tensor]:
    for axis in range(t.dim()):
        yield t.new_ones([n + (i == axis) for i, n in enumerate(t.shape)])


def shorter(t: Tensor) -> Iterator[Tensor]:
    for axis, length in enumerate(t.shape):
        if length > 1:
            yield t.narrow(axis, 0, length - 1).contiguous()


def whole_numbers(t: Tensor) -> Iterator[Tensor]:
    yield t.new_ones(t.shape, dtype=torch.int32)


def as_many(t: Tensor) -> Iterator[Tensor]:
    """As many elements in another shape: turned, flat, with axes of one, and cut otherwise."""
    if t.dim() == 0:  # a counter, which is one number in any shape
        return
    n = t.numel()
    shapes = [(n,), (n, 1), (1, n), (1, *t.shape), (*t.shape, 1), (n, 1, 1, 1), (1, 1, n, 1)]
    shapes += [(n // 2, 2), (2, n // 2), (2, 1, n // 2)] if n % 2 == 0 else []
    turned = [t.transpose(i, j) for i in range(t.dim()) for j in range(i)]
    same = {t.shape}
    for each in [*turned, *(t.reshape(shape) for shape in shapes)]:
        if each.shape not in same:
            same.add(each.shape)
            yield each.contiguous()


CHANGES: dict[str, Callable[[Tensor], Iterator[Tensor]]] = {
    "longer": longer,
    "shorter": shorter,
    "whole numbers": whole_numbers,
    "as many": as_many,
}

TENSORS = [
    (operator, key)
    for operator, arguments in operators().items()
    for key, value in arguments.items()
    if isinstance(value, Tensor)
    or (isinstance(value, list) and value and isinstance(value[0], Tensor))
]


def test_the_arguments_are_right():
    for operator, arguments in operators().items():
        call(operator, arguments)
        for value in arguments.values():
            if isinstance(value, Tensor):
                assert value.isfinite().all(), operator


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("operator", "key"), TENSORS, ids=lambda v: str(v))
def test_raw_operators_check_every_tensor(operator, key, change):
    """One tensor at a time, a list's each element: a RuntimeError that names it."""
    value = operators()[operator][key]
    count = len(value) if isinstance(value, list) else 1
    for position in range(count):
        one = value[position] if isinstance(value, list) else value
        if one.numel() == 0:  # absent
            continue
        for number, bad in enumerate(CHANGES[change](one)):
            arguments = operators()[operator]
            if isinstance(value, list):
                arguments[key][position] = bad
            else:
                arguments[key] = bad
            where = f"{operator} {key}[{position}] {change} {number}: {list(bad.shape)}"
            with pytest.raises(RuntimeError) as raised:
                call(operator, arguments)
                pytest.fail(f"taken: {where}")
            first = str(raised.value).splitlines()[0]
            assert ": expected " in first and " got " in first, f"{where}: {first}"


PARAMS = list(bam_params())

# Of as many elements as what is expected: (operator, list or argument, position, shape, message).
RESHAPED = [
    ("bam_forward", "params", PARAMS.index("fc.1"), (HIDDEN, C), r"channel\.fc: .*\[8, 2\]"),
    ("bam_forward", "params", PARAMS.index("fc.1"), (4, 4), r"channel\.fc: .*\[8, 2\]"),
    ("bam_forward", "params", PARAMS.index("reduce"), (C, HIDDEN), r"spatial\.reduce: .*\[2, 8\]"),
    ("bam_forward", "params", PARAMS.index("conv.0"), (3, 3, 2, 2), r"dilated: .*\[2, 2, 3, 3\]"),
    ("bam_forward", "params", PARAMS.index("conv.1"), (2, 3, 2, 3), r"dilated: .*\[2, 2, 3, 3\]"),
    ("bam_forward", "params", PARAMS.index("project"), (HIDDEN, 1), r"project: .*\[1, 2\]"),
    ("bam_forward", "params", PARAMS.index("channel mean"), (4, 2), r"norm: .*\[8\]"),
    ("pool_reduce", "weight", None, (HIDDEN, 4, 2), r"weight: .*\[2, 8\]"),
    ("pool_reduce", "bias", None, (1, HIDDEN), r"bias: .*\[2\]"),
    ("gate_forward", "c", None, (C, N), r"channel_logits: .*\[2, 8\]"),
    ("gate_gradient", "s", None, (N, 1, W, H), r"spatial_logits: .*\[2, 1, 3, 4\]"),
    ("input_gradient", "weight", None, (C, HIDDEN), r"weight: .*\[2, 8\]"),
    ("input_gradient", "dpooled", None, (C, N), r"dpooled: .*\[2, 8\]"),
    ("channel_forward", "params", 2, (HIDDEN, C), r"weight1: .*\[8, 2\]"),
    ("channel_backward", "params", 2, (HIDDEN, C), r"weight1: .*\[8, 2\]"),
    ("spatial_forward", "weights", 1, (2, 3, 3, 2), r"weights: .*\[2, 2, 3, 3\]"),
    ("spatial_forward", "project_weight", None, (HIDDEN, 1), r"project_weight: .*\[2\]"),
    ("spatial_backward", "weights", 0, (3, 3, 2, 2), r"weights: .*\[2, 2, 3, 3\]"),
    ("update_running", "batch_means", 0, (C, 1), r"batch statistics: .*\[8\]"),
]


@pytest.mark.parametrize(
    ("operator", "key", "position", "shape", "message"),
    RESHAPED,
    ids=[f"{operator} {key} {list(shape)}" for operator, key, _, shape, _ in RESHAPED],
)
def test_as_many_elements_are_not_the_shape(operator, key, position, shape, message):
    """A transposed weight, say: the numbers would be wrong and nothing else."""
    arguments = operators()[operator]
    value = arguments[key]
    if position is None:
        arguments[key] = value.reshape(shape)
    else:
        value[position] = value[position].reshape(shape)
    got = re.escape(str(list(shape)))
    with pytest.raises(RuntimeError, match=f"{message}, got {got}"):
        call(operator, arguments)


@pytest.mark.parametrize(
    ("operator", "key", "position"),
    [
        ("bam_forward", "params", PARAMS.index("reduce")),
        ("bam_forward", "params", PARAMS.index("project")),
        ("pool_reduce", "weight", None),
        ("input_gradient", "weight", None),
    ],
)
def test_a_convolution_of_one_by_one_is_a_matrix(operator, key, position):
    plain = operators()[operator]
    call(operator, plain)
    results = ("out", "pooled", "reduced", "dx", "dweight", "dbias")
    expected = {name: plain[name].clone() for name in results if name in plain}
    if position is None:
        plain[key] = plain[key][:, :, None, None]
    else:
        plain[key][position] = plain[key][position][:, :, None, None]
    for name in expected:
        plain[name].fill_(float("nan"))
    call(operator, plain)
    for name, want in expected.items():
        assert torch.equal(plain[name], want), name


@pytest.mark.parametrize(("operator", "key"), TENSORS, ids=lambda v: str(v))
def test_raw_operators_take_strides_or_refuse_them(operator, key):
    """A tensor whose memory lies otherwise: the same numbers, or a RuntimeError that names it.

    Results are compared on the arguments' own memory, so that nothing beside them may change.
    """
    plain = operators()[operator]
    value = plain[key]
    for position in range(len(value) if isinstance(value, list) else 1):
        one = value[position] if isinstance(value, list) else value
        if one.numel() < 2:
            continue
        big = torch.full([2 * n + 2 for n in one.shape], -7.0, dtype=one.dtype)
        cut = big[tuple(slice(1, 1 + 2 * n, 2) for n in one.shape)]
        cut.copy_(one)
        beside = torch.ones_like(big, dtype=torch.bool)
        beside[tuple(slice(1, 1 + 2 * n, 2) for n in one.shape)] = False
        changed = {k: clone(v) for k, v in plain.items()}
        expected = {k: clone(v) for k, v in plain.items()}
        if isinstance(value, list):
            changed[key][position] = cut
        else:
            changed[key] = cut
        try:
            call(operator, changed)
        except RuntimeError as error:
            assert ": expected " in str(error).splitlines()[0], error
            assert (big[beside] == -7).all()
            continue
        call(operator, expected)
        assert (big[beside] == -7).all(), "memory beside the tensor was written"
        for name, want in expected.items():
            pairs = zip(changed[name], want, strict=True) if isinstance(want, list) else ()
            pairs = [(changed[name], want)] if isinstance(want, Tensor) else pairs
            for a, b in pairs:
                if isinstance(b, Tensor):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def clone(value: object) -> object:
    if isinstance(value, list):
        return [clone(each) for each in value]
    return value.clone() if isinstance(value, Tensor) else value


@pytest.mark.parametrize(
    ("operator", "key"), [(o, k) for o, k in TENSORS if k in ("x", "reduced", "dout", "out", "dx")]
)
def test_raw_operators_check_ranks_and_dtypes(operator, key):
    for bad in (made(C, H, W), made(N, C, H, W, 1), made(N * C * H * W), torch.tensor(1.0)):
        arguments = operators()[operator]
        arguments[key] = bad
        with pytest.raises(RuntimeError, match=": expected "):
            call(operator, arguments)
    if key in ("out", "dx", "dout"):
        arguments = operators()[operator]
        arguments[key] = arguments[key].double()
        with pytest.raises(RuntimeError, match=f"{key}: expected float32, got float64"):
            call(operator, arguments)


@pytest.mark.parametrize("position", range(len(bam_params())), ids=list(bam_params()))
def test_a_missing_parameter_of_a_whole_module(position):
    """A bias or an affine parameter may be absent; a weight or a statistic may not."""
    arguments = operators()["bam_forward"]
    name = list(bam_params())[position]
    arguments["params"][position] = torch.empty(0)
    if name.endswith(("bias", "gamma", "beta")):
        call("bam_forward", arguments)
        assert arguments["out"].isfinite().all()
        return
    with pytest.raises(RuntimeError, match=": expected "):
        call("bam_forward", arguments)


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (0, 4), (0, -1), (2, 3), (2, -1), (2, 10**9), (6, 3), (6, -1), (6, 10**9), (7, 0),
        (7, -3), (7, 10**12), (10, 3), (10, 0), (10, -2), (10, 10**12),
    ],
)  # fmt: skip
def test_options_out_of_range(position, value):
    arguments = operators()["bam_forward"]
    arguments["options"][position] = value
    with pytest.raises(RuntimeError, match=r"expected|cannot allocate"):
        call("bam_forward", arguments)


@pytest.mark.parametrize("key", ("params", "options", "eps"))
def test_lists_of_the_wrong_length(key):
    for change in (lambda v: v[:-1], lambda v: [*v, v[-1]], lambda v: []):
        arguments = operators()["bam_forward"]
        arguments[key] = change(arguments[key])
        with pytest.raises(RuntimeError, match=f"{key}: expected"):
            call("bam_forward", arguments)


@pytest.mark.parametrize(
    "key", ("weights", "biases", "gammas", "betas", "batch_stats", "eps", "dilation")
)
@pytest.mark.parametrize("operator", ("spatial_forward", "spatial_backward"))
def test_lists_of_the_spatial_branch(operator, key):
    value = operators()[operator][key]
    bad = [0, -1] if key == "dilation" else [[*value, value[-1]]]
    bad += [value[:-1]] if key in ("weights", "biases", "batch_stats", "eps") else []
    for each in bad:
        arguments = operators()[operator]
        arguments[key] = each
        with pytest.raises(RuntimeError, match="expected"):
            call(operator, arguments)


@pytest.mark.parametrize("key", list(operators()["update_running"]))
def test_lists_of_the_running_statistics(key):
    arguments = operators()["update_running"]
    arguments[key] = arguments[key] * 2
    with pytest.raises(RuntimeError, match="expected"):
        call("update_running", arguments)
    arguments[key] = []
    with pytest.raises(RuntimeError, match="expected"):
        call("update_running", arguments)


@pytest.mark.parametrize("combine", (-1, 4, 2**40))
@pytest.mark.parametrize("operator", ("gate_forward", "gate_gradient", "input_gradient"))
def test_combine_out_of_range(operator, combine):
    arguments = operators()[operator] | {"combine": combine}
    with pytest.raises(RuntimeError, match="combine: expected"):
        call(operator, arguments)


@pytest.mark.parametrize(("operator", "key"), TENSORS, ids=lambda v: str(v))
def test_tensors_of_another_device(operator, key):
    arguments = operators()[operator]
    value = arguments[key]
    arguments[key] = (
        [value[0].to("meta"), *value[1:]] if isinstance(value, list) else value.to("meta")
    )
    with pytest.raises(RuntimeError):
        call(operator, arguments)
