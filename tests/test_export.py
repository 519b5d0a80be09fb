"""torch.export and AOTInductor: our operators in the program, dynamic sizes, a fresh process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from portable import MODULES, OTHERS, TRACED, assert_equal_on, network, resnet50, run_python
from torch import nn
from torch.export import Dim

pytestmark = pytest.mark.usefixtures("seed", "large_tiles")


def export(
    model: nn.Module, size: tuple[int, ...] = TRACED, grad: bool = False, strict: bool = False
) -> torch.export.ExportedProgram:
    with torch.set_grad_enabled(grad):
        return torch.export.export(
            model,
            (torch.randn(size),),
            dynamic_shapes=({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},),
            strict=strict,
        )


def our_operators(program: torch.export.ExportedProgram) -> list[str]:
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [name.split(".")[1] for name in names if name.startswith("bam_kernels.")]


@pytest.mark.parametrize("strict", (False, True), ids=("non_strict", "strict"))
@pytest.mark.parametrize("kind", MODULES)
def test_a_program_has_our_operators(kind, strict):
    model = network(kind)
    program = export(model, strict=strict)
    # A deep MLP is no kernel of Triton's, on whose interpreter the tests run; a bare reduction is
    # none of any backend.
    in_parts = kind in ("deep_mlp", "fightingcv", "changzy00")
    expected = our_operators(program) if in_parts else ["bam"]
    assert our_operators(program) == expected and expected
    assert_equal_on(program.module(), model, (TRACED, *OTHERS))


@pytest.mark.parametrize("kind", MODULES)
def test_a_program_of_a_model_with_gradients(kind):
    """Exported outside of no_grad it can still be trained: the operators that have gradients."""
    model = network(kind)
    program = export(model, grad=True)
    assert "gate_linked" in our_operators(program)
    assert_equal_on(program.module(), model, (TRACED, *OTHERS))


def save_inputs(model: nn.Module, folder: Path, sizes: tuple[tuple[int, ...], ...]) -> None:
    with torch.no_grad():
        pairs = [(x, model(x)) for x in map(torch.randn, sizes)]
    torch.save(pairs, folder / "io.pt")


CHECK = """
for x, want in torch.load("io.pt"):
    with torch.no_grad():
        error = ((call(x) - want).norm() / want.norm()).item()
    assert error <= 1e-5, (tuple(x.shape), error)
print("equal")
"""


def test_a_saved_program_runs_in_a_fresh_process(tmp_path):
    model = network("official")
    torch.export.save(export(model), tmp_path / "program.pt2")
    save_inputs(model, tmp_path, (TRACED, *OTHERS))
    load = "import torch, bam_kernels\ncall = torch.export.load('program.pt2').module()\n"
    assert run_python(load + CHECK, tmp_path).split() == ["equal"]


def package(model: nn.Module, folder: Path, size: tuple[int, ...], grad: bool) -> None:
    program = export(model, size, grad=grad)
    assert our_operators(program)
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))


LOAD = "import torch, bam_kernels\ncall = torch._inductor.aoti_load_package('model.pt2')\n"


@pytest.mark.slow
@pytest.mark.parametrize("grad", (False, True), ids=("no_grad", "grad"))
def test_aot_inductor(grad, tmp_path):
    """A .pt2 runs our operators in a fresh process, C++'s there, at other sizes than traced."""
    model = network("official")
    package(model, tmp_path, TRACED, grad)
    save_inputs(model, tmp_path, (TRACED, *OTHERS))
    assert run_python(LOAD + CHECK, tmp_path).split() == ["equal"]


@pytest.mark.slow
def test_aot_inductor_resnet50(tmp_path):
    model = resnet50()
    package(model, tmp_path, (2, 3, 64, 64), grad=False)
    save_inputs(model, tmp_path, ((2, 3, 64, 64), (3, 3, 49, 75)))
    assert run_python(LOAD + CHECK, tmp_path).split() == ["equal"]


def test_resnet50_program():
    model = resnet50()
    program = export(model, (2, 3, 64, 64))
    assert our_operators(program) == ["bam"] * 3
    # Of sides like 49, torch 2.11's own export of ResNet-50 says that it is not made for them.
    assert_equal_on(program.module(), model, ((3, 3, 51, 75),))
