"""What attention costs a network, fused and eager: the paper's Table 10, and times and memory.

A network without attention, and with SE, BAM-C and BAM: each on the fused kernels and in plain
PyTorch, with the same weights. Parameters and multiply-accumulates are counted as the paper counts
them; the times of an inference and of a training step are medians over rounds in which every
network is timed once, in turns, so that a machine's other load falls on all alike; peak memory is
the most that is allocated at once beyond the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bam_kernels
from bam_kernels.benchmarking import timing
from bam_kernels.benchmarking.cpu.machine import environment
from bam_kernels.benchmarking.cpu.memory import torch_peak
from bam_kernels.benchmarking.sites import INFERENCE, TRAINING
from bam_kernels.paper.counting import count

BASELINE = "baseline"
ATTENTION = ("se", "bam-c", "bam")
FUSED, EAGER = "fused", "eager"
MODES = (INFERENCE, TRAINING)

Build = Callable[[str | None, bool], nn.Module]
"""``build(attention, fused)``: the network with that attention of `ATTENTION`, or None."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        model: the network's name, for the record.
        size: of the images, [N, 3, H, W].
        attention: of `ATTENTION`.
        device: where.
        threads: of the CPU.
        rounds: times taken of each network.
        least_ms: a time's least duration, in ms.
        seed: of weights and images.
    """

    model: str
    size: tuple[int, int, int, int]
    attention: tuple[str, ...] = ATTENTION
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1
    rounds: int = 10
    least_ms: float = 20.0
    seed: int = 0

    @property
    def steps(self) -> int:
        """How often `measure` tells what it does."""
        networks = 1 + 2 * len(self.attention)
        told_rounds = max(0, self.rounds - timing.FEWEST_ROUNDS)
        return networks * (1 + len(MODES)) + len(MODES) * (1 + told_rounds)


def measure(options: Options, build: Build, step: Callable[[str], None]) -> dict[str, Any]:
    """Everything, as the JSON object that ``compare --json`` writes.

    Args:
        options: what is measured.
        build: makes the networks; each with random weights, which are then made equal.
        step: is told what is being done.

    Raises:
        ValueError: a network does not run on such images.
    """
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(options.seed)
    images = torch.randn(options.size, generator=generator).to(options.device)
    result: dict[str, Any] = {
        "what": f"{options.model} on images {list(options.size)}: the cost of attention",
        **environment(options.threads),
        "device": str(options.device),
        "backend": _backend(options.device),
        "settings": {"rounds": options.rounds, "least_ms": options.least_ms, "seed": options.seed},
    }
    if options.device.type == "cuda":
        from bam_kernels.benchmarking.gpu import environment as gpu

        result["gpu"] = gpu.environment(options.device)
    networks, rows = _networks(options, build, step)
    errors = _errors(networks, images)
    labels = torch.randint(2, options.size[:1], generator=generator).to(options.device)
    for mode in MODES:
        runs = {key: _run(net, mode, images, labels) for key, net in networks.items()}
        times = _times(runs, options, mode, step)
        for key, run in runs.items():
            rows[key][mode] = times[key]
            step(f"memory of {mode}, {key}")
            if "error" not in times[key]:
                peak = timing.peak_bytes(run, options.device)
                rows[key][mode]["peak_bytes"] = torch_peak(run) if peak is None else peak
    for key, row in rows.items():
        row["ratios"] = _ratios(row, rows[BASELINE])
        row |= {"relative_error": errors[key]} if key in errors else {}
    result["rows"] = list(rows.values())
    result["machine"]["load_average_after"] = environment(options.threads)["machine"][
        "load_average"
    ]
    return result


def _backend(device: torch.device) -> str:
    """Which backend the fused modules run on."""
    module = bam_kernels.BAM(32, device=device).eval()
    return bam_kernels.explain(module, torch.randn(2, 32, 8, 8, device=device)).backend


def _networks(
    options: Options, build: Build, step: Callable[[str], None]
) -> tuple[dict[str, nn.Module], dict[str, dict[str, Any]]]:
    """The networks by key, and the beginnings of their rows: names, parameters and GMACs."""
    networks: dict[str, nn.Module] = {}
    rows: dict[str, dict[str, Any]] = {}
    pairs = [(name, kind) for name in options.attention for kind in (EAGER, FUSED)]
    shared: dict[str, Tensor] = {}
    for name, kind in [(BASELINE, EAGER), *pairs]:
        key = BASELINE if name == BASELINE else f"{name} {kind}"
        step(f"building {key}")
        torch.manual_seed(options.seed)
        net = build(None if name == BASELINE else name, kind == FUSED)
        if kind == FUSED:
            net.load_state_dict(networks[f"{name} {EAGER}"].state_dict())
        elif name == BASELINE:
            shared = net.state_dict()
        else:
            net.load_state_dict(shared, strict=False)  # the keys of the attention are not in it
        # The fused one is counted as the eager one: its operators are closed to a counter.
        if kind == EAGER:
            counted = count(net, (1, *options.size[1:]))
        rows[key] = {
            "attention": name, "kind": "-" if name == BASELINE else kind,
            "parameters": sum(p.numel() for p in net.parameters()), "macs": counted.macs,
        }  # fmt: skip
        networks[key] = net.to(options.device)
    return networks, rows


@torch.inference_mode()
def _errors(networks: Mapping[str, nn.Module], images: Tensor) -> dict[str, float]:
    """Of each fused network's output, against the eager one's with the same weights."""
    found = {}
    for key, net in networks.items():
        name, _, kind = key.rpartition(" ")
        if kind == FUSED:
            ours, eager = (each.eval()(images) for each in (net, networks[f"{name} {EAGER}"]))
            if not isinstance(ours, Tensor):
                raise ValueError(
                    f"expected a network that puts out a tensor, got {type(ours).__name__}"
                )
            found[key] = timing.relative_error(ours, eager)
    return found


def _run(net: nn.Module, mode: str, images: Tensor, labels: Tensor) -> Callable[[], object]:
    def infer() -> object:
        net.eval()
        with torch.inference_mode():
            return net(images)

    def train() -> None:
        net.train()
        net.zero_grad(set_to_none=True)
        out = net(images)
        loss = F.cross_entropy(out, labels) if out.dim() == 2 else out.square().mean()
        loss.backward()
        # What a step leaves behind must not count as held before the next one.
        net.zero_grad(set_to_none=True)

    return infer if mode == INFERENCE else train


def _times(
    runs: Mapping[str, Callable[[], object]],
    options: Options,
    mode: str,
    step: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    def tell() -> bool:  # asked before each round, once there were `timing.FEWEST_ROUNDS`
        step(f"timing {mode}")
        return False

    tell()
    return timing.interleave(
        {key: timing.Peer(run) for key, run in runs.items()},
        timing.clock(options.device),
        rounds=options.rounds, warmups=1, least_ms=options.least_ms, expired=tell,
    )  # fmt: skip


def _ratios(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, float]:
    """To the network without attention: of parameters, GMACs, times and memory."""
    found = {name: row[name] / baseline[name] for name in ("parameters", "macs")}
    for mode in MODES:
        for name in ("median_ms", "peak_bytes"):
            ours, theirs = row[mode].get(name), baseline[mode].get(name)
            if ours is not None and theirs:
                found[f"{mode} {name}"] = ours / theirs
    return found
