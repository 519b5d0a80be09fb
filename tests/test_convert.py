"""convert_state_dict and its command: every client's keys, both ways, and what is refused."""

from __future__ import annotations

import collections
import os
import re
import subprocess
import sys

import client_doubles as clients
import pytest
import torch
from test_module import randomize
from tolerances import relative_error
from torch import Tensor, nn

from bam_kernels import BAM, cli, convert_state_dict

pytestmark = pytest.mark.usefixtures("seed", "large_tiles")

# By source: their module, and the options of ours over the same layers.
PAIRS = {
    "official": (lambda: clients.OfficialBAM(48), {}),
    "pytorchcv": (lambda: clients.pytorchcv_bam(48), {}),
    "fightingcv": (lambda: clients.fightingcv_bam(48, dia_val=1), {"dilation": 1}),
    "changzy00": (lambda: clients.Changzy00BAM(48), {}),
}


def network(*bams: nn.Module) -> nn.Sequential:
    """With layers before, between and behind; in inference, with random weights."""
    layers: list[nn.Module] = [nn.Conv2d(3, 48, 1)]
    for bam in bams:
        layers += [nn.Sequential(collections.OrderedDict(bam=bam)), nn.BatchNorm2d(48)]
    return randomize(nn.Sequential(*layers)).eval()


@pytest.mark.parametrize("name", PAIRS)
def test_there_and_back(name):
    """Ours loads what is converted and has the same numbers; back, every key and value is there,
    in the same order."""
    make, options = PAIRS[name]
    theirs = network(make(), make())
    ours = network(*(BAM(48, preset=name, **options) for _ in range(2)))
    state = nn.DataParallel(theirs).state_dict()
    before = dict(state)
    forth = convert_state_dict(state, name, "bam_kernels")
    assert dict(state) == before and type(forth) is type(state)
    nn.DataParallel(ours).load_state_dict(forth)
    x = torch.randn(3, 3, 7, 7)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-6
    back = convert_state_dict(forth, "bam_kernels", name)
    assert list(back) == list(state)
    assert all(back[key] is value for key, value in state.items())
    assert {k: v for k, v in back._metadata.items() if k in state._metadata} == state._metadata
    assert [a == b for a, b in zip(state, forth, strict=True)].count(True) == 2 + 2 * 5
    assert forth._metadata["module.1.bam.channel.fc.0"] == {"version": 1}


def test_between_clients():
    """official and pytorchcv compute the same; no other two do."""
    theirs, other = network(clients.OfficialBAM(48)), network(clients.pytorchcv_bam(48))
    other.load_state_dict(convert_state_dict(theirs.state_dict(), "official", "pytorchcv"))
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        assert relative_error(other(x), theirs(x)) < 1e-6
    for source in PAIRS:
        state = network(PAIRS[source][0]()).state_dict()
        for target in PAIRS.keys() - {source, "official", "pytorchcv"}:
            with pytest.raises(ValueError, match=f"target: .*{target} differs in "):
                convert_state_dict(state, source, target)
        assert convert_state_dict(state, source, source) == state


def test_ours_of_other_layers_is_refused():
    for options, target, reason in (
        ({}, "official", "official has no layer for 'channel.norm'"),
        ({"preset": "official"}, "changzy00", "changzy00 has no layer for 'channel.hidden_norm.0'"),
        ({"norm_final": False}, "official", "official has 'channel.hidden_norm.0'"),
        (
            {"preset": "fightingcv"},
            "pytorchcv",
            "pytorchcv has 1 hidden layers in its MLP, not 3",
        ),
    ):
        state = network(BAM(48, **options)).state_dict()
        with pytest.raises(ValueError, match=f"target: BAM at '1.bam': {reason}"):
            convert_state_dict(state, "bam_kernels", target)
    paper = network(BAM(48)).state_dict()
    assert list(convert_state_dict(paper, "bam_kernels", "bam_kernels")) == list(paper)


@pytest.mark.parametrize("name", PAIRS)
def test_damage_is_named(name):
    state = network(PAIRS[name][0]()).state_dict()
    keys = [key for key in state if ".bam." in key and not key.endswith("tracked")]
    missing = keys[torch.randint(len(keys), ()).item()]
    with pytest.raises(ValueError, match=re.escape(f"'1.bam': expected the key '{missing}'")):
        convert_state_dict({k: v for k, v in state.items() if k != missing}, name, "bam_kernels")
    branch = ".".join(missing.split(".")[:3])
    with pytest.raises(ValueError, match=re.escape(f"expected no key '{branch}.gamma'")):
        convert_state_dict({**state, f"{branch}.gamma": torch.ones(1)}, name, "bam_kernels")
    for key in keys:
        wrong = torch.zeros(7, *state[key].shape)
        with pytest.raises(ValueError, match=r"expected (shape|weights) .* got .*\[7, "):
            convert_state_dict({**state, key: wrong}, name, "bam_kernels")
        # Of one row more all else tells what was meant, but for the layers that set the widths.
        with pytest.raises(ValueError, match="expected shape"):
            more = torch.zeros(state[key].shape[0] + 1, *state[key].shape[1:])
            convert_state_dict({**state, key: more}, name, "bam_kernels")
    with pytest.raises(ValueError, match=r"expected a tensor at .* got float"):
        convert_state_dict({**state, missing: 0.5}, name, "bam_kernels")
    # Counters came with torch 0.4: older checkpoints have none.
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert len(convert_state_dict(old, name, "bam_kernels")) == len(old)


def test_errors():
    state = network(clients.Changzy00BAM(48)).state_dict()
    with pytest.raises(ValueError, match=r"source: expected one of bam_kernels, .*'paper'"):
        convert_state_dict(state, "paper", "bam_kernels")
    with pytest.raises(ValueError, match=r"target: expected one of .*, got 'resnet'"):
        convert_state_dict(state, "changzy00", "resnet")
    with pytest.raises(TypeError, match="state_dict: expected a dict, got list"):
        convert_state_dict(list(state), "changzy00", "bam_kernels")
    with pytest.raises(TypeError, match="state_dict: expected keys of type str, got int 3"):
        convert_state_dict({3: 4}, "changzy00", "bam_kernels")
    with pytest.raises(ValueError, match=r"found those of .*\(source='changzy00'\)"):
        convert_state_dict(state, "official", "bam_kernels")
    with pytest.raises(ValueError, match="found none; it holds a dict itself, 'state_dict'"):
        convert_state_dict({"state_dict": state}, "official", "bam_kernels")
    with pytest.raises(ValueError, match="found none"):
        convert_state_dict({}, "official", "bam_kernels")
    taken = {**state, "1.bam.channel.fc.0.weight": torch.ones(1)}
    with pytest.raises(
        ValueError, match=r"two of its keys would be '1\.bam\.channel\.fc\.0\.weight'"
    ):
        convert_state_dict(taken, "changzy00", "bam_kernels")


# --- the command ------------------------------------------------------------------------------


def convert(capsys, *args: object) -> tuple[int, str, str]:
    try:
        status = cli.main(["convert", *map(str, args)])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_refused(result: tuple[int, str, str], reason: str) -> None:
    status, out, err = result
    assert status == 2 and out == "" and err.count("\n") == 1, result
    assert re.search(f"^bam_kernels convert: error: .*{reason}", err), err


@pytest.fixture
def files(tmp_path):
    """A checkpoint as training scripts write them, and what it was made of."""
    model = network(clients.pytorchcv_bam(48))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    rest = {"epoch": 3, "best": torch.tensor(0.5), "optimizer": optimizer.state_dict()}
    torch.save({"state_dict": model.state_dict(), **rest}, tmp_path / "in.pth")
    return tmp_path, model, rest


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_a_checkpoint_keeps_the_rest(files, capsys):
    folder, model, rest = files
    done = convert(capsys, folder / "in.pth", folder / "out.pt", "--from", "pytorchcv")
    assert done[0] == 0 and done[2] == ""
    assert re.search(r"state_dict: 1\.bam .* 48 .* 3 .* 1 .* 2 ", done[1])
    assert "preset='pytorchcv'" in done[1] and "'optimizer' stays as it was" in done[1]
    found = torch.load(folder / "out.pt", weights_only=True)
    assert list(found) == ["state_dict", *rest] and found["epoch"] == 3
    want = convert_state_dict(model.state_dict(), "pytorchcv", "bam_kernels")
    assert same(found["state_dict"], want)
    network(BAM(48, preset="pytorchcv")).load_state_dict(found["state_dict"])


def test_safetensors_both_ways(files, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    folder, model, _ = files
    one, two = folder / "out.safetensors", folder / "again.pth"
    done = convert(capsys, folder / "in.pth", one, "--from", "pytorchcv")
    assert done[0] == 0 and "left out, which .safetensors cannot hold: epoch, best" in done[1]
    want = convert_state_dict(model.state_dict(), "pytorchcv", "bam_kernels")
    found = safetensors.load_file(one)
    assert found.keys() == want.keys() and all(torch.equal(found[k], want[k]) for k in want)
    args = ("--from", "bam_kernels", "--to", "pytorchcv")
    assert convert(capsys, one, two, *args)[0] == 0
    back = torch.load(two, weights_only=True)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())
    # One tensor under two names is written as two.
    shared = network(bam := clients.pytorchcv_bam(48), bam)
    torch.save(shared.state_dict(), folder / "shared.pth")
    assert convert(capsys, folder / "shared.pth", one, "--from", "pytorchcv", "--force")[0] == 0
    assert len(safetensors.load_file(one)) == len(shared.state_dict())
    (folder / "cut.safetensors").write_bytes(one.read_bytes()[:200])
    assert_refused(
        convert(capsys, folder / "cut.safetensors", two, "--from", "bam_kernels", "--force"),
        "cut.safetensors: cannot be read: SafetensorError",
    )


def test_several_state_dicts_in_one_file(capsys, tmp_path):
    states = {"model": network(clients.OfficialBAM(48)).state_dict()}
    states["ema"] = network(clients.OfficialBAM(48)).state_dict()
    torch.save(states, tmp_path / "in.ckpt")
    args = (tmp_path / "in.ckpt", tmp_path / "out.ckpt", "--from", "official")
    assert convert(capsys, *args)[0] == 0
    found = torch.load(tmp_path / "out.ckpt", weights_only=True)
    for key, state in states.items():
        assert same(found[key], convert_state_dict(state, "official", "bam_kernels"))
    pytest.importorskip("safetensors")
    assert_refused(
        convert(capsys, args[0], tmp_path / "out.safetensors", *args[2:]),
        "expected one state dict for .safetensors, got 'model', 'ema'",
    )


class Harm:
    """A pickle of it makes a file when it is loaded as a program."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_runs_and_nothing_is_written_on_bad_files(files, capsys, tmp_path):
    folder, model, _ = files
    harm = tmp_path / "harm"
    torch.save({"state_dict": model.state_dict(), "extra": Harm(str(harm))}, folder / "bad.pth")
    torch.save(model, folder / "model.pth")
    torch.save([1, 2], folder / "list.pth")
    torch.save({"state_dict": {"conv.weight": torch.ones(1)}}, folder / "none.pth")
    whole = (folder / "in.pth").read_bytes()
    (folder / "cut.pth").write_bytes(whole[: torch.randint(1, len(whole), ()).item()])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.pth").write_text("no checkpoint")
    (folder / "folder.pth").mkdir()
    before = sorted(os.listdir(folder))
    for name, reason in (
        ("bad.pth", r"a pickle that asks for \w+\.mkdir"),
        ("model.pth", "a pickle that asks for torch"),
        ("list.pth", "expected a dict, got list"),
        ("none.pth", "none.pth: state_dict: expected the keys of pytorchcv's BamBlock, found none"),
        ("cut.pth", "cut.pth: cannot be read"),
        ("empty.pth", "empty.pth: cannot be read"),
        ("text.pth", "text.pth: "),
        ("folder.pth", "no such file"),
        ("missing.pth", "no such file"),
        ("in.npz", "expected a name that ends in one of"),
    ):
        done = convert(capsys, folder / name, folder / "out.pth", "--from", "pytorchcv")
        assert_refused(done, reason)
    assert not harm.exists() and sorted(os.listdir(folder)) == before
    # The test can fail: loaded as a program, it does make the folder.
    torch.load(folder / "bad.pth", weights_only=False)
    assert harm.exists()


def test_nothing_is_written_over(files, capsys):
    folder, *_ = files
    out = folder / "out.pth"
    out.write_text("precious")
    args = (folder / "in.pth", out, "--from", "pytorchcv")
    assert_refused(convert(capsys, *args), "out.pth exists; --force")
    assert out.read_text() == "precious"
    assert_refused(convert(capsys, *args[:3], "official", "--force"), "found those of pytorchcv")
    assert out.read_text() == "precious"
    assert convert(capsys, *args, "--force")[0] == 0
    assert "state_dict" in torch.load(out, weights_only=True)
    assert sorted(p.name for p in folder.iterdir()) == ["in.pth", "out.pth"]


def test_bad_arguments(files, capsys, monkeypatch):
    folder, *_ = files
    out = folder / "out.pth"
    for args, reason in (
        ((), "required: input, output, --from"),
        ((folder / "in.pth", out), "required: --from"),
        ((folder / "in.pth", out, "--from", "paper"), "--from: expected one of .* got 'paper'"),
        ((folder / "in.pth", out, "--from", "official", "--to", "x"), "--to: expected one of"),
        ((folder / "in.pth", folder / "out", "--from", "pytorchcv"), "expected a name that ends"),
        ((folder / "in.pth", folder / "no/out.pt", "--from", "pytorchcv"), "cannot be written"),
        ((folder / "in.pth", out, "--from", "pytorchcv", "--to", "changzy00"), "differs in"),
    ):
        assert_refused(convert(capsys, *args), reason)
    find = "bam_kernels.integrate.checkpoint.importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name: None)
    args = (folder / "in.pth", folder / "out.safetensors", "--from", "pytorchcv")
    assert_refused(convert(capsys, *args), "safetensors is not installed; pip install safetensors")
    assert not out.exists()


def test_as_a_program(files):
    folder, *_ = files
    command = [sys.executable, "-m", "bam_kernels", "convert", "in.pth", "out.pth", "--from"]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [*command, "pytorchcv"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "out.pth").exists()
