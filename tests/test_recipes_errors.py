"""Bad input to train and evaluate: one line, exit status 2, and nothing is overwritten."""

from __future__ import annotations

import fcntl
import os
import pickle
from pathlib import Path

import pytest
import torch
from test_recipes import toy, toys, write_cifar, write_imagenet

from bam_kernels import cli

__all__ = ["toys"]  # a fixture of every test here


def told(capsys, command: str, message: str) -> None:
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and len(lines) == 1, err
    assert lines[0].startswith(f"bam_kernels {command}: error: ") and message in lines[0], err


def refused(capsys, message: str, *words: object, command: str = "train") -> None:
    """`words` end with status 2 and one line that has the message."""
    capsys.readouterr()
    try:
        status = cli.main([command, *map(str, words)])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    told(capsys, command, message)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_data_folders(tmp_path, capsys, monkeypatch):
    out = f"--out={tmp_path / 'run'}"
    cifar, imagenet = ["--recipe=cifar100", out], ["--recipe=imagenet", out]
    refused(capsys, "--data: expected the folder of cifar100, got none", *cifar)
    refused(capsys, "there is no folder /no/such", *cifar, "--data=/no/such")
    refused(capsys, "comes with a package", "--recipe=digits", out, f"--data={tmp_path}")
    (tmp_path / "empty").mkdir()
    refused(capsys, "expected CIFAR-100 in", *cifar, f"--data={tmp_path / 'empty'}")
    write_cifar(tmp_path / "cut", monkeypatch)
    file = tmp_path / "cut/cifar-100-python/train"
    file.write_bytes(file.read_bytes()[:1000])
    refused(capsys, "expected CIFAR-100 in", *cifar, f"--data={tmp_path / 'cut'}")
    write_imagenet(tmp_path / "images", images=1)
    words = [*imagenet, f"--data={tmp_path / 'images'}"]
    refused(capsys, "--download: nothing downloads imagenet", *words, "--download")
    (tmp_path / "images/val/n02/0.jpg").unlink()
    refused(capsys, "--data: ", *words)  # a class without an image
    (tmp_path / "images/val/n02").rmdir()
    refused(capsys, "such as 'n02'", *words)
    (tmp_path / "images/val").rename(tmp_path / "images/validation")
    refused(capsys, f"there is no folder {tmp_path / 'images/val'}", *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(workers, tmp_path, capsys):
    write_imagenet(tmp_path / "data", images=2)
    bad = tmp_path / "data/train/n02/1.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    words = ["--recipe=imagenet", "--model=resnet18", "--batch=4", "--device=cpu", "--epochs=1"]
    words += [f"--data={tmp_path / 'data'}", f"--workers={workers}", f"--out={tmp_path / 'run'}"]
    refused(capsys, f"--data: cannot read the image {bad}: ", *words)


def test_devices_models_and_options(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--recipe=toy", f"--out={tmp_path / 'run'}"]
    if not torch.cuda.device_count():
        refused(capsys, "--device: expected one that is here, got cuda", *words, "--device=cuda")
    refused(capsys, "--device: ", *words, "--device=abacus")
    refused(capsys, "--device: expected one that computes", *words, "--device=meta")
    words += ["--device=cpu"]
    refused(capsys, "--recipe: expected one of cifar100", "--recipe=mnist")
    refused(capsys, "model: expected one of", *words, "--model=resnet5")
    refused(capsys, "dilation", *words, "--dilation=2")
    refused(capsys, "dilation", *words, "--attention=se", "--dilation=2")
    refused(capsys, "preset", *words, "--attention=bam", "--preset=mine")
    refused(capsys, "at least reduction=99", *words, "--attention=bam", "--reduction=99")
    refused(capsys, "block", *words, "--attention=block")
    refused(capsys, "--sync-bn: expected several processes", *words, "--sync-bn")
    refused(capsys, "--batch: expected at most the 72 images", *words, "--batch=100")
    refused(capsys, "argument --lr: expected a number above 0, got '0'", *words, "--lr=0")
    refused(capsys, "milestones: expected rising", *words, "--milestones", 3, 2)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run(tmp_path, capsys):
    toy(tmp_path / "run", "--epochs=1", "--attention=se", "--reduction=4")
    words = ["--recipe=toy", "--device=cpu", "--epochs=1", f"--out={tmp_path / 'run'}"]
    before = content(tmp_path)
    refused(capsys, "holds a run; --resume goes on, --force begins anew", *words)
    for change, message in (
        ([], "attention is 'se' there, None here"),
        (["--attention=se", "--reduction=8"], "options.reduction is 4 there, 8 here"),
        (["--attention=se", "--reduction=4", "--lr=1"], "recipe.lr is 0.05 there, 1.0 here"),
        (["--attention=se", "--reduction=4", "--seed=1"], "seed is 0 there, 1 here"),
    ):
        refused(capsys, f"holds another run: {message}", *words, "--resume", *change)
    assert content(tmp_path) == before
    refused(capsys, "--resume: no run in", *words[:-1], "--resume", f"--out={tmp_path / 'no'}")
    refused(capsys, "not allowed with", *words, "--resume", "--force")
    (tmp_path / "file").write_text("")
    refused(capsys, "expected a folder, got the file", *words[:-1], f"--out={tmp_path / 'file'}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/metrics.csv").write_text("mine")
    refused(capsys, "holds a metrics.csv that is no", *words[:-1], f"--out={tmp_path / 'mine'}")
    assert (tmp_path / "mine/metrics.csv").read_text() == "mine"
    toy(tmp_path / "run", "--epochs=1", "--force")
    assert content(tmp_path) != before


def test_a_folder_that_a_process_trains_in(tmp_path, capsys):
    toy(tmp_path, "--epochs=1")
    before = content(tmp_path)
    words = ["--recipe=toy", "--device=cpu", "--epochs=1", f"--out={tmp_path}"]
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # as a run holds it
        for more in ("--resume", "--force"):
            refused(capsys, "another process trains in", *words, more)
    finally:
        os.close(handle)
    assert content(tmp_path) == before
    toy(tmp_path, "--epochs=1", "--resume")


def test_checkpoints(tmp_path, capsys):
    toy(tmp_path / "run", "--epochs=1")
    path = tmp_path / "run/checkpoint.pth"
    found = torch.load(path, weights_only=True)

    def evaluated(message: str, *words: object) -> None:
        refused(capsys, message, *words, "--device=cpu", command="evaluate")

    evaluated("there is no such checkpoint", tmp_path / "none.pth")
    evaluated("comes with a package", path, f"--data={tmp_path}")
    other = tmp_path / "other.pth"
    other.write_bytes(path.read_bytes()[:5000])
    evaluated("cannot be read as a checkpoint", other)
    torch.save(found["model"], other)
    evaluated("expected a checkpoint of bam_kernels train, got another file", other)
    torch.save({**found, "network": {**found["network"], "attention": "se"}}, other)
    evaluated("its weights are not those of toy_resnet", other)
    torch.save({**found, "network": {**found["network"], "name": "gone"}}, other)
    evaluated("model: expected one of", other)
    torch.save({key: value for key, value in found.items() if key != "rows"}, other)
    evaluated("expected rows in the checkpoint", other)
    damaged = bytearray(path.read_bytes())
    damaged[:4] = b"\0" * 4
    path.write_bytes(damaged)
    words = ["--recipe=toy", "--device=cpu", "--epochs=1", f"--out={tmp_path / 'run'}"]
    refused(capsys, "cannot be read as a checkpoint", *words, "--resume")
    assert path.read_bytes() == bytes(damaged)


class Malicious:
    """Unpickled, this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("saved", ["torch", "pickle"])
def test_a_checkpoint_runs_no_code(saved, tmp_path, capsys):
    bad = {"format": "bam_kernels training 1", "model": Malicious(tmp_path / "touched")}
    if saved == "torch":
        torch.save(bad, tmp_path / "bad.pth")
    else:
        (tmp_path / "bad.pth").write_bytes(pickle.dumps(bad))
    refused(capsys, "cannot be read as a checkpoint", tmp_path / "bad.pth", command="evaluate")
    assert not (tmp_path / "touched").exists()
    pickle.loads(pickle.dumps(bad))
    assert (tmp_path / "touched").exists()


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    missing = {"tqdm", "tensorboard", "sklearn"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )
    words = [f"--out={tmp_path / 'run'}", "--device=cpu"]
    refused(capsys, "needs tqdm: pip install 'bam_kernels[train]'", "--recipe=toy", *words)
    missing.remove("tqdm")
    refused(capsys, "digits needs sklearn: pip install", "--recipe=digits", *words)
    refused(capsys, "needs tensorboard: pip", "--recipe=toy", *words, "--tensorboard")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, capsys):
    toy(tmp_path, "--lr=1e30", status=1)
    assert "the loss is nan in epoch" in capsys.readouterr().err
