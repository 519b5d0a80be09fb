"""Results files as tables, and the tables in a document: reads the JSON of the CPU benchmark (and
of ``bench``), of the GPU run and of the traffic meter.

A document holds a table between two comments, ``<!-- results: NAME -->`` and ``<!-- end -->``. NAME
is a kind, "cpu", "gpu" or "traffic", or a file's name without its suffix.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bam_kernels.files import replacing

KINDS = ("cpu", "gpu", "traffic")

FORMATS = {"cpu": 1, "gpu": 1, "traffic": 1}
"""The version of each kind's JSON that is read here; a file without one is of the first."""

NOT_MEASURED = "NOT A MEASUREMENT: a smoke run on toy shapes"

_NUMBER = (int, float)
_NAMES = {dict: "an object", list: "a list", str: "a string", int: "an integer", type(None): "null"}
_BEGIN = re.compile(r"<!-- results: (\S+) -->")
_END = "<!-- end -->"


class ResultsError(Exception):
    """A file that is no results file, or a document without its place; one line says which."""


@dataclasses.dataclass(frozen=True)
class Results:
    """A results file, checked.

    Attributes:
        path: of the file.
        kind: one of `KINDS`.
        data: the JSON object.
    """

    path: Path
    kind: str
    data: dict[str, Any]

    @property
    def measured(self) -> bool:
        """False for a smoke run, whose times mean nothing."""
        return not self.data.get("not_a_measurement", False)


# --- reading ----------------------------------------------------------------------------------


def load(path: Path) -> Results:
    """Read a results file.

    Raises:
        ResultsError: it cannot be read, is no JSON, is of no known kind or of another version, or
            lacks something that its table needs.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path}: expected a file to read, got {error.strerror}") from error
    except ValueError as error:  # of json, and of the decoding
        raise ResultsError(f"{path}: expected JSON, got {error}") from error
    kind = _kind(path, data)
    version = data.get("format", 1)
    if version != FORMATS[kind]:
        raise ResultsError(f"{path}: expected {kind} results of format {FORMATS[kind]}, got "
                           f"format {version!r}")  # fmt: skip
    {"cpu": _check_cpu, "gpu": _check_gpu, "traffic": _check_traffic}[kind](path, data)
    return Results(path, kind, data)


def _kind(path: Path, data: Any) -> str:
    """By content: a traffic file's rows count passes, a CPU file's have sides, a GPU file has the
    sections of its run."""
    if isinstance(data, dict):
        rows = data.get("rows")
        first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
        if "passes" in first or "launches" in first:
            return "traffic"
        if "sides" in first or ("rows" in data and "settings" in data):
            return "cpu"
        if "environment" in data and "sections" in data:
            return "gpu"
    expected = "results of the CPU benchmark, the GPU run or the traffic meter"
    got = f"keys {', '.join(map(str, data)) or 'none'}" if isinstance(data, dict) else (
        f"JSON of type {type(data).__name__}")  # fmt: skip
    raise ResultsError(f"{path}: expected {expected}, got {got if len(got) < 200 else got[:200]}")


class _Checked:
    """A value of a file and where it stands; asks for its parts by name."""

    def __init__(self, path: Path, where: str, value: Any) -> None:
        self.path, self.where, self.value = path, where, value

    def get(self, key: str, kind: type | tuple[type, ...] | None = None) -> _Checked:
        where = f"{self.where}.{key}" if self.where else key
        if not isinstance(self.value, dict):
            raise ResultsError(f"{self.path}: {self.where}: expected an object, got "
                               f"{type(self.value).__name__}")  # fmt: skip
        if key not in self.value:
            raise ResultsError(f"{self.path}: expected the key {where}, got none")
        found = _Checked(self.path, where, self.value[key])
        wrong = kind is not None and not isinstance(found.value, kind)
        if wrong or (kind is not None and isinstance(found.value, bool)):  # which is an int
            kinds = kind if isinstance(kind, tuple) else (kind,)
            names = "a number" if kind is _NUMBER else " or ".join(_NAMES[each] for each in kinds)
            got = repr(found.value)[:60]
            raise ResultsError(f"{self.path}: {where}: expected {names}, got {got}")
        return found

    def items(self) -> Iterator[_Checked]:
        for i, value in enumerate(self.value):
            yield _Checked(self.path, f"{self.where}[{i}]", value)


def _check_traffic(path: Path, data: dict[str, Any]) -> None:
    for row in _Checked(path, "", data).get("rows", list).items():
        for key in ("module", "preset", "layout"):
            row.get(key, str)
        row.get("shape", list)
        for key in ("passes", "launches"):
            for part in ("forward", "backward", "inference"):
                row.get(key, dict).get(part, _NUMBER)
        for key in ("kept_for_backward", "peak"):
            row.get(key, _NUMBER)


def _check_cpu(path: Path, data: dict[str, Any]) -> None:
    whole = _Checked(path, "", data)
    whole.get("machine", dict)
    whole.get("versions", dict)
    for row in whole.get("rows", list).items():
        for key in ("mode", "dtype", "site", "preset"):
            row.get(key, str)
        sides = row.get("sides", dict)
        for side in sides.value:
            sides.get(side, dict).get("median_ms", _NUMBER)
        best = row.get("best_peer", (str, type(None))).value
        if best is not None:
            sides.get(best)
        ratios = row.get("ratios", dict)
        for key in ratios.value:
            ratios.get(key, _NUMBER)


def _check_gpu(path: Path, data: dict[str, Any]) -> None:
    whole = _Checked(path, "", data)
    environment = whole.get("environment", dict)
    for key in ("device", "torch", "triton", "commit"):
        environment.get(key)
    if "cases" not in data:
        raise ResultsError(f"{path}: expected the key cases, got none: the run timed nothing")
    for entry in whole.get("cases", list).items():
        case = entry.get("case", dict)
        for key in ("dtype", "layout", "mode", "preset"):
            case.get(key, str)
        for key in ("batch", "channels", "height", "width"):
            case.get(key, int)
        if "error" in entry.value:
            continue
        peers = entry.get("peers", dict)
        for peer in peers.value:
            if "median_ms" in peers.get(peer, dict).value:  # there is none of one that broke off
                peers.get(peer).get("median_ms", _NUMBER)


# --- tables -----------------------------------------------------------------------------------


def provenance(results: Results) -> str:
    """What was measured, where, with what: one line."""
    data = results.data
    if results.kind == "gpu":
        told = data["environment"]
        commit = f"{str(told['commit'])[:12]}{' (changed)' if told.get('dirty') else ''}"
        line = f"{told['device']}, torch {told['torch']}, Triton {told['triton']}, commit {commit}"
        return line if results.measured else f"{NOT_MEASURED}: {line}"
    commit = str(data.get("commit", "unknown"))[:12]
    if results.kind == "traffic":
        return f"counts, no times; torch {data.get('torch')}, Triton {data.get('triton')}, " \
               f"commit {commit}"  # fmt: skip
    machine = data["machine"]
    return (f"{machine.get('cpu')}, {machine.get('threads')} threads, torch "
            f"{data['versions'].get('torch')}, commit {commit}")  # fmt: skip


def table(results: Results) -> str:
    """The file's table in Markdown, without a newline at its end.

    Raises:
        ResultsError: the CPU benchmark's needs rich, which is not installed.
    """
    if results.kind == "traffic":
        return traffic_markdown(results.data["rows"])
    if results.kind == "gpu":
        return gpu_markdown(results.data)
    try:
        from bam_kernels.benchmarking.cpu import report
    except ImportError as error:
        raise ResultsError(f"{results.path}: its table needs a package: {error}") from error
    return report.markdown(results.data)


def traffic_markdown(rows: Sequence[Mapping[str, Any]], layout: str = "nchw") -> str:
    """The traffic meter's rows in one memory format; the JSON has both."""
    lines = [
        "| shape | preset | module | passes forward | backward | inference "
        "| launches forward | backward | inference | kept for backward | peak |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["layout"] != layout:
            continue
        passes, launches = row["passes"], row["launches"]
        lines.append(
            f"| {'x'.join(map(str, row['shape']))} | {row['preset']} | {row['module']} "
            f"| {passes['forward']:.1f} | {passes['backward']:.1f} | {passes['inference']:.1f} "
            f"| {launches['forward']} | {launches['backward']} | {launches['inference']} "
            f"| {row['kept_for_backward']:.2f} x | {row['peak']:.2f} x |"
        )
    return "\n".join(lines)


_PEERS = {
    "fused": "fused",
    "eager": "eager",
    "compile": "torch.compile",
    "fused_graphed": "fused, graph",
    "eager_graphed": "eager, graph",
    "compile_graphed": "torch.compile, graph",
}


def gpu_rows(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and a line a case of the GPU run, times in ms: plain calls, then CUDA graphs.

    A ratio is the best peer's time over ours, above 1 where ours is the faster. The share is of the
    bandwidth that a large copy reaches, for the bytes that the fused module cannot do without.
    """
    header = ["mode", "preset", "dtype", "layout", "site", *_PEERS.values()]
    header += ["ratio", "ratio, graph", "share of copy"]
    rows = []
    for entry in data["cases"]:
        case = entry["case"]
        site = "x".join(str(case[key]) for key in ("batch", "channels", "height", "width"))
        cells = [case["mode"], case["preset"], case["dtype"], case["layout"], site]
        peers = entry.get("peers", {})
        cells += [_cell(peers.get(name, {}).get("median_ms"), 3) for name in _PEERS]
        cells += [_cell(entry.get(f"ratio_{kind}"), 2) for kind in ("plain", "graphed")]
        shares = entry.get("share_of_copy") or {}
        cells.append(_cell(shares.get("fused_graphed", shares.get("fused")), 2))
        rows.append(cells)
    return header, rows


def gpu_markdown(data: Mapping[str, Any]) -> str:
    """`gpu_rows` in Markdown."""
    header, rows = gpu_rows(data)
    lines = [header, ["---"] * len(header), *rows]
    found = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{NOT_MEASURED}\n\n{found}" if data.get("not_a_measurement") else found


def _cell(value: Any, digits: int) -> str:
    known = isinstance(value, _NUMBER) and not isinstance(value, bool)
    return f"{value:.{digits}f}" if known else "-"


# --- the document -----------------------------------------------------------------------------


def filled(document: Path, files: Sequence[Results]) -> tuple[str, str]:
    """(the document as it is, the document with the files' tables in their places).

    Raises:
        ResultsError: the document cannot be read, its comments do not pair, a file has no place in
            it or a place more than one file, or a file is no measurement.
    """
    try:
        with open(document, encoding="utf-8", newline="") as file:
            text = file.read()
    except (OSError, ValueError) as error:
        raise ResultsError(f"{document}: expected a document to read, got {error}") from error
    tables: dict[str, str] = {}
    places = _places(document, text)
    for each in files:
        if not each.measured:
            raise ResultsError(f"{each.path}: expected a measurement for {document}, got a smoke "
                               "run on toy shapes")  # fmt: skip
        name = each.path.stem if each.path.stem in places else each.kind
        if name not in places:
            raise ResultsError(f"{document}: expected a line <!-- results: {each.kind} --> for "
                               f"{each.path}, got {', '.join(places) or 'none'}")  # fmt: skip
        if name in tables:
            raise ResultsError(f"{each.path}: expected one file for <!-- results: {name} -->, got "
                               "another before")  # fmt: skip
        tables[name] = table(each)
    end = "\r\n" if "\r\n" in text else "\n"
    new = text
    for name in sorted(tables, key=lambda name: -places[name][0]):  # the last first
        start, stop = places[name]
        new = new[:start] + tables[name].replace("\n", end) + end + new[stop:]
    return text, new


def _places(document: Path, text: str) -> dict[str, tuple[int, int]]:
    """By name where a table begins, behind its first comment, and where its second begins."""
    places: dict[str, tuple[int, int]] = {}
    name, start, at = None, 0, 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        begin = _BEGIN.fullmatch(line.strip())
        if begin and name is not None:
            raise ResultsError(
                f"{document}:{number}: expected {_END} of {name}, got {line.strip()}"
            )
        if begin:
            name, start = begin[1], at + len(line)
            if name in places:
                raise ResultsError(f"{document}:{number}: expected one place {name}, got a second")
        elif line.strip() == _END and name is not None:
            places[name], name = (start, at), None
        at += len(line)
    if name is not None:
        raise ResultsError(f"{document}: expected {_END} behind <!-- results: {name} -->, got none")
    return places


def replace(path: Path, text: str) -> None:
    """Write a document whole or not at all; it keeps its mode."""
    with replacing(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        file.write(text)
