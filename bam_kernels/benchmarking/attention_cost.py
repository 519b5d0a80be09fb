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
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bam_kernels
from bam_kernels.benchmarking import timing
from bam_kernels.benchmarking.cpu.machine import environment
from bam_kernels.benchmarking.cpu.memory import torch_peak
from bam_kernels.benchmarking.sites import INFERENCE, TRAINING
from bam_kernels.paper.count import count

BASELINE = "baseline"
ATTENTION = ("se", "bam-c", "bam")
FUSED, EAGER = "fused", "eager"
MODES = (INFERENCE, TRAINING)

# Of the network's output in inference, fused against eager in float32: a kernel that is wrong is
# off by far more; TF32 convolutions on a GPU, which only one of the two may take, by less.
ERROR_LIMIT = 5e-3

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
        return (1 + 2 * len(self.attention)) * 2 + len(MODES) * self.rounds


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
        counted = count(net, (1, *options.size[1:]))
        rows[key] = {
            "attention": name, "kind": "-" if name == BASELINE else kind,
            "parameters": counted.parameters, "macs": counted.macs,
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
    def tell() -> bool:
        step(f"timing {mode}")
        return False

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


def problems(result: Mapping[str, Any]) -> list[str]:
    """The networks that failed, or whose fused output is not the eager one's, in words."""
    found = []
    for row in result["rows"]:
        key = f"{row['attention']} {row['kind']}"
        found += [f"{key}, {m}: {row[m]['error']}" for m in MODES if "error" in row[m]]
        error = row.get("relative_error", 0.0)
        if not error <= ERROR_LIMIT:  # NaN as well
            found.append(f"{key}: off from eager by {error:.1e}, at most {ERROR_LIMIT:.0e}")
    return found


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[list[str]]]]:
    """Header, and rows in groups by attention; times in ms with their ratio to the baseline."""
    header = ["attention", "kernels", "params M", "GMACs", "inference ms", "x", "training step ms",
              "x", "peak MiB, inference", "peak MiB, training"]  # fmt: skip
    groups: dict[str, list[list[str]]] = {}
    for row in result["rows"]:
        cells = [row["attention"], row["kind"], f"{row['parameters'] / 1e6:.3f}",
                 f"{row['macs'] / 1e9:.4f}"]  # fmt: skip
        for mode in MODES:
            ratio = row["ratios"].get(f"{mode} median_ms")
            cells.append(f"{row[mode]['median_ms']:.2f}" if ratio is not None else "FAILED")
            cells.append(f"{ratio:.2f}" if ratio is not None else "-")
        peaks = [row[mode].get("peak_bytes") for mode in MODES]
        cells += ["-" if peak is None else f"{peak / 2**20:.1f}" for peak in peaks]
        groups.setdefault(row["attention"], []).append(cells)
    return header, list(groups.values())


def title(result: Mapping[str, Any]) -> str:
    """What, on what, with how many threads, and how busy the machine was."""
    machine = result["machine"]
    where = result["gpu"]["device"] if "gpu" in result else machine["cpu"]
    load = f"{machine['load_average'][0]:.1f} to {machine['load_average_after'][0]:.1f}"
    return (
        f"{result['what']}; {where}, {machine['threads']} threads, "
        f"fused on {result['backend']}, load {load} on "
        f"{machine['cores']} cores; medians of {result['settings']['rounds']} "
        "interleaved rounds; x: to the baseline"
    )


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture: times and training memory over the baseline's, fused beside eager.

    Raises:
        ImportError: there is no matplotlib.
        OSError: the file cannot be written.
    """
    from bam_kernels.analysis.drawing import COLORS, GREY, new_figure, save

    panels = {
        "inference": f"{INFERENCE} median_ms",
        "training step": f"{TRAINING} median_ms",
        "peak memory, training": f"{TRAINING} peak_bytes",
    }
    figure = new_figure((10.5, 3.6))
    figure.suptitle(title(result).replace("; medians", ";\nmedians"), fontsize=8, color=GREY)
    rows = [row for row in result["rows"] if row["attention"] != BASELINE]
    names = list(dict.fromkeys(row["attention"] for row in rows))
    for ax, (what, ratio) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for offset, kind, color in ((-0.2, FUSED, COLORS[0]), (0.2, EAGER, COLORS[4])):
            told = {r["attention"]: r["ratios"].get(ratio) for r in rows if r["kind"] == kind}
            at = [(names.index(n) + offset, v) for n, v in told.items() if v is not None]
            bars = ax.bar([x for x, _ in at], [y for _, y in at], 0.36, color=color, label=kind)
            ax.bar_label(bars, fmt="%.2f", fontsize=7)
        ax.axhline(1, color=GREY, linestyle="--", linewidth=1)
        ax.set_xticks(range(len(names)), [name.upper() for name in names])
        ax.set_title(what, fontsize=10)
        ax.tick_params(labelsize=8)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    figure.axes[0].set_ylabel("over the network without attention", fontsize=8)
    figure.axes[0].legend(frameon=False, fontsize=8, loc="lower right", facecolor="white")
    save(figure, path)
