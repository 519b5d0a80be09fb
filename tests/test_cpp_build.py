"""How the C++ backend's library comes to be: at install, on first use, or not at all.

The real sources take long to compile; here a stand-in that registers a version and nothing else is
built in a copy of the package, each time in a process of its own.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest

from bam_kernels import build_cpp

ROOT = Path(__file__).resolve().parent.parent
TOOLS = build_cpp.find_toolchain()

pytestmark = [
    pytest.mark.skipif(isinstance(TOOLS, list), reason=f"nothing to compile with: {TOOLS}"),
    pytest.mark.skipif(
        os.environ.get("BAM_KERNELS_TEST_SANITIZE") == "1", reason="builds without sanitizers"
    ),
]

STAND_IN = """
#if __has_include(<Python.h>)
#include <Python.h>
#endif
#include <torch/csrc/stable/library.h>
#include "version.h"
static int64_t abi_version() { return VERSION; }
STABLE_TORCH_LIBRARY(bam_kernels_cpp, m) { m.def("abi_version() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(bam_kernels_cpp, CompositeExplicitAutograd, m) {
  m.impl("abi_version", TORCH_BOX(&abi_version));
}
#if __has_include(<Python.h>)
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", 0, -1, 0, 0, 0, 0, 0};
  return PyModule_Create(&module);
}
#endif
"""

FIRST_USE = """
    import logging, sys, time
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    import torch, bam_kernels
    from bam_kernels.backends import cpp_library
    assert not torch.ops.loaded_libraries  # an import builds nothing
    cpp_library.load()
    cpp_library.load()
    print(*torch.ops.loaded_libraries)
"""

FALLBACK = """
    import logging, torch, bam_kernels
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    module, x = bam_kernels.BAM(32), torch.randn(2, 32, 5, 7)
    module(x), module(x)
    try:
        with bam_kernels.use_backend("cpp"):
            module(x)
    except Exception as error:
        print(type(error).__name__, error)
    print(bam_kernels.explain(module, x))
"""

DAMAGED = """
    import torch, bam_kernels
    module, x = bam_kernels.BAM(32), torch.randn(2, 32, 5, 7)
    for name in ("auto", "cpp", "reference"):
        try:
            with bam_kernels.use_backend(name):
                module(x), print(name, "ran")
        except Exception as error:
            print(name, type(error).__name__, error)
"""


def write_sources(csrc: Path, version: int = 1) -> Path:
    (csrc / "cpu").mkdir(parents=True)
    (csrc / "testing").mkdir()
    (csrc / "registration.cpp").write_text(STAND_IN)
    (csrc / "version.h").write_text(f"#define VERSION {version}\n")
    (csrc / "testing" / "bindings.cpp").write_text("#error not for the library\n")
    # Compiled for its CPU, or not at all.
    guard = "#ifndef __AVX2__\n#error\n#endif\n" if platform.machine() == "x86_64" else ""
    (csrc / "cpu" / "empty_avx2.cpp").write_text(f"{guard}namespace {{}}\n")
    return csrc


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the stand-in's sources, in a folder whose name has a blank."""
    folder = tmp_path_factory.mktemp("a checkout")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "csrc")
    shutil.copytree(ROOT / "bam_kernels", folder / "bam_kernels", ignore=ignored)
    write_sources(folder / "csrc")
    return folder


@pytest.fixture
def copy(tree: Path, tmp_path: Path) -> Path:
    """A checkout to spoil."""
    return Path(shutil.copytree(tree, tmp_path / "checkout"))


def environment(**given: str | Path) -> dict[str, str]:
    """This process's without what would change the choice of a backend, or a build."""
    dropped = ("BAM_KERNELS", "TRITON_I", "CXX", "PYTHONPATH", "XDG_CACHE")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return clean | {name: str(value) for name, value in given.items()}


def start(code: str, package: Path, cache: Path, **given: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment(PYTHONPATH=package, BAM_KERNELS_CACHE=cache, **given),
        cwd=package,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(code: str, package: Path, cache: Path, **given: str | Path) -> tuple[str, str]:
    """What a process prints on stdout and stderr; it must succeed."""
    process = start(code, package, cache, **given)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    return out, err


def libraries(cache: Path) -> list[Path]:
    """A cache's libraries; nothing else may be left in it but locks."""
    assert {path.suffix for path in cache.iterdir()} <= {".so", ".lock"}
    return list(cache.glob("*.so"))


# --- on first use -----------------------------------------------------------------------------


def test_first_use_compiles_once_and_says_so_in_a_line(tree, tmp_path):
    cache = tmp_path / "cache"
    out, err = run(FIRST_USE, tree, cache)
    (library,) = libraries(cache)
    assert out.strip() == str(library)
    assert re.fullmatch(rf"compiled the C\+\+ backend in \d+\.\d s: {library}\n", err)
    out, err = run(FIRST_USE, tree, cache)
    assert (out.strip(), err) == (str(library), "")

    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    out, err = run(FIRST_USE, tree, cache)
    assert "compiled the C++ backend" in err and [Path(out.strip())] == libraries(cache)
    assert len(Path(out.strip()).read_bytes()) == len(whole)


def test_two_processes_at_once_compile_once(tree, tmp_path):
    cache = tmp_path / "cache"
    processes = [start(FIRST_USE, tree, cache) for _ in range(2)]
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert sum(err.count("compiled the C++ backend") for _, err in told) == 1
    assert {out.strip() for out, _ in told} == {str(path) for path in libraries(cache)}


def test_a_build_that_was_killed_is_made_again(tree, tmp_path):
    """By a compiler that hangs in the place of the one that answers to --version."""
    cache, compiler = tmp_path / "cache", tmp_path / "hangs"
    real = TOOLS.compiler[0]
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec {real} --version\necho > {tmp_path}/began\n'
        "sleep 600\n"
    )
    compiler.chmod(0o755)
    process = start(FIRST_USE, tree, cache, CXX=compiler)
    until = time.monotonic() + 60
    while not (tmp_path / "began").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert list(cache.glob("*.build")), "it is not building"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(cache.glob("*.build"))
    _, err = run(FIRST_USE, tree, cache, CXX=real)
    assert "compiled the C++ backend" in err and len(libraries(cache)) == 1


def test_a_cache_that_cannot_be_written_gives_way_to_a_temporary_folder(tree, tmp_path):
    (tmp_path / "file").touch()
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    out, err = run(FIRST_USE, tree, tmp_path / "file" / "cache", TMPDIR=temporary)
    library = Path(out.strip())
    assert library.parent == temporary / f"bam_kernels-{os.getuid()}"
    assert library.parent.stat().st_mode & 0o777 == 0o700
    assert "compiled the C++ backend" in err and libraries(library.parent) == [library]


def test_without_a_compiler_plain_pytorch_runs_and_says_so_once(tree, tmp_path):
    nothing = tmp_path / "bin"
    nothing.mkdir()
    out, err = run(FALLBACK, tree, tmp_path / "cache", PATH=nothing)
    assert err.count("running plain PyTorch on cpu") == 1 and "there is no C++ compiler" in err
    assert "BackendUnavailableError backend 'cpp' cannot run: the library was not built" in out
    assert "install g++" in out and "runs on 'reference'" in out
    assert not (tmp_path / "cache").exists()


def test_a_build_that_fails_is_told_in_the_compilers_words(copy, tmp_path):
    (copy / "csrc" / "version.h").write_text("#error a stand-in for a mistake\n")
    out, err = run(FALLBACK, copy, tmp_path / "cache")
    assert err.count("running plain PyTorch on cpu") == 1
    assert "compiling failed" in err and "a stand-in for a mistake" in err
    assert "a stand-in for a mistake" in out and "runs on 'reference'" in out
    assert not libraries(tmp_path / "cache")


def test_none_keeps_it_from_being_compiled(tree, tmp_path):
    out, err = run(FALLBACK, tree, tmp_path / "cache", BAM_KERNELS_BUILD="none")
    assert "BAM_KERNELS_BUILD=none" in err and "runs on 'reference'" in out
    process = start(FIRST_USE, tree, tmp_path / "cache", BAM_KERNELS_BUILD="noen")
    error = process.communicate(timeout=120)[1]
    assert "ValueError: BAM_KERNELS_BUILD: expected one of auto, cpu, cuda, none" in error


# --- the cache's key --------------------------------------------------------------------------


def test_a_key_is_of_all_that_the_library_is_made_of(tmp_path, monkeypatch):
    compiler = TOOLS.compiler
    csrc = write_sources(tmp_path / "one" / "csrc")
    keys = [build_cpp.cache_key(csrc, compiler)]
    elsewhere = write_sources(tmp_path / "another" / "csrc")
    assert build_cpp.cache_key(elsewhere, compiler) == keys[0]
    (elsewhere / "testing" / "bindings.cpp").write_text("// not of the library\n")
    assert build_cpp.cache_key(elsewhere, compiler) == keys[0]

    (csrc / "version.h").write_text("#define VERSION 2\n")
    keys.append(build_cpp.cache_key(csrc, compiler))
    (csrc / "cpu" / "empty_avx2.cpp").rename(csrc / "cpu" / "empty.cpp")
    keys.append(build_cpp.cache_key(csrc, compiler))
    (csrc / "cpu" / "more.h").touch()
    keys.append(build_cpp.cache_key(csrc, compiler))
    keys.append(build_cpp.cache_key(csrc, (*compiler, "-O1")))
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "abacus")
        keys.append(build_cpp.cache_key(csrc, compiler))
    with monkeypatch.context() as patch:
        patch.setattr(build_cpp, "compiler_version", lambda compiler: "g++ 99")
        keys.append(build_cpp.cache_key(csrc, compiler))
    with monkeypatch.context() as patch:
        patch.setattr(build_cpp, "_FLAGS", ("-std=c++20",))
        keys.append(build_cpp.cache_key(csrc, compiler))
    assert len(set(keys)) == len(keys)


def test_instruction_sets_are_files(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert build_cpp.instruction_set(Path("gate_avx2.cpp")) == ("-mavx2", "-mfma", "-mf16c")
    assert "-mavx512vl" in build_cpp.instruction_set(Path("gate_avx512.cpp"))
    assert build_cpp.instruction_set(Path("gate.cpp")) == ()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert build_cpp.instruction_set(Path("gate_avx2.cpp")) == ()


# --- at install -------------------------------------------------------------------------------


def setup(tree: Path, *arguments: str, **given: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(**given),
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("mode", "path", "messages"),
    [
        ("cuda", None, ["BAM_KERNELS_BUILD=cuda", "no CUDA sources"]),
        ("gpu", None, ["expected one of auto, cpu, cuda, none, got 'gpu'"]),
        ("cpu", "", ["BAM_KERNELS_BUILD=cpu", "no C++ compiler", "--no-build-isolation"]),
    ],
)
def test_what_cannot_be_built_is_said(mode, path, messages, tree):
    given = {"BAM_KERNELS_BUILD": mode} | ({} if path is None else {"PATH": path})
    done = setup(tree, "setup.py", "--version", **given)
    assert done.returncode == 1
    for message in messages:
        assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def setuptools() -> Path:
    module = pytest.importorskip("setuptools", minversion="77", reason="setuptools >= 77")
    return Path(module.__file__).parent


def wheel(folder: Path) -> tuple[str, zipfile.ZipFile]:
    (path,) = folder.glob("*.whl")
    return path.name, zipfile.ZipFile(path)


def test_an_isolated_build_is_pure_and_compiles_when_used(copy, setuptools, tmp_path):
    """Where setuptools is all there is, as in pip's build isolation: no torch."""
    alone, wheels, site = tmp_path / "alone", tmp_path / "wheels", tmp_path / "site"
    alone.mkdir()
    for pattern in ("setuptools", "setuptools-*", "_distutils_hack"):
        for path in setuptools.parent.glob(pattern):
            (alone / path.name).symlink_to(path)
    # Left of a build by hand: not of this wheel.
    (copy / "bam_kernels" / build_cpp.LIBRARY_NAME).write_text("not a library")
    code = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    done = setup(copy, "-S", "-c", code, str(wheels), PYTHONPATH=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    name, contents = wheel(wheels)
    assert name.endswith("-py3-none-any.whl")
    files = contents.namelist()
    assert not [file for file in files if file.endswith(".so") or "/testing/bindings" in file]
    for file in ("registration.cpp", "version.h", "cpu/empty_avx2.cpp"):
        assert f"bam_kernels/csrc/{file}" in files
    assert "bam_kernels/build_cpp.py" in files

    contents.extractall(site)
    out, err = run(FIRST_USE, site, tmp_path / "cache")
    assert "compiled the C++ backend" in err and [Path(out.strip())] == libraries(
        tmp_path / "cache"
    )


@pytest.fixture(scope="module")
def installed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip installs where it finds torch and a compiler."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools >= 77")
    folder = tmp_path_factory.mktemp("wheels")
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    done = setup(tree, *command, PIP_DISABLE_PIP_VERSION_CHECK="1")
    assert done.returncode == 0, done.stdout + done.stderr
    name, contents = wheel(folder)
    assert re.search(r"-cp310-abi3-linux_\w+\.whl$", name)
    files = contents.namelist()
    assert [file for file in files if file.endswith(".so")] == ["bam_kernels/_C.abi3.so"]
    assert "bam_kernels/csrc/registration.cpp" in files
    contents.extractall(folder / "site")
    return folder / "site"


def test_an_installed_library_is_loaded_without_a_compiler(installed, tmp_path):
    out, err = run(FIRST_USE, installed, tmp_path / "cache", PATH="", BAM_KERNELS_BUILD="none")
    assert out.strip() == str(installed / "bam_kernels" / "_C.abi3.so") and not err
    assert not (tmp_path / "cache").exists()
    if build_cpp._python_include():
        run("import torch, bam_kernels._C", installed, tmp_path / "cache")


@pytest.mark.parametrize("damage", ["cut off", "text", "another version"])
def test_a_damaged_installation_raises_and_says_what_to_do(damage, installed, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    library = site / "bam_kernels" / build_cpp.LIBRARY_NAME
    if damage == "cut off":
        library.write_bytes(library.read_bytes()[:-1000])
    elif damage == "text":
        library.write_text("version https://git-lfs.github.com/spec/v1\n" * 5)
    else:
        build_cpp.build(library, csrc=write_sources(tmp_path / "csrc", version=99))
    out, _ = run(DAMAGED, site, tmp_path / "cache")
    told = dict(line.split(" ", 1) for line in out.splitlines())
    assert told["reference"] == "ran"
    for name in ("auto", "cpp"):
        assert told[name].startswith(f"ImportError {library} ")
        expected = "is of version 99, where this bam_kernels needs 1"
        assert (expected if damage == "another version" else "cannot be loaded: it is") in told[
            name
        ]
        assert "delete it and install bam_kernels again" in told[name]
        assert "set BAM_KERNELS_BACKEND=reference" in told[name]


def test_a_checkouts_library_older_than_its_sources_is_passed_over(copy, tmp_path):
    library = copy / "bam_kernels" / build_cpp.LIBRARY_NAME
    build_cpp.build(library, csrc=copy / "csrc")
    assert run(FIRST_USE, copy, tmp_path / "cache")[0].strip() == str(library)
    os.utime(library, (0, 0))
    out, err = run(FIRST_USE, copy, tmp_path / "cache")
    assert "is older than its sources and passed over" in err and "compiled the C++" in err
    assert [Path(out.strip())] == libraries(tmp_path / "cache")


def test_by_hand_only_what_changed_is_compiled(copy):
    work, library = copy / "build" / "cpp", copy / "bam_kernels" / build_cpp.LIBRARY_NAME
    command = (str(copy / "bam_kernels" / "build_cpp.py"),)
    assert setup(copy, *command).stdout.strip() == str(library)
    before = {path.name: path.stat().st_mtime_ns for path in work.glob("*.o")}
    assert set(before) == {"registration.cpp.o", "cpu-empty_avx2.cpp.o"}
    (copy / "csrc" / "version.h").write_text("#define VERSION 3\n")
    assert setup(copy, *command).returncode == 0
    after = {path.name: path.stat().st_mtime_ns for path in work.glob("*.o")}
    assert [name for name in before if before[name] != after[name]] == ["registration.cpp.o"]
    (copy / "csrc" / "version.h").write_text("#error a mistake\n")
    done = setup(copy, *command)
    assert done.returncode == 1 and "a mistake" in done.stderr and "Traceback" not in done.stderr
    assert library.is_file()
