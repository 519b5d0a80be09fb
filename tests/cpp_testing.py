"""The module of csrc/testing, built when a test asks for it: the C++ kernels' insides in Python."""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import pytest

from bam_kernels import build_cpp

SANITIZED = os.environ.get("BAM_KERNELS_TEST_SANITIZE") == "1"
"""Whether this is the run of ``make sanitize``, whose modules must all be built with sanitizers."""


@functools.cache
def load() -> ModuleType:
    """Compile the module, where its sources have changed, and import it.

    Raises:
        BuildError: it does not compile.
    """
    work = build_cpp.work_folder(SANITIZED)
    path = work / "lib" / f"{build_cpp.TESTING_NAME}.so"
    build_cpp.build_testing(path, work=work, sanitize=SANITIZED)
    spec = importlib.util.spec_from_file_location(build_cpp.TESTING_NAME, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cpp_testing() -> ModuleType:
    """`load`, for tests that import this name; skips where there is nothing to compile with."""
    tools = build_cpp.find_toolchain()
    if isinstance(tools, list):
        pytest.skip("; ".join(tools))
    return load()
