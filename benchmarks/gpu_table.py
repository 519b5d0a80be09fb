"""The run on paper: tables of sweep, kernels and parity, then a summary of at most 60 lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

SUMMARY_LINES = 60

_MODES = (("training", "train"), ("inference", "infer"))
_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
_LAYOUTS = {"channels_last": "nhwc", "nchw": "nchw"}


def number(value: Any, digits: int = 3, width: int = 6) -> str:
    """A number in `width` characters, with fewer digits if it must; a dash where there is none."""
    if not isinstance(value, int | float):
        return "-".rjust(width)
    while digits and len(f"{value:.{digits}f}") > width:
        digits -= 1
    return f"{value:.{digits}f}".rjust(width)


def label(entry: Mapping[str, Any]) -> str:
    """A shape in few characters."""
    shape = f"{entry['channels']}x{entry['height']}x{entry['width']}"
    dtype, layout = _DTYPES[entry["dtype"]], _LAYOUTS[entry["layout"]]
    return f"{shape:<11} {entry['batch']:>3} {dtype} {layout}"


def sweep_lines(data: Mapping[str, Any]) -> Iterator[str]:
    """The best three tiles beside the table's, a line each."""
    if not data.get("sweep"):
        return
    yield "sweep: ms and share of the copy's bandwidth; tile is block_c x block_p, warps, stages"
    for entry in data["sweep"]:
        name = f"{entry['kernel']:<20} {label(entry)}"
        if "error" in entry:
            yield f"{name}  {entry['error'][:60]}"
            continue
        yield f"{name}  table {_tile(entry['shipped'])}" + "".join(
            f" | {_tile(best)}" for best in entry["best"]
        )


def _tile(entry: Mapping[str, Any]) -> str:
    tile = f"{entry['block_c']}x{entry['block_p']},{entry['num_warps']},{entry['num_stages']}"
    if "median_ms" not in entry:
        return f"{tile} error"
    share = entry.get("share_of_copy")
    return f"{tile} {entry['median_ms']:.4f}" + (f" {share:.2f}" if share else "")


def kernel_lines(data: Mapping[str, Any]) -> Iterator[str]:
    """The kernels, a line a shape: ms and share of the copy's bandwidth of each."""
    if not data.get("kernels"):
        return
    names = list(dict.fromkeys(entry["kernel"] for entry in data["kernels"]))
    yield "kernels by CUDA graph: ms, and x-sized bytes as a share of the copy's bandwidth"
    yield f"{'':<25}" + "".join(f"{name:>21}" for name in names)
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    for entry in data["kernels"]:
        rows.setdefault(label(entry), {})[entry["kernel"]] = entry
    for name, row in rows.items():
        cells = [row.get(kernel, {}) for kernel in names]
        yield f"{name:<25}" + "".join(
            f"{number(c.get('median_ms'), 4, 14)} {number(c.get('share_of_copy'), 2, 6)}"
            if "error" not in c
            else f"{'error':>21}"
            for c in cells
        )


def launch_table_lines(data: Mapping[str, Any]) -> Iterator[str]:
    """The sweep's tiles, to paste into the launch tables."""
    yield from data.get("launch_table", {}).get("paste", ())


def matrix_lines(data: Mapping[str, Any]) -> Iterator[str]:
    """The matrix's worst errors by dtype and combine mode, and what failed, with its seed."""
    matrix = data.get("matrix")
    if not matrix:
        return
    combines = list(dict.fromkeys(c for row in matrix["worst"].values() for c in row))
    yield "parity matrix: worst relative error against float64, fused (eager)"
    yield f"{'':<13} {'':<10} {'':<10}" + "".join(f"{name:>19}" for name in combines)
    for dtype, row in matrix["worst"].items():
        for mode in ("training", "inference"):
            for kind in ("out", "gradients"):
                cells = [row.get(name, {}).get(mode, {}).get(kind) for name in combines]
                if any(cells):
                    yield f"{dtype:<13} {mode:<10} {kind:<10}" + "".join(map(_pair, cells))
    for failure in matrix["failures"]:
        yield f"WRONG: {failure['row']}: {'; '.join(failure['wrong'])[:300]}"
    if matrix["failures"]:
        yield f"to repeat: bash benchmarks/gpu.sh --sections matrix --seed {matrix['first_seed']}"


def _pair(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return f"{'-':>19}"
    fused, eager = (float(cell[name]) for name in ("fused", "eager"))
    return f"{fused:.1e} ({eager:.1e})".rjust(19)


def summary_lines(data: Mapping[str, Any]) -> list[str]:
    """What the run found, in at most `SUMMARY_LINES` lines."""
    head = []
    if data.get("not_a_measurement"):
        head.append("NOT A MEASUREMENT: a smoke run on toy shapes")
    environment = data.get("environment", {})
    if environment:
        versions = f"torch {environment.get('torch')}, Triton {environment.get('triton')}"
        head.append(
            f"{environment.get('device')}, {versions}, CUDA {environment.get('cuda')}, "
            f"commit {str(environment.get('commit'))[:12]}"
            f"{' (changed)' if environment.get('dirty') else ''}"
        )
    tail = [*_matrix_line(data), *_parity_lines(data), *_sanitizer_line(data)]
    tail += [*_check_lines(data), *_left_out_lines(data)]
    rows = list(_case_lines(data))
    room = SUMMARY_LINES - len(head) - len(tail) - 2
    if len(rows) > room:
        rows = [*rows[: room - 1], f"... {len(rows) - room + 1} more rows in the JSON"]
    bandwidth = data.get("bandwidth", {})
    copy = bandwidth.get("best") or bandwidth.get("large")
    if copy:
        gbs = number(copy.get("gbs"), 0, 1)
        method = f" by {copy['method']}" if "method" in copy else ""
        head.append(f"copy of {copy['bytes']} bytes{method}: {gbs} GB/s read + written")
    return [*head, *rows, *tail]


def _case_lines(data: Mapping[str, Any]) -> Iterator[str]:
    cases = data.get("cases")
    if not cases:
        return
    columns = "fused eager  comp | graph: fused eager  comp | plain graph share tuned convs"
    yield (
        "ms a call; best peer / fused for plain calls and for CUDA graphs (above 1: fused is "
        "faster); share of copy bandwidth; shipped over tuned tiles; the convolutions not taken, "
        "ours or the library's, over those taken"
    )
    yield f"{'':<26}" + " || ".join(f"{short}: {columns}" for _, short in _MODES)
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    for entry in cases:
        case = entry["case"]
        name = label(case) + ("" if case["preset"] == "paper" else f" {case['preset'][:3]}")
        rows.setdefault(name, {})[case["mode"]] = entry
    for name, row in rows.items():
        yield f"{name:<29}" + " || ".join(_case_cells(row.get(mode, {})) for mode, _ in _MODES)


def _case_cells(entry: Mapping[str, Any]) -> str:
    if "error" in entry:
        return f"error: {entry['error'][:55]:<55}"
    peers = entry.get("peers", {})

    def ms(name: str) -> str:
        peer = peers.get(name, {})
        return " error" if "error" in peer else number(peer.get("median_ms"))

    plain = " ".join(ms(name) for name in ("fused", "eager", "compile"))
    graph = " ".join(ms(f"{name}_graphed") for name in ("fused", "eager", "compile"))
    shares = entry.get("share_of_copy", {})
    share = shares.get("fused_graphed", shares.get("fused"))
    ratios = [number(entry.get(f"ratio_{kind}"), 2, 5) for kind in ("plain", "graphed")]
    ratios.append(number(share, 2, 5))
    ratios += [number(entry.get(f"ratio_{kind}"), 2, 5) for kind in ("tuned", "convolutions")]
    return f"{plain} | {graph} | {' '.join(ratios)}"


def _matrix_line(data: Mapping[str, Any]) -> Iterator[str]:
    matrix = data.get("matrix")
    if not matrix:
        yield "matrix: not run"
        return
    wrong = matrix["failures"]
    verdict = f"WRONG in {len(wrong)}: {wrong[0]['row']}" if wrong else "all right"
    yield f"matrix: {matrix['done']} of {matrix['rows']} rows done, {verdict}"


def _sanitizer_line(data: Mapping[str, Any]) -> Iterator[str]:
    tools = data.get("sanitizer")
    if tools:
        yield "compute-sanitizer: " + ", ".join(
            f"{name} {found['outcome']}" + (f" {found['errors']}" if found.get("errors") else "")
            for name, found in tools.items()
        )


def _parity_lines(data: Mapping[str, Any]) -> Iterator[str]:
    parity = data.get("parity")
    if not parity:
        yield "parity: not run"
        return
    if "error" in parity:
        yield f"parity: {parity['error'][:120]}"
        return
    verdict = "ok" if parity["ok"] else "FAILED"
    counts = ", ".join(
        f"{parity[kind]} {kind}" for kind in ("passed", "failed", "errors", "skipped", "xfailed")
    )
    cut = "" if parity["complete"] else ", CUT SHORT"
    yield f"parity: {verdict}: {counts}{cut} in {parity['seconds']:.0f} s"
    for failure in parity["failures"][:5]:
        last = failure["message"].splitlines()[-1:] or [""]
        yield f"  {failure['test'][:70]}: {last[0][:80]}"


def _check_lines(data: Mapping[str, Any]) -> Iterator[str]:
    failed = data.get("failed_spot_checks")
    if failed is None:
        return
    checked = len(data.get("cases", []))
    yield f"spot checks: {checked - len(failed)} of {checked} cases right" + (
        f"; WRONG: {'; '.join(failed)[:160]}" if failed else ""
    )


def _left_out_lines(data: Mapping[str, Any]) -> Iterator[str]:
    counts = Counter(entry["section"] for entry in data["left_out"])
    if counts:
        told = ", ".join(f"{count} in {section}" for section, count in counts.items())
        yield f"left out for want of time (see the JSON): {told}"
    yield f"took {data.get('seconds', 0):.0f} of {data.get('budget_s', 0):.0f} s"
