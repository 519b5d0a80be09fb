"""The test suite on the hardware: counts, and the names and last words of what failed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bam_kernels.benchmarking.gpu.environment import ROOT

_LAST_LINES = 4
_MOST_FAILURES = 200
_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed)")


def run_parity(
    tests: Sequence[str], stem: Path, seconds: float, workers: int, on_gpu: bool
) -> dict[str, Any]:
    """Run pytest in a process of its own, for `seconds` at most.

    Args:
        tests: paths for pytest.
        stem: the log goes to ``stem.parity.log``, pytest's XML to ``stem.parity.xml``.
        seconds: of wall time.
        workers: processes, where pytest-xdist is there.
        on_gpu: kernels are compiled for the device; otherwise Triton's interpreter runs them.

    Returns:
        ``ok``, ``complete``, counts, ``failures`` and the ``seconds`` it took.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    log, xml = stem.with_name(f"{stem.name}.parity.log"), stem.with_name(f"{stem.name}.parity.xml")
    xml.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *tests, "-v", "--tb=short", "--color=no"]
    command += ["-p", "no:cacheprovider", f"--junitxml={xml}"]
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    environment = dict(os.environ, PYTHONUNBUFFERED="1")  # the log holds all that was seen
    path = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    if on_gpu:
        environment.pop("TRITON_INTERPRET", None)
    else:
        environment["TRITON_INTERPRET"] = "1"

    begin = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
            stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            complete = _wait(process, seconds)
        except BaseException:
            _kill(process)
            raise
    found = {
        "command": " ".join(command[1:]),
        "seconds": round(time.monotonic() - begin, 2),
        "exit_status": process.returncode,
        "complete": complete,
        **read_results(xml, log),
    }
    if not complete:
        # A test that was interrupted stands in the XML too, without a word of failure; and where
        # pytest had to be killed, there is no XML.
        lines = log.read_text(errors="replace").splitlines()
        found["passed"] = sum(" PASSED " in line for line in lines)
    found["ok"] = bool(
        complete
        and process.returncode == 0
        and found["passed"]
        and not found["failed"]
        and not found["errors"]
    )
    if not found["ok"]:
        found["log_tail"] = log.read_text(errors="replace").splitlines()[-20:]
    return found


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it ended by itself; else it is interrupted, so that it still writes its report."""
    grace = min(15.0, 0.2 * seconds)
    try:
        process.wait(seconds - grace)
        return True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    _kill(process)
    return False


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and the workers that it started: they are a group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_results(xml: Path, log: Path) -> dict[str, Any]:
    """Counts and failures from pytest's XML; the counts alone from the log if there is none."""
    counts = dict.fromkeys(("passed", "failed", "errors", "skipped", "xfailed"), 0)
    try:
        cases = list(ElementTree.parse(xml).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return {**counts, **_counts_of_log(log), "failures": [], "counted_by": "log"}
    failures = []
    for case in cases:
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        kind, words = _outcome(case)
        counts[kind] += 1
        if kind in ("failed", "errors"):
            failures.append({"test": name, "outcome": kind, "message": words})
    found: dict[str, Any] = {**counts, "failures": failures[:_MOST_FAILURES], "counted_by": "xml"}
    if len(failures) > _MOST_FAILURES:
        found["failures_not_listed"] = len(failures) - _MOST_FAILURES
    return found


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for tag, kind in (("failure", "failed"), ("error", "errors")):
        part = case.find(tag)
        if part is not None:
            lines = [line for line in (part.text or "").splitlines() if line.strip()]
            lines = lines or [part.get("message", "")]
            return kind, "\n".join(lines[-_LAST_LINES:])[-600:]
    part = case.find("skipped")
    if part is not None:
        return ("xfailed" if part.get("type") == "pytest.xfail" else "skipped"), ""
    return "passed", ""


def _counts_of_log(log: Path) -> dict[str, int]:
    with contextlib.suppress(OSError):
        for line in reversed(log.read_text(errors="replace").splitlines()):
            found = _COUNT.findall(line)
            if found:
                return {
                    "errors" if word.startswith("error") else word: int(number)
                    for number, word in found
                    if word != "xpassed"
                }
    return {}
