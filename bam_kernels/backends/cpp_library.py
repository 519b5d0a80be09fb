"""Finds, compiles where need be, and loads the library of the C++ backend.

In this order: the file that ``BAM_KERNELS_CPP_LIBRARY`` names; ``bam_kernels/_C.abi3.so``, built
when the package was installed; one in the cache folder, compiled now if it is not there yet.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import struct
import tempfile
import threading
import time
from pathlib import Path

import torch

from bam_kernels import build_cpp, env

ABI_VERSION = 1
"""Of the operators' schemas; ``bam_kernels_cpp::abi_version`` must return the same."""

log = logging.getLogger("bam_kernels")

_lock = threading.RLock()
_settled = False  # whether the rest is known
_reason: str | None = None  # why the library cannot be used; None: it is loaded
_damaged = False  # whether a binary is there and is no good


def why_not() -> str | None:
    """Why the library cannot be used; None where it is loaded.

    The first call loads it, and compiles it if need be, which is logged with the time it took.

    Raises:
        ValueError: ``BAM_KERNELS_BUILD`` is wrong.
    """
    if not _settled:
        _settle()
    return _reason


def load() -> None:
    """Load the library, compiling it if need be; does nothing the second time.

    Raises:
        ImportError: it cannot be used; the message says why and what to do.
        ValueError: ``BAM_KERNELS_BUILD`` is wrong.
    """
    reason = why_not()
    if reason is not None:
        raise ImportError(reason)


def is_damaged() -> bool:
    """Whether there is a binary that cannot be used: what nobody wants to be passed over."""
    return why_not() is not None and _damaged


def _settle() -> None:
    global _settled, _reason, _damaged
    with _lock:
        if _settled:
            return
        try:
            _reason = _find()
        except _DamagedError as error:
            _reason, _damaged = str(error), True
        _settled = True


class _DamagedError(Exception):
    pass


def _find() -> str | None:
    """Load what there is; returns why there is nothing."""
    if _registered():  # by torch.ops.load_library, say
        _check_version("the library that is loaded already")
        return None
    named, built = env.cpp_library(), build_cpp.PACKAGE / build_cpp.LIBRARY_NAME
    csrc = build_cpp.source_folder()
    if named is not None:
        _load_installed(named, "set BAM_KERNELS_CPP_LIBRARY to another, or unset it")
        return None
    if built.is_file() and not _outdated(built, csrc):
        _load_installed(built, "delete it and install bam_kernels again")
        return None
    if env.build() == "none":
        return "the library was not built, and BAM_KERNELS_BUILD=none keeps it so"
    if csrc is None:
        return "the library was not built, and its sources are not installed"
    tools = build_cpp.find_toolchain()
    if isinstance(tools, list):
        return f"the library was not built, and cannot be now: {'; '.join(tools)}"
    try:
        path = _compiled(csrc, tools.compiler)
        _open(path)
    except (build_cpp.BuildError, OSError) as error:
        return f"the library was not built, and cannot be now: {error}"
    _check_version(str(path))
    return None


# --- loading ----------------------------------------------------------------------------------


def _outdated(built: Path, csrc: Path | None) -> bool:
    """Whether a checkout's sources are newer than the library that was built of them."""
    if csrc is None or csrc.parent == build_cpp.PACKAGE:
        return False
    newest = max(path.stat().st_mtime for path in build_cpp.tracked_files(csrc))
    if newest <= built.stat().st_mtime:
        return False
    log.info("%s is older than its sources and passed over", built)
    return True


def _load_installed(path: Path, advice: str) -> None:
    try:
        _open(path)
    except OSError as error:
        raise _DamagedError(
            f"{path} cannot be loaded: {error}; {advice}, or set BAM_KERNELS_BACKEND=reference"
        ) from error
    _check_version(str(path), advice)


def _open(path: Path) -> None:
    _check_whole(path)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        # torch says which file; the loader, whose error is the cause, says what is wrong with it.
        raise OSError(str(error.__cause__ or error)) from error
    if not _registered():
        raise OSError("it is not a library of bam_kernels")


def _check_whole(path: Path) -> None:
    """Raise OSError where a file is cut off, which the loader may notice only by a bus error."""
    with open(path, "rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:5] != b"\x7fELF\x02":
            raise OSError("it is not a shared library, or cut off")
        # e_phoff, e_shoff, e_phentsize, e_phnum, e_shentsize, e_shnum
        segments, sections, width, count, section, number = struct.unpack("<32xQQ6xHHHH2x", header)
        file.seek(segments)
        table = file.read(width * count)
    ends = [segments + width * count, sections + section * number]
    if len(table) == width * count:
        for at in range(0, len(table), width):
            offset, size = struct.unpack_from("<8xQ16xQ", table, at)  # p_offset, p_filesz
            ends.append(offset + size)
    if path.stat().st_size < max(ends):
        raise OSError("it is cut off")


def _registered() -> bool:
    return hasattr(torch.ops.bam_kernels_cpp, "abi_version")


def _check_version(name: str, advice: str = "delete it") -> None:
    found: list[object] = []

    def ask() -> None:
        try:
            found.append(int(torch.ops.bam_kernels_cpp.abi_version()))
        except Exception as error:
            found.append(error)

    # A thread of its own has no modes: fake tensors, or a tracer, would answer for the library.
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    if found != [ABI_VERSION]:
        raise _DamagedError(
            f"{name} is of version {found[0]}, where this bam_kernels needs {ABI_VERSION}; "
            f"{advice}, or set BAM_KERNELS_BACKEND=reference"
        )


# --- compiled on first use --------------------------------------------------------------------


def _compiled(csrc: Path, compiler: tuple[str, ...]) -> Path:
    """The library of these sources in a cache folder; compiled where it is in none.

    Raises:
        BuildError, OSError: it could not be compiled, or written anywhere.
    """
    key = build_cpp.cache_key(csrc, compiler)
    named, private = env.cache(), _temporary_folder()
    folders = [folder for folder in (named, private) if folder is not None]
    for folder in folders:
        path = _cached(folder, key)
        if path is not None:
            return path
    failure: OSError = OSError("there is no folder to write to")
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return _compile_into(folder, key, csrc)
        except OSError as error:  # read-only, full: the next one
            failure = error
    # Nowhere that the next process could find it.
    folder = Path(tempfile.mkdtemp(prefix="bam_kernels-"))
    try:
        return _compile_into(folder, key, csrc)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise failure from None


def _temporary_folder() -> Path | None:
    """A folder of this user's in the shared temporary one; None where another's stands there."""
    folder = Path(tempfile.gettempdir()) / f"bam_kernels-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return folder if mine and not found.st_mode & 0o022 else None


def _cached(folder: Path, key: str) -> Path | None:
    """A whole library: a file's name holds its contents' digest."""
    for path in sorted(folder.glob(f"{_stem(key)}-*.so")):
        try:
            if path.name == _name(key, path):
                return path
            path.unlink()
        except OSError:
            continue
    return None


def _stem(key: str) -> str:
    return f"bam_kernels_cpp-{key}"


def _name(key: str, path: Path) -> str:
    return f"{_stem(key)}-{hashlib.sha256(path.read_bytes()).hexdigest()[:20]}.so"


def _compile_into(folder: Path, key: str, csrc: Path) -> Path:
    with build_cpp.lock(folder / f"{_stem(key)}.lock") as alone:
        path = _cached(folder, key)  # by another process, while this one waited
        if path is not None:
            return path
        if alone:
            for left in folder.glob(f"{_stem(key)}-*.build"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        start = time.perf_counter()
        work = Path(tempfile.mkdtemp(prefix=f"{_stem(key)}-", suffix=".build", dir=folder))
        try:
            built = work / build_cpp.LIBRARY_NAME
            build_cpp.build(built, csrc=csrc, work=work)
            path = folder / _name(key, built)
            os.replace(built, path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    log.info("compiled the C++ backend in %.1f s: %s", time.perf_counter() - start, path)
    return path
