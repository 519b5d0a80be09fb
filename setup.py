"""Builds bam_kernels; the metadata stands in pyproject.toml.

``pip install .`` needs no torch, no compiler and no GPU: Triton compiles its kernels at their first
use, and so is the C++ backend compiled where a compiler is found then. What is compiled already at
install is said by ``BAM_KERNELS_BUILD``:

    auto    the C++ backend, where a compiler and torch are found; torch is found with
            ``pip install --no-build-isolation .`` only, and never downloaded for this
    cpu     the C++ backend, or an error
    cuda    CUDA's kernels too, of which there are none yet: an error
    none    nothing
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load(name: str) -> ModuleType:
    """A file of the package by its path: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "bam_kernels" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


env, build_cpp = load("env"), load("build_cpp")


class BuildSources(build_py):
    """Ships csrc/, without what is for tests, for a backend that is compiled on first use."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "bam_kernels", "csrc")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target, ignore=shutil.ignore_patterns("testing"))


class BuildLibrary(build_ext):
    """Compiles with ninja, and as the backend itself does on first use."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        try:
            build_cpp.build(output, csrc=ROOT / "csrc", work=Path(self.build_temp, "cpp"))
        except build_cpp.BuildError as error:
            raise SystemExit(
                f"bam_kernels: the C++ backend was not built: {error}\n"
                "BAM_KERNELS_BUILD=none installs without it."
            ) from error


def missing() -> list[str]:
    """What a build of the C++ backend lacks here."""
    found = build_cpp.find_toolchain()
    lacking = found if isinstance(found, list) else []
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        lacking.append("free-threaded Pythons have no limited API; there it is built on first use")
    return lacking


def wants_library() -> bool:
    try:
        mode = env.build()
    except ValueError as error:
        raise SystemExit(f"bam_kernels: {error}") from error
    if mode == "cuda":
        raise SystemExit(
            "bam_kernels: BAM_KERNELS_BUILD=cuda: this version has no CUDA sources; its GPU "
            "kernels are Triton's. Take auto, cpu or none."
        )
    if mode == "none":
        return False
    lacking = missing()
    if mode == "cpu" and lacking:
        raise SystemExit(
            "bam_kernels: BAM_KERNELS_BUILD=cpu: the C++ backend cannot be built:\n"
            + "".join(f"  - {what}\n" for what in lacking)
            + "torch is not seen in an isolated build: pip install --no-build-isolation, in an "
            "environment with torch, ninja and setuptools."
        )
    return not lacking


options = {}
if wants_library():
    options["ext_modules"] = [
        Extension(
            "bam_kernels._C",
            [str(path.relative_to(ROOT)) for path in build_cpp.source_files(ROOT / "csrc")],
            py_limited_api=True,
        )
    ]
    options["options"] = {"bdist_wheel": {"py_limited_api": "cp310"}}

setup(cmdclass={"build_py": BuildSources, "build_ext": BuildLibrary}, **options)
