"""torch.compile: one graph, one recompilation at most for a changing batch, no pass more.

Backend ``aot_eager`` traces as every backend does and runs PyTorch's own operators; ``inductor``
decides layouts, copies and what is kept for backward. Its generated C++ kernels are counted here
and not built, but for the tests that say so: `metered` is exact about which tensors they take.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
import torch._dynamo
import torch._inductor.config
import torch._inductor.cpu_vec_isa
from cases import PRESETS, make_map
from conftest import kernel_device
from test_module import randomize
from torch import Tensor, nn
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.utils import fresh_inductor_cache

from bam_kernels import BAM, SqueezeExcite, fusable, insert_bam, reference
from bam_kernels.backends.triton import configs
from bam_kernels.testing import traffic

LAYOUTS = ("nchw", "channels_last")
BATCHES = (2, 3, 5, 4)  # below 16, where PyTorch's own convolution recompiles on a CPU

on_cpu = pytest.mark.skipif(
    kernel_device().type != "cpu", reason="the meter counts what Triton's interpreter does"
)


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No graph, guard or profile of another test; quiet, and quick to build."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    # Finding out which vector instructions there are takes several builds of its own.
    monkeypatch.setattr(torch._inductor.cpu_vec_isa, "valid_vec_isa_list", list)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


# --- what was compiled ------------------------------------------------------------------------


class Graphs:
    """A backend, ``aot_eager``, that keeps the graphs which Dynamo hands it."""

    def __init__(self) -> None:
        self.modules: list[torch.fx.GraphModule] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: list) -> Callable:
        self.modules.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    def fused(self) -> list[int]:
        """How many fused modules each graph holds: as their gates, or in inference as one operator
        each. In plain PyTorch there are none."""
        names = ("bam_kernels.gate_linked", "bam_kernels.bam")
        return [
            sum(str(node.target).removesuffix(".default") in names for node in module.graph.nodes)
            for module in self.modules
        ]


def assert_one_graph(graphs: Graphs, gates: int, compilations: int) -> None:
    """All in one graph, on the fused path, compiled at most so often."""
    assert not torch._dynamo.utils.counters["graph_break"]
    assert 1 <= len(graphs.modules) <= compilations, f"{len(graphs.modules)} compilations"
    assert graphs.fused() == [gates] * len(graphs.modules)


def step(model: nn.Module, call: Callable, *inputs: Tensor) -> dict[str, Tensor]:
    """Everything that `call(*inputs)` and its backward leave behind; `inputs[0]` is given a leaf's
    gradient. Without grad mode, or where nothing needs it: what `call` returns."""
    x = inputs[0].detach().clone(memory_format=torch.preserve_format)
    model.zero_grad()
    if not torch.is_grad_enabled():
        return {"out": call(x, *inputs[1:])}
    out = call(x.requires_grad_(), *inputs[1:])
    # Along x, so that gradients are more than the rounding of sums of noise.
    (out if out.dim() == 0 else (out * (x.detach() if out.shape == x.shape else out.detach())).sum()
     ).backward()  # fmt: skip
    found = {"out": out.detach(), "dx": x.grad}
    found |= {f"d{key}": p.grad for key, p in model.named_parameters()}
    return found | {key: b.clone() for key, b in model.named_buffers()}


def assert_close(found: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    """Each within `bound` by norm(a - b) / norm(b).

    A gradient that is zero but for rounding, as a bias's in front of batch statistics, has no
    digits of its own: its error is small beside the largest gradient. Nor need one of a single
    number, a sum over the map, which may cancel.
    """
    assert list(found) == list(want)
    largest = max((v.norm().item() for k, v in want.items() if k.startswith("d")), default=0)
    for key, b in want.items():
        a = found[key]
        assert a.shape == b.shape and a.isfinite().all(), key
        error, norm = (a.double() - b.double()).norm().item(), b.double().norm().item()
        assert norm > 0 or not key.startswith(("out", "dx")), f"{key}: nothing is compared"
        zero = key.startswith("d") and norm < 1e-6 * largest
        allowed = 0.0 if zero else bound * norm
        if zero or (key.startswith("d") and b.numel() == 1):
            allowed = max(allowed, 1e-2 * bound * largest)
        assert error <= allowed, f"{key}: error {error:.2e}, norm {norm:.2e}, at most {bound}"


# --- a whole network --------------------------------------------------------------------------


def resnet50() -> nn.Module:
    """torchvision's, with BAM at the paper's three places, in float64."""
    model = pytest.importorskip("torchvision.models").resnet50(weights=None, num_classes=10)
    insert_bam(model, after=["layer1", "layer2", "layer3"])
    return model.double()


@pytest.mark.slow
@pytest.mark.parametrize("train", (True, False), ids=("training", "inference"))
def test_resnet50_is_one_graph_for_all_batches(train, device, seed, large_tiles):
    """fullgraph, at most one recompilation over four batch sizes, and the uncompiled numbers: of
    the loss, the image's and all parameters' gradients, and all running statistics."""
    model = resnet50().to(device).train(train)
    twin, graphs = copy.deepcopy(model), Graphs()

    def loss(net: nn.Module, image: Tensor, label: Tensor) -> Tensor:
        logits = net(image)
        return nn.functional.cross_entropy(logits, label) if train else logits

    compiled = torch.compile(functools.partial(loss, model), fullgraph=True, backend=graphs)
    with contextlib.nullcontext() if train else torch.no_grad():
        for n in BATCHES:
            image = torch.randn(n, 3, 48, 64, dtype=torch.float64, device=device)
            label = torch.randint(10, (n,), device=device)
            if n in (BATCHES[0], BATCHES[-1]):  # the first graph, and the one with a symbolic batch
                twin.load_state_dict(model.state_dict())
                want = step(twin, functools.partial(loss, twin), image, label)
                assert_close(step(model, compiled, image, label), want, 1e-9)
            else:
                step(model, compiled, image, label)
    assert_one_graph(graphs, gates=3, compilations=2)


# --- modules, over batch sizes ----------------------------------------------------------------

KINDS = {
    "paper": lambda: BAM(24, 4),
    "official": lambda: BAM(24, 4, preset="official"),
    "squeeze_excite": lambda: SqueezeExcite(24, 4),
}


@pytest.mark.parametrize("mode", ("training", "eval", "inference"))
@pytest.mark.parametrize("kind", KINDS)
def test_batch_sizes_recompile_once(kind, mode, device, seed, large_tiles):
    """Sizes 2, 3, 5, 4: one graph with the size, one with a symbol; the numbers of each size."""
    model = randomize(KINDS[kind]()).to(device).double().train(mode == "training")
    twin, graphs = copy.deepcopy(model), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.no_grad() if mode == "inference" else contextlib.nullcontext():
        for n in BATCHES:
            x = make_map((n, 24, 5, 7), torch.float64, device, "channels_last")
            assert_close(step(model, compiled, x), step(twin, twin, x), 1e-11)
    assert_one_graph(graphs, gates=1, compilations=2)


def test_batch_sizes_beyond_the_fused_mlp_recompile_once(monkeypatch, device, seed, large_tiles):
    """Where a batch outgrows the kernel of the channel MLP, neither the limit nor the words about
    it tie the graph to one size."""
    monkeypatch.setattr(fusable, "MOST_MLP_SAMPLES", 16)
    model = randomize(BAM(24, 4, spatial=False)).to(device).double()
    assert fusable.unfusable_mlp(model.channel, 16) is None
    twin, graphs = copy.deepcopy(model), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for n in (17, 18, 20, 19):
        assert fusable.unfusable_mlp(model.channel, n) is not None
        x = make_map((n, 24, 2, 3), torch.float64, device)
        assert_close(step(model, compiled, x), step(twin, twin, x), 1e-11)
    assert_one_graph(graphs, gates=1, compilations=2)


@pytest.mark.parametrize("x_dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_inside(kind, x_dtype, device, seed, large_tiles):
    """A loss with autocast in it: one graph, and what the same loss gives uncompiled."""
    model = randomize(KINDS[kind]()).to(device)
    twin, graphs = copy.deepcopy(model), Graphs()

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            out = net(x)
        return (out.float() * x.detach()).mean()

    compiled = torch.compile(functools.partial(loss, model), fullgraph=True, backend=graphs)
    x = make_map((4, 24, 5, 7), x_dtype, device)
    found, want = step(model, compiled, x), step(twin, functools.partial(loss, twin), x)
    assert_close(found, want, 1e-4)
    assert [v.dtype for v in found.values()] == [v.dtype for v in want.values()]
    assert_one_graph(graphs, gates=1, compilations=1)


# --- passes over x, and what is kept for backward ---------------------------------------------


@dataclasses.dataclass
class Moved:
    """What one forward or backward of a compiled function moved."""

    traffic: traffic.Traffic
    generated: list[list[tuple[str, int]]]  # by kernel that inductor made: (argument, bytes)

    def by_generated(self, x: Tensor) -> float:
        """Passes over x-sized memory by inductor's own kernels; each tensor once each way."""
        arguments = [argument for kernel in self.generated for argument in kernel]
        large = [(name, size) for name, size in arguments if 2 * size >= x.nbytes]
        return sum(size * (2 if "in_out" in name else 1) for name, size in large) / x.nbytes

    def passes(self, x: Tensor) -> float:
        """All of them: inductor's, those of Triton's kernels, and of PyTorch's operators."""
        return self.by_generated(x) + self.traffic.passes(x)


@contextlib.contextmanager
def metered(**options: object) -> Iterator[Callable[[Callable], tuple[Moved, object]]]:
    """Yields ``run(f) -> (Moved, f())``, which counts what compiled code does.

    Inductor works as it does for anyone, up to its C++ kernels: these are not built. A call of one
    is recorded, argument by argument, and fills what it writes with zeros. Everything else runs.
    """
    calls: list[list[tuple[str, int]]] = []

    def make(self: object, types: list[str], source: str) -> Callable[..., None]:
        names = re.findall(r"\*\s*(\w+)\s*[,)]", source[source.index("void  kernel(") :])
        assert len(names) >= len(types)

        def kernel(*arguments: object) -> None:
            given = list(zip(names, types, arguments, strict=False))
            calls.append([(k, t.nbytes) for k, _, t in given if isinstance(t, Tensor)])
            with torch.utils._python_dispatch._disable_current_modes():
                for _, kind, t in given:
                    if isinstance(t, Tensor) and not kind.startswith("const"):
                        t.zero_()

        return kernel

    def run(f: Callable) -> tuple[Moved, object]:
        start = len(calls)
        with traffic.measure(strict=True) as seen:
            result = f()
        return Moved(seen, calls[start:]), result

    tile = configs.Tile(128, 256, 4, 1)
    # The mode of `measure` would otherwise turn compiled code off.
    transparent = mock.patch.object(
        traffic.Recorder, "ignore_compile_internals", classmethod(lambda cls: True)
    )
    with (
        fresh_inductor_cache(),
        torch._inductor.config.patch(options),
        mock.patch.object(AsyncCompile, "cpp_pybinding", make),
        configs.override(**dict.fromkeys(configs.KERNELS, tile)),
        transparent,
    ):
        yield run


@on_cpu
def test_the_meter_sees_generated_kernels():
    """A pointwise function and a copy to another layout, on inductor: two passes each."""
    x = torch.randn(2, 16, 6, 6)
    functions = (
        lambda x: torch.relu(x + 1) * 2,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.relu_(x),
    )
    for function in functions:
        with metered() as run:
            compiled = torch.compile(function, fullgraph=True)
            compiled(x)
            moved, _ = run(lambda compiled=compiled: compiled(x))
        assert moved.by_generated(x) == moved.passes(x) == 2.0


@dataclasses.dataclass
class Step:
    """A training step of one compiled module: what it moved, and bytes kept beside x, the output,
    parameters and buffers."""

    forward: Moved
    backward: Moved
    kept: int
    x: Tensor


@functools.cache
def module_step(kind: str, layout: str, backend: str, batches: tuple[int, ...], half: bool) -> Step:
    """BAM(64) at [N, 64, 14, 14], compiled at all `batches` and measured at the last one.

    Without inductor's layout optimisation, as on a GPU: there it leaves a graph alone where no
    convolution has more than 64 channels. On a CPU it copies whatever leads to a convolution,
    x itself here, to channels_last; that belongs to the network, and is tested in one below.
    """
    make = {"squeeze_excite": lambda: SqueezeExcite(64)}.get(kind, lambda: BAM(64, preset=kind))
    model, kept = make(), {}

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(x)

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t
        return t

    with metered(layout_optimization=False) as run:
        compiled = torch.compile(call, fullgraph=True, backend=backend)
        for n in batches:
            x = make_map((n, 64, 14, 14), torch.float32, torch.device("cpu"), layout)
            x = x.to(torch.bfloat16 if half else torch.float32).requires_grad_()
            compiled(x).backward(torch.ones_like(x))
            x.grad = None  # adding to a gradient is not the module's
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            forward, out = run(lambda: compiled(x))
        dout = torch.ones_like(out)
        backward, _ = run(lambda: out.backward(dout))
    assert x.grad.stride() == x.stride() == out.stride()
    own = {t.untyped_storage()._cdata for t in (x, out, *model.parameters(), *model.buffers())}
    size = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    return Step(forward, backward, size, x.detach())


@on_cpu
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", PRESETS)
def test_three_passes_forward_and_five_backward(kind, layout, backend, seed):
    """Compiled as not compiled; and no kernel that inductor makes touches anything x-sized
    (`test_the_meter_sees_generated_kernels` shows that such kernels would be seen)."""
    found = module_step(kind, layout, backend, (2,), False)
    assert found.forward.passes(found.x) == pytest.approx(3.0, abs=0.01)
    assert found.backward.passes(found.x) == pytest.approx(5.0, abs=0.01)
    if backend == "inductor":
        assert found.forward.by_generated(found.x) == found.backward.by_generated(found.x) == 0


@on_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", PRESETS)
def test_little_is_kept_for_backward(kind, layout, seed):
    """By inductor's choice of what to keep and what to compute again."""
    found = module_step(kind, layout, "inductor", (2,), False)
    assert 0 < found.kept <= 0.25 * found.x.nbytes, f"{found.kept / found.x.nbytes:.3f} of x"


@on_cpu
def test_passes_of_a_symbolic_batch(seed):
    found = module_step("paper", "channels_last", "inductor", (2, 4, 3), False)
    assert found.forward.passes(found.x) == pytest.approx(3.0, abs=0.01)
    assert found.backward.passes(found.x) == pytest.approx(5.0, abs=0.01)


@on_cpu
def test_passes_under_autocast(seed):
    found = module_step("paper", "nchw", "inductor", (2,), True)
    assert found.x.dtype == torch.bfloat16
    assert found.forward.passes(found.x) == pytest.approx(3.0, abs=0.01)
    assert found.backward.passes(found.x) == pytest.approx(5.0, abs=0.01)


@on_cpu
def test_passes_of_squeeze_excite(seed):
    found = module_step("squeeze_excite", "nchw", "inductor", (2,), False)
    assert found.forward.passes(found.x) == pytest.approx(3.0, abs=0.01)
    assert 3.0 <= found.backward.passes(found.x) <= 5.01


class Neck(nn.Module):
    """A BAM, or nothing, between convolutions: the least network in which layouts are decided."""

    def __init__(self, preset: str | None) -> None:
        super().__init__()
        self.conv0, self.norm0 = nn.Conv2d(8, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.bam = nn.Identity() if preset is None else BAM(64, preset=preset)
        self.conv1, self.norm1 = nn.Conv2d(64, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bam(torch.relu(self.norm0(self.conv0(x))))
        return self.fc(torch.relu(self.norm1(self.conv1(y))).mean(dim=(2, 3)))


@functools.cache
def neck_passes(preset: str | None, layout: str, batches: tuple[int, ...]) -> tuple[float, float]:
    """(forward, backward) passes of a whole `Neck`, in sizes of its BAM's input."""
    fmt = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = Neck(preset).to(memory_format=fmt)
    with metered() as run:
        compiled = torch.compile(model, fullgraph=True)
        for n in batches:
            x = make_map((n, 8, 14, 14), torch.float32, torch.device("cpu"), layout)
            compiled(x).sum().backward()
            model.zero_grad()
        forward, out = run(lambda: compiled(x))
        backward, _ = run(lambda: out.backward(torch.ones_like(out)))
    f = torch.empty(batches[-1], 64, 14, 14)
    return forward.passes(f), backward.passes(f)


@on_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_network_moves_three_and_five_passes_more(preset, layout, seed):
    """With inductor's own layouts, channels_last for either here, as on GPUs for a whole ResNet:
    the network with a BAM moves what it does without, and 3 + 5 passes."""
    with_bam, without = neck_passes(preset, layout, (2,)), neck_passes(None, layout, (2,))
    assert with_bam[0] - without[0] == pytest.approx(3.0, abs=0.01)
    assert with_bam[1] - without[1] == pytest.approx(5.0, abs=0.01)


@on_cpu
def test_a_network_with_a_symbolic_batch_moves_no_more(seed):
    batches = (2, 4, 3)
    with_bam, without = neck_passes("paper", "nchw", batches), neck_passes(None, "nchw", batches)
    assert with_bam[0] - without[0] == pytest.approx(3.0, abs=0.01)
    assert with_bam[1] - without[1] == pytest.approx(5.0, abs=0.01)


# --- inductor's numbers, on kernels that are built --------------------------------------------


def builds_cpp() -> bool:
    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@on_cpu
@pytest.mark.skipif(not builds_cpp(), reason="inductor builds its CPU kernels with a C++ compiler")
@pytest.mark.parametrize(("preset", "layout"), [("paper", "channels_last"), ("official", "nchw")])
def test_inductor_numbers(preset, layout, seed, large_tiles):
    """Training and inference of a network, built, beside float64."""
    fmt = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = randomize(Neck(preset)).to(memory_format=fmt)
    plain = copy.deepcopy(model)
    plain.bam = reference.BAM(64, preset=preset)
    plain.bam.load_state_dict(model.bam.state_dict())
    plain = plain.double()
    x = make_map((4, 8, 7, 9), torch.float32, torch.device("cpu"), layout)
    compiled = torch.compile(model, fullgraph=True)
    assert_close(step(model, compiled, x), step(plain, plain, x.double()), 1e-4)
    model.eval(), plain.eval()
    with torch.no_grad():
        assert_close(step(model, compiled, x), step(plain, plain, x.double()), 1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
