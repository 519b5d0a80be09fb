"""ONNX: plain operators, dynamic sizes, and eager's numbers in ONNX Runtime and OpenVINO."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from portable import MODULES, OTHERS, TRACED, assert_equal_on, network, resnet50
from torch import Tensor, nn
from torch.export import Dim

from bam_kernels import dispatch, strip, use_backend

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")

pytestmark = [
    pytest.mark.usefixtures("seed", "large_tiles"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def export(model: nn.Module, path: Path, exporter: str, size: tuple[int, ...] = TRACED) -> None:
    """The file, by the exporter of torch.export's programs or by TorchScript's."""
    x = torch.randn(size)
    if exporter == "dynamo":
        shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
        torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    else:
        axes = {"x": {0: "n", 2: "h", 3: "w"}}
        torch.onnx.export(model, (x,), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    domains = {node.domain for node in graph.graph.node}
    domains |= {node.domain for function in graph.functions for node in function.node}
    assert domains <= {"", "ai.onnx"}, domains


def onnxruntime_of(path: Path):
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def call(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.numpy()})[0])

    return call


def openvino_of(path: Path):
    openvino = pytest.importorskip("openvino")
    # In float32 also where the processor has bfloat16 units.
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(openvino.Core().read_model(path), "CPU", hints)

    def call(x: Tensor) -> Tensor:
        return torch.from_numpy(compiled(x.numpy())[0].copy())

    return call


RUNTIMES = {"onnxruntime": onnxruntime_of, "openvino": openvino_of}


@pytest.mark.parametrize("exporter", ("dynamo", "torchscript"))
@pytest.mark.parametrize("kind", MODULES)
def test_plain_operators_and_eagers_numbers(kind, exporter, tmp_path):
    model, path = network(kind), tmp_path / "model.onnx"
    export(model, path, exporter)
    for runtime in RUNTIMES.values():
        assert_equal_on(runtime(path), model, (TRACED, *OTHERS))


@pytest.mark.slow
def test_resnet50(tmp_path):
    model, path = resnet50(), tmp_path / "resnet50.onnx"
    export(model, path, "dynamo", (2, 3, 64, 64))
    for runtime in RUNTIMES.values():
        assert_equal_on(runtime(path), model, ((2, 3, 64, 64), (3, 3, 49, 75)))


def test_whatever_backend_is_asked_for(tmp_path):
    """A file is plain under a backend asked for by name, which then runs again as before."""
    model = network("paper")
    with use_backend("triton"):
        export(model, tmp_path / "model.onnx", "dynamo")
        assert dispatch.choose_backend(torch.randn(1)) == "triton"


def test_a_stripped_model_exports_the_same(tmp_path):
    model = network("official")
    plain = strip(model, inplace=False)
    export(plain, tmp_path / "model.onnx", "dynamo")
    assert_equal_on(onnxruntime_of(tmp_path / "model.onnx"), model, (TRACED, *OTHERS))


def test_torchscript_traces_are_plain(tmp_path):
    model = network("paper")
    traced = torch.jit.trace(model, (torch.randn(TRACED),))
    assert "bam_kernels::" not in str(traced.inlined_graph)
    assert_equal_on(traced, model, (TRACED, *OTHERS))
