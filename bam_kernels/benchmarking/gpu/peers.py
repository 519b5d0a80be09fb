"""The whole module against its peers: fused, eager, torch.compile, each also as a CUDA graph."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

import bam_kernels
from bam_kernels import convolution_choice, reference
from bam_kernels.benchmarking.gpu.environment import l2_bytes
from bam_kernels.benchmarking.gpu.report import Estimate, Report, Section
from bam_kernels.benchmarking.sites import TRAINING, Case, Shape, normal
from bam_kernels.benchmarking.timing import (
    Peer,
    clock,
    describe,
    gigabytes_per_second,
    graphed,
    interleave,
    peak_bytes,
    relative_error,
)

OURS = ("fused", "fused_graphed")
TUNED = ("fused_tuned", "fused_tuned_graphed")
"""`OURS` with the tiles that a sweep in the same run found, in place of the shipped tables'."""
CHOSEN_AGAINST = {"fused": "fused_ours", "library": "fused_library"}
"""The fused module with the convolutions that `bam_kernels.convolution_choice` does not take."""
PLAIN_PEERS = ("eager", "compile", "compile_autotune")
GRAPHED_PEERS = ("eager_graphed", "compile_graphed", "compile_autotune_graphed")
COMPILE_MODES = {"compile": None, "compile_autotune": "max-autotune-no-cudagraphs"}

# A fused result passes the spot check with an error under this, or under thrice eager's own.
# float32 goes through TF32 where torch's settings let convolutions do so, as they do by default.
ERROR_LIMITS = {"float16": 1e-2, "bfloat16": 5e-2, "float32": 5e-3, "float64": 1e-9}

_SPOT_BATCH = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every measurement shares.

    Args:
        device: to measure on.
        copy_gbs: the fastest copy's bandwidth in 10^9 bytes a second, or None if it is not known.
        rounds: times taken of each peer.
        warmups: untimed runs before.
        least_ms: a measurement lasts about this long.
        compile_backend: torch.compile's.
        dry: shapes are toys and estimates of time are not needed.
    """

    device: torch.device
    copy_gbs: float | None
    rounds: int
    warmups: int
    least_ms: float
    compile_backend: str
    dry: bool


def build(case: Case, device: torch.device) -> tuple[reference.BAM, bam_kernels.BAM]:
    """(plain, fused), with the same parameters and statistics, none of them at its default."""
    options = {"preset": case.preset, "dtype": case.shape.torch_dtype}
    plain = reference.BAM(case.shape.site.channels, **options)
    with torch.no_grad():
        for name, value in plain.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value += 0.05 * torch.randn_like(value)
    fused = bam_kernels.BAM(case.shape.site.channels, **options)
    fused.load_state_dict(plain.state_dict())
    training = case.mode == TRAINING
    return plain.to(device).train(training), fused.to(device).train(training)


def inputs(case: Case, device: torch.device) -> list[tuple[Tensor, Tensor | None]]:
    """(x, dout) of every input set; dout is None in inference."""
    found = []
    for _ in range(case.shape.sets(l2_bytes(device))):
        x = case.shape.random(device)
        if case.mode == TRAINING:
            found.append((x.requires_grad_(), case.shape.random(device)))
        else:
            found.append((x, None))
    return found


def steps(
    forward: Callable[[Tensor], Tensor],
    module: nn.Module,
    sets: list[tuple[Tensor, Tensor | None]],
    backend: str = "auto",
) -> Callable[[], None]:
    """A run: one inference or training step on every input set; gradients start and end at None."""
    parameters = list(module.parameters())

    def run() -> None:
        with bam_kernels.use_backend(backend):
            for x, dout in sets:
                if dout is None:
                    with torch.no_grad():
                        forward(x)
                    continue
                forward(x).backward(dout)
                x.grad = None
                for parameter in parameters:
                    parameter.grad = None

    return run


def compiled(
    module: nn.Module, mode: str | None, backend: str = "inductor"
) -> Callable[[Tensor], Tensor]:
    """torch.compile of a module for one shape; raises rather than run uncompiled."""
    return torch.compile(module, mode=mode, backend=backend, dynamic=False, fullgraph=True)


def fair_autotuning() -> None:
    """Let inductor choose its tiles anew in every process.

    Its choice is a timing. The one that a cache-filling process makes, on a device shared with
    others, must not become the one that is measured.
    """
    import torch._inductor.config

    torch._inductor.config.autotune_local_cache = False


def fill_compile_cache(case: Case, device_name: str, mode: str | None = None) -> None:
    """Run the compiled peer of a case once: a task for `gpu_workers.Workers`."""
    fair_autotuning()
    device = torch.device(device_name)
    torch._dynamo.reset()
    plain, fused = build(case, device)
    sets = inputs(case, device)[:1]
    steps(compiled(plain, mode), plain, sets)()
    steps(fused, fused, sets, "triton")()
    if device.type == "cuda":
        torch.cuda.synchronize()


def spot_check(case: Case, plain: nn.Module, fused: nn.Module) -> dict[str, Any]:
    """Relative errors of fused and eager on fresh inputs at batch 2, against float64."""
    site, dtype = case.shape.site, case.shape.torch_dtype
    device = next(plain.parameters()).device
    shape = dataclasses.replace(case.shape, batch=_SPOT_BATCH)
    # Channel means that differ between samples: a batch norm over two nearly equal values would
    # magnify rounding, and compare noise.
    x = shape.random(device)
    x += normal((_SPOT_BATCH, site.channels, 1, 1), dtype, device)
    dout = shape.random(device)
    exact = reference.BAM(site.channels, preset=case.preset, device=device, dtype=torch.float64)
    exact.load_state_dict(plain.state_dict())
    exact.train(plain.training)
    expected = _result(exact, x.double(), dout.double(), case.mode)
    limit = ERROR_LIMITS[case.shape.dtype]
    found: dict[str, Any] = {"batch": _SPOT_BATCH, "limit": limit, "ok": True}
    with bam_kernels.use_backend("triton"):
        ours = _result(fused, x, dout, case.mode)
    theirs = _result(plain, x, dout, case.mode)
    for name, right in expected.items():
        error, eager = relative_error(ours[name], right), relative_error(theirs[name], right)
        found[name] = {"fused": error, "eager": eager}
        found["ok"] &= error <= max(limit, 3 * eager)  # False for NaN
    return found


def _result(module: nn.Module, x: Tensor, dout: Tensor, mode: str) -> dict[str, Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format)
    if mode != TRAINING:
        with torch.no_grad():
            return {"out": module(x)}
    # The statistics are put back: whoever is checked next starts from the same ones.
    before = {name: value.clone() for name, value in module.named_buffers()}
    out = module(x.requires_grad_())
    out.backward(dout)
    dweight = module.spatial.reduce.weight.grad
    found = {"out": out.detach(), "dx": x.grad, "dweight": dweight}
    for parameter in module.parameters():
        parameter.grad = None
    for name, value in module.named_buffers():
        value.copy_(before[name])
    return found


def _overriding(tiles: Mapping[str, Any] | None) -> AbstractContextManager[None]:
    """These tiles in place of the launch tables'."""
    if not tiles:
        return contextlib.nullcontext()
    from bam_kernels.backends.triton import configs

    return configs.override(**tiles)


def _under(
    context: Callable[[], AbstractContextManager[None]], run: Callable[[], None]
) -> Callable[[], None]:
    def inside() -> None:
        with context():
            run()

    return inside


def _other_convolutions(fused: bam_kernels.BAM, x: Tensor) -> str | None:
    """The choice of convolutions that is not taken for x; None where there is none."""
    if not convolution_choice.on_gpu(x):
        return None
    hidden = fused.spatial.reduce.out_channels
    ours = convolution_choice.by_library(hidden, x, inference=not fused.training) is None
    return "library" if ours else "fused"


def measure_case(
    case: Case,
    settings: Settings,
    expired: Callable[[], bool],
    compile_as: tuple[str, ...] = (),
    tiles: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Time every peer of a case, interleaved, and each one's peak memory for one step.

    Args:
        case: what to time.
        settings: how.
        expired: once true, the rounds end early.
        compile_as: which of `COMPILE_MODES` stand among the peers.
        tiles: by kernel, of the launch tables: with some, the fused module stands among the peers
            with these as well, as "fused_tuned".
    """
    device = settings.device
    torch._dynamo.reset()  # its limit of compilations per function would count other cases' too
    plain, fused = build(case, device)
    sets = inputs(case, device)
    runs = {
        "fused": (fused, fused, "triton"),
        "eager": (plain, plain, "auto"),
    }
    contexts: dict[str, Callable[[], AbstractContextManager[None]]] = {}
    if tiles:
        runs["fused_tuned"] = runs["fused"]
        contexts["fused_tuned"] = functools.partial(_overriding, tiles)
    other = _other_convolutions(fused, sets[0][0])
    if other is not None:
        runs[CHOSEN_AGAINST[other]] = runs["fused"]
        contexts[CHOSEN_AGAINST[other]] = functools.partial(convolution_choice.convolutions, other)
    peers: dict[str, Peer] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in compile_as:
        begin = time.perf_counter()
        try:
            forward = compiled(plain, COMPILE_MODES[name], settings.compile_backend)
            steps(forward, plain, sets[:1])()
            synchronize(device)
            runs[name] = (forward, plain, "auto")
            found[name] = {"compile_s": round(time.perf_counter() - begin, 2)}
        except Exception as error:
            found[name] = describe(error)
    graphs: dict[str, Peer] = {}
    for name, (forward, module, backend) in runs.items():
        run, single = (
            steps(forward, module, sets, backend),
            steps(forward, module, sets[:1], backend),
        )
        if name in contexts:
            run, single = _under(contexts[name], run), _under(contexts[name], single)
        entry = found.setdefault(name, {})
        try:
            single()
            entry["peak_bytes"] = peak_bytes(single, device)
        except Exception as error:
            entry.update(describe(error))
            continue
        peers[name] = Peer(run, len(sets))
        if device.type == "cuda":
            try:
                graphs[f"{name}_graphed"] = Peer(graphed(run), len(sets))
            except Exception as error:
                found[f"{name}_graphed"] = describe(error)
    peers.update(graphs)
    times = interleave(
        peers,
        clock(device),
        rounds=settings.rounds,
        warmups=settings.warmups,
        least_ms=settings.least_ms,
        expired=expired,
    )
    for name, entry in times.items():
        found.setdefault(name, {}).update(entry)
    return {
        "case": case.record(),
        "input_sets": len(sets),
        "moved_bytes": case.moved_bytes,
        "peers": found,
        **({"tiles": {k: dataclasses.asdict(tile) for k, tile in tiles.items()}} if tiles else {}),
        **conclude(found, case.moved_bytes, settings.copy_gbs),
    }


def synchronize(device: torch.device) -> None:
    """Wait for the device, and raise what went wrong on it."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def conclude(
    found: Mapping[str, Mapping[str, Any]], moved_bytes: int, copy_gbs: float | None
) -> dict[str, Any]:
    """Ratios to the best peer, and our shares of the copy's bandwidth.

    ``ratio_plain`` compares calls as Python makes them, ``ratio_graphed`` CUDA graphs with CUDA
    graphs, and ``ratio_best`` the best of all with the best of ours; above 1, ours is faster. All
    three are of the shipped launch tables. ``ratio_tuned`` is their time over the tuned tiles', as
    CUDA graphs if there are both, where there are tuned ones; ``ratio_convolutions`` likewise the
    time with the convolutions that are not taken, ours or the library's, over ours as shipped.
    """
    ms = {name: entry["median_ms"] for name, entry in found.items() if "median_ms" in entry}

    def ratio(ours: tuple[str, ...], peers: tuple[str, ...]) -> float | None:
        mine = [ms[name] for name in ours if name in ms]
        theirs = [ms[name] for name in peers if name in ms]
        return min(theirs) / min(mine) if mine and theirs else None

    tuned = ratio(TUNED[1:], OURS[1:]) or ratio(TUNED[:1], OURS[:1])
    others = tuple(CHOSEN_AGAINST.values())
    graphs = tuple(f"{name}_graphed" for name in others)
    other = ratio(OURS[1:], graphs) or ratio(OURS[:1], others)
    return {
        **({} if tuned is None else {"ratio_tuned": tuned}),
        **({} if other is None else {"ratio_convolutions": other}),
        "ratio_plain": ratio(OURS[:1], PLAIN_PEERS),
        "ratio_graphed": ratio(OURS[1:], GRAPHED_PEERS),
        "ratio_best": ratio(OURS, PLAIN_PEERS + GRAPHED_PEERS),
        "share_of_copy": {
            name: gigabytes_per_second(moved_bytes, ms[name]) / copy_gbs
            for name in OURS + TUNED
            if name in ms and copy_gbs
        },
    }


class CaseTable:
    """The report's table of cases, in passes that refine one another.

    Args:
        report: keeps the entries under "cases".
        settings: of every measurement.
    """

    def __init__(self, report: Report, settings: Settings) -> None:
        self.report = report
        self.settings = settings
        self.entries: dict[Case, dict[str, Any]] = {}
        self.tiles: Callable[[Case], Mapping[str, Any]] = lambda case: {}
        """By kernel, the tiles that a sweep chose for a case, if not the shipped ones."""
        report.data["cases"] = []

    def run(self, cases: list[Case], section: Section, compile_as: tuple[str, ...] = ()) -> None:
        """Measure the cases that the section's time allows, the first first."""
        estimates: dict[str, Estimate] = {}
        first = (25.0 * len(compile_as) if compile_as else 8.0) if not self.settings.dry else 1.0
        what = "+".join(("fused", "eager", *compile_as))
        for case in cases:
            estimate = estimates.setdefault(case.mode, Estimate(first))
            if not section.allows(estimate.next(), f"{case}: {what}"):
                continue
            begin = time.monotonic()
            self._measure(case, section, compile_as)
            estimate.add(time.monotonic() - begin)
            self.report.save()

    def _measure(self, case: Case, section: Section, compile_as: tuple[str, ...]) -> None:
        before = self.entries.get(case)
        tiles = self.tiles(case)
        try:
            entry = measure_case(case, self.settings, section.expired, compile_as, tiles)
        except Exception as error:
            entry = {"case": case.record(), **describe(error)}
        finally:
            release(self.settings.device)
        if before is not None:
            if "peers" not in entry:  # the earlier times are worth more than this error
                before["later_error"] = entry["error"]
                return
            # The same versions in an earlier pass: the spread between the two is the noise.
            entry["earlier_median_ms"] = {
                name: peer["median_ms"]
                for name, peer in before.get("peers", {}).items()
                if "median_ms" in peer
            }
        entry["spot_check"] = before["spot_check"] if before else self._spot_check(case)
        if tiles:
            entry["spot_check_tuned"] = self._spot_check(case, tiles)
        self.entries[case] = entry
        self.report.data["cases"] = list(self.entries.values())

    def has(self, case: Case, peer: str) -> bool:
        """Whether the peer's time in a case is known."""
        return "median_ms" in self.entries.get(case, {}).get("peers", {}).get(peer, {})

    def _spot_check(self, case: Case, tiles: Mapping[str, Any] | None = None) -> dict[str, Any]:
        # It does not depend on the batch that is timed: one check serves every batch.
        alike = dataclasses.replace(case, shape=dataclasses.replace(case.shape, batch=_SPOT_BATCH))
        chosen = tuple(sorted((tiles or {}).items()))
        return dict(_cached_spot_check(alike, self.settings.device, chosen))

    def failed_checks(self) -> list[str]:
        """The cases whose spot check, with shipped or tuned tiles, failed or could not run."""
        names = ("spot_check", "spot_check_tuned")
        return [
            str(case)
            for case, entry in self.entries.items()
            if not all(entry[name]["ok"] for name in names if name in entry)
        ]


@functools.cache
def _cached_spot_check(
    case: Case, device: torch.device, tiles: tuple[tuple[str, Any], ...]
) -> dict[str, Any]:
    try:
        with _overriding(dict(tiles)):
            return spot_check(case, *build(case, device))
    except Exception as error:
        return {"ok": False, **describe(error)}
    finally:
        release(device)


def release(device: torch.device) -> None:
    """Hand cached memory back, so that each measurement starts alike."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def copy_shapes(shapes: list[Shape]) -> Iterator[Shape]:
    """One shape for every size in bytes among the shapes."""
    seen: set[int] = set()
    for shape in shapes:
        if shape.x_bytes not in seen:
            seen.add(shape.x_bytes)
            yield shape
