"""The presets of the BAMs that people have, and their options: numbers on every backend, what is
fused and what is not, and what is refused."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from test_module import randomize, step, twin
from tolerances import PARITY, relative_error
from torch import nn

from bam_kernels import BAM, explain, inference, reference, training, use_backend
from bam_kernels.config import PRESETS, BAMConfig, resolve
from bam_kernels.fusable import unfusable, unfusable_spatial

pytestmark = pytest.mark.usefixtures("seed", "large_tiles")

WIDE, SEVEN = (5, 9), (7, 7)

# By name: the options, the input's size, and whether the whole, all but the MLP, all but the
# spatial branch, or nothing but the two passes over x run on kernels.
CASES = {
    "official": ({"preset": "official", "pool": "global"}, WIDE, "whole"),
    "pytorchcv": ({"preset": "pytorchcv"}, WIDE, "whole"),
    "fightingcv": ({"preset": "fightingcv"}, WIDE, "spatial"),
    "fightingcv_as_theirs": ({"preset": "fightingcv", "padding": 1}, SEVEN, "neither"),
    "changzy00": ({"preset": "changzy00"}, WIDE, "channel"),
    "square": ({"preset": "official", "pool": "square"}, WIDE, "nothing"),
    "bare": ({"bare_reduction": True}, WIDE, "channel"),
    "bare_alone": (
        {"bare_reduction": True, "num_dilated": 0, "norm_final": False},
        WIDE,
        "channel",
    ),
    "norm_dilated": ({"norm_dilated": True}, WIDE, "channel"),
    "norm_reduction": ({"norm_hidden": True, "norm_dilated": False}, WIDE, "channel"),
    "bare_of_normed": ({"preset": "official", "bare_reduction": True}, WIDE, "channel"),
}


def make(name: str, dtype: torch.dtype = torch.float32, channels: int = 37) -> BAM:
    return randomize(BAM(channels, 4, **CASES[name][0])).to(dtype)


@pytest.mark.parametrize("train", (False, True), ids=("eval", "train"))
@pytest.mark.parametrize("backend", ("cpp", "triton", "reference"))
@pytest.mark.parametrize("name", CASES)
def test_numbers_on_every_backend(name, backend, train):
    """Output, gradients and statistics, against the reference in float64."""
    size = CASES[name][1]
    for dtype in (torch.float64, torch.float32):
        ours = make(name, dtype).train(train)
        truth = twin(ours, torch.float64)
        x, dout = torch.randn(4, 37, *size, dtype=dtype), torch.randn(4, 37, *size, dtype=dtype)
        with use_backend(backend), torch.no_grad():
            out = None if train else ours(x)  # inference in one operator, where it is one
        with use_backend(backend):
            found = step(ours, x, dout)
        want = step(truth, x.double(), dout.double())
        bound = PARITY[dtype]
        assert list(found) == list(want)
        assert relative_error(found["out"], want["out"]) < bound
        assert out is None or relative_error(out, want["out"]) < bound
        grads = [torch.cat([f[k].flatten() for k in want if k[0] == "d"]) for f in (found, want)]
        assert relative_error(*grads) < 10 * bound
        if dtype == torch.float64:
            for key, value in want.items():
                if not value.is_floating_point():
                    assert torch.equal(found[key], value)
                elif value.norm() > 1e-9 * want["dx"].norm():  # not zero but for rounding
                    assert relative_error(found[key], value) < 1e-5, key


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("name", ("changzy00", "fightingcv", "fightingcv_as_theirs", "square"))
def test_half_types(name, dtype):
    ours = make(name, dtype, 64).eval()
    x = torch.randn(2, 64, *CASES[name][1], dtype=dtype)
    want = twin(ours, torch.float64)(x.double())
    for backend in ("cpp", "triton"):
        with use_backend(backend), torch.no_grad():
            assert relative_error(ours(x), want) < PARITY[dtype]


@pytest.mark.parametrize("name", CASES)
def test_what_is_fused(name):
    """The fused paths refuse what they do not have, by themselves; explain tells why."""
    ours, fused = make(name).eval(), CASES[name][2]
    x = torch.randn(2, 37, *CASES[name][1])
    branches = ours.channel, ours.spatial
    with use_backend("triton"), torch.no_grad():
        arguments = None
        if unfusable(*branches) is None:
            arguments = inference.arguments(x, *branches, "sum", True)
            trains = training.refine(x, *branches, "sum", True, "triton")
            assert (trains is not None) == (fused == "whole")
        found = explain(ours, x)
    assert (found.backend == "reference") == (fused == "nothing")
    assert (arguments is not None) == (fused in ("whole", "spatial"))
    assert (unfusable_spatial(ours.spatial, x) is None) == (
        fused in ("whole", "spatial", "nothing")
    )
    named = {note.split(" runs")[0] for note in found.notes}
    assert (
        named
        == {
            "whole": set(),
            "nothing": set(),
            "spatial": {"the channel MLP"},
            "channel": {"the spatial branch"},
            "neither": {"the channel MLP", "the spatial branch"},
        }[fused]
    )
    if name in ("norm_dilated", "norm_reduction"):
        assert "norms follow some of its hidden layers only" in found.notes[0]
    if fused == "nothing":
        assert "pool='square'" in found.reasons["triton"]


def test_the_presets_layers():
    """The keys that each has, beside the paper's, or lacks."""
    keys = {name: set(reference.BAM(64, preset=name).state_dict()) for name in PRESETS}
    layers = {name: {key.rpartition(".")[0] for key in each} for name, each in keys.items()}
    inside = {"channel.hidden_norm.0", *(f"spatial.hidden_norm.{i}" for i in range(3))}
    final = {"channel.norm", "spatial.norm"}
    assert layers["official"] == layers["pytorchcv"] == layers["paper"] - final | inside
    assert layers["changzy00"] == layers["paper"] | inside - {
        "channel.hidden_norm.0",
        "spatial.hidden_norm.0",
    }
    assert layers["fightingcv"] == layers["official"] | {
        "channel.fc.2",
        "channel.fc.3",
        "channel.hidden_norm.1",
        "channel.hidden_norm.2",
        "spatial.dilated.2",
        "spatial.hidden_norm.3",
    }
    combine = {name: resolve(64, preset=name).combine for name in PRESETS}
    assert combine == {
        "paper": "sum",
        "official": "product",
        "pytorchcv": "product",
        "fightingcv": "sum",
        "changzy00": "sum",
    }


def test_options_of_the_wrong_kind():
    for options, problem, text in (
        ({"pool": "max"}, ValueError, "pool: expected one of global, square, got 'max'"),
        ({"padding": 5}, ValueError, "padding: expected at most dilation=4, .* got 5"),
        ({"padding": -1}, ValueError, "padding: expected at least 0, got -1"),
        ({"padding": 1.0}, TypeError, "padding: expected an int, got float"),
        ({"norm_dilated": 1}, TypeError, "norm_dilated: expected a bool, got int"),
        ({"bare_reduction": "no"}, TypeError, "bare_reduction: expected a bool, got str"),
        ({"preset": "cbam"}, ValueError, "preset: expected one of paper, official, pytorchcv"),
    ):
        with pytest.raises(problem, match=text):
            BAM(64, **options)
    assert BAMConfig(64).padding == 4 and BAMConfig(64, dilation=3).shrinkage == 0
    assert BAMConfig(64, num_dilated=3, dilation=2, padding=1).shrinkage == 6


@pytest.mark.parametrize("backend", ("cpp", "triton", "reference"))
def test_sizes_that_a_client_does_not_take(backend):
    square, seven = make("square").eval(), make("fightingcv_as_theirs").eval()
    with use_backend(backend), torch.no_grad():
        for size in ((5, 4), (5, 10), (1, 2)):
            with pytest.raises(ValueError, match=r"x: expected H <= W < 2 H.*got shape \[2, 37, "):
                square(torch.randn(2, 37, *size))
        for size in ((7, 8), (8, 7), (9, 9), (1, 1)):
            with pytest.raises(ValueError, match=r"x: expected H = W = 7, .*got shape \[2, 37, "):
                seven(torch.randn(2, 37, *size))


# --- the warning of inputs on which the authors' pooling differs -----------------------------


def forward(module: nn.Module, *sizes: tuple[int, int]) -> list[str]:
    """The warnings of it, each as told where the module is called."""
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for size in sizes:
            module(torch.randn(2, 32, *size))
    ours = [each for each in caught if str(each.message).startswith("preset=")]
    assert all(each.filename == __file__ for each in ours)
    return [str(each.message) for each in ours]


@pytest.fixture
def not_yet_warned(monkeypatch):
    monkeypatch.setattr("bam_kernels.modules._warned", False)


@pytest.mark.usefixtures("not_yet_warned")
def test_warned_once():
    (message,) = forward(BAM(32, preset="official").eval(), (5, 5), (5, 7), (7, 5), (6, 7))
    assert "5x7" in message and "pool='square'" in message and "pool='global'" in message


@pytest.mark.usefixtures("not_yet_warned")
def test_not_warned():
    for options in (
        {"preset": "official", "pool": "global"},
        {"preset": "official", "pool": "square"},
        {"preset": "pytorchcv"},
        {},
    ):
        assert not forward(BAM(32, **options).eval(), (5, 7))
    assert not forward(BAM(32, preset="official").eval(), (7, 7))


@pytest.mark.usefixtures("not_yet_warned")
def test_the_warning_ties_no_program_to_sizes():
    ours = BAM(32, preset="official").eval()
    x = torch.randn(3, 32, 5, 7)
    dynamic = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.export.export(
            ours, (x,), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
        )
        assert torch.compile(ours, fullgraph=True, backend="eager")(x).shape == x.shape
        traced = torch.jit.trace(ours, (x,))
        for size in ((6, 6), (9, 4)):
            y = torch.randn(2, 32, *size)
            want = reference.BAM.forward(ours, y)
            assert relative_error(program.module()(y), want) < 1e-5
            assert relative_error(traced(y), want) < 1e-5


def test_a_module_that_was_pickled_before_the_options_existed():
    """Its branches have no attributes of these names."""
    ours = randomize(BAM(32, 4)).eval()
    assert not {"pool", "bare_reduction", "shrinkage"} & (
        vars(ours.channel).keys() | vars(ours.spatial).keys()
    )
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    x = torch.randn(2, 32, 5, 7)
    with torch.no_grad():
        assert torch.equal(torch.load(file, weights_only=False)(x), ours(x))
