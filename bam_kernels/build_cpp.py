"""Compiles csrc/ into the library of the C++ backend: one binary for every supported torch.

    python -m bam_kernels.build_cpp        # in a checkout: bam_kernels/_C.abi3.so, incrementally

The sources keep to LibTorch's stable ABI and to Python's limited API, so that a library compiled
against one torch loads under any from 2.11 on. This file imports neither torch nor bam_kernels:
setup.py loads it by its path, and `backends.cpp_library` compiles with it on first use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
LIBRARY_NAME = "_C.abi3.so"
TESTING_NAME = "bam_kernels_cpp_testing"

# The oldest torch that the library runs under, as torch/csrc/stable/version.h writes it: 2.11.
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
_PYTHON_TARGET = "-DPy_LIMITED_API=0x030a0000"  # likewise: 3.10
# Optimised and IEEE: nothing of -ffast-math, whose sums and infinities differ by compiler.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# A file's instruction set is in its name; what is common to all must run on every CPU.
_X86_FLAGS = {
    "_avx2": ("-mavx2", "-mfma", "-mf16c"),
    "_avx512": (
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c",
        "-mprefer-vector-width=512",
    ),
}  # fmt: skip
# Less optimised than what is shipped: compiled with sanitizers, that takes minutes a file.
_SANITIZE = (
    "-fsanitize=address,undefined", "-fno-sanitize-recover", "-fno-omit-frame-pointer", "-O1", "-g",
)  # fmt: skip
_ERROR_LINES = 6  # of a compiler's output, in a message


class BuildError(Exception):
    """The library was not built; the message says why, with the compiler's first lines."""


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """What a build needs: the compiler's command, ninja, and torch's package folder."""

    compiler: tuple[str, ...]
    ninja: str
    torch: Path


# --- what is there ----------------------------------------------------------------------------


def source_folder() -> Path | None:
    """csrc/ of an installed package, or of the checkout that the package stands in."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "registration.cpp").is_file():
            return folder
    return None


def source_files(csrc: Path) -> list[Path]:
    """What is compiled into the library."""
    return sorted(csrc.glob("*.cpp")) + sorted((csrc / "cpu").glob("*.cpp"))


def tracked_files(csrc: Path) -> list[Path]:
    """What the library depends on: its sources and their headers."""
    headers = [*csrc.glob("*.h"), *(csrc / "cpu").glob("*.h")]
    return source_files(csrc) + sorted(headers)


def find_toolchain() -> Toolchain | list[str]:
    """The tools of a build; where some are missing, what those are and how to get them."""
    if not sys.platform.startswith("linux"):
        return [f"the C++ backend is built on Linux only, not on {sys.platform}"]
    compiler, ninja, torch = _compiler(), _ninja(), _torch()
    missing = []
    if compiler is None:
        named = os.environ.get("CXX")
        what = f"CXX={named} does not run" if named else "there is no C++ compiler"
        missing.append(f"{what}; install g++ (10 or newer) or clang++, or set CXX")
    if torch is None:
        missing.append("there are no headers of torch 2.11 or newer; pip install 'torch>=2.11'")
    if ninja is None:
        missing.append("there is no ninja; pip install ninja")
    return missing or Toolchain(compiler, ninja, torch)


def _compiler() -> tuple[str, ...] | None:
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["c++"], ["clang++"]]:
        found = shutil.which(command[0])
        if found is not None:
            return (found, *command[1:])
    return None


def _ninja() -> str | None:
    """The PyPI package's, which need not be on PATH, else any."""
    spec = importlib.util.find_spec("ninja")
    folders = [sysconfig.get_path("scripts")]
    if spec is not None and spec.origin is not None:
        folders.append(str(Path(spec.origin).parent / "data" / "bin"))
    for folder in folders:
        found = shutil.which("ninja", path=folder)
        if found is not None:
            return found
    return shutil.which("ninja")


def _torch() -> Path | None:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    torch = Path(spec.origin).parent
    version = torch / "include" / "torch" / "csrc" / "stable" / "version.h"
    if not version.is_file() or not (torch / "lib" / "libtorch_cpu.so").is_file():
        return None
    return torch if "TORCH_VERSION_2_11_0" in version.read_text("utf-8") else None


def _python_include() -> list[str]:
    """Python's headers, where installed: with them the library can be imported as a module too.

    Free-threaded Pythons have no limited API.
    """
    folder = sysconfig.get_path("include")
    if sysconfig.get_config_var("Py_GIL_DISABLED") or not Path(folder, "Python.h").is_file():
        return []
    return ["-isystem", folder]


# --- flags ------------------------------------------------------------------------------------


def instruction_set(source: Path) -> tuple[str, ...]:
    """The flags that a file's name asks for, on x86-64; other CPUs have none."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    return next((f for end, f in _X86_FLAGS.items() if source.stem.endswith(end)), ())


@functools.lru_cache
def compiler_version(compiler: tuple[str, ...]) -> str:
    """What the compiler says of itself.

    Raises:
        BuildError: it does not run.
    """
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(compiler)} does not run: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(compiler)} does not run: {_first_lines(done.stderr)}")
    return done.stdout


def cache_key(csrc: Path, compiler: tuple[str, ...]) -> str:
    """A hash of all that the library is made of: sources, flags, compiler, CPU architecture.

    Not torch's version or place: the library is the same for all.
    """
    digest = hashlib.sha256()
    words = [platform.machine(), _TORCH_TARGET, _PYTHON_TARGET, *_FLAGS, shlex.join(compiler[1:])]
    words.append(compiler_version(compiler))
    for path in tracked_files(csrc):
        words += [str(path.relative_to(csrc)), *instruction_set(path), path.read_text("utf-8")]
    for word in words:
        data = word.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:20]


# --- the build --------------------------------------------------------------------------------


def build(
    output: Path,
    *,
    csrc: Path | None = None,
    work: Path | None = None,
    sanitize: bool = False,
) -> None:
    """Compile the library and put it at `output`, whole or not at all.

    Args:
        output: the file to write.
        csrc: the sources; `source_folder()` by default.
        work: where objects are kept for the next build; a temporary folder by default.
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer, for the tests.

    Raises:
        BuildError: a tool is missing, or a source does not compile.
    """
    csrc = _sources(csrc)
    _build(output, csrc, source_files(csrc), work, sanitize)


def build_testing(output: Path, *, work: Path | None = None, sanitize: bool = False) -> None:
    """Compile the tests' module, csrc/testing with the kernels and what they run in; as `build`.

    pybind11 and Python's whole API are for this module only, which is never shipped.
    """
    csrc = _sources(None)
    pybind11 = importlib.util.find_spec("pybind11")
    if pybind11 is None or pybind11.origin is None:
        raise BuildError("pybind11 is not installed; pip install pybind11")
    if not _python_include():
        raise BuildError("Python's headers are not installed (python3-dev)")
    bindings = (csrc / "testing").glob("bindings*.cpp")
    own_sources = sorted((csrc / "testing").glob("*.cpp"))
    sources = [*own_sources, csrc / "launch.cpp", *sorted((csrc / "cpu").glob("*.cpp"))]
    own = ("-isystem", str(Path(pybind11.origin).parent / "include"))
    _build(output, csrc, sources, work, sanitize, {each.resolve(): own for each in bindings})


def _sources(csrc: Path | None) -> Path:
    csrc = csrc or source_folder()
    if csrc is None:
        raise BuildError("the C++ sources (csrc) are not there: this is an incomplete installation")
    return csrc


def _build(
    output: Path,
    csrc: Path,
    sources: Sequence[Path],
    work: Path | None,
    sanitize: bool,
    own_flags: dict[Path, tuple[str, ...]] | None = None,
) -> None:
    """`own_flags`: by source that keeps to no limited API, what it is compiled with instead."""
    tools = find_toolchain()
    if isinstance(tools, list):
        raise BuildError("; ".join(tools))
    compiler_version(tools.compiler)
    with contextlib.ExitStack() as stack:
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bam_kernels-")))
        work = work.resolve()
        work.mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock(work / "lock"))
        target = work / output.name
        text = _ninja_file(tools, csrc.resolve(), sources, target, sanitize, own_flags or {})
        script = work / f"{output.name}.ninja"
        if not script.is_file() or script.read_text("utf-8") != text:
            script.write_text(text, "utf-8")
        jobs = len(os.sched_getaffinity(0))
        done = subprocess.run(
            [tools.ninja, "-C", str(work), "-f", script.name, f"-j{jobs}"],
            env=os.environ | {"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if done.returncode != 0:
            raise BuildError(f"compiling failed: {_first_lines(done.stdout)}")
        install(target, output)


def install(built: Path, output: Path) -> None:
    """Copy into place at once: a reader finds the old file or the new one, never a part."""
    output.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{output.name}-", dir=output.parent)
    os.close(handle)
    try:
        shutil.copyfile(built, temporary)
        os.chmod(temporary, 0o755)
        os.replace(temporary, output)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Hold a file's lock, which ends with the process; yields False where there are no locks."""
    import fcntl

    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems
            yield False
            return
        yield True


def _ninja_file(
    tools: Toolchain,
    csrc: Path,
    sources: Sequence[Path],
    target: Path,
    sanitize: bool,
    own_flags: dict[Path, tuple[str, ...]],
) -> str:
    extra = list(_SANITIZE) if sanitize else []
    common = [*_FLAGS, *extra, _TORCH_TARGET, f"-I{csrc}", f"-fmacro-prefix-map={csrc}=csrc"]
    common += ["-isystem", str(tools.torch / "include"), *_python_include()]
    # Named, so that the loader looks for the stable ABI in the libtorch_cpu that is loaded already;
    # without a run path, which would tie the library to this torch.
    link = [*extra, "-shared", "-Wl,--as-needed", f"-L{tools.torch / 'lib'}", "-ltorch_cpu"]
    lines = [
        "ninja_required_version = 1.3",
        f"cxx = {_words(tools.compiler)}",
        f"flags = {_words(common)}",
        f"link = {_words(link)}",
        "rule compile",
        "  command = $cxx $own $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $in",
        "rule link",
        "  command = $cxx $in $link -o $out",
        "  description = $out",
    ]
    objects = []
    for source in sources:
        source = source.resolve()
        obj = str(source.relative_to(csrc)).replace("/", "-") + ".o"
        own = (*own_flags.get(source, (_PYTHON_TARGET,)), *instruction_set(source))
        lines += [f"build {obj}: compile {_path(source)}", f"  own = {_words(own)}"]
        objects.append(obj)
    lines += [f"build {_path(target.name)}: link {' '.join(objects)}"]
    return "\n".join(lines) + "\n"


def _words(words: Sequence[str]) -> str:
    """A command line for ninja: quoted for the shell, with ninja's own escapes."""
    return shlex.join(words).replace("$", "$$")


def _path(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _first_lines(text: str) -> str:
    """Where the compiler's complaints start, without ninja's echo of the commands."""
    lines = [line for line in text.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if "error" in line.lower()), 0)
    return "\n".join(lines[first : first + _ERROR_LINES]) or "no output"


def work_folder(sanitize: bool = False) -> Path:
    """Where a checkout's objects are kept."""
    return PACKAGE.parent / "build" / ("cpp-sanitized" if sanitize else "cpp")


# --- by hand ----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m bam_kernels.build_cpp``: 0 where the library was built, 1 where not."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m bam_kernels.build_cpp",
        description="Compile the C++ backend's library; again, only what has changed.",
    )
    add = parser.add_argument
    add("--output", type=Path, metavar="FILE", default=PACKAGE / LIBRARY_NAME)
    add("--work", type=Path, metavar="DIR", help="for the objects (default: build/cpp)")
    add("--sanitize", action="store_true", help="with the address and undefined sanitizers")
    add("--testing", action="store_true", help="the tests' pybind11 module in its place")
    args = parser.parse_args(argv)
    make = build_testing if args.testing else build
    try:
        make(args.output, work=args.work or work_folder(args.sanitize), sanitize=args.sanitize)
    except BuildError as error:
        print(f"bam_kernels: error: {error}", file=sys.stderr)
        return 1
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
