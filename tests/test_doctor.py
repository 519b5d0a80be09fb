"""The command doctor: what it finds on whole installations and on broken ones.

Each examination is a process of its own, in an environment made for it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bam_kernels import build_cpp, cli, doctor, doctor_findings

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available() or torch.xpu.is_available()
no_gpu = pytest.mark.skipif(GPU, reason="about machines without a GPU")

DROPPED = ("BAM_KERNELS", "TRITON_I", "CXX", "PYTHONPATH", "XDG_CACHE")

# Without Triton: its finder says that there is none, as the import system would.
NO_TRITON = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def examine(monkeypatch, capsys):
    """Runs the command, in an environment in which only what is given is set; the report.

    Its child is what is under test: a process of its own, with this one's environment and path.
    """

    def run(*arguments: str, **given: str | Path) -> dict:
        with monkeypatch.context() as patch:
            for name in [name for name in os.environ if name.startswith(DROPPED)]:
                patch.delenv(name)
            for name, value in given.items():
                patch.setenv(name, str(value))
            if "PYTHONPATH" in given:
                patch.syspath_prepend(given["PYTHONPATH"])
            status = cli.main(["doctor", "--json", "--device=cpu", *arguments])
        report = json.loads(capsys.readouterr().out)
        assert status == report["status"]
        assert status == int(any(each["level"] == "problem" for each in report["findings"]))
        assert all(each["what"] and each["advice"] for each in report["findings"])
        return report

    return run


def finding(report: dict, words: str) -> dict:
    (found,) = [each for each in report["findings"] if words in each["what"]]
    return found


@pytest.fixture(scope="module")
def needs_library() -> None:
    from bam_kernels.backends import cpp_library

    if cpp_library.why_not() is not None:
        pytest.skip(cpp_library.why_not())


# --- a whole installation ---------------------------------------------------------------------


def test_all_well_in_a_process_of_its_own(needs_library):
    given = ["--device=cpu", "--shape=3x48x5x6", "--reduction=8", "--preset=official"]
    given += ["--training", "--layout=channels_last", "--dtype=float64", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "bam_kernels", "doctor", *given],
        env={k: v for k, v in os.environ.items() if not k.startswith(DROPPED)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "... choosing a backend\n" in done.stderr
    report = json.loads(done.stdout)
    assert report["status"] == 0
    versions = report["versions"]
    assert versions["torch"] == torch.__version__ and versions["python"] in sys.version
    assert versions["cuda"] == torch.version.cuda
    assert report["devices"]["cpu"]["torch_capability"] == torch.backends.cpu.get_cpu_capability()
    library = report["library"]
    assert library["loaded"] and Path(library["path"]).is_file()
    assert library["route"] in ("checkout", "installed", "cache")
    assert library["isa"] == torch.ops.bam_kernels_cpp.isa()
    backend = report["backend"]
    assert (backend["chosen"], backend["requested"]) == ("cpp", "auto")
    assert set(backend["reasons"]) == {"triton", "cuda", "reference"}
    module = report["module"]
    assert (module["shape"], module["reduction"]) == ([3, 48, 5, 6], 8)
    smoke = report["smoke"]
    assert smoke["pass"] and smoke["backend"] == "cpp" and smoke["shape"] == [4, 32, 9, 10]
    assert set(smoke["errors"]) == {
        "output",
        "gradient of the input",
        "gradients of the parameters",
    }
    assert all(0 < each["error"] < 1e-9 for each in smoke["errors"].values())


@no_gpu
def test_for_people_and_variables(needs_library, examine, tmp_path, capsys):
    report = examine(
        "--dtype=bfloat16", BAM_KERNELS_BACKEND="cpp", BAM_KERNELS_TYPO="1",
        BAM_KERNELS_CACHE=tmp_path,
    )  # fmt: skip
    assert report["status"] == 0
    cli.doctor._print(report)
    told = capsys.readouterr().out
    for words in (
        "runs on 'cpp' (asked for: 'cpp')", "not on 'triton'", "all well", ": loaded, ",
        torch.__version__, "2x256x14x14 bfloat16 nchw", "output, no autograd",
        "BAM_KERNELS_TYPO is set, which nothing reads", "unset it; there are",
        f"BAM_KERNELS_CACHE={tmp_path}: the folder", report["devices"]["cpu"]["model"],
    ):  # fmt: skip
        assert words in told
    assert "FAILED" not in told and told.endswith("all well\n")


# --- broken ones ------------------------------------------------------------------------------


def test_a_damaged_library(needs_library, examine, tmp_path):
    library = tmp_path / "library.so"
    library.write_bytes(Path(doctor._library()["path"]).read_bytes()[:-1000])
    report = examine(BAM_KERNELS_CPP_LIBRARY=library)
    assert report["status"] == 1 and report["library"]["damaged"]
    assert str(library) in finding(report, "is damaged")["what"]
    advice = finding(report, "is damaged")["advice"]
    assert "unset BAM_KERNELS_CPP_LIBRARY" in advice and "BAM_KERNELS_BACKEND=reference" in advice
    assert "ImportError" in report["backend"]["error"]
    assert report["versions"]["torch"] == torch.__version__
    # Going on without it is told to be possible, and is; the library is no better for it.
    report = examine(BAM_KERNELS_CPP_LIBRARY=library, BAM_KERNELS_BACKEND="reference")
    assert report["smoke"]["pass"] and report["backend"]["chosen"] == "reference"
    assert report["status"] == 1 and finding(report, "is damaged")


@pytest.fixture
def no_library(tmp_path: Path) -> Path:
    """A package without a library of its own, in a copy of the checkout."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "bam_kernels", tmp_path / "copy" / "bam_kernels", ignore=ignored)
    if not (ROOT / "bam_kernels" / "csrc").exists():
        shutil.copytree(ROOT / "csrc", tmp_path / "copy" / "csrc")
    return tmp_path / "copy"


@no_gpu
def test_no_compiler(no_library, examine, tmp_path):
    given = {"PYTHONPATH": no_library, "PATH": "", "BAM_KERNELS_CACHE": tmp_path / "cache"}
    report = examine(**given)
    assert report["status"] == 1 and not report["library"]["loaded"]
    assert report["backend"]["chosen"] == "reference" and report["smoke"]["pass"]
    assert report["toolchain"]["compiler"] is None
    advice = finding(report, "plain PyTorch runs")["advice"]
    assert "install g++ (10 or newer) or clang++" in advice
    # Asked for, it is no fault.
    assert examine(**given, BAM_KERNELS_BUILD="none")["status"] == 0
    # A backend that is asked for and cannot run is one.
    report = examine(**given, BAM_KERNELS_BACKEND="cpp")
    assert report["status"] == 1
    assert "BackendUnavailableError" in finding(report, "no backend runs")["what"]
    assert "BAM_KERNELS_BACKEND=cpp" in finding(report, "no backend runs")["advice"]


@no_gpu
def test_without_triton(needs_library, examine, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_TRITON)
    report = examine(PYTHONPATH=tmp_path, BAM_KERNELS_BACKEND="triton")
    assert report["versions"]["triton"] is None
    assert report["status"] == 1 and "pip install triton" in report["backend"]["error"]


@pytest.mark.parametrize("interpret", [{}, {"TRITON_INTERPRET": "1"}])
def test_a_triton_that_does_not_import(interpret, examine, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so is broken')")
    report = examine(PYTHONPATH=tmp_path, **interpret)
    assert report["status"] == 1
    assert "libtriton.so is broken" in finding(report, "does not import")["what"]
    assert "triton" in finding(report, "does not import")["advice"]
    assert ("error" in report["backend"]) == bool(interpret)


@no_gpu
def test_tritons_interpreter(examine, tmp_path):
    pytest.importorskip("triton")
    report = examine(
        "--channels=16",
        "--reduction=8",
        TRITON_INTERPRET="1",
        BAM_KERNELS_BUILD="none",
        BAM_KERNELS_CACHE=tmp_path,
    )
    assert report["backend"]["chosen"] == "triton" == report["smoke"]["backend"]
    assert report["status"] == 0 and report["smoke"]["pass"]
    assert "unset it" in finding(report, "TRITON_INTERPRET is set")["advice"]


def test_variables_of_no_known_value(no_library, examine):
    report = examine(PYTHONPATH=no_library, BAM_KERNELS_BACKEND="tritno", BAM_KERNELS_BUILD="noen")
    assert report["status"] == 1
    for told in ("BAM_KERNELS_BACKEND=tritno", "BAM_KERNELS_BUILD=noen"):
        assert "set it to one of" in finding(report, told)["advice"]
    assert "BAM_KERNELS_BUILD" in report["library"]["error"]
    assert "BAM_KERNELS_BACKEND" in report["backend"]["error"]


def test_a_process_that_dies_is_told_of(examine, tmp_path):
    """By what only shows when a kernel runs: a crash in the operator."""
    code = """
import os, signal, sys
def trace(frame, event, arg):
    if frame.f_code.co_name == "_step" and frame.f_code.co_filename.endswith("doctor.py"):
        os.kill(os.getpid(), signal.SIGSEGV)
sys.setprofile(trace)
"""
    (tmp_path / "sitecustomize.py").write_text(code)
    report = examine(PYTHONPATH=tmp_path, BAM_KERNELS_BACKEND="reference")
    assert report["status"] == 1 and "SIGSEGV" in finding(report, "smoke check broke off")["what"]
    assert report["backend"]["chosen"] == "reference"


def test_a_driver_that_does_not_answer(examine, tmp_path):
    """torch.cuda raises: the rest is examined all the same."""
    code = """
import sys
def trace(frame, event, arg):
    if frame.f_code.co_name == "_gpus" and event == "call":
        import torch
        def broken(): raise RuntimeError("CUDA driver version is insufficient")
        torch.cuda.is_available = broken
        sys.setprofile(None)
sys.setprofile(trace)
"""
    (tmp_path / "sitecustomize.py").write_text(code)
    report = examine(PYTHONPATH=tmp_path, BAM_KERNELS_BACKEND="reference")
    assert report["status"] == 1 and report["smoke"]["pass"]
    assert "driver version" in finding(report, "the GPUs cannot be examined")["what"]


def test_a_wrong_result_fails(monkeypatch):
    """The smoke check notices an output that is off by a thousandth, and NaN."""
    from bam_kernels import BAM

    options = doctor.Options((2, 32, 7, 7))
    assert doctor._smoke(options)["pass"]
    forward = BAM.forward
    monkeypatch.setattr(BAM, "forward", lambda self, x: forward(self, x) * 1.001)
    smoke = doctor._smoke(options)
    assert not smoke["pass"] and not smoke["errors"]["output"]["pass"]
    assert not smoke["errors"]["gradients of the parameters"]["pass"]
    monkeypatch.setattr(BAM, "forward", lambda self, x: forward(self, x) * float("nan"))
    assert not doctor._smoke(options)["pass"]
    json.dumps(doctor._smoke(options), allow_nan=False)


# --- findings from a report alone: states that no test machine has ------------------------------


def report_with(**changes: object) -> dict:
    """Of a machine on which all is well, but for the changes."""
    return {
        "versions": {"triton": "3.8.0"},
        "devices": {"cpu": {}, "gpus": [{"device": "cuda:0"}]},
        "environment": [],
        "toolchain": {"compiler": "g++", "missing": []},
        "library": {"loaded": True},
        "backend": {"device": "cuda", "requested": "auto", "chosen": "triton", "reasons": {},
                    "notes": []},
        "smoke": {"pass": True, "errors": {}},
        **changes,
    }  # fmt: skip


def test_a_gpu_without_triton():
    assert doctor.findings(report_with()) == []
    backend = {"device": "cuda", "requested": "auto", "chosen": "reference", "notes": [],
               "reasons": {"triton": "Triton is not installed"}}  # fmt: skip
    found = doctor.findings(report_with(versions={"triton": None}, backend=backend))
    assert [each["level"] for each in found] == ["problem", "problem"]
    assert all(each["advice"] == "pip install triton" for each in found)


def test_a_gpu_under_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (found,) = doctor.findings(report_with(environment=doctor.environment()[-1:]))
    assert found["level"] == "problem" and "unset it" in found["advice"]


def test_a_failed_smoke_check_is_a_problem():
    smoke = {
        "pass": False,
        "backend": "triton",
        "errors": {"output": {"error": 0.5, "pass": False}},
    }
    (found,) = doctor.findings(report_with(smoke=smoke))
    assert found["level"] == "problem" and "output 0.5" in found["what"]


def test_an_old_compiler_is_told_of(monkeypatch):
    tools = build_cpp.Toolchain(("g++",), "ninja", Path("torch"))
    monkeypatch.setattr(build_cpp, "find_toolchain", lambda: tools)
    for line, old in (
        ("g++ (Debian 8.3.0-6) 8.3.0", True),
        ("g++ (Debian 12.2.0-14) 12.2.0", False),
        ("Debian clang version 14.0.6", False),
    ):
        monkeypatch.setattr(build_cpp, "compiler_version", lambda compiler, line=line: line + "\n")
        assert bool(doctor.toolchain()["missing"]) == old
        assert doctor.toolchain()["compiler_version"] == line


def test_every_variable_of_env_has_its_effect_told():
    import re

    named = set(re.findall(r'environ\.get\("(\w+)"', (ROOT / "bam_kernels/env.py").read_text()))
    assert len(named) >= 6 and named <= set(doctor_findings.EFFECTS)


# --- bad arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "2x256x14"], "--shape: expected NxCxHxW"),
        (["--shape", "0x256x14x14"], "--shape: expected NxCxHxW, each 1 or more"),
        (["--shape", "2x64x7x7", "--channels", "32"], "--channels: expected the 64 of --shape"),
        (["--channels", "8"], "--channels: expected at least reduction=16"),
        (["--reduction", "0"], "--reduction: expected at least 1, got 0"),
        (
            ["--preset", "mine"],
            "--preset: expected one of paper, official, pytorchcv, fightingcv, changzy00, "
            "got 'mine'",
        ),
        (["--dtype", "int8"], "--dtype: expected one of float32"),
        (["--layout", "nhwc"], "--layout: expected one of nchw, channels_last, got 'nhwc'"),
        (["--device", "abacus"], "--device: expected auto or a device of torch, got 'abacus'"),
        (["--device", "meta"], "--device: expected cpu, cuda, xpu or mps, got 'meta'"),
        (["--device", "cuda:99"], "--device: expected one that is here, got 'cuda:99'"),
        (["--training", "--shape", "1x64x7x7"], "--training: expected at least 2 samples"),
    ],
)
def test_bad_arguments_are_one_line(arguments, words, capsys):
    assert cli.main(["doctor", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and words in err
