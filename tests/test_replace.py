"""replace_bam: every known BAM, its numbers before and after, and what is left alone."""

from __future__ import annotations

import copy
import io
import re

import client_doubles as clients
import pytest
import torch
from portable import calm_norms
from pytorchcv import model_provider
from pytorchcv.models import bamresnet
from test_module import randomize
from tolerances import relative_error
from torch import Tensor, nn

from bam_kernels import (
    BAM,
    attention_maps,
    convert_state_dict,
    explain,
    reference,
    replace_bam,
    strip,
    use_backend,
)

pytestmark = pytest.mark.usefixtures("seed", "large_tiles")

# By client: what makes its BAM, an input's size, and whether that is all it takes.
CLIENTS = {
    "official": (lambda: clients.OfficialBAM(64), (9, 9)),
    "official_wide": (lambda: clients.OfficialBAM(48, 8, dilation=2), (6, 10)),
    "pytorchcv": (lambda: clients.pytorchcv_bam(64), (6, 11)),
    "fightingcv_any_size": (lambda: clients.fightingcv_bam(48, dia_val=1), (9, 6)),
    "fightingcv": (lambda: clients.fightingcv_bam(37, 9), (7, 7)),
    "changzy00": (lambda: clients.Changzy00BAM(72), (5, 12)),
    "reference": (lambda: reference.BAM(40, 8, combine="max"), (5, 12)),
}
BACKENDS = ("cpp", "triton", "reference")


def options(name: str) -> dict[str, str]:
    return {"pool": "square"} if name == "official_wide" else {}


def wrapped(made: nn.Module, channels: int) -> nn.Sequential:
    """A BAM in a network, with random weights and statistics, and a head that sums unevenly."""
    model = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), made, nn.Conv2d(channels, 2, 1))
    return randomize(model)


def network(name: str) -> tuple[nn.Sequential, Tensor]:
    make, size = CLIENTS[name]
    made = make()
    conv = next(m for m in made.modules() if isinstance(m, nn.Conv2d))
    return wrapped(made, conv.in_channels), torch.randn(4, 3, *size)


def run(model: nn.Module, x: Tensor, train: bool) -> dict[str, Tensor]:
    """The output, all gradients, and all buffers."""
    model.train(train)
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    (out * torch.cos(3 * out.detach())).sum().backward()
    found = {"out": out.detach(), "dx": x.grad}
    found |= {f"d{id(p)}": p.grad.clone() for p in model.parameters()}
    return found | {f"b{id(b)}": b.clone() for b in model.buffers()}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("float32", "float64"))
@pytest.mark.parametrize("train", (False, True), ids=("eval", "train"))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CLIENTS)
def test_the_numbers_are_the_clients(name, backend, train, dtype):
    """The same model and the same weights, before and after."""
    model, x = network(name)
    model, x = model.to(dtype), x.to(dtype)
    buffers = {id(b): b.clone() for b in model.buffers()}
    want = run(model, x, train)
    for b in model.buffers():
        b.copy_(buffers[id(b)])
    report = replace_bam(model, **options(name))
    assert [r.names for r in report.replaced] == [("1",)] and not report.left_alone
    assert type(model[1]) is BAM and report.model is model
    with use_backend(backend):
        got = run(model, x, train)
        assert name == "official_wide" or explain(model[1], model[0](x)).backend == backend
    assert got.keys() == want.keys()
    fine = 1e-6 if dtype == torch.float32 else 1e-12
    assert relative_error(got["out"], want["out"]) < fine
    assert relative_error(got["dx"], want["dx"]) < 10 * fine
    grads = [key for key in want if key.startswith("d") and key != "dx"]
    assert relative_error(*(torch.cat([f[k].flatten() for k in grads]) for f in (got, want))) < (
        10 * fine
    )
    for key, value in want.items():
        if key.startswith("b"):
            tolerance = {"rtol": 10 * fine, "atol": fine} if value.is_floating_point() else {}
            torch.testing.assert_close(got[key], value, **(tolerance or {"rtol": 0, "atol": 0}))
    if dtype == torch.float64:
        # Each by itself; what is zero but for rounding, a bias before batch statistics, left out.
        kept = [key for key in grads if want[key].norm() > 1e-9 * want["dx"].norm()]
        assert len(kept) > len(grads) / 2
        for key in kept:
            assert relative_error(got[key], want[key]) < 1e-5


def test_a_second_call_and_strip_find_the_same_parameters():
    model, x = network("pytorchcv")
    model.eval()
    parameters = {id(p): p.detach().clone() for p in model.parameters()}
    buffers = {id(b) for b in model.buffers()}
    random_state = torch.get_rng_state()
    with torch.no_grad():
        want = model(x)
        replace_bam(model)
        assert torch.equal(torch.get_rng_state(), random_state)
        ours = model[1]
        report = replace_bam(model)
        assert not report.replaced and report.already == ("1",) and model[1] is ours
        assert {id(p) for p in model.parameters()} == set(parameters)
        assert all(torch.equal(p, parameters[id(p)]) for p in model.parameters())
        assert {id(b) for b in model.buffers()} == buffers
        strip(model)
        assert not isinstance(model[1], reference.BAM)
        assert relative_error(model(x), want) < 1e-6
    assert {id(p) for p in model.parameters()} == set(parameters)
    (left,) = replace_bam(model).left_alone
    assert left.names == ("1",) and "strip()" in left.reason


def test_modes_frozen_parameters_types_and_devices_stay():
    model, _ = network("pytorchcv")
    model[1].to(torch.bfloat16).train()
    model[1].sp_att.eval()
    model[1].sp_att.dil_convs.conv2.bn.train()
    model[1].ch_att.requires_grad_(False)
    norm = model[1].sp_att.dil_convs.conv2.bn
    replace_bam(model)
    ours = model[1]
    assert ours.training and ours.channel.training and not ours.spatial.training
    assert ours.spatial.hidden_norm[2] is norm and norm.training
    assert not ours.spatial.hidden_norm[1].training and not ours.spatial.dilated.training
    assert not any(p.requires_grad for p in ours.channel.parameters())
    assert all(p.requires_grad for p in ours.spatial.parameters())
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    meta = nn.Sequential(clients.Changzy00BAM(32).to("meta"))
    replace_bam(meta)
    assert type(meta[0]) is BAM and {p.device.type for p in meta.parameters()} == {"meta"}


def test_an_optimizer_from_before_steps_the_same_weights():
    model, x = network("changzy00")
    twin = copy.deepcopy(model)
    pairs = [(n, torch.optim.SGD(n.parameters(), 0.05, momentum=0.9)) for n in (model, twin)]
    for step in range(3):
        if step == 1:
            replace_bam(model)
        for net, optimizer in pairs:
            net.train()
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    ours = convert_state_dict(model.state_dict(), "bam_kernels", "changzy00")
    for key, value in twin.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(ours[key], value, rtol=1e-5, atol=1e-6), key


def test_hooks_and_attributes_go_along():
    model, x = network("pytorchcv")
    bam, calls = model[1], []
    before = bam.register_forward_pre_hook(lambda *_: calls.append("pre"))
    bam.register_forward_hook(lambda m, args, out, **_: calls.append(type(m)), always_call=True)
    bam.register_full_backward_hook(lambda *_: calls.append("backward"))
    bam.register_state_dict_post_hook(lambda *_: calls.append("state_dict"))
    bam.register_load_state_dict_pre_hook(lambda m, *_: calls.append(("load", type(m))))
    bam.sp_att.init_conv.conv.register_forward_hook(lambda *_: calls.append("layer"))
    bam.i, bam.f, bam.type = 7, -1, "BamBlock"
    replace_bam(model)
    del bam
    model(x).sum().backward()
    assert calls == ["pre", "layer", BAM, "backward"]
    calls.clear()
    model.load_state_dict(model.state_dict())
    assert calls == ["state_dict", ("load", BAM)]
    calls.clear()
    before.remove()
    model(x)
    assert calls == ["layer", BAM]
    assert (model[1].i, model[1].f, model[1].type) == (7, -1, "BamBlock")


def test_one_module_in_two_places_attributes_and_the_model_itself():
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = clients.Changzy00BAM(32)
            self.stages = nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), self.first)})

        def forward(self, x: Tensor) -> Tensor:
            return self.stages["a"](self.second(self.first(x)))

    model = randomize(Holder()).eval()
    x = torch.randn(2, 32, 5, 7)
    with torch.no_grad():
        want = model(x)
        other = replace_bam(model, inplace=False)
        assert type(model.first) is clients.Changzy00BAM and other.model is not model
        (replaced,) = replace_bam(model).replaced
        assert replaced.names == ("first", "second", "stages.a.1")
        assert model.first is model.second is model.stages["a"][1] is replaced.module
        for net in (model, other.model):
            assert relative_error(net(x), want) < 1e-6
    root = clients.Changzy00BAM(32)
    report = replace_bam(root)
    assert type(report.model) is BAM and type(root) is clients.Changzy00BAM
    assert "the model itself" in str(report)
    assert {id(p) for p in root.parameters()} == {id(p) for p in report.model.parameters()}


def test_norms_of_other_kinds_and_of_several_processes():
    """SyncBatchNorm, which runs on no CPU once there are processes; norms without parameters."""
    made = clients.pytorchcv_bam(32)
    made.ch_att.init_fc.bn = nn.BatchNorm1d(2, affine=False, track_running_stats=False)
    model = nn.Sequential(made, nn.SyncBatchNorm.convert_sync_batchnorm(clients.pytorchcv_bam(32)))
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for part in model.modules():
            if isinstance(part, nn.SyncBatchNorm):
                part.process_group = torch.distributed.group.WORLD
        with pytest.raises(ValueError, match="SyncBatchNorm"):
            model[1](torch.randn(2, 32, 5, 7))
        report = replace_bam(model)
    finally:
        torch.distributed.destroy_process_group()
    assert [r.names for r in report.replaced] == [("0",), ("1",)]
    assert type(model[1].spatial.hidden_norm[2]) is nn.SyncBatchNorm
    assert type(model[0].channel.hidden_norm[0]) is nn.BatchNorm1d


def test_the_report_reads():
    options = {"preset": "official", "combine": "sum"}
    model = nn.Sequential(
        clients.OfficialBAM(64), clients.fightingcv_bam(48, 8, 1), reference.BAM(32, **options)
    )
    model.add_module("again", model[0])
    text = str(replace_bam(nn.Sequential(model, clients.PyramidBAM(32))))
    lines = [re.sub(" +", " ", line) for line in text.splitlines()]
    assert lines[:4] == [
        "name was became",
        "0.0, 0.again BAM (official) BAM(64, preset='official')",
        "0.1 BAMBlock (fightingcv) BAM(48, reduction=8, preset='fightingcv', dilation=1)",
        "0.2 BAM (reference) BAM(32, norm_hidden=True, norm_final=False, norm_dilated=True)",
    ]
    assert lines[4].startswith("note: the authors' code pools") and len(lines) == 6
    assert lines[5].startswith("left alone: 1 (BAM): its layers are those of no known BAM")


def test_a_network_without_bam():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    report = replace_bam(model)
    assert str(report) == "no BAM was replaced" and report.model is model


def test_errors():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        replace_bam(3)
    model = nn.Sequential(clients.Changzy00BAM(32))
    with pytest.raises(ValueError, match="pool: expected one of global, square, got 'max'"):
        replace_bam(model, pool="max")
    assert type(model[0]) is clients.Changzy00BAM


def test_what_was_registered_on_a_reference_stays():
    model = nn.Sequential(reference.BAM(32))
    model[0].register_buffer("seen", torch.ones(3), persistent=False)
    model[0].scale = nn.Parameter(torch.ones(2))
    keys, parameters, seen = list(model.state_dict()), list(model.parameters()), model[0].seen
    replace_bam(model)
    assert type(model[0]) is BAM and model[0].seen is seen
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


# --- the authors' pooling ---------------------------------------------------------------------


def test_a_fork_that_pools_globally_is_known_by_what_it_computes(recwarn, monkeypatch):
    monkeypatch.setattr("bam_kernels.modules._warned", False)
    made = randomize(clients.OfficialBAM(32)).eval()
    made.channel_att.pooling = lambda x: x.mean(dim=(2, 3), keepdim=True)
    x = torch.randn(2, 32, 9, 5)
    with torch.no_grad():
        want = made(x)
        report = replace_bam(made, pool="square")
        assert relative_error(report.model(x), want) < 1e-6
    assert report.replaced[0].note is None
    assert not [each for each in recwarn.list if "preset=" in str(each.message)]


def test_what_the_authors_pooling_becomes(monkeypatch):
    monkeypatch.setattr("bam_kernels.modules._warned", False)
    made = randomize(clients.OfficialBAM(96, 4)).eval()
    wide = torch.randn(2, 96, 6, 9)
    report = replace_bam(made)
    assert "pool='square'" in report.replaced[0].note and report.replaced[0].note in str(report)
    exact = replace_bam(made, pool="square").model
    assert exact.config.pool == "square"
    with torch.no_grad():
        report.model(torch.randn(2, 96, 6, 6))
        with pytest.warns(UserWarning, match="6x9"):
            ours = report.model(wide)
        assert relative_error(exact(wide), made(wide)) < 1e-6
        assert relative_error(ours, made(wide)) > 1e-4
        for size in ((9, 6), (6, 12)):
            x = torch.randn(2, 96, *size)
            with pytest.raises(RuntimeError):
                made(x)
            with pytest.raises(ValueError, match="H <= W < 2 H"):
                exact(x)


# --- a whole network --------------------------------------------------------------------------


def bam_resnet50() -> nn.Module:
    """pytorchcv's, with random norms and biases; and a module that is called BAM and is none."""
    model = calm_norms(model_provider.get_model("bam_resnet50", num_classes=10))
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)  # its own is made for 224 x 224
    model.add_module("unrelated", clients.PyramidBAM(10))
    with torch.no_grad():
        for bam in (m for m in model.modules() if isinstance(m, bamresnet.BamBlock)):
            for name, p in bam.named_parameters():
                if name.endswith("bias"):  # those of convolutions are zero at first
                    p.normal_(std=0.2)
    return model


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    return {k: relative_error(a[k], v) for k, v in b.items() if v.is_floating_point()}


def test_pytorchcvs_bam_resnet50():
    """Logits, keys, and a step of SGD, before and after."""
    model, x = bam_resnet50(), torch.randn(3, 3, 64, 96)
    twin, unrelated, keys = copy.deepcopy(model), model.unrelated, list(model.state_dict())
    report = replace_bam(model)
    assert [r.client for r in report.replaced] == ["pytorchcv"] * 3
    assert [x.names for x in report.left_alone] == [("unrelated",)]
    assert model.unrelated is unrelated
    with torch.no_grad():
        logits = relative_error(model.eval()(x), twin.eval()(x))
    print(f"logits: {logits:.1e}")
    assert logits < 1e-5

    back = convert_state_dict(model.state_dict(), "bam_kernels", "pytorchcv")
    assert sorted(back) == sorted(keys)
    assert all(torch.equal(back[key], value) for key, value in twin.state_dict().items())
    forth = convert_state_dict(twin.state_dict(), "pytorchcv", "bam_kernels")
    assert sorted(forth) == sorted(model.state_dict())
    model.load_state_dict(forth)

    # In float64: in float32 what is rounded otherwise grows on the way back through 16 residual
    # blocks with batch statistics, to some 1e-6 of the stem's weights.
    for net in (model, twin):
        net.double().train()
        optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
        net(x.double()).logsumexp(1).mean().backward()
        optimizer.step()
    after = convert_state_dict(model.state_dict(), "bam_kernels", "pytorchcv")
    worst = max(differences(after, twin.state_dict()).values())
    moved = differences(twin.state_dict(), {k: v.double() for k, v in back.items()})
    moved = [v for k, v in moved.items() if "bam.sp_att" in k and k.endswith("conv.weight")]
    print(f"after a step: {worst:.1e}, of weights in BAM that moved by {min(moved):.1e} and more")
    assert worst < 1e-6 and worst < 1e-3 * min(moved)


def test_what_replaced_modules_go_on_to():
    """Attention maps, torch.save and torch.export of a model that was swapped."""
    model, x = network("fightingcv_any_size")
    replace_bam(model)
    model.eval()
    with torch.no_grad():
        want = model(x)
        with attention_maps(model) as maps:
            model(x)
        assert list(maps) == ["1"]
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        assert relative_error(again(x), want) < 1e-6
        program = torch.export.export(model, (x,))
        assert relative_error(program.module()(x), want) < 1e-6
