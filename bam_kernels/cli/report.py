"""``python -m bam_kernels report``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bam_kernels.cli import arguments
from bam_kernels.cli.output import FAILED, error, print_table, progress

if TYPE_CHECKING:
    from bam_kernels.benchmarking.cost import Cost, Machine
    from bam_kernels.benchmarking.kernel_report import Compiled
    from bam_kernels.benchmarking.sites import Case

_SIZES = ((32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14))
_TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
_DTYPES = ("float16", "float32", "bfloat16", "float64")
_LAYOUTS = ("nchw", "channels_last")
_WIDTH = 170  # of the widest table where no terminal sets it
_PREDICTED = "predicted, not measured: launches x {:g} us + bytes / bandwidth"


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    report = commands.add_parser(
        "report",
        help="compile every Triton kernel for GPUs that are not here; predict bytes and times",
        description="Compile what BAM launches, ahead of time and with the launch tables that "
        "ship, for GPUs that need not be here: registers, spills, shared memory, occupancy and the "
        "width of accesses to global memory. Beside it the DRAM traffic of each kernel and of "
        "whole modules, fused and eager, and times predicted from it. Nothing is run on a GPU.",
        epilog="Exit status: 0 no kernel spills or has lost a wide access; 1 one does; 2 a bad "
        "argument, or no Triton.",
    )
    add = report.add_argument
    add("--targets", nargs="+", choices=_TARGETS, metavar="TARGET",
        help=f"GPUs to compile for, of {', '.join(_TARGETS)} (default: all)")  # fmt: skip
    add("--sites", nargs="+", type=arguments.site, metavar="NxCxHxW",
        help="shapes of x (default: ResNet-50's at N = 32)")  # fmt: skip
    add("--dtype", nargs="+", choices=_DTYPES, help="of x (default: float16 float32)")
    add("--layouts", nargs="+", choices=_LAYOUTS, help="of x (default: both)")
    add("--presets", nargs="+", choices=("paper", "official"), help="of the module (default: all)")
    add("--quick", action="store_true",
        help="sm_90, the first site, float16, NCHW, the paper's preset")  # fmt: skip
    add("--bandwidth", type=arguments.above_zero, metavar="GB/S",
        help="predict for a GPU of this DRAM bandwidth as well")  # fmt: skip
    add("--launch-us", type=arguments.above_zero, metavar="US",
        help="what a launch takes beside its bytes (default: 3)")  # fmt: skip
    add("--processes", type=arguments.positive, help="that compile (default: one a CPU)")
    add("--json", type=Path, metavar="FILE", help="write every figure there")
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("triton") is None:
        return error("report", "triton is not installed; pip install triton")
    problem = arguments.unwritable("--json", args.json)
    if problem is not None:
        return error("report", problem)

    from bam_kernels.benchmarking import cost, kernel_report
    from bam_kernels.testing import aot

    reason = aot.is_available(in_subprocess=True)
    if reason is not None:
        return error("report", reason)
    quick = args.quick
    targets = args.targets or (("sm_90",) if quick else kernel_report.TARGETS)
    cases = kernel_report.cases(
        args.sites or (_SIZES[:1] if quick else _SIZES),
        args.dtype or (("float16",) if quick else ("float16", "float32")),
        args.layouts or (_LAYOUTS[:1] if quick else _LAYOUTS),
        args.presets or (("paper",) if quick else ("paper", "official")),
    )
    machines = _machines(args.bandwidth, args.launch_us)
    processes = args.processes or os.cpu_count() or 1
    compiled: list[Compiled] = []
    jobs = [(target, case) for target in targets for case in cases]
    with progress(len(jobs) + 1) as tell:
        tell("predicting")
        costs = {case: {kind: cost.cost(case, kind) for kind in cost.KINDS} for case in cases}
        found = kernel_report.compile_all(targets, cases, processes)
        for (target, case), each in zip(jobs, found, strict=True):
            tell(f"{target} {case}")
            compiled += each
    _print_kernels(compiled, targets)
    _print_traffic(compiled, cases[0], targets[0], machines)
    _print_costs(costs, machines)
    wrong = _print_problems(compiled)
    if args.json is not None:
        _write(args.json, compiled, costs, machines)
    return FAILED if wrong else 0


def _machines(bandwidth: float | None, launch_us: float | None) -> list[Machine]:
    import dataclasses

    from bam_kernels.benchmarking import cost

    machines = list(cost.MACHINES)
    if bandwidth is not None:
        machines.append(cost.Machine(f"{bandwidth:g} GB/s", "", bandwidth))
    if launch_us is not None:
        machines = [dataclasses.replace(each, launch_us=launch_us) for each in machines]
    return machines


def _kernel(name: str) -> str:
    return name.removeprefix("_").removesuffix("_kernel")


def _by_kernel(compiled: Iterable[Compiled]) -> dict[str, list[Compiled]]:
    found: defaultdict[str, list[Compiled]] = defaultdict(list)
    for each in compiled:
        found[_kernel(each.report.name)].append(each)
    return dict(sorted(found.items()))


def _print_kernels(compiled: Sequence[Compiled], targets: Sequence[str]) -> None:
    from bam_kernels.benchmarking.occupancy import occupancy

    def cell(found: Sequence[Compiled]) -> str:
        if not found:
            return ""
        reports = [each.report for each in found]
        spilled = max(report.spill_bytes for report in reports)
        return (
            f"{max(report.registers for report in reports)}r "
            f"{max(report.shared_bytes for report in reports) / 1024:.0f}K "
            f"{100 * min(occupancy(report) or 0.0 for report in reports):.0f}%"
            + (f" spills {spilled}" if spilled else "")
        )

    rows = []
    for name, found in _by_kernel(compiled).items():
        of = {target: [e for e in found if e.report.target == target] for target in targets}
        rows.append([name, *(cell(each) for each in of.values())])
    title = "the worst of all cases: registers a thread, shared memory in KiB, occupancy"
    print_table(title, ["kernel", *targets], [rows])
    rows = []
    for name, found in _by_kernel(compiled).items():
        widths = defaultdict(set)
        for each in found:
            for map_, access in each.report.accesses.items():
                if map_ in ("x", "dout", "out", "dx") and "ALIGN" in each.report.constants:
                    widths[map_] |= access.load_bits | access.store_bits
        if widths:
            rows.append([name, *(_bits(widths[m]) for m in ("x", "dout", "out", "dx"))])
    if rows:
        title = "bits a thread moves at a time, of maps of x's size (NVIDIA's targets)"
        print_table(title, ["kernel", "x", "dout", "out", "dx"], [rows])


def _bits(widths: set[int]) -> str:
    return ", ".join(map(str, sorted(widths))) or "-"


def _print_traffic(
    compiled: Sequence[Compiled], case: Case, target: str, machines: Sequence[Machine]
) -> None:
    """The kernels of one training step and one inference, with what each moves."""
    from bam_kernels.benchmarking.cost import Cost

    groups = []
    for phase in ("inference", "forward", "backward"):
        chosen = [
            each
            for each in compiled
            if each.phase == phase
            and each.report.target == target
            and (each.case.shape, each.case.preset) == (case.shape, case.preset)
        ]
        rows = []
        for name, found in _by_kernel(chosen).items():
            read, written = (
                sum(getattr(each, side) for each in found)
                for side in ("read_bytes", "written_bytes")
            )
            whole = Cost(len(found), read, written, 0.0)
            times = [f"{whole.predicted_us(machine):.1f}" for machine in machines]
            rows.append([phase, name, str(len(found)), f"{whole.moved_bytes / 1e6:.2f}", *times])
        if rows:
            groups.append(rows)
    title = f"DRAM traffic of {case.shape} {case.preset}; us {_PREDICTED}".format(
        machines[0].launch_us
    )
    header = ["phase", "kernel", "launches", "MB", *(machine.name for machine in machines)]
    print_table(title, header, groups)


def _print_costs(costs: dict[Case, dict[str, Cost]], machines: Sequence[Machine]) -> None:
    groups: defaultdict[str, list[list[str]]] = defaultdict(list)
    for case, each in costs.items():
        fused, eager = each.values()
        times = []
        for machine in machines:
            a, b = fused.predicted_us(machine), eager.predicted_us(machine)
            times.append(f"{a:.0f} ({b / a:.1f})")
        shape = case.shape
        groups[f"{case.mode} {shape.dtype} {case.preset}"].append(
            [
                "x".join(map(str, shape.size)), shape.dtype, shape.layout, case.mode, case.preset,
                f"{fused.launches} / {eager.launches}", f"{fused.passes:.1f} / {eager.passes:.1f}",
                *times,
            ]
        )  # fmt: skip
    header = ["x", "dtype", "layout", "mode", "preset", "launches", "passes"]
    title = f"fused / eager; us of the fused module (eager's over it), {_PREDICTED}".format(
        machines[0].launch_us
    )
    print_table(
        title, [*header, *(machine.name for machine in machines)], list(groups.values()), _WIDTH
    )


def _print_problems(compiled: Sequence[Compiled]) -> bool:
    from bam_kernels.benchmarking.kernel_report import problems

    wrong = [(each, words) for each in compiled for words in problems(each.report)]
    for each, words in wrong:
        where = f"{each.report.target} {each.case} {each.phase}"
        print(f"{where}: {_kernel(each.report.name)}: {words}")
    told = f"{len(wrong)} problems" if wrong else "no spills, no access narrower than it can be"
    print(f"{len(compiled)} launches compiled: {told}")
    return bool(wrong)


def _write(
    path: Path,
    compiled: Sequence[Compiled],
    costs: dict[Case, dict[str, Cost]],
    machines: Sequence[Machine],
) -> None:
    import dataclasses

    from bam_kernels.benchmarking.cpu.machine import versions
    from bam_kernels.benchmarking.gpu.environment import commit
    from bam_kernels.files import replacing

    predictions = [
        {
            **case.record(),
            "kind": kind,
            **dataclasses.asdict(each),
            "moved_bytes": each.moved_bytes,
            "predicted_us": {m.name: each.predicted_us(m) for m in machines},
        }
        for case, found in costs.items()
        for kind, each in found.items()
    ]
    data: dict[str, Any] = {
        "what": "kernels compiled ahead of time, and times predicted from bytes and launches; "
        "nothing was run",
        "not_a_measurement": True,
        **commit(),
        "versions": versions(),
        "machines": [dataclasses.asdict(machine) for machine in machines],
        "predictions": predictions,
        "kernels": [each.record() for each in compiled],
    }
    with replacing(path) as part:
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
