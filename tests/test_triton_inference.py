"""Inference of a whole module on the Triton kernels: k + 2 launches, and the same numbers.

The reference in float64 is the truth and, in the same dtype, the peer. `residual=False` leaves x
itself out of the output, so that every fault in a logit shows.
"""

from __future__ import annotations

import pytest
import torch
from cases import COMBINES, DTYPES, LAYOUTS, PRESETS, make_map, memory_format, name
from conftest import kernel_device
from test_module import randomize, twin
from tolerances import Errors, relative_error

from bam_kernels import BAM, SqueezeExcite, use_backend
from bam_kernels.backends.triton import configs, pool_reduce
from bam_kernels.testing.traffic import measure

pytestmark = pytest.mark.usefixtures("large_tiles")

F64 = torch.float64
interpreted = pytest.mark.skipif(
    kernel_device().type != "cpu", reason="the meter counts what Triton's interpreter does"
)


def run(module, x):
    with torch.no_grad(), use_backend("triton"):
        return module(x)


def launches(module, x) -> tuple[list[str], float]:
    """The kernels of one inference, with eager operators that would launch one, and the passes."""
    with measure(strict=True) as traffic:
        run(module, x)
    assert traffic.outside_bytes == 0
    assert traffic.device_launches == len(traffic.launches), "operators ran beside the kernels"
    return [launch.kernel for launch in traffic.launches], traffic.passes(x)


def check(make, shape, dtype, device, layout="nchw", draws=2):
    """Against float64 and beside eager, by the root mean square of several draws."""
    errors = Errors()
    for _ in errors.draws(draws, peers=min(shape[2:]) > 1):
        module = randomize(make()).to(device=device, dtype=dtype).eval()
        x = make_map(shape, dtype, device, layout)
        found = run(module, x)
        assert found.dtype == dtype and found.shape == x.shape
        assert found.is_contiguous(memory_format=memory_format(layout)) or layout == "strided"
        assert torch.equal(found, run(module, x))
        with torch.no_grad():
            eager, want = twin(module, dtype)(x), twin(module, F64)(x.double())
        errors.add("out", found, want, eager, sway=None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_parity(dtype, preset, layout, device, seed):
    check(lambda: BAM(64, preset=preset, residual=False), (3, 64, 9, 11), dtype, device, layout)


# One pixel, one row, C off the multiples of 16, more samples than a block of the MLP's.
SHAPES = ((3, 16, 1, 1), (2, 37, 1, 19), (4, 100, 14, 13), (19, 48, 3, 5))


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("preset", PRESETS)
def test_shapes(preset, shape, device, seed):
    check(lambda: BAM(shape[1], 8, preset=preset), shape, torch.float32, device)


OPTIONS = (
    *({"combine": combine} for combine in COMBINES[1:]),
    {"num_dilated": 0},
    {"num_dilated": 1},
    {"num_dilated": 3, "preset": "official"},
    {"channel": False},
    {"channel": False, "num_dilated": 0},
    {"spatial": False},
    {"spatial": False, "preset": "official"},
    {"residual": True, "norm_hidden": True},
    {"norm_final": False},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name)
def test_options(dtype, options, device, seed):
    options = {"residual": False, "reduction": 4, "dilation": 2} | options
    check(lambda: BAM(40, **options), (3, 40, 6, 9), dtype, device, draws=3)


@pytest.mark.parametrize("layout", ("nchw", "channels_last"))
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=name)
def test_sums_in_parts(dtype, preset, layout, device, seed, monkeypatch):
    """Pooled and reduced in several parts each, which their readers add up; with and without the
    launch that does it for them. Squeeze-and-Excitation in several parts of the positions too."""
    shape = (2, 160, 5, 9)
    for limit in (0, 1 << 40):
        monkeypatch.setattr(configs, "_READ_AGAIN_BYTES", limit)
        with configs.override(pool_reduce=configs.Tile(32, 16, 4, 1)):
            module, x = BAM(160, preset=preset), make_map(shape, dtype, device, layout)
            parts = pool_reduce.pool_reduce_parts(
                x, module.spatial.reduce.weight.flatten(1).to(x), None, True
            )
            assert parts.tiles == parts.splits == 3
            check(lambda: BAM(160, preset=preset, residual=False), shape, dtype, device, layout)
            check(lambda: SqueezeExcite(160), shape, dtype, device, layout)


@pytest.mark.parametrize("hidden", (1, 4, 15, 33, 64, 128))
def test_hidden_widths(hidden, device, seed):
    check(
        lambda: BAM(2 * hidden, 2, dilation=2, residual=False),
        (3, 2 * hidden, 4, 5), torch.float32, device, draws=3,
    )  # fmt: skip


@pytest.mark.parametrize("dilation", range(1, 7))
def test_dilations(dilation, device, seed):
    check(
        lambda: BAM(32, 4, dilation=dilation, residual=False),
        (2, 32, 11, 7), torch.float32, device, "channels_last",
    )  # fmt: skip


@pytest.mark.parametrize("layout", ("nchw", "channels_last", "sliced"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16), ids=name)
def test_squeeze_excite(dtype, layout, device, seed):
    check(lambda: SqueezeExcite(72, 8), (3, 72, 5, 9), dtype, device, layout)


# --- launches -----------------------------------------------------------------------------------

SITES = ((2, 256, 56, 56), (4, 512, 28, 28), (4, 1024, 14, 14))


@interpreted
@pytest.mark.parametrize("layout", ("nchw", "channels_last"))
@pytest.mark.parametrize("shape", SITES, ids=name)
def test_launches_and_passes(shape, layout, device, seed):
    """At ResNet-50's sites: two dilated convolutions in four launches, and Squeeze-and-Excitation
    in two, x-sized memory passed three times."""
    x = make_map(shape, torch.float32, device, layout)
    for module, expected in (
        (BAM(shape[1], preset="paper"), 4),
        (BAM(shape[1], preset="official"), 4),
        (SqueezeExcite(shape[1]), 2),
    ):
        kernels, passes = launches(module.eval(), x)
        assert len(kernels) == expected, kernels
        assert passes <= 3.0 + 1e-3


@interpreted
@pytest.mark.parametrize("convs,expected", ((1, 3), (2, 4), (3, 5)))
@pytest.mark.parametrize("dtype", (torch.float16, torch.float64), ids=name)
def test_launches_by_convolutions(dtype, convs, expected, device, seed):
    for options in ({}, {"preset": "official"}, {"channel": False}):
        module = BAM(64, num_dilated=convs, dtype=dtype, **options).eval()
        kernels, _ = launches(module, make_map((2, 64, 9, 11), dtype, device))
        assert len(kernels) == expected, kernels
        assert kernels[0] == "_pool_reduce_kernel" and kernels[-1] == "_gate_forward_kernel"


@interpreted
@pytest.mark.parametrize("kind", (BAM, SqueezeExcite))
def test_where_reading_again_costs_more_than_a_launch(kind, device, seed, monkeypatch):
    """The table decides whether parts are added up by their readers; the numbers do not change."""
    module = randomize(kind(64, 4)).eval()
    x = make_map((2, 64, 30, 31), torch.float32, device)  # more than one tile of positions
    found = {}
    for limit in (0, 1 << 40):
        monkeypatch.setattr(configs, "_READ_AGAIN_BYTES", limit)
        found[limit] = (run(module, x), *launches(module, x))
    few, many = found[1 << 40][1], found[0][1]
    assert len(few) == (4 if kind is BAM else 2) and len(many) > len(few)
    assert "_sum_splits_kernel" in many and "_sum_splits_kernel" not in few
    # Beside a convolution the MLP stays in either case; the gate, with no parts to add up, reads
    # the layers again.
    assert ("_channel_mlp_kernel" in many) == (kind is SqueezeExcite)
    assert "_channel_mlp_kernel" not in few and len(many) <= len(few) + 2
    assert relative_error(found[0][0], found[1 << 40][0]) <= 2e-7


# --- what a call must see -----------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_changed_module_is_seen(preset, device, seed):
    """Weights, affine parameters and statistics in place, one after the other: nothing stale."""
    module = randomize(BAM(32, 4, preset=preset, residual=False, device=device)).eval()
    x = make_map((2, 32, 6, 7), torch.float32, device)
    before = run(module, x)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for key, tensor in tensors:
        if not tensor.is_floating_point():
            continue
        with torch.no_grad():
            tensor.mul_(1.5).add_(0.1)
        after = run(module, x)
        with torch.no_grad():
            want = twin(module, F64)(x.double())
        assert relative_error(after, want) <= 2e-6, key
        if "bias" not in key and "running_mean" not in key:
            assert not torch.equal(before, after), key
        before = after


def test_with_gradients_training_runs(device, seed):
    """And eval() with something to differentiate is not inference."""
    module = BAM(32, 4, device=device).eval()
    x = make_map((2, 32, 6, 7), torch.float32, device)
    with use_backend("triton"):
        out = module(x)
    assert out.requires_grad and relative_error(out.detach(), run(module, x)) <= 2e-6


@pytest.mark.parametrize("x_half", (False, True))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=name)
def test_autocast(dtype, x_half, device, seed):
    """float32 parameters: x keeps its dtype."""
    module = randomize(BAM(48, 4, dilation=2, device=device)).eval()
    x = make_map((3, 48, 7, 9), dtype if x_half else torch.float32, device)
    with torch.autocast(device.type, dtype):
        found = run(module, x)
    with torch.no_grad():
        want = twin(module, F64)(x.double())
    assert found.dtype == x.dtype
    assert relative_error(found, want) <= 5 * torch.finfo(dtype).eps


def test_large_logits_and_infinities(device, seed):
    """As in the reference: gates shut and open, NaN where it has NaN."""
    module = randomize(BAM(32, 4, residual=False, device=device)).eval()
    with torch.no_grad():
        module.channel.fc[1].weight.mul_(1e4)
        module.spatial.project.weight.mul_(1e4)
    x = make_map((2, 32, 6, 7), torch.float32, device)
    with torch.no_grad():
        want = twin(module, F64)(x.double())
    assert relative_error(run(module, x), want) <= 1e-3
    x[0, 3, 2, 4], x[1, 5, 0, 0] = torch.inf, torch.nan
    with torch.no_grad():
        want = twin(module, torch.float32)(x)
    assert torch.equal(run(module, x).isnan(), want.isnan())


@pytest.mark.parametrize("kind", (BAM, SqueezeExcite))
def test_compiled(kind, device, seed):
    """Without a graph break, as one operator."""
    module = randomize(kind(32, 4, device=device)).eval()
    x = make_map((2, 32, 6, 7), torch.float32, device)
    seen = []

    def backend(graph, example_inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    found = run(torch.compile(module, fullgraph=True, backend=backend), x)
    torch.compiler.reset()
    assert seen == ["bam_kernels.bam.default"] or "bam_kernels.bam" in seen, seen
    assert torch.equal(found, run(module, x))
