"""What is timed on a CPU: ours and its peers on one problem, each checked before it is timed.

A problem is a shape, a dtype, a mode and a preset. All peers hold the same weights and get the same
input; what one of them makes of it is compared with float64 before any time is taken.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import bam_kernels
from bam_kernels.benchmarking import sites, timing

OURS, EAGER, COMPILE = "ours", "eager", "compile"
ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
PEERS = (EAGER, COMPILE, ONNXRUNTIME, OPENVINO)
LAYOUTS = (sites.NCHW, sites.CHANNELS_LAST)

NEEDS = {
    EAGER: (),
    COMPILE: (),
    ONNXRUNTIME: ("onnx", "onnxscript", "onnxruntime"),
    OPENVINO: ("onnx", "onnxscript", "openvino"),
}
"""The packages that a peer needs beside torch; both runtimes read the module exported to ONNX."""

LIMITS = {
    ("float32", sites.INFERENCE): 1e-5,
    ("bfloat16", sites.INFERENCE): 3e-2,
    # A ReLU's unit that rounding switches moves a gradient by more than rounding does.
    ("float32", sites.TRAINING): 1e-3,
    ("bfloat16", sites.TRAINING): 1e-1,
}
"""Largest relative error against float64 with which a side is timed; the errors are recorded."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that every side computes.

    Args:
        size: [N, C, H, W].
        dtype: "float32" or "bfloat16", of the input and of the parameters.
        mode: "inference" or "training".
        preset: "paper" or "official".
    """

    size: tuple[int, int, int, int]
    dtype: str
    mode: str
    preset: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def hidden(self) -> int:
        """h = C // 16, the width of both branches inside."""
        return self.size[1] // 16

    @property
    def x_bytes(self) -> int:
        """|x|, the bytes of the feature map."""
        n, c, h, w = self.size
        return n * c * h * w * self.torch_dtype.itemsize

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.size))} {self.dtype} {self.mode} {self.preset}"


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Args:
        name: "ours", "eager", "compile", "onnxruntime" or "openvino".
        layout: "nchw" or "channels_last", of its input and output.
        loop: makes that many calls, in the mode's gradient mode.
        last: what the last call made: "out", and in training "dx".
        held: memory that the loop reads through a bare pointer.
    """

    name: str
    layout: str
    loop: Callable[[int], None]
    last: Callable[[], dict[str, Tensor]]
    held: tuple[object, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.name} {self.layout}"


NO_BACKEND = (bam_kernels.dispatch.BackendUnavailableError, ImportError)
"""What a backend that was asked for and cannot run raises; the second: a damaged installation."""


class UnavailableError(Exception):
    """A side does not run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A problem with its weights, its input and what float64 makes of them."""

    problem: Problem
    module: nn.Module
    x: Tensor
    dout: Tensor | None
    truth: dict[str, Tensor]
    threads: int
    models: dict[torch.dtype, bytes] = dataclasses.field(default_factory=dict)

    @classmethod
    def make(cls, problem: Problem, threads: int) -> Setting:
        """Random weights, running statistics and input; the reference in float64 on them."""
        training = problem.mode == sites.TRAINING
        module = bam_kernels.reference.BAM(problem.size[1], preset=problem.preset)
        randomize(module)
        module.train(training).to(problem.torch_dtype)
        x = torch.randn(problem.size).to(problem.torch_dtype)
        dout = torch.randn(problem.size).to(problem.torch_dtype) if training else None
        setting = cls(problem, module, x, dout, {}, threads)
        wide = copy.deepcopy(module).double()
        truth = _torch_side(
            setting, EAGER, wide, x.double(), dout if dout is None else dout.double()
        )
        truth.loop(1)
        return dataclasses.replace(setting, truth=truth.last())

    def error(self, side: Side) -> float:
        """The largest relative error of what a side's last call made."""
        found = side.last()
        return max(timing.relative_error(found[key], want) for key, want in self.truth.items())

    def limit(self) -> float:
        return LIMITS[self.problem.dtype, self.problem.mode]


def randomize(module: nn.Module) -> None:
    """Running statistics and affine parameters that no runtime can fold into nothing."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(std=0.5)
                part.running_mean.normal_(std=0.2)
                part.running_var.uniform_(0.5, 2.0)


def missing(peer: str) -> str | None:
    """What a peer needs and is not installed, as a sentence; None if all is there."""
    absent = [name for name in NEEDS[peer] if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"not installed: pip install {' '.join(absent)}"


def sides(
    setting: Setting, peers: tuple[str, ...]
) -> tuple[list[Side], dict[str, float], dict[str, str]]:
    """Every side that runs and is right, their errors, and why the others do not run, by key.

    Ours runs on the backend that is in force around the call.

    Raises:
        BackendUnavailableError, ImportError: ours cannot run on it at all.
    """
    made: list[Side] = []
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name, layout in _wanted(peers):
        try:
            side = build(setting, name, layout)
            side.loop(1)
            error = setting.error(side)
            if not error <= setting.limit():
                raise UnavailableError(
                    f"wrong: relative error {error:.1e} against float64, at most "
                    f"{setting.limit():.0e}"
                )
        except Exception as exception:
            if name == OURS and isinstance(exception, NO_BACKEND):
                raise
            reasons[f"{name} {layout}"] = _words(exception)
        else:
            made.append(side)
            errors[side.key] = error
    return made, errors, reasons


def _wanted(peers: tuple[str, ...]) -> list[tuple[str, str]]:
    names = [OURS, *(peer for peer in PEERS if peer in peers)]
    pairs = [(name, layout) for name in names for layout in LAYOUTS]
    return [pair for pair in pairs if pair != (ONNXRUNTIME, sites.CHANNELS_LAST)]


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UnavailableError) else f"{type(error).__name__}: {text}"


def build(setting: Setting, name: str, layout: str) -> Side:
    """One side of a problem.

    Raises:
        UnavailableError: it cannot run this problem.
    """
    if name in (ONNXRUNTIME, OPENVINO):
        reason = missing(name)
        if reason is None and setting.problem.mode == sites.TRAINING:
            reason = "inference only"
        if reason is not None:
            raise UnavailableError(reason)
        runtime = _onnxruntime_side if name == ONNXRUNTIME else _openvino_side
        return runtime(setting, layout)
    fmt = torch.channels_last if layout == sites.CHANNELS_LAST else torch.contiguous_format
    x, dout = (t if t is None else t.clone(memory_format=fmt) for t in (setting.x, setting.dout))
    module = copy.deepcopy(setting.module)
    if name == OURS:
        module = _ours(module, setting.problem)
        backend = bam_kernels.dispatch.requested_backend()
        told = bam_kernels.explain(module, x)
        if told.backend != backend:
            raise UnavailableError(f"ran on {told.backend!r}: {told.reasons.get(backend)}")
    elif name == COMPILE:
        module = torch.compile(module, dynamic=False)
    return _torch_side(setting, name, module, x, dout, layout)


def _ours(plain: nn.Module, problem: Problem) -> nn.Module:
    module = bam_kernels.BAM(problem.size[1], preset=problem.preset)
    module.to(problem.torch_dtype).load_state_dict(plain.state_dict())
    return module.train(plain.training)


def _torch_side(
    setting: Setting,
    name: str,
    module: nn.Module,
    x: Tensor,
    dout: Tensor | None,
    layout: str = sites.NCHW,
) -> Side:
    kept: dict[str, Tensor] = {}

    @torch.inference_mode()
    def infer(calls: int) -> None:
        for _ in range(calls):
            out = module(x)
        kept["out"] = out

    def train(calls: int) -> None:
        for _ in range(calls):
            module.zero_grad(set_to_none=True)
            x.grad = None
            out = module(x)
            out.backward(dout)
        kept["out"], kept["dx"] = out.detach(), x.grad

    if dout is not None:
        x.requires_grad_()
    return Side(name, layout, infer if dout is None else train, lambda: kept)


# --- runtimes on an ONNX file -----------------------------------------------------------------


def exported(setting: Setting, dtype: torch.dtype) -> bytes:
    """The reference module as an ONNX model of the problem's shape in `dtype`; exported once."""
    if dtype not in setting.models:
        module = copy.deepcopy(setting.module).to(dtype).eval()
        with tempfile.TemporaryDirectory() as folder, _quiet():
            path = Path(folder) / "bam.onnx"
            torch.onnx.export(
                module,
                (setting.x.to(dtype),),
                path,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            setting.models[dtype] = path.read_bytes()
    return setting.models[dtype]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporting prints and warns of."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _onnxruntime_side(setting: Setting, layout: str) -> Side:
    """ONNX Runtime on tensors that are bound once: no copy of x, no allocation of the output."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Its threads wait in a loop for the next operator, as they do by default, but not past the end
    # of a run: the next side's threads need the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = exported(setting, setting.problem.torch_dtype)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = setting.x.contiguous()
    out = torch.empty_like(x)
    kind = getattr(onnx.TensorProto, "FLOAT" if x.dtype == torch.float32 else "BFLOAT16")
    binding = session.io_binding()
    for bind, slot, tensor in (
        (binding.bind_input, session.get_inputs()[0], x),
        (binding.bind_output, session.get_outputs()[0], out),
    ):
        bind(slot.name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())

    def loop(calls: int) -> None:
        for _ in range(calls):
            session.run_with_iobinding(binding)

    return Side(ONNXRUNTIME, layout, loop, lambda: {"out": out}, (x, out))


def _openvino_side(setting: Setting, layout: str) -> Side:
    """OpenVINO on a tensor that shares x's memory, in x's dtype and layout.

    Its bfloat16 is a precision of execution and starts from a float32 model, to which the weights
    are widened without a loss.
    """
    import openvino

    half = setting.problem.dtype == "bfloat16"
    kind = openvino.Type.bf16 if half else openvino.Type.f32
    core = openvino.Core()
    model = core.read_model(io.BytesIO(exported(setting, torch.float32)))
    steps = openvino.preprocess.PrePostProcessor(model)
    for port in (steps.input(), steps.output()):
        port.tensor().set_element_type(kind)
        if layout == sites.CHANNELS_LAST:
            port.tensor().set_layout(openvino.Layout("NHWC"))
            port.model().set_layout(openvino.Layout("NCHW"))
    options = {
        "INFERENCE_NUM_THREADS": setting.threads,
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    request = core.compile_model(steps.build(), "CPU", options).create_infer_request()
    order = (0, 2, 3, 1) if layout == sites.CHANNELS_LAST else (0, 1, 2, 3)
    x = setting.x.permute(order).contiguous()
    if half:
        shared = openvino.Tensor(x.view(torch.int16).numpy(), openvino.Shape(list(x.shape)), kind)
    else:
        shared = openvino.Tensor(x.numpy(), shared_memory=True)
    request.set_input_tensor(shared)

    def loop(calls: int) -> None:
        for _ in range(calls):
            request.infer()

    def last() -> dict[str, Tensor]:
        data = torch.from_numpy(request.get_output_tensor().data.copy())
        out = data.view(torch.bfloat16) if half else data
        found = out.reshape(x.shape)
        if layout == sites.CHANNELS_LAST:
            found = found.permute(0, 3, 1, 2)
        return {"out": found}

    return Side(OPENVINO, layout, loop, last, (x,))
