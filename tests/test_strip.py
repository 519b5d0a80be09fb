"""strip: the plain modules of a network, which need torch alone."""

from __future__ import annotations

import copy

import pytest
import torch
from portable import MODULES, OTHERS, TRACED, assert_equal_on, network, run_python
from test_module import randomize
from tolerances import relative_error
from torch import nn

import bam_kernels
from bam_kernels import BAM, attention_maps, insert_bam, reference, strip

pytestmark = pytest.mark.usefixtures("seed", "large_tiles")


def of_ours(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if type(m).__module__.startswith("bam_kernels")]


@pytest.mark.parametrize("kind", MODULES)
def test_same_numbers_parameters_and_keys(kind):
    model = network(kind)
    twin = copy.deepcopy(model)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    buffers = list(model.buffers())
    assert strip(model) is model and not of_ours(model)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))
    assert not any(part.training for part in model.modules())
    assert_equal_on(model, twin, (TRACED, *OTHERS))


@pytest.mark.parametrize("kind", ("paper", "official"))
def test_trains_as_before(kind):
    """Batch statistics, running statistics and gradients, in float64."""
    model = network(kind).double().train()
    plain = strip(model, inplace=False)
    assert of_ours(model) and not of_ours(plain)
    x = torch.randn(4, 3, 7, 9, dtype=torch.float64)
    for net in (model, plain):
        (net(x) * x[:, :1]).sum().backward()
    for (key, a), (other, b) in zip(
        plain.named_parameters(), model.named_parameters(), strict=True
    ):
        assert key == other and a is not b
        if b.grad.norm() > 1e-9:  # not zero but for rounding, as a bias's before batch statistics
            assert relative_error(a.grad, b.grad) < 1e-7, key
    for (key, a), b in zip(plain.named_buffers(), model.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), key


def test_modes_and_frozen_parameters_stay():
    model = BAM(24, 4, preset="official", dtype=torch.bfloat16).train()
    model.spatial.hidden_norm[1].eval()
    model.channel.requires_grad_(False)
    modes = {name: part.training for name, part in model.named_modules()}
    needs = {name: p.requires_grad for name, p in model.named_parameters()}
    plain = strip(model)
    assert {name: part.training for name, part in plain.named_modules()} == modes
    assert {name: p.requires_grad for name, p in plain.named_parameters()} == needs
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    plain.eval()
    assert not any(part.training for part in plain.modules())


def test_a_root_a_nested_and_a_shared_module():
    shared = BAM(24, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, reference.BAM(24, 4))})
    randomize(model).eval()
    strip(model)
    assert model["a"] is model["b"][0] and not of_ours(model)
    again = model["a"]
    assert strip(model)["a"] is again  # a second time nothing is left to do
    root = randomize(BAM(24, 4)).eval()
    x = torch.randn(2, 24, 5, 7)
    with torch.no_grad():
        assert relative_error(strip(root, inplace=False)(x), root(x)) < 1e-5
    branch = randomize(reference.SpatialBranch(root.config)).eval()
    assert relative_error(strip(branch)(x), branch(x)) < 1e-6


def test_hooks_stay():
    model, calls = BAM(24, 4).eval(), []
    handle = model.register_forward_hook(lambda *_: calls.append("module"))
    model.channel.register_forward_hook(lambda *_: calls.append("branch"))
    model.spatial.reduce.register_forward_pre_hook(lambda *_: calls.append("layer"))
    plain = strip(model)
    plain(torch.randn(2, 24, 5, 7))
    assert calls == ["branch", "layer", "module"]
    handle.remove()
    plain(torch.randn(2, 24, 5, 7))
    assert calls[3:] == ["branch", "layer"]


def test_without_us_a_saved_model_runs(tmp_path):
    """torch.save of whole models, an insertion by hook among them, TorchScript and a state_dict
    load and give the same numbers where importing bam_kernels fails."""
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.Sequential(nn.Conv2d(24, 24, 1), nn.ReLU()))
    insert_bam(model, after=["0", "1"], reduction=4)
    randomize(model).eval()
    x = torch.randn(2, 3, 9, 11)
    with torch.no_grad():
        want = model(x)
    plain = strip(model)
    official = strip(network("official"))
    with torch.no_grad():
        torch.save({"x": x, "want": want, "official": official(x)}, tmp_path / "io.pt")
    torch.save(plain, tmp_path / "model.pt")
    torch.save(official, tmp_path / "official.pt")
    torch.save(copy.deepcopy(plain), tmp_path / "copy.pt")
    torch.jit.script(official).save(str(tmp_path / "script.pt"))
    torch.export.save(torch.export.export(plain, (x,)), tmp_path / "program.pt2")
    out = run_python(
        """
import torch
io = torch.load("io.pt")
def check(name, call, want):
    with torch.no_grad():
        error = ((call(io["x"]) - want).norm() / want.norm()).item()
    assert error < 1e-5, (name, error)
for name in ("model.pt", "copy.pt"):
    check(name, torch.load(name, weights_only=False), io["want"])
check("official.pt", torch.load("official.pt", weights_only=False), io["official"])
check("script.pt", torch.jit.load("script.pt"), io["official"])
check("program.pt2", torch.export.load("program.pt2").module(), io["want"])
try:
    import bam_kernels
except ImportError:
    print("without")
""",
        tmp_path,
        without_us=True,
    )
    assert out.split() == ["without"]


class Subclass(BAM):
    pass


def test_errors_leave_the_model_alone():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
        strip(3)
    model = nn.Sequential(BAM(24, 4), Subclass(24, 4))
    with pytest.raises(TypeError, match=r"model: '1': .*subclass Subclass"):
        strip(model)
    assert type(model[0]) is BAM
    model = nn.Sequential(BAM(24, 4))
    with attention_maps(model), pytest.raises(ValueError, match="'0': expected no observer"):
        strip(model)
    model[0].forward = lambda x: x
    with pytest.raises(ValueError, match="'0': expected the class's own forward"):
        strip(model)


def test_a_model_without_bam_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    assert bam_kernels.strip(model) is model and type(model[0]) is nn.Conv2d
