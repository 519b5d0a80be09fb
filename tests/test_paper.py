"""The paper's tables: what is counted, what is compared, and the command."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from bam_kernels import BAM, SqueezeExcite, models, paper
from bam_kernels.cli import FAILED, USAGE_ERROR, main
from bam_kernels.cli import paper as command
from bam_kernels.paper import comparison, formatting
from bam_kernels.paper.comparison import EQUAL, NOT_REPRODUCIBLE, OFF, Entry
from bam_kernels.paper.reasons import REASONS

pytest.importorskip("torchvision", reason="pip install '.[models]'")


@pytest.fixture(scope="module")
def everything() -> list[paper.Comparison]:
    return paper.compare(paper.TABLES)


# --- counting -----------------------------------------------------------------------------------


def macs_of_bam(c: int, h: int, w: int, r: int) -> int:
    hidden = c // r
    return 2 * c * hidden + h * w * (c * hidden + 2 * 9 * hidden**2 + hidden)


@pytest.mark.parametrize("r", (4, 16))
def test_a_module_by_hand(r):
    n, c, h, w = 3, 64, 7, 9
    found = paper.count(BAM(c, r), (n, c, h, w))
    hidden = c // r
    learned = 2 * (c * hidden + hidden) + hidden * c - hidden * c  # two ways in
    learned += hidden * c + c + 2 * (9 * hidden**2 + hidden) + hidden + 1 + 2 * c + 2
    assert found == paper.Count(learned, n * macs_of_bam(c, h, w, r))
    assert paper.count(SqueezeExcite(c, r), (n, c, h, w)).macs == n * 2 * c * hidden


def test_convolutions_by_hand():
    """Grouped, strided, dilated and with a bias, which counts as a parameter only; norms."""
    model = nn.Sequential(
        nn.Conv2d(6, 8, 3, stride=2, padding=2, dilation=2, groups=2),  # to 4 x 5
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    found = paper.count(model, (1, 6, 8, 10))
    assert found.macs == 8 * 4 * 5 * 3 * 9 + 8 * 5
    assert found.parameters == 8 * 3 * 9 + 8 + 16 + 8 * 5 + 5


def test_counting_sees_what_hooks_see():
    """On a network that runs: each convolution and linear layer, by the sizes it puts out."""
    from bam_kernels import reference

    model = models.create("cifar_preresnet110", attention="bam-c", attention_module=reference.BAM)
    seen = 0

    def watch(layer: nn.Module, args: object, out: torch.Tensor) -> None:
        nonlocal seen
        each = layer.in_features if isinstance(layer, nn.Linear) else layer.weight[0].numel()
        seen += out.numel() * each

    for part in model.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            part.register_forward_hook(watch)
    with torch.no_grad():
        model.eval()(torch.randn(1, 3, 32, 32))
    fused = models.create("cifar_preresnet110", attention="bam-c")
    state = {key: value.clone() for key, value in fused.state_dict().items()}
    assert paper.count(fused, (1, 3, 32, 32)).macs == seen
    after = fused.state_dict()
    assert fused.training and all(torch.equal(after[key], state[key]) for key in state)
    assert not any("forward" in vars(part) for part in fused.modules())


def test_counting_refuses():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        paper.count("resnet18", (1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"shape: a run on \[1, 4, 32, 32\] failed"):
        paper.count(models.create("resnet18", device="meta"), (1, 4, 32, 32))


# --- comparing ----------------------------------------------------------------------------------


def test_verdicts():
    unit = 10**6
    assert Entry("34.52", 34_515_000, unit).verdict == EQUAL
    assert Entry("34.52", 34_524_999, unit, "a reason that is not needed").verdict == EQUAL
    high, low = Entry("34.52", 34_525_000, unit), Entry("34.52", 34_514_999, unit, "so")
    assert (high.verdict, str(high)) == (OFF, "off by +0.01")
    assert (low.verdict, str(low)) == (NOT_REPRODUCIBLE, "not reproducible, off by -0.01")
    assert (
        Entry("0.8", 849_999, unit).ours == "0.8" and Entry("5.00", 4_999_000, unit).ours == "5.00"
    )
    assert Entry("2.0", 2_100_000, unit).relative == pytest.approx(0.05)


def test_as_many_as_can_be(everything):
    """The module of Eq. 1-4 reproduces these; the others are reported as they are."""
    counts = paper.summary(everything)
    assert counts["params"]["entries"] == 82 and counts["gflops"]["entries"] == 58
    assert counts["params"][EQUAL] >= 64
    assert counts["gflops"][EQUAL] >= 48
    assert counts["gflops"]["within 3 %"] >= 56


def test_equal_is_equal(everything):
    """The verdicts, counted anew in plain arithmetic."""
    equal = 0
    for each in everything:
        digits = len(each.params.printed.partition(".")[2])
        off = abs(each.params.exact / 1e6 - float(each.params.printed))
        assert (each.params.verdict == EQUAL) == (off <= 0.5 * 10**-digits)
        equal += off <= 0.5 * 10**-digits
    assert equal == paper.summary(everything)["params"][EQUAL]


def test_every_reason_is_of_a_figure_that_differs(everything):
    used = {
        (each.row.table, each.row.name, column)
        for each in everything
        for column, entry in (("params", each.params), ("gflops", each.gflops))
        if entry is not None and entry.verdict == NOT_REPRODUCIBLE
    }
    assert used == set(REASONS)


def test_the_module_is_the_default_everywhere():
    """No row has options but Table 1a's own; every BAM counted is that of Eq. 1-4."""
    for table in paper.TABLES:
        for row in paper.rows(table):
            assert set(row.options) <= ({"dilation", "reduction"} if table == "1a" else set())
            has = " + " in row.name or (table == "1a" and not row.name.startswith("Base"))
            assert (row.attention is not None) == has


def test_rows():
    (row,) = [r for r in paper.rows("1a") if r.name == "r=4 d=4"]
    assert (row.model, row.attention) == ("cifar_resnext29_8x64d", "bam")
    assert row.options == {"dilation": 4, "reduction": 4} and row.gflops is None
    found = {(r.name, r.model, r.attention) for r in paper.rows("10")}
    assert ("PreResNet110 + SE", "cifar_preresnet110", "se") in found
    found = {(r.name, r.model, r.attention) for r in paper.rows("4")}
    assert ("ResNet50 + BAM", "resnet50", "bam") in found
    with pytest.raises(ValueError, match=r"table: expected one of 1a, 1c, .* got '5'"):
        paper.rows("5")


# --- the command --------------------------------------------------------------------------------


def test_command(capsys, tmp_path):
    file = tmp_path / "found.json"
    assert main(["paper", "--table", "1a", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"r=4 d=4\W+35\.14\W+35\.14\W+equal", out)
    assert "Params: 9 of 9 equal to the printed digit, 0 off, 0 not reproducible" in out
    written = json.loads(file.read_text())
    first = written["rows"][0]
    assert first["row"] == "d=1 r=16"
    counted = paper.count(models.create(first["model"], attention="bam", device="meta"),
                          (1, 3, 32, 32))  # fmt: skip
    assert first["params"]["ours"] == counted.parameters and first["gflops"] is None
    assert written["summary"]["params"]["equal"] == 9 and "torch" in written["versions"]


def test_document(everything):
    text = formatting.document(everything)
    for table in paper.TABLES:
        assert f"Table {table}:\n\n| network |" in text
    lines = [line for line in text.split("\n") if line.startswith("| ")]
    assert len(lines) == 82 + 2 * len(paper.TABLES)
    assert "| ResNet50 + BAM | 25.92 | 25.92 | equal | 3.94 | 3.94 | equal |" in lines
    assert "- Table 4, MobileNetV2 + BAM: the text does not say where" in text
    assert re.search(r"- Params: \d+ of 82 equal to the printed digit", text)


def test_command_prints_the_document(capsys):
    assert main(["paper", "--table", "1a", "1a", "--markdown"]) == 0
    assert capsys.readouterr().out == formatting.document(paper.compare(["1a"])) + "\n"


def test_command_refuses(capsys, tmp_path, monkeypatch):
    assert command._TABLES == paper.TABLES

    def refused(*arguments: str) -> str:
        try:
            status = main(["paper", *arguments])
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        assert status == USAGE_ERROR != FAILED and not out
        assert err.count("\n") == 1 and "error: " in err
        return err

    assert "--table" in refused()
    assert "'5'" in refused("--table", "5")
    assert "not allowed with" in refused("--all", "--table", "2")
    assert "no such folder" in refused("--table", "1a", "--json", str(tmp_path / "no" / "a.json"))
    assert "expected a file" in refused("--table", "1a", "--json", str(tmp_path))
    monkeypatch.setattr(comparison.importlib.util, "find_spec", lambda name: None)
    kept = tmp_path / "kept.json"
    kept.write_text("before")
    message = refused("--table", "7", "--json", str(kept))
    assert "torchvision is not installed; pip install 'bam_kernels[models]'" in message
    assert kept.read_text() == "before"
