"""BAM where layers are configured by name: each package itself where it is installed, and a double
of it (by_name_doubles.py) everywhere."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import sys

import by_name_doubles
import pytest
import torch
from tolerances import relative_error
from torch import nn

from bam_kernels import BAM, SqueezeExcite, reference, use_backend
from bam_kernels.integrate import kernel_layers
from bam_kernels.integrate import kernels as our_kernels
from bam_kernels.integrate import ultralytics as our_ultralytics

pytestmark = pytest.mark.usefixtures("seed", "large_tiles")


def provide(request: pytest.FixtureRequest, name: str, package: str):
    """The package's module `name`, or the double of the package."""
    if request.param == "installed":
        if name.startswith("ultralytics"):  # writes its settings where this says
            folder = request.getfixturevalue("tmp_path_factory").mktemp("yolo")
            request.getfixturevalue("monkeypatch").setenv("YOLO_CONFIG_DIR", str(folder))
        return pytest.importorskip(name, reason=f"pip install {package}")
    monkeypatch = request.getfixturevalue("monkeypatch")
    return getattr(by_name_doubles, name.partition(".")[0])(monkeypatch)


def both(function):
    return pytest.fixture(params=["installed", "double"])(function)


@both
def tasks(request):
    return provide(request, "ultralytics.nn.tasks", "ultralytics")


@both
def registry(request):
    module = provide(request, "mmengine.registry", "mmengine")
    yield module
    for name in ("BAM", "BAMSqueezeExcite", "OfficialBAM"):
        module.MODELS.module_dict.pop(name, None)


@both
def kernels(request, monkeypatch):
    for layer in (reference.BAM, reference.SqueezeExcite):  # leave no attributes behind
        for name in ("kernel_layer_name", "kernel_condition"):
            monkeypatch.setattr(layer, name, None, raising=False)
    return provide(request, "kernels", "kernels")


# --- ultralytics ------------------------------------------------------------------------------


def yaml(*backbone: list) -> dict:
    return {"nc": 2, "backbone": [list(row) for row in backbone], "head": []}


@pytest.mark.parametrize("name", ["BAM", "Attention"])
def test_ultralytics_yaml_infers_the_channels(tasks, monkeypatch, name):
    monkeypatch.setattr(tasks, name, None, raising=False)
    our_ultralytics.register(name)
    model, _ = tasks.parse_model(
        yaml(
            [-1, 1, "Conv", [16, 3, 2]],
            [-1, 1, name, ["c2"]],
            [-1, 1, "Conv", [40, 3, 2]],
            [-1, 1, name, ["c2", 8]],
            [1, 2, name, ["ch", "f", 4]],
            [0, 1, name, [16, 2]],
        ),
        3,
    )
    bams = [model[1], model[3], *model[4], model[5]]
    assert all(type(bam) is BAM for bam in bams)
    assert [bam.config.channels for bam in bams] == [16, 40, 16, 16, 16]
    assert [bam.config.reduction for bam in bams] == [16, 8, 4, 4, 2]
    x = torch.randn(2, 3, 20, 28)
    twin = pickle.loads(pickle.dumps(model[:4])).eval()
    assert torch.equal(twin(x), model[:4].eval()(x))


def test_ultralytics_options_make_another_name(tasks, monkeypatch):
    for name in ("OfficialBAM", "SE"):
        monkeypatch.setattr(tasks, name, None, raising=False)
    our_ultralytics.register("OfficialBAM", preset="official")
    our_ultralytics.register("SE", SqueezeExcite)
    our_ultralytics.register("SE", SqueezeExcite, reduction=4)  # a name of ours is replaced
    rows = [[-1, 1, "Conv", [32, 3, 2]], [-1, 1, "OfficialBAM", ["c2", 4]], [-1, 1, "SE", ["c2"]]]
    model, _ = tasks.parse_model(yaml(*rows), 3)
    assert model[1].config.norm_hidden and model[1].config.reduction == 4
    assert type(model[2]) is SqueezeExcite and model[2].config.reduction == 4


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("Conv", ValueError, "name: expected one that is free, but 'Conv' is"),
        ("B A M", ValueError, "name: expected an identifier, got 'B A M'"),
        (3, TypeError, "name: expected a str, got int"),
    ],
)
def test_ultralytics_names_that_cannot_be(tasks, name, error, message):
    conv = tasks.Conv
    with pytest.raises(error, match=message):
        our_ultralytics.register(name)
    assert tasks.Conv is conv


@pytest.mark.parametrize("arguments", [[], ["ch"], [2.5], ["ch", "ch"], [True]])
def test_ultralytics_arguments_that_are_none(tasks, monkeypatch, arguments):
    monkeypatch.setattr(tasks, "BAM", None, raising=False)
    our_ultralytics.register()
    with pytest.raises(TypeError, match=r"channels|BAM: expected arguments"):
        tasks.parse_model(yaml([-1, 1, "Conv", [16, 3, 2]], [-1, 1, "BAM", arguments]), 3)


def test_ultralytics_detector_trains():
    """The whole way: strides, a loss and its backward."""
    folder = pytest.importorskip("ultralytics.nn.tasks", reason="pip install ultralytics")
    if hasattr(folder, "BAM"):
        del folder.BAM
    our_ultralytics.register()
    rows = yaml(
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "BAM", ["c2"]],
        [-1, 1, "Conv", [128, 3, 2]],
        [-1, 1, "BAM", ["c2"]],
    )
    rows["head"] = [[[1, 3], 1, "Detect", ["nc"]]]
    model = folder.DetectionModel({**rows, "width_multiple": 0.5}, ch=3, nc=2, verbose=False)
    assert [model.model[i].config.channels for i in (1, 3)] == [32, 64]
    assert model.stride.tolist() == [2, 4]
    outputs = model.train()(torch.randn(2, 3, 32, 32))
    outputs = outputs.values() if isinstance(outputs, dict) else outputs
    sum(o.square().mean() for o in outputs if isinstance(o, torch.Tensor)).backward()
    assert model.model[1].spatial.project.weight.grad.abs().max() > 0
    del folder.BAM


# --- mmengine ---------------------------------------------------------------------------------


def registered():
    """Importing the module registers; here each time anew."""
    sys.modules.pop("bam_kernels.integrate.mmengine", None)
    return importlib.import_module("bam_kernels.integrate.mmengine")


class Bottleneck(nn.Module):
    """A residual block with plugins behind its last convolution, as mmdet's ResNet builds it."""

    def __init__(self, build_plugin_layer, channels: int, plugins: list[dict]) -> None:
        super().__init__()
        self.conv3, self.names = nn.Conv2d(channels, channels, 1), []
        for plugin in plugins:
            cfg = dict(plugin["cfg"])
            name, layer = build_plugin_layer(
                cfg, in_channels=channels, postfix=cfg.pop("postfix", "")
            )
            self.add_module(name, layer)
            self.names.append(name)

    def forward(self, x):
        y = self.conv3(x)
        for name in self.names:
            y = getattr(self, name)(y)
        return torch.relu(y + x)


def test_mmengine_builds_a_bam_from_a_config(registry):
    ours = registered()
    bam = registry.MODELS.build({"type": "BAM", "in_channels": 32, "reduction": 4})
    assert type(bam) is BAM and bam.config.channels == 32 and bam.config.reduction == 4
    se = registry.MODELS.build({"type": "BAMSqueezeExcite", "in_channels": 32})
    assert type(se) is SqueezeExcite
    ours.register("OfficialBAM", preset="official", reduction=8)
    official = registry.MODELS.build({"type": "OfficialBAM", "in_channels": 16, "reduction": 2})
    assert official.config.norm_hidden and official.config.reduction == 2
    registered()  # a second import replaces what is ours
    registry.MODELS.module_dict["OfficialBAM"] = nn.Conv2d
    with pytest.raises(ValueError, match="name: expected one that is free, but 'OfficialBAM'"):
        ours.register("OfficialBAM")
    assert registry.MODELS.module_dict["OfficialBAM"] is nn.Conv2d


def test_mmengine_plugins(registry):
    registered()
    cnn = pytest.importorskip("mmcv.cnn", reason="pip install mmcv-lite")
    plugins = [
        {"cfg": {"type": "BAM", "reduction": 4}, "position": "after_conv3"},
        {"cfg": {"type": "BAM", "preset": "official", "postfix": "_2"}, "position": "after_conv3"},
    ]
    before = copy.deepcopy(plugins)
    block = Bottleneck(cnn.build_plugin_layer, 32, plugins).double().eval()
    assert plugins == before and block.names == ["bam", "bam_2"]
    assert type(block.bam) is BAM and "bam_2.spatial.hidden_norm.0.weight" in block.state_dict()
    x = torch.randn(2, 32, 7, 9, dtype=torch.float64)
    expected = torch.relu(block.bam_2(block.bam(block.conv3(x))) + x)
    assert relative_error(block(x), expected) < 1e-14


# --- kernels ----------------------------------------------------------------------------------


def randomised(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(part.weight, 0.5, 2)
            nn.init.normal_(part.bias)
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return module.double()


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 20, 1),
        reference.BAM(20, 4, combine="max", residual=False),
        reference.SqueezeExcite(20, 4),
        BAM(20, 4, preset="official"),
        reference.BAM(20, 5, spatial=False),
    )


@pytest.mark.parametrize("training", [False, True])
def test_kernels_take_over_plain_bams(kernels, training):
    our_kernels.register()
    model = randomised(network()).train(training)
    plain = copy.deepcopy(model)
    keys = list(model.state_dict())
    mode = kernels.Mode.TRAINING if training else kernels.Mode.INFERENCE
    assert kernels.kernelize(model, mode=mode, device="cpu") is model
    forwards = [getattr(part, "forward").__func__ for part in model]  # noqa: B009
    assert forwards[1] is forwards[4] is kernel_layers.BAM.forward
    assert forwards[2] is kernel_layers.SqueezeExcite.forward
    assert forwards[3] is BAM.forward and "forward" not in vars(model[3])  # fused as it is
    assert list(model.state_dict()) == keys
    x = torch.randn(3, 3, 5, 7, dtype=torch.float64)
    results = []
    for net in (model, plain):
        y = net(x)
        (y * x[:, :1]).sum().backward()
        results.append([y.detach(), *(p.grad for p in net.parameters()), *net.buffers()])
    for ours, theirs in zip(*results, strict=True):
        if theirs.double().norm() > 1e-9:  # no bias in front of batch statistics, which has none
            assert relative_error(ours.double(), theirs.double()) < 1e-9


def test_kernels_forward_runs_on_the_backend_asked_for(kernels, monkeypatch):
    """Fused, and not the reference once more."""
    our_kernels.register(["cpu"])
    model = kernels.kernelize(network().eval(), mode=kernels.Mode.INFERENCE, device="cpu")
    monkeypatch.setattr(reference, "gate", None)
    x = torch.randn(2, 3, 5, 7)
    with torch.no_grad(), use_backend("triton"):
        assert model(x).isfinite().all()
    with pytest.raises(ValueError, match="x: expected 20 channels"):
        model[1](torch.randn(2, 3, 5, 7))


def test_kernels_local_repository(tmp_path, monkeypatch):
    """A folder as the Hub has it, whose layers are those of the installed package."""
    hub = pytest.importorskip("kernels", reason="pip install kernels")
    variant = tmp_path / "build" / "torch-universal"
    variant.mkdir(parents=True)
    metadata = {"id": "bam", "name": "bam-kernels", "version": 1, "license": "Apache-2.0"}
    metadata |= {"python-depends": [], "backend": {"type": "cpu"}}
    (variant / "metadata.json").write_text(json.dumps(metadata))
    (variant / "__init__.py").write_text(
        "from bam_kernels.integrate import kernel_layers as layers\n"
    )

    class Plain(reference.BAM):
        """A class of one's own with a BAM's parts."""

    hub.replace_kernel_forward_from_hub(Plain, "PlainBAM")
    repository = hub.LocalLayerRepository(repo_path=tmp_path, layer_name="BAM")
    model = nn.Sequential(Plain(16, 4)).eval()
    x = torch.randn(2, 16, 5, 6)
    expected = model(x)
    with hub.use_kernel_mapping({"PlainBAM": {"cpu": repository}}):
        hub.kernelize(model, mode=hub.Mode.INFERENCE, device="cpu", use_fallback=False)
    assert "forward" in vars(model[0])
    assert relative_error(model(x), expected) < 1e-5


def test_kernels_errors(kernels):
    with pytest.raises(ValueError, match="Unknown device type"):
        our_kernels.register(["abacus"])
    with pytest.raises(ValueError, match="layer_name: expected one of BAM, SqueezeExcite, got 'C"):
        our_kernels.InstalledLayer("CBAM").load()


# --- without the packages ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "register"),
    [
        ("ultralytics", our_ultralytics.register),
        ("kernels", our_kernels.register),
        ("mmengine", registered),
    ],
)
def test_a_missing_package_is_named(monkeypatch, package, register):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs {package}: pip install {package}"):
        register()
