"""The compact parity matrix: whole modules on the hardware against float64, a row in a fraction of
a second once its kernels are compiled.

Rows are dtype x layout x combine x preset x mode. The first `CORE` of them show every pair of
values; the others follow if there is time. Processes take rows off one list, each with a seed of
its own: correctness needs no quiet device. A row also runs a second time with poisoned memory and
must give the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from gpu_workers import Outcome, Task, task_name
from torch import Tensor, nn

import bam_kernels
from bam_kernels import reference
from bam_kernels.benchmarking.sites import INFERENCE, TRAINING
from bam_kernels.benchmarking.timing import relative_error
from bam_kernels.convolution_choice import convolutions

DTYPES = ("float16", "bfloat16", "float32", "float32_tf32", "float64")
LAYOUTS = ("nchw", "channels_last", "sliced")
COMBINES = ("sum", "product", "max", "sigmoid_sum")
PRESETS = ("paper", "official")
MODES = (TRAINING, INFERENCE)
SIZES = {"even": (8, 256, 16, 28), "odd": (7, 100, 9, 11), "toy": (6, 32, 6, 5)}
"""[N, C, H, W]: extents that every vector width divides, that none does, and a smoke run's."""

# An error, norm(a - b) / norm(b) with b in float64, passes under this, under thrice eager's own, or
# under ten times what b itself moves by when all that it is made of moves by a rounding: of a
# gradient that cancels behind a norm few digits are left, and a hidden unit that rounding switches
# moves a gradient by more than rounding does. Four of these are the tests' own bounds; TF32 keeps
# ten bits of a factor.
LIMITS = {
    "float16": 2e-3,
    "bfloat16": 1e-2,
    "float32": 2e-6,
    "float32_tf32": 2e-3,
    "float64": 1e-12,
}
_PEER, _SWAY = 3.0, 10.0
_ROUNDING = {
    "float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24, "float32_tf32": 2**-11,
    "float64": 2**-53,
}  # fmt: skip
# In front of a ReLU errors are a few roundings; of these types they switch single units, not many.
_SWITCH, _FINE = 8.0, ("float32", "float64")
# Fewer numbers than this have no error of their own to speak of: they are compared together.
_FEW = 32
# A gradient that is zero but for rounding (of a bias in front of a norm) has no relative error.
_ZERO = 1e-9


@dataclasses.dataclass(frozen=True)
class Row:
    """One module on one kind of input.

    Args:
        dtype: one of `DTYPES`.
        layout: one of `LAYOUTS`; a sliced map is cut from a larger one, in N and C.
        combine: of the logits.
        preset: "paper" or "official".
        mode: "training" or "inference".
        size: one of `SIZES`.
        seed: of the parameters and inputs.
    """

    dtype: str
    layout: str
    combine: str
    preset: str
    mode: str
    size: str
    seed: int

    def __str__(self) -> str:
        return " ".join(map(str, dataclasses.astuple(self)[:-1])) + f" seed {self.seed}"


def _core() -> list[tuple[str, str, str, str, str, str]]:
    """Every dtype with every combine mode in both modes, so that all pairs of values occur."""
    found = []
    for (d, dtype), (c, combine) in itertools.product(enumerate(DTYPES), enumerate(COMBINES)):
        layout = LAYOUTS[(d + c) % len(LAYOUTS)]
        for m, mode in enumerate(MODES):
            preset = PRESETS[(c // 2 + d + m) % len(PRESETS)]
            size = ("even", "odd")[(c + d // 2 + m) % 2]
            found.append((dtype, layout, combine, preset, mode, size))
    return found


CORE = len(_core())


def rows(seed: int, toy: bool = False) -> list[Row]:
    """The whole matrix, the first `CORE` rows first; with `toy` a few small ones.

    Args:
        seed: of the first row; each next row has the next.
        toy: six rows on a toy map.
    """
    core = _core()
    if toy:
        core = [(*values[:-1], "toy") for values in core[:: CORE // 6 + 1]]
        return [Row(*values, seed + i) for i, values in enumerate(core)]
    seen = {values[:-1] for values in core}
    rest = [
        (*values, ("even", "odd")[i // 2 % 2])  # both in either mode
        for i, values in enumerate(itertools.product(DTYPES, LAYOUTS, COMBINES, PRESETS, MODES))
        if values not in seen
    ]
    # A stride that is prime to their number: of a matrix cut short, a bit of everything is there.
    step = next(s for s in (37, 41, 43) if math.gcd(s, len(rest)) == 1)
    rest = [rest[i * step % len(rest)] for i in range(len(rest))]
    return [Row(*values, seed + i) for i, values in enumerate(core + rest)]


def tasks(chosen: Sequence[Row], device: torch.device) -> list[Task]:
    """A task a row, for `gpu_workers.Workers`."""
    return [(task_name(check_row), (row, str(device))) for row in chosen]


def fresh_seed() -> int:
    """One that no run before had."""
    return random.SystemRandom().randrange(2**31)


def check_row(row: Row, device_name: str) -> dict[str, Any]:
    """Run a row; its errors and what is wrong with them.

    Returns:
        ``errors``, by tensor the relative errors of ``fused`` and ``eager`` against float64 and
        the ``bound`` on the first; ``wrong``, a list of words, empty where all is right.
    """
    device = torch.device(device_name)
    if device.type == "cpu":
        from bam_kernels.testing.interpreter import accelerate

        accelerate()
    torch.manual_seed(row.seed)
    with _tf32(row.dtype == "float32_tf32"):
        return _check(row, device)


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Products and convolutions of float32 through TF32, or not."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def _check(row: Row, device: torch.device) -> dict[str, Any]:
    dtype = getattr(torch, row.dtype.removesuffix("_tf32"))
    channels = SIZES[row.size][1]
    options = {"combine": row.combine, "preset": row.preset, "device": device}
    plain = reference.BAM(channels, dtype=dtype, **options).train(row.mode == TRAINING)
    _randomize(plain)
    x = _map(row, dtype, device)
    dout = torch.randn(x.shape, device=device).to(dtype)
    exact = reference.BAM(channels, dtype=torch.float64, **options).train(plain.training)
    fused = bam_kernels.BAM(channels, dtype=dtype, **options).train(plain.training)
    for module in (exact, fused):
        module.load_state_dict(plain.state_dict())

    start = {name: value.clone() for name, value in fused.state_dict().items()}
    truth = _result(exact, x.double(), dout.double())
    eager = _result(plain, x, dout)
    # Our convolutions at every width, whosever are faster.
    with bam_kernels.use_backend("triton"), convolutions("fused"):
        with _deterministic(poisoned=False):
            ours = _result(fused, x, dout)
        fused.load_state_dict(start)
        with _deterministic(poisoned=True):
            again = _result(fused, x, dout)

    errors, wrong = {}, []
    swayed = list(_swayed(exact, x, dout, start, row.dtype))
    for name, (right, mine, theirs, *moved) in _comparable(truth, ours, eager, *swayed).items():
        error, own = relative_error(mine, right), relative_error(theirs, right)
        sway = max(relative_error(other, right) for other in moved)
        bound = max(LIMITS[row.dtype], _PEER * own, _SWAY * sway)
        errors[name] = {"fused": error, "eager": own, "bound": bound}
        if not error <= bound:  # so that NaN does not pass
            wrong.append(f"{name}: error {error:.1e}, at most {bound:.1e}; eager's {own:.1e}")
    moved = [name for name, value in ours.items() if not _same_bits(value, again[name])]
    if moved:
        wrong.append(
            f"other bits, or memory that nothing wrote, the second time: {', '.join(moved)}"
        )
    return {"errors": errors, "wrong": wrong}


def _swayed(
    exact: nn.Module, x: Tensor, dout: Tensor, state: Mapping[str, Tensor], dtype: str
) -> Iterator[dict[str, Tensor]]:
    """The float64 result where inputs, parameters and statistics are each off by a rounding; for
    the finer types also where what is in front of the ReLUs is, up and down."""
    rounding = _ROUNDING[dtype]

    def off(value: Tensor) -> Tensor:
        value = value.double()
        return value * (1 + rounding * torch.randn_like(value))

    x, dout = x.detach(), dout.detach()
    exact.load_state_dict(
        {name: off(v) if v.is_floating_point() else v for name, v in state.items()}
    )
    yield _result(exact, off(x), off(dout))
    if dtype not in _FINE or not exact.training:
        return
    for sign in (1, -1):
        exact.load_state_dict(state)
        with torch.no_grad():
            for bias in _biases_before_relus(exact):
                bias += sign * _SWITCH * rounding
        yield _result(exact, x.double(), dout.double())


def _biases_before_relus(module: reference.BAM) -> list[Tensor]:
    channel, spatial = module.channel, module.spatial
    layers = [*channel.fc[:-1], spatial.reduce, *spatial.dilated]
    norms = [*(channel.hidden_norm or ()), *(spatial.hidden_norm or ())]
    return [layer.bias for layer in norms or layers]


def _randomize(module: nn.Module) -> None:
    """Parameters and statistics off their defaults.

    Weights are twice theirs, as in the tests: else maps fade from layer to layer to what is nearly
    constant, and the last norm magnifies the rounding of all, the reference's too.
    """
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.dim() > 1:
                value *= 2
            elif value.is_floating_point():
                value += 0.05 * torch.randn_like(value)


def _map(row: Row, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal values with channel means that differ between samples: a norm over nearly equal ones
    would magnify rounding."""
    n, c, h, w = SIZES[row.size]
    if row.layout == "sliced":
        return _map_of((n + 2, c + 5, h, w), dtype, device)[1 : n + 1, 3 : 3 + c]
    x = _map_of((n, c, h, w), dtype, device)
    return x.contiguous(memory_format=torch.channels_last) if row.layout != "nchw" else x


def _map_of(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return (torch.randn(size, device=device) + torch.randn(*size[:2], 1, 1, device=device)).to(
        dtype
    )


def _result(module: nn.Module, x: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """Output, gradients and statistics of a forward, in training with its backward."""
    if not module.training:
        with torch.no_grad():
            return {"out": module(x)}
    x = x.detach().requires_grad_()  # a view: it lies as it lay
    out = module(x)
    out.backward(dout)
    found = {"out": out.detach(), "dx": x.grad}
    for name, parameter in module.named_parameters():
        found[f"d {name}"] = parameter.grad
        parameter.grad = None
    for name, value in module.named_buffers():
        if value.is_floating_point():
            found[name] = value.detach().clone()
    return found


def _comparable(
    *results: Mapping[str, Tensor],
) -> dict[str, tuple[Tensor, ...]]:
    """By name the tensors of the results, the truth's first; small ones as one vector a kind."""
    truth = results[0]
    gradients = [value for name, value in truth.items() if name.startswith("d ")]
    largest = max((value.norm().item() for value in gradients), default=0.0)
    found: dict[str, tuple[Tensor, ...]] = {}
    small: dict[str, list[tuple[Tensor, ...]]] = {}
    for name, right in truth.items():
        kind = "small gradients" if name.startswith("d ") else "statistics"
        if kind == "small gradients" and right.norm().item() <= _ZERO * largest:
            continue
        values = tuple(result[name].detach().double() for result in results)
        if name in ("out", "dx") or (kind == "small gradients" and right.numel() >= _FEW):
            found[name] = values
        else:
            small.setdefault(kind, []).append(tuple(value.flatten() for value in values))
    for kind, entries in small.items():
        found[kind] = tuple(torch.cat(column) for column in zip(*entries, strict=True))
    return found


@contextlib.contextmanager
def _deterministic(poisoned: bool) -> Iterator[None]:
    """Deterministic algorithms, where torch has such, as in the run that this one is compared with.

    Poisoned, what torch.empty and its like hand out holds NaN: what no kernel writes shows.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = poisoned
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _same_bits(a: Tensor, b: Tensor) -> bool:
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    kind = kinds[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def summarize(chosen: Sequence[Row], outcomes: Mapping[int, Outcome]) -> dict[str, Any]:
    """The report's "matrix".

    Args:
        chosen: the rows.
        outcomes: of those that were run, by number.

    Returns:
        ``ok``, counts, ``worst`` (by dtype, combine and mode the largest error of the fused output
        and of its gradients and statistics, with eager's beside it), ``failures`` with what repeats
        them, and every row's errors.
    """
    worst: dict[str, dict[str, dict[str, Any]]] = {}
    failures, told = [], []
    for number, outcome in sorted(outcomes.items()):
        row = chosen[number]
        entry = dataclasses.asdict(row)
        wrong = [outcome.error] if outcome.error else outcome.result["wrong"]
        if wrong:
            failures.append({**entry, "row": str(row), "wrong": wrong})
        if outcome.error:
            told.append({**entry, "error": outcome.error})
            continue
        errors = outcome.result["errors"]
        told.append({**entry, "errors": errors})
        cell = worst.setdefault(row.dtype, {}).setdefault(row.combine, {})
        cell = cell.setdefault(row.mode, {})
        for name, pair in errors.items():
            kind = "out" if name == "out" else "gradients"
            before = cell.get(kind)
            if before is None or not pair["fused"] <= before["fused"]:  # NaN is the worst
                cell[kind] = {**pair, "tensor": name}
    return {
        "ok": bool(outcomes) and not failures,
        "rows": len(chosen),
        "done": len(outcomes),
        "first_seed": chosen[0].seed if chosen else None,
        "limits": LIMITS,
        "bound": f"the largest of limit, {_PEER:g} x eager's error, {_SWAY:g} x a rounding's sway",
        "worst": worst,
        "failures": failures,
        "checked": told,
    }
