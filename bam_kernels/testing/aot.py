"""Ahead-of-time compilation of exactly what a launcher would launch, without a GPU.

Call a launcher with tensors on the "meta" device inside `compile_only("sm_90")`: every
``kernel[grid](...)`` it makes is specialised and compiled by Triton's own JIT for that target, is
not launched, and adds one `KernelReport` to the list the context manager yields. Several checks
only mean something if the list is not empty, so assert that first.

A meta tensor reports address 0 plus its storage offset, so it is specialised as 16-byte aligned
unless it is a view at an unaligned offset, as a tensor from CUDA's allocator would be.

Triton is imported when it is used, never when this module is imported. Not thread-safe.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")

# Dynamic shared memory one thread block can opt in to, in KiB. Triton compares against this only
# when it loads a kernel on a device, so a compilation alone never notices an oversized kernel.
SHARED_LIMITS = {
    "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64,
}  # fmt: skip

UNKNOWN = "?"  # key in `KernelReport.accesses` of accesses that lead back to no parameter

_MARKER = "AOT_REPORTS:"


@dataclass(frozen=True)
class Access:
    """Widths, in bits per thread and instruction, of the global memory accesses to one pointer."""

    load_bits: frozenset[int] = frozenset()
    store_bits: frozenset[int] = frozenset()
    atomic_bits: frozenset[int] = frozenset()


@dataclass(frozen=True)
class KernelReport:
    """What one launch compiled to.

    Sizes are in bytes. AMD targets have no per-pointer widths, and None where a size is unknown.
    """

    name: str
    target: str
    signature: dict[str, str]  # run-time parameter -> Triton type: {"x": "*fp16", "n": "i32"}
    constants: dict[str, Any]  # constexprs, None arguments, and integers specialised to 1
    divisible_by_16: tuple[str, ...]  # parameters specialised as multiples of 16
    num_warps: int
    num_stages: int
    registers: int  # 32-bit registers per thread
    stack_bytes: int  # local memory frame per thread
    spill_bytes: int  # local stores + loads; on AMD the size of the spilled registers
    shared_bytes: int  # dynamic shared memory per block
    static_shared_bytes: int | None = None  # from sm_90 on includes 1024 that the system reserves
    local_store_bytes: int | None = None  # the local store instructions' widths, summed, per thread
    local_load_bytes: int | None = None
    uses_tma: bool = False  # has bulk copies, which `accesses` leaves out
    accesses: dict[str, Access] = field(default_factory=dict)

    @property
    def fits_shared(self) -> bool | None:
        """Whether the target can launch a block with `shared_bytes`; None for unlisted targets."""
        limit = SHARED_LIMITS.get(self.target)
        return None if limit is None else self.shared_bytes <= limit * 1024

    def to_json(self) -> str:
        """The report as JSON text; `from_json` is its inverse."""
        return json.dumps(asdict(self), default=sorted)  # the only non-JSON type is frozenset

    @classmethod
    def from_json(cls, text: str) -> KernelReport:
        """The report that `to_json` wrote."""
        data = json.loads(text)
        data["divisible_by_16"] = tuple(data["divisible_by_16"])
        data["accesses"] = {
            name: Access(**{kind: frozenset(bits) for kind, bits in access.items()})
            for name, access in data["accesses"].items()
        }
        return cls(**data)


def is_available(*, in_subprocess: bool = False) -> str | None:
    """None when `compile_only` is usable, else the reason why not.

    With in_subprocess=True the question is about `reports_in_subprocess`, whose process is free of
    the interpreter.
    """
    for module in ("torch", "triton"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    from triton import knobs

    if knobs.runtime.interpret and not in_subprocess:
        return "TRITON_INTERPRET is set: @triton.jit makes interpreted functions, not compiled ones"
    try:
        _ = knobs.nvidia.cuobjdump.path, knobs.nvidia.nvdisasm.path
    except RuntimeError as error:
        return str(error)
    return None


@contextmanager
def compile_only(target: str) -> Iterator[list[KernelReport]]:
    """Compile for `target` ("sm_90", "gfx942", ...) and launch nothing.

    Yields a list that gets one report per kernel launch, in launch order, launches of one kernel
    included. Errors of the compiler propagate to the launcher. Autotuned kernels do not work here:
    timing their configurations takes a device.
    """
    reports: list[KernelReport] = []
    with without_launches(target, lambda kernel: reports.append(_report(kernel, target))):
        yield reports


@contextmanager
def without_launches(target: str, launched: Callable[[Any], object]) -> Iterator[None]:
    """Compile for `target`, and call `launched` with each kernel in place of launching it.

    Everything else that a launch does on the host is done: arguments bound and specialised, the
    kernel looked up. As `compile_only`, which also reads what was compiled.
    """
    if reason := is_available():
        raise RuntimeError(f"cannot compile ahead of time: {reason}")
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    original_run, original_getitem = JITFunction.run, CompiledKernel.__getitem__

    @functools.wraps(original_run)
    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = original_run(self, *args, grid=grid, warmup=True, **kwargs)
        if hasattr(kernel, "result"):  # a compilation still under way in another thread
            kernel = kernel.result()
        if kernel is None:
            raise RuntimeError(f"a Triton hook vetoed the compilation of {self.__name__}")
        launched(kernel)
        return kernel

    def getitem(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args: launched(kernel)

    with active_target(target):
        JITFunction.run, CompiledKernel.__getitem__ = run, getitem
        try:
            yield
        finally:
            JITFunction.run, CompiledKernel.__getitem__ = original_run, original_getitem


@contextmanager
def active_target(target: str) -> Iterator[None]:
    """Have Triton believe in a GPU of this kind. Nothing can be launched on it."""
    from triton.runtime import driver

    # The `active` property would create the default driver, which fails where there is no GPU.
    previous_driver = driver._active
    if isinstance(previous_driver, _FakeDriver):
        raise RuntimeError("compile_only does not nest")
    driver.set_active(_FakeDriver(target))
    try:
        yield
    finally:
        driver.set_active(previous_driver)


def reports_in_subprocess(code: str, timeout: float = 300.0) -> list[KernelReport]:
    """Run Python `code` in a new process without the interpreter and return its `reports`.

    The code must leave a list of KernelReport in a variable `reports`. It sees this process's
    sys.path. Kernels have to come from a file that it imports, because Triton reads their source.
    `timeout` is in seconds; subprocess.TimeoutExpired past it.
    """
    epilogue = (
        "\nimport json as _json\n"
        f"print('\\n' + {_MARKER!r} + _json.dumps([_r.to_json() for _r in reports]))\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join([root, *(p for p in sys.path if p)])
    command = [sys.executable, "-c", textwrap.dedent(code) + epilogue]
    child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    lines = [line for line in child.stdout.splitlines() if line.startswith(_MARKER)]
    if child.returncode != 0 or not lines:
        output = f"{child.stdout[-4000:]}\n{child.stderr[-8000:]}"
        raise RuntimeError(f"the process ended with status {child.returncode}\n{output}")
    return [KernelReport.from_json(text) for text in json.loads(lines[-1].removeprefix(_MARKER))]


def format_table(reports: Iterable[KernelReport]) -> str:
    """The reports as text: sizes in bytes, "!" if too large, accesses in bits: loads/stores."""
    rows = ["kernel target warps stages regs spill stack shared accesses".split()]
    for r in reports:
        accesses = " ".join(
            f"{name}:{_bits(a.load_bits)}/{_bits(a.store_bits)}"
            + (f"/{_bits(a.atomic_bits)}" if a.atomic_bits else "")
            for name, a in r.accesses.items()
        )
        shared = f"{r.shared_bytes}{'!' if r.fits_shared is False else ''}"
        numbers = (r.num_warps, r.num_stages, r.registers, r.spill_bytes, r.stack_bytes)
        rows.append([r.name, r.target, *map(str, numbers), shared, accesses])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (map(str.ljust, row, widths) for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def _bits(widths: frozenset[int]) -> str:
    return ",".join(map(str, sorted(widths))) or "-"


class _FakeDriver:
    """The part of Triton's driver interface that compiling, as opposed to launching, asks for."""

    _devices: ClassVar[dict[str, int]] = {}

    def __init__(self, target: str) -> None:
        self.target = target
        # A JITFunction caches kernels, and the backend, per device index: one index per target
        # keeps targets apart, and a large one keeps them apart from the devices of the machine.
        self.device = self._devices.setdefault(target, 1_000_000 + len(self._devices))

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        if match := re.fullmatch(r"sm_(\d+)", self.target):
            return GPUTarget("cuda", int(match[1]), 32)
        if re.fullmatch(r"gfx\w+", self.target):
            return GPUTarget("hip", self.target, 64 if self.target.startswith("gfx9") else 32)
        raise ValueError(f"unknown target {self.target!r}: expected sm_NN or gfxNNN")

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def _report(kernel: Any, target: str) -> KernelReport:
    source, meta = kernel.src, kernel.metadata
    names = list(source.fn.arg_names)
    runtime = dict(_flatten(list(source.signature.items())))
    aligned = [p for p, a in sorted(source.attrs.items()) if ["tt.divisibility", 16] in a]
    common: dict[str, Any] = {
        "name": kernel.name,
        "target": target,
        "signature": runtime,
        "constants": {_path_name(names, p): _plain(v) for p, v in source.constants.items()},
        "divisible_by_16": tuple(_path_name(names, path) for path in aligned),
        "num_warps": meta.num_warps,
        "num_stages": meta.num_stages,
        "shared_bytes": meta.shared,
    }
    if "amdgcn" in kernel.asm:
        return KernelReport(**common, **_amd_resources(kernel.asm["amdgcn"]))
    ptx = kernel.asm["ptx"]
    if any(type_.startswith("tensordesc") for type_ in runtime.values()):
        raise NotImplementedError("tensor descriptors as kernel arguments are not supported")
    pointers = [name for name, type_ in runtime.items() if type_.startswith("*")]
    return KernelReport(
        **common,
        **_nvidia_resources(kernel.asm["cubin"]),
        uses_tma="cp.async.bulk" in ptx or "cp.reduce.async.bulk" in ptx,
        accesses=_accesses(ptx, list(runtime), pointers),
    )


def _flatten(items: list[tuple[str, Any]]) -> Iterator[tuple[str, str]]:
    """Run-time parameters in PTX order: tuples become one parameter per element."""
    for name, type_ in items:
        if isinstance(type_, tuple):
            yield from _flatten([(f"{name}.{i}", t) for i, t in enumerate(type_)])
        elif type_ != "constexpr":
            yield name, type_


def _path_name(names: list[str], path: tuple[int, ...]) -> str:
    return ".".join([names[path[0]], *map(str, path[1:])])


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)  # tl.constexpr
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


@functools.cache
def _nvidia_resources(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    def run(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
        numbers = dict(re.findall(r"\b(REG|STACK|SHARED):(\d+)", usage))
        # Spills live in the stack frame: without one, skip the disassembly, which is slow.
        sass = run(knobs.nvidia.nvdisasm.path, "-c", str(path)) if numbers["STACK"] != "0" else ""
    # Summed over the instructions, as the compiler's own spill figures are.
    moved = {"STL": 0, "LDL": 0}
    widths = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
    for op, suffixes in re.findall(r"\s(STL|LDL)((?:\.\w+)*)\s", sass):
        moved[op] += next((widths[s] for s in suffixes.split(".") if s in widths), 4)
    return {
        "registers": int(numbers["REG"]),
        "stack_bytes": int(numbers["STACK"]),
        "static_shared_bytes": int(numbers["SHARED"]),
        "local_store_bytes": moved["STL"],
        "local_load_bytes": moved["LDL"],
        "spill_bytes": moved["STL"] + moved["LDL"],
    }


def _amd_resources(amdgcn: str) -> dict[str, int]:
    found = dict(re.findall(r"^\s*\.(\w+):\s*(\d+)\s*$", amdgcn, re.MULTILINE))
    registers, stack = int(found["vgpr_count"]), int(found["private_segment_fixed_size"])
    spill = 4 * int(found["vgpr_spill_count"])
    return {"registers": registers, "stack_bytes": stack, "spill_bytes": spill}


_ENTRY = re.compile(r"\.entry\s+\w+\s*\((.*?)\)", re.DOTALL)
_BODY_END = re.compile(r"^\s*(?:\.section\b|(?:\.\w+\s+)*\.(?:func|entry)\b)", re.MULTILINE)
_STATEMENT = re.compile(r"^[\s{}]*(?:@!?[%\w$]+\s+)?([a-z][\w.:]*)\s+(.*)$", re.DOTALL)
_WORD = re.compile(r"[%A-Za-z_$][\w$]*")


def _accesses(ptx: str, parameters: list[str], pointers: list[str]) -> dict[str, Access]:
    """Widths of the global accesses in `ptx`, by the name of the pointer the address stems from.

    Every register is followed from the parameters through arithmetic, without regard to control
    flow. An address made from two pointers counts for both.
    """
    if not (entry := _ENTRY.search(ptx)):
        raise ValueError("the PTX has no entry point")
    declared = [_WORD.findall(re.sub(r"\[.*", "", p))[-1] for p in entry[1].split(",") if p.strip()]
    if len(declared) < len(parameters):
        raise ValueError(f"the PTX has parameters {declared}, the signature {parameters}")
    # Beyond the signature's, Triton appends pointers to its own scratch memory.
    labels = [*parameters, *(f"<scratch{i}>" for i in range(len(declared) - len(parameters)))]
    traced = [*pointers, *labels[len(parameters) :]]

    end = _BODY_END.search(ptx, entry.end())
    stop = end.start() if end else len(ptx)
    flows: defaultdict[str, set[str]] = defaultdict(set)
    uses: list[tuple[str, str, int]] = []
    for parts, operands in _statements(ptx[entry.end() : stop]):
        if (use := _global_use(parts, operands)) is not None:
            uses.append(use)
        elif "param" in parts or parts[0] not in _NO_FLOW:
            target, _, rest = operands.partition("}" if operands.startswith("{") else ",")
            for register in _WORD.findall(rest):
                flows[register].update(_WORD.findall(target))

    # Functions that were not inlined: their registers are not the entry's, nor followed into.
    for parts, operands in _statements(ptx[: entry.start()] + ptx[stop:]):
        if (use := _global_use(parts, operands)) is not None:
            uses.append((use[0], "", use[2]))

    origins: defaultdict[str, set[str]] = defaultdict(set)
    for register, label in zip(declared, labels, strict=True):
        pending = [register] if label in traced else []
        while pending:
            current = pending.pop()
            if label not in origins[current]:
                origins[current].add(label)
                pending.extend(flows[current])

    found: defaultdict[str, defaultdict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for kind, address, bits in uses:
        names = set().union(*(origins[word] for word in _WORD.findall(address)))
        for name in names or {UNKNOWN}:
            found[name][kind].add(bits)
    accesses = {name: Access() for name in pointers}
    for name, kinds in found.items():
        accesses[name] = Access(**{kind: frozenset(bits) for kind, bits in kinds.items()})
    return accesses


# Their results are data or conditions, never addresses.
_NO_FLOW = {"ld", "ldu", "st", "atom", "red", "set", "setp", "testp", "bra", "call", "prefetch"}


def _statements(body: str) -> Iterator[tuple[list[str], str]]:
    """Pairs of a dotted operation, split at the dots, and its operands' text."""
    lines = (re.sub(r"//.*|^\s*[$\w]+:(?!:)", "", line).strip() for line in body.splitlines())
    # Directives such as .loc end with their line, all else with a semicolon.
    code = "\n".join(line for line in lines if line[:1] != "." or ";" in line)
    for statement in code.split(";"):
        if match := _STATEMENT.match(statement):
            yield match[1].split("."), match[2].strip()


def _global_use(parts: list[str], operands: str) -> tuple[str, str, int] | None:
    """(kind, address, bits) of a global memory access, None for any other operation."""
    brackets = re.findall(r"\[([^\]]*)\]", operands)
    if parts[:2] == ["cp", "async"] and "global" in parts and len(brackets) >= 2:
        size = int(re.findall(r"\]\s*,\s*(\w+)", operands)[-1], 0)
        return "load_bits", brackets[1], 8 * size
    kind = {"ld": "load_bits", "ldu": "load_bits", "st": "store_bits"}.get(parts[0], "atomic_bits")
    # No state space means a generic address, which here is a global one.
    elsewhere = {"shared", "shared::cta", "shared::cluster", "local", "param", "const", "bulk"}
    if parts[0] not in {"ld", "ldu", "st", "atom", "red"} or elsewhere.intersection(parts):
        return None
    kinds = [re.fullmatch(r"(?:[busf]|bf)(\d+)(?:x(\d))?", part) for part in parts]
    element = next((int(m[1]) * int(m[2] or 1) for m in reversed(kinds) if m), None)
    if element is None or not brackets:
        raise ValueError(f"cannot read the PTX statement {'.'.join(parts)} {operands}")
    lanes = next((int(p[1:]) for p in parts if re.fullmatch(r"v\d", p)), 1)
    return kind, brackets[0], lanes * element
