"""insert_bam: the places, the state_dict, the channels, and what it leaves alone."""

from __future__ import annotations

import copy
import io
import pickle
import random

import pytest
import torch
from torch import Tensor, nn

from bam_kernels import BAM, SqueezeExcite, reference, use_backend
from bam_kernels.integrate import insert_bam


class Block(nn.Module):
    """A residual block, [N, 16, H, W] to [N, C, H, W]: no Sequential."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.skip = nn.Conv2d(16, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)) + self.skip(x))


class Reversed(nn.Sequential):
    """A Sequential of its own kind: what is added last runs first."""

    def forward(self, x: Tensor) -> Tensor:
        for module in reversed(list(self)):
            x = module(x)
        return x


class Segmenter(nn.Module):
    """An encoder and a decoder with a skip connection, as segmentation networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
        self.down = nn.MaxPool2d(2)
        self.encoder = Block(32)
        self.decoder = nn.Conv2d(48, 24, 3, padding=1)
        self.head = nn.Conv2d(24, 5, 1)
        self.unused = nn.Conv2d(3, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        coarse = nn.functional.interpolate(self.encoder(self.down(fine)), fine.shape[2:])
        return self.head(torch.relu(self.decoder(torch.cat([fine, coarse], dim=1))))


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Block(32), nn.Conv2d(32, 4, 1))


def randomise_norms(module: nn.Module) -> None:
    """Fresh batch norms hide a wrong order or a lost statistic: give them values."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.weight.uniform_(0.5, 2.0)
                part.bias.normal_()
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2.0)


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 20, 12)))


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    """Every test here draws its inputs from a fresh seed."""


# --- where and how it runs --------------------------------------------------------------------


def test_segmentation_network_forward_is_layer_then_bam():
    model = Segmenter()
    plain = copy.deepcopy(model)
    inserted = insert_bam(model, ["encoder", "stem", "decoder"], reduction=4)
    assert list(inserted) == ["encoder.bam", "stem.bam", "decoder.bam"]
    assert [bam.config.channels for bam in inserted.values()] == [32, 16, 24]
    for part in (model, plain):
        part.eval()
    for bam in inserted.values():
        randomise_norms(bam)
    bams = {path.removesuffix(".bam"): bam for path, bam in inserted.items()}
    x = image()
    fine = bams["stem"](plain.stem(x))
    coarse = bams["encoder"](plain.encoder(plain.down(fine)))
    joined = torch.cat([fine, nn.functional.interpolate(coarse, fine.shape[2:])], dim=1)
    expected = plain.head(torch.relu(bams["decoder"](plain.decoder(joined))))
    torch.testing.assert_close(model(x), expected)


def test_plain_sequential_runs_it_as_its_last_child_and_others_in_a_hook():
    model = small_net()
    insert_bam(model, ["1"])
    assert model[1]._forward_hooks and list(model[1]._modules)[-1] == "bam"
    outer = nn.Sequential(small_net())
    insert_bam(outer, ["0"], reduction=2)
    assert not outer[0]._forward_hooks and list(outer[0]._modules)[-1] == "bam"


def test_a_layer_named_twice_is_refined_once_in_the_order_given():
    inserted = insert_bam(small_net(), ["1", "[01]", "0"], reduction=2)
    assert list(inserted) == ["1.bam", "0.bam"]


def test_a_layer_under_two_names_is_refined_once_and_called_twice():
    shared = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    inserted = insert_bam(model, ["2", "0"], module=reference.BAM, reduction=1)
    assert list(inserted) == ["2.bam"]
    bam = inserted["2.bam"].eval()
    x = image()
    plain = copy.deepcopy(shared)
    plain._forward_hooks.clear()
    torch.testing.assert_close(model(x), bam(plain(torch.relu(bam(plain(x))))))


def test_globs_leave_out_the_insides_of_a_bam():
    model = small_net()
    insert_bam(model, ["0"])
    inserted = insert_bam(model, ["1.*"])
    assert list(inserted) == ["1.conv.bam", "1.norm.bam", "1.skip.bam"]
    with pytest.raises(ValueError, match="matches no layer"):
        insert_bam(model, ["*.spatial.reduce"])


# --- what is inserted -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", [BAM, SqueezeExcite, reference.BAM, reference.SqueezeExcite, nn.BatchNorm2d]
)
def test_module_is_what_goes_in(module):
    options = {} if module is nn.BatchNorm2d else {"reduction": 4}
    inserted = insert_bam(small_net(), ["1"], module=module, **options)
    assert type(inserted["1.bam"]) is module
    if options:
        assert inserted["1.bam"].config.channels == 32
        assert inserted["1.bam"].config.reduction == 4


def test_options_reach_the_bam():
    bam = insert_bam(small_net(), ["1"], preset="official", residual=False, dilation=2)["1.bam"]
    assert bam.config.combine == "product" and bam.config.norm_hidden
    assert not bam.config.residual and bam.config.dilation == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_mode_are_the_layers(dtype):
    model = small_net().to(dtype).train()
    model[1].eval()
    inserted = insert_bam(model, ["0", "1"])
    assert all(p.dtype == dtype for bam in inserted.values() for p in bam.parameters())
    modes = {path: {part.training for part in bam.modules()} for path, bam in inserted.items()}
    assert modes == {"0.bam": {True}, "1.bam": {False}}


class Elsewhere(Block):
    """A stage of a network that is spread over devices."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.conv.weight.device))


def test_device_is_the_layers():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), Elsewhere(32).to("meta"))
    bam = insert_bam(model, ["1"])["1.bam"]
    assert all(t.device.type == "meta" for t in bam.state_dict().values())
    assert {p.device.type for p in model[0].parameters()} == {"cpu"}


# --- what stays as it was ---------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything of a model that insert_bam may not touch, by value."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "modes": {name: part.training for name, part in model.named_modules()},
        "hooks": {name: len(part._forward_hooks) for name, part in model.named_modules()},
        "seen": list(getattr(model, "seen", [])),
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    assert {k: before[k] for k in ("modes", "hooks", "seen")} == {
        k: after[k] for k in ("modes", "hooks", "seen")
    }
    assert before["state"].keys() == after["state"].keys()
    assert all(torch.equal(value, after["state"][key]) for key, value in before["state"].items())


class Remembers(nn.Sequential):
    """A forward with side effects on its module, and one that draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = [*getattr(self, "seen", []), x.shape]
        return super().forward(x + torch.rand_like(x))


def test_run_for_the_channels_leaves_the_model_and_the_generators_alone():
    model = Remembers(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Dropout(), nn.Conv2d(16, 4, 1))
    recorded = []
    model[1].register_forward_hook(lambda module, args, output: recorded.append(output))
    model.train()[1].eval()
    before, torch_state, python_state = snapshot(model), torch.get_rng_state(), random.getstate()

    def make(channels: int) -> nn.Module:
        # The first thing after the run: no generator has moved yet.
        assert torch.equal(torch.get_rng_state(), torch_state)
        return nn.Identity()

    insert_bam(model, ["1"], module=make)
    assert random.getstate() == python_state and not recorded
    del model[1].bam
    model[1]._forward_hooks.popitem()
    assert_same(before, snapshot(model))


def bad_bam(channels: int, **options: object) -> nn.Module:
    if channels == 32:
        raise ValueError("reduction: made to fail")
    return BAM(channels, **options)


@pytest.mark.parametrize(
    ("after", "options", "error", "message"),
    [
        (["0", "9"], {}, ValueError, "'9' matches no layer of Remembers"),
        (["0", "1.norn"], {}, ValueError, "did you mean '1.norm'"),
        (["0", "x*"], {}, ValueError, r"'x\*' matches no layer"),
        (["0", ""], {}, ValueError, "'' matches no layer"),
        ("0", {}, TypeError, r"write after=\['0'\]"),
        (7, {}, TypeError, "after: expected a list of names, got int"),
        ([], {}, ValueError, "after: expected at least one name"),
        (["0", 1], {}, TypeError, r"after: expected names \(str\), got int"),
        (["0"], {"reduction": 17}, ValueError, r"after '0' \(16 channels\): channels"),
        (["0", "1"], {"module": bad_bam}, ValueError, r"after '1' \(32 channels\): reduction"),
        (["0"], {"reductoin": 4}, TypeError, "after '0'.*reductoin"),
        (["0"], {"combine": "min"}, ValueError, "after '0'.*combine.*'min'"),
        (["0"], {"device": "cpu"}, TypeError, "device: is that of the refined layer"),
        (["0"], {"module": 5}, TypeError, "module: expected a class like"),
        (["0"], {"module": str}, TypeError, "module: expected it to make.*got str"),
        (["0"], {"example_input": "big"}, TypeError, "example_input: expected a tensor"),
        (["0"], {"example_input": (1, 3.0, 8, 8)}, TypeError, "example_input"),
        (["1"], {"example_input": (1, 5, 8, 8)}, ValueError, "failed before '1'"),
    ],
)
def test_errors_name_the_argument_and_change_nothing(after, options, error, message):
    model = Remembers(*small_net())
    before = snapshot(model)
    with pytest.raises(error, match=message):
        insert_bam(model, after, **options)
    assert_same(before, snapshot(model))


def test_model_must_be_a_module():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        insert_bam([nn.Conv2d(3, 4, 1)], ["0"])


def test_a_layer_has_one_bam():
    model = small_net()
    insert_bam(model, ["1"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="'1' has one already \\(BAM\\)"):
        insert_bam(model, ["0", "1"])
    assert_same(before, snapshot(model))


def test_a_layer_that_is_never_called():
    model = Segmenter()
    with pytest.raises(ValueError, match="'unused' \\(Conv2d\\) is never called"):
        insert_bam(model, ["stem", "unused"])
    assert "stem.bam" not in dict(model.named_modules())


class Tokens(nn.Module):
    """Puts out what is asked for, other than [N, C, H, W]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> object:
        outputs = {
            "tuple": (x, x),
            "tokens": x.flatten(2),
            "channels last": x.permute(0, 2, 3, 1),
        }
        return outputs[self.kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("tuple", "'1' puts out a tuple"),
        ("tokens", r"'1' puts out a tensor of shape \[1, 16, 50176\]"),
        ("channels last", r"\[1, 224, 224, 16\], which looks like \[N, H, W, C\]"),
    ],
)
def test_output_must_be_a_feature_map(kind, message):
    with pytest.raises(ValueError, match=message):
        insert_bam(nn.Sequential(nn.Conv2d(3, 16, 1), Tokens(kind)), ["1"])


def test_a_layer_called_with_two_widths():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(torch.cat([self.act(x)] * 2, dim=1))

    with pytest.raises(ValueError, match=r"'act' is called 2 times and puts out \[3, 6\]"):
        insert_bam(Twice(), ["act"])


def test_containers_with_a_loop_of_their_own_are_refused():
    body = Reversed(nn.Conv2d(16, 32, 1), nn.Conv2d(3, 16, 1))
    with pytest.raises(ValueError, match="'0' is a Reversed, a container with a loop of its own"):
        insert_bam(nn.Sequential(body), ["0"])
    assert list(body._modules) == ["0", "1"]


# --- the channels, without a run that goes through --------------------------------------------


class Breaks(nn.Module):
    """Needs more than an image: its forward fails before or behind its layers."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early
        self.conv = nn.Conv2d(3, 24, 3)
        self.body = nn.Sequential(nn.Conv2d(24, 40, 1), nn.BatchNorm2d(40), nn.ReLU())
        self.block = Block(8)

    def forward(self, x: Tensor) -> Tensor:
        if self.early:
            raise RuntimeError("give me targets")
        x = self.body(self.conv(x))
        raise RuntimeError("give me targets")


@pytest.mark.parametrize("early", [True, False])
def test_channels_of_a_model_that_cannot_run(early):
    inserted = insert_bam(Breaks(early), ["conv", "body"])
    assert [bam.config.channels for bam in inserted.values()] == [24, 40]


def test_no_guess_where_a_class_does_not_tell():
    with pytest.raises(ValueError, match=r"failed before 'block'.*give me targets.*example_input="):
        insert_bam(Breaks(True), ["block"])


def test_example_input_as_a_shape_and_as_a_tensor():
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(7, 16, 3), Block(32), nn.AvgPool2d(3), nn.Flatten())

    with pytest.raises(ValueError, match="failed before '1'"):
        insert_bam(net(), ["1"])
    for example in ((1, 7, 9, 12), torch.Size((2, 7, 9, 9)), image(2, 7, 9, 12)):
        assert insert_bam(net(), ["1"], example_input=example)["1.bam"].config.channels == 32


# --- what a changed model goes through afterwards ---------------------------------------------


def hooked_and_chained() -> tuple[nn.Module, dict[str, nn.Module]]:
    model = nn.Sequential(small_net()[:2], nn.Conv2d(32, 4, 1))
    inserted = insert_bam(model, ["0", "0.1"], reduction=4)
    for bam in inserted.values():
        randomise_norms(bam)
    return model.eval(), inserted


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_state_dict(model: nn.Module) -> nn.Module:
    twin, _ = hooked_and_chained()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize(
    "travel", [copy.deepcopy, through_pickle, through_torch_save, through_state_dict]
)
def test_copies_give_the_same_and_are_their_own(travel):
    model, inserted = hooked_and_chained()
    x = image()
    expected = model(x)
    twin = travel(model)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for bam in inserted.values():
            bam.spatial.norm.bias.add_(3.0)
    assert not torch.equal(model(x), expected)
    assert torch.equal(twin(x), expected)


def test_compiles_without_a_graph_break():
    model, _ = hooked_and_chained()
    x = image()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_exports():
    model, _ = hooked_and_chained()
    x = image()
    with use_backend("reference"):
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x))


def test_trains():
    model, inserted = hooked_and_chained()
    model.train()
    model(image()).square().mean().backward()
    gradients = {
        f"{path}.{name}": p.grad for path, bam in inserted.items()
        for name, p in bam.named_parameters()
    }  # fmt: skip
    lost = [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()]
    assert not lost
    assert all(g.abs().max() > 0 for name, g in gradients.items() if name.endswith("norm.bias"))
