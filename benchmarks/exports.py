"""ResNet-50 with BAM in every form that it can be shipped in, each beside eager: a table.

    python benchmarks/exports.py [--seed 0]

Prints the relative difference norm(a - b) / norm(b) of the logits from those of the plain PyTorch
network in eager mode, in float32, the largest over two inputs of other sizes than the traced one.
Exits with status 1 if one is above 1e-5. On a CPU; takes some minutes.
"""

from __future__ import annotations

import argparse
import copy
import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.export import Dim  # noqa: E402

from bam_kernels import explain, insert_bam, strip, use_backend  # noqa: E402

BOUND = 1e-5
TRACED, OTHERS = (2, 3, 64, 64), ((3, 3, 49, 75), (1, 3, 96, 65))
DYNAMIC = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)

Call = Callable[[Tensor], Tensor]


def network() -> nn.Module:
    """With random weights and random running statistics."""
    from torchvision.models import resnet50

    model = resnet50(num_classes=10)
    insert_bam(model, after=["layer1", "layer2", "layer3"])
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.weight.uniform_(0.2, 0.6)
                part.bias.normal_(std=0.2)
                part.running_mean.normal_(std=0.1)
                part.running_var.uniform_(0.5, 1.5)
    return model.eval()


def _compile(model: nn.Module, folder: Path) -> Call:
    return torch.compile(model, fullgraph=True, dynamic=True)


def _program(model: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(model, (torch.randn(TRACED),), dynamic_shapes=DYNAMIC)


def _export(model: nn.Module, folder: Path) -> Call:
    torch.export.save(_program(model), folder / "program.pt2")
    return torch.export.load(folder / "program.pt2").module()


def _aot_inductor(model: nn.Module, folder: Path) -> Call:
    path = str(folder / "model.pt2")
    torch._inductor.aoti_compile_and_package(_program(model), package_path=path)
    return torch._inductor.aoti_load_package(path)


def _onnx(model: nn.Module, path: Path, dynamo: bool) -> Path:
    x = torch.randn(TRACED)
    if dynamo:
        torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    else:
        axes = {"x": {0: "n", 2: "h", 3: "w"}}
        torch.onnx.export(model, (x,), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    return path


def _onnxruntime(path: Path) -> Call:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _openvino(path: Path) -> Call:
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())


def _features(model: nn.Module, folder: Path) -> Call:
    from torchvision.models.feature_extraction import create_feature_extractor

    extractor = create_feature_extractor(model, {"layer1.bam": "map", "fc": "logits"})
    return lambda x: extractor(x)["logits"]


def _pickled(model: nn.Module, folder: Path) -> Call:
    data = io.BytesIO()
    torch.save(strip(copy.deepcopy(model)), data)
    assert b"bam_kernels" not in data.getvalue()
    data.seek(0)
    return torch.load(data, weights_only=False)


FORMS: dict[str, Callable[[nn.Module, Path], Call]] = {
    "fused, eager mode": lambda model, _: model,
    "torch.compile, fullgraph, dynamic": _compile,
    "torch.export, saved and loaded": _export,
    "AOTInductor .pt2": _aot_inductor,
    "ONNX (dynamo), ONNX Runtime": lambda m, f: _onnxruntime(_onnx(m, f / "m.onnx", True)),
    "ONNX (dynamo), OpenVINO": lambda m, f: _openvino(_onnx(m, f / "m.onnx", True)),
    "ONNX (TorchScript), ONNX Runtime": lambda m, f: _onnxruntime(_onnx(m, f / "m.onnx", False)),
    "ONNX (TorchScript), OpenVINO": lambda m, f: _openvino(_onnx(m, f / "m.onnx", False)),
    "torch.jit.trace": lambda model, _: torch.jit.trace(model, torch.randn(TRACED)),
    "torch.fx.symbolic_trace": lambda model, _: torch.fx.symbolic_trace(model),
    "torchvision feature extractor": _features,
    "bam_kernels.strip, saved and loaded": _pickled,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default 0)")
    torch.manual_seed(parser.parse_args().seed)
    warnings.simplefilter("ignore")
    model = network()
    inputs = [torch.randn(size) for size in OTHERS]
    worst = 0.0
    with torch.no_grad():
        with use_backend("reference"):
            want = [model(x) for x in inputs]
        backend = explain(model.layer1.bam, torch.randn(1, 256, 8, 8)).backend
        print(f"torch {torch.__version__}, backend {backend}, traced at {TRACED}, run at {OTHERS}")
        print("\n| form | largest relative difference |\n|---|---|")
        for name, make in FORMS.items():
            with tempfile.TemporaryDirectory() as folder:
                call = make(copy.deepcopy(model), Path(folder))
                error = max(
                    ((call(x) - y).norm() / y.norm()).item()
                    for x, y in zip(inputs, want, strict=True)
                )
            worst = max(worst, error)
            print(f"| {name} | {error:.1e} |", flush=True)
    if not worst <= BOUND:
        print(f"{worst:.1e} is above {BOUND}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
