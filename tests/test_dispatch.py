"""Which backend runs, who decides it, what is said when it cannot; and what an import needs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from cases import make_map

import bam_kernels
from bam_kernels import BAM, BackendUnavailableError, dispatch, explain, functional, use_backend


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a fresh process in which only the given BAM_KERNELS_* and TRITON_* are set."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BAM_KERNELS", "TRITON_I"))}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    clean["PYTHONPATH"] = root
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_import_needs_torch_alone():
    """With Triton, torchvision and the rest out of reach, and without touching them if they are."""
    run = python("""
        import sys
        class Blocker:
            def find_spec(self, name, path=None, target=None):
                blocked = ("triton", "torchvision", "timm", "matplotlib", "rich", "skimage", "PIL")
                if name.split(".")[0] in blocked:
                    raise ModuleNotFoundError(f"{name} is blocked", name=name)
        sys.meta_path.insert(0, Blocker())
        import torch, bam_kernels
        assert "triton" not in sys.modules
        x = torch.randn(2, 32, 5, 7)
        module = bam_kernels.BAM(32)
        module(x).sum().backward()
        print(bam_kernels.explain(module, x))
    """)
    assert run.returncode == 0, run.stderr
    assert "runs on 'triton'" not in run.stdout


def test_import_leaves_triton_alone():
    """TRITON_INTERPRET may still be set after the import, and an import is quick."""
    run = python("""
        import os, sys, torch, bam_kernels
        assert not {"triton", "torch._dynamo"} & set(sys.modules), "imported"
        os.environ["TRITON_INTERPRET"] = "1"
        print(bam_kernels.explain(bam_kernels.BAM(32), torch.randn(2, 32, 5, 7)))
    """)
    assert run.returncode == 0, run.stderr
    assert "runs on 'triton'" in run.stdout


def test_a_cpu_without_interpreter_takes_the_cpp_backend():
    pytest.importorskip("bam_kernels.backends.cpp", reason="no C++ library, and no compiler for it")
    run = python("""
        import torch, bam_kernels
        print(bam_kernels.explain(bam_kernels.BAM(32), torch.randn(2, 32, 5, 7)))
    """)
    assert run.returncode == 0, run.stderr
    assert "runs on 'cpp'" in run.stdout and "TRITON_INTERPRET=1" in run.stdout


def test_a_cpu_without_any_backend_takes_plain_pytorch_and_says_so_once():
    run = python("""
        import logging, torch, bam_kernels
        from bam_kernels.backends import cpp_library
        cpp_library._settled, cpp_library._reason = True, "no compiler"
        logging.basicConfig(level=logging.INFO)
        module = bam_kernels.BAM(32)
        for _ in range(3):
            module(torch.randn(2, 32, 5, 7))
    """)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("running plain PyTorch on cpu: no compiler") == 1


def test_the_process_wide_choice():
    code = """
        import torch, bam_kernels
        module, x = bam_kernels.BAM(32), torch.randn(2, 32, 5, 7)
        try:
            print(bam_kernels.explain(module, x).backend)
        except Exception as error:
            print(type(error).__name__, error)
    """
    assert python(code, BAM_KERNELS_BACKEND="reference").stdout.strip() == "reference"
    assert python(code, TRITON_INTERPRET="1").stdout.strip() == "triton"
    asked = python(code, BAM_KERNELS_BACKEND="triton").stdout
    assert "BackendUnavailableError" in asked and "TRITON_INTERPRET" in asked
    unknown = python(code, BAM_KERNELS_BACKEND="tritno").stdout
    assert "ValueError" in unknown and "BAM_KERNELS_BACKEND" in unknown and "tritno" in unknown


def test_without_triton_a_named_backend_says_what_to_install():
    run = python("""
        import importlib.util, torch, bam_kernels
        importlib.util.find_spec = lambda name, package=None: None
        bam_kernels.use_backend("triton").__enter__()
        bam_kernels.BAM(32)(torch.randn(2, 32, 5, 7))
    """)
    assert "pip install triton" in run.stderr and "BackendUnavailableError" in run.stderr


def test_use_backend_nests_and_restores(device):
    x = make_map((2, 32, 5, 7), torch.float32, device)
    before = dispatch.choose_backend(x)
    with use_backend("reference"):
        assert dispatch.choose_backend(x) == "reference"
        with use_backend("triton"):
            assert dispatch.choose_backend(x) == "triton"
        assert dispatch.choose_backend(x) == "reference"
        with pytest.raises(RuntimeError, match="inside"), use_backend("triton"):
            raise RuntimeError("inside")
        assert dispatch.choose_backend(x) == "reference"
    assert dispatch.choose_backend(x) == before == "triton"


def test_a_backend_that_is_not_there_raises(device):
    x = make_map((2, 32, 5, 7), torch.float32, device)
    with use_backend("cuda"), pytest.raises(BackendUnavailableError, match="no cuda backend"):
        BAM(32, device=device)(x)
    with use_backend("cuda"), pytest.raises(BackendUnavailableError):
        functional.gate(x, torch.randn(2, 32, device=device), None)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match=r"backend: expected one of auto, triton.*got 'tritno'"):
        use_backend("tritno")


def test_explain(device, seed):
    module, x = BAM(32, device=device), make_map((3, 32, 5, 7), torch.float32, device)
    told = explain(module, x)
    assert told.backend == "triton" and told.requested == "auto"
    assert set(told.reasons) == {"cpp", "cuda", "reference"}
    assert "runs on 'triton'" in str(told)
    with use_backend("reference"):
        told = explain(module, x)
    assert (told.backend, told.requested) == ("reference", "reference")
    deep = explain(BAM(32, mlp_layers=2, device=device), x)
    assert any("2 hidden layers" in note for note in deep.notes)
    assert "empty" in explain(module, x[:0]).reasons["triton"]
    with pytest.raises(TypeError, match=r"module: expected a bam_kernels\.BAM"):
        explain(torch.nn.ReLU(), x)
    with pytest.raises(ValueError, match="expected 32 channels, got 16"):
        explain(module, x[:, :16])


def test_reasons_by_device():
    assert dispatch.why_not("triton", "cuda") is None
    assert dispatch.why_not("triton", "xpu") is None
    assert "mps" in dispatch.why_not("triton", "mps")
    assert "runs on the CPU, not on 'cuda'" in dispatch.why_not("cpp", "cuda")
    assert dispatch.why_not("reference", "mps") is None


def test_fallbacks_are_logged_once(device, caplog):
    module, x = BAM(32, device=device).eval(), make_map((2, 32, 5, 7), torch.float32, device)
    module.spatial.register_forward_hook(lambda *_: None)
    dispatch._logged.clear()
    with caplog.at_level(logging.INFO, logger="bam_kernels"):
        module(x)
        module(x)
    assert [r.message for r in caplog.records].count(
        "running plain PyTorch: the spatial branch has hooks, which the fused path would not call"
    ) == 1


def test_version_and_public_names():
    assert bam_kernels.__version__.count(".") == 2
    for name in bam_kernels.__all__:
        assert getattr(bam_kernels, name) is not None
