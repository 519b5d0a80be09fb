"""The command compare: counts, rows and errors of the cost of attention (Table 10)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bam_kernels
from bam_kernels import dispatch, reference, use_backend
from bam_kernels.benchmarking import attention_cost, attention_cost_report
from bam_kernels.cli import main

BACKEND = "cpp" if dispatch.why_not("cpp", "cpu") is None else "reference"


@pytest.fixture(autouse=True)
def seeded(seed: int):
    """A fresh seed; compiled kernels where they are built: this times, which no interpreter can."""
    threads = torch.get_num_threads()
    with use_backend(BACKEND):
        yield
    torch.set_num_threads(threads)


class Network(nn.Module):
    """Two residual blocks and a head; attention behind each block, or behind the first stage."""

    def __init__(self, attention: str | None, package: object) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(32, 5)
        make = {None: None, "se": package.SqueezeExcite}.get(attention, package.BAM)
        places = {None: 0, "bam": 1}.get(attention, 2)
        self.attention = nn.ModuleList(make(32) for _ in range(places))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, conv in enumerate(self.convs):
            x = x + conv(x).relu()
            if i < len(self.attention):
                x = self.attention[i](x)
        return self.head(x.mean(dim=(2, 3)))


def build(attention: str | None, fused: bool) -> nn.Module:
    return Network(attention, bam_kernels if fused else reference)


def options(**changes: object) -> attention_cost.Options:
    size = (3, 3, 12, 10)
    return attention_cost.Options("toy", size, rounds=2, least_ms=0.1, **changes)


def test_rows_are_counted_and_measured():
    told: list[str] = []
    result = attention_cost.measure(options(seed=7), build, told.append)
    rows = {f"{row['attention']} {row['kind']}": row for row in result["rows"]}
    assert list(rows) == ["baseline -", "se eager", "se fused", "bam-c eager", "bam-c fused",
                          "bam eager", "bam fused"]  # fmt: skip
    assert not attention_cost_report.problems(result)
    assert len(told) == options().steps == 7 * 3 + 2
    base = rows["baseline -"]
    # h = 2: an MLP of 32-2-32, 1x1 to 2, two 3x3 of 2, 1x1 to 1, and two norms of 32 and of 1.
    bam = (32 * 2 + 2 + 2 * 32 + 32) + (32 * 2 + 2 + 2 * (9 * 4 + 2) + 3) + 2 * (32 + 1)
    se = 32 * 2 + 2 + 2 * 32 + 32
    positions = 12 * 10
    macs = 2 * 32 * 2 + positions * (32 * 2 + 2 * 9 * 4 + 2)
    for kind in ("eager", "fused"):
        assert rows[f"bam {kind}"]["parameters"] - base["parameters"] == bam
        assert rows[f"bam-c {kind}"]["parameters"] - base["parameters"] == 2 * bam
        assert rows[f"se {kind}"]["parameters"] - base["parameters"] == 2 * se
        assert rows[f"bam {kind}"]["macs"] - base["macs"] == macs
    assert base["macs"] == positions * (27 * 32 + 2 * 9 * 32 * 32) + 32 * 5
    for row in rows.values():
        for mode in ("inference", "training"):
            assert row[mode]["median_ms"] > 0 and row[mode]["rounds"] == 2
            x_bytes = 3 * 32 * positions * 4
            assert x_bytes <= row[mode]["peak_bytes"] < 100 * x_bytes
        ratios = row["ratios"]
        assert ratios["training median_ms"] == pytest.approx(
            row["training"]["median_ms"] / base["training"]["median_ms"]
        )
        assert ("relative_error" in row) == (row["kind"] == "fused")
    assert set(base["ratios"].values()) == {1.0}
    assert result["backend"] == BACKEND and len(result["machine"]["load_average_after"]) == 3
    title = attention_cost_report.title(result)
    assert "1 threads" in title and "load" in title and f"fused on {BACKEND}" in title


def test_networks_share_their_weights():
    """The shared layers are the baseline's, and each pair's attention is the same."""
    made: dict[tuple[str | None, bool], nn.Module] = {}

    def keep(attention: str | None, fused: bool) -> nn.Module:
        made[attention, fused] = build(attention, fused)
        return made[attention, fused]

    attention_cost.measure(options(attention=("se", "bam")), keep, lambda _: None)
    base = made[None, False].state_dict()
    for (attention, _), net in made.items():
        state = net.state_dict()
        assert all(torch.equal(state[key], value) for key, value in base.items())
        eager = made[attention, False].state_dict()
        learned = [key for key, _ in net.named_parameters()]
        assert all(torch.equal(state[key], eager[key]) for key in learned)


def test_a_fused_network_that_computes_something_else_is_told():
    class Wrong(bam_kernels.BAM):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.1 * x

    def wrong(attention: str | None, fused: bool) -> nn.Module:
        net = build(attention, fused)
        if fused:
            net.attention[0].__class__ = Wrong
        return net

    result = attention_cost.measure(options(attention=("bam",)), wrong, lambda _: None)
    (told,) = attention_cost_report.problems(result)
    assert told.startswith("bam fused: off from eager by")


def test_a_network_that_fails_in_training_leaves_the_others():
    def failing(attention: str | None, fused: bool) -> nn.Module:
        net = build(attention, fused)
        if fused:
            net.register_forward_pre_hook(lambda m, _: 1 / 0 if m.training else None)
        return net

    result = attention_cost.measure(options(attention=("bam",)), failing, lambda _: None)
    (told,) = attention_cost_report.problems(result)
    assert told.startswith("bam fused, training: ZeroDivisionError")
    header, groups = attention_cost_report.table(result)
    assert groups[1][1][header.index("training step ms")] == "FAILED"
    assert groups[1][0][header.index("training step ms")] != "FAILED"


def test_a_busy_machine_is_told():
    def row(kind: str, spread: float) -> dict:
        time = {"p20_ms": 2.0, "p80_ms": 2.0 * spread}
        return {"attention": "bam", "kind": kind, "inference": time, "training": {"error": "x"}}

    steady = {"rows": [row("eager", 1.02), row("fused", 1.05)]}
    assert attention_cost_report.caution(steady) is None
    told = attention_cost_report.caution({"rows": [row("eager", 1.02), row("fused", 1.7)]})
    assert "bam fused, inference spread by a factor of 1.7" in told


def run(*arguments: object) -> int:
    return main(["compare", *map(str, arguments)])


def test_command(tmp_path: Path, capsys):
    pytest.importorskip("torchvision", reason="pip install '.[demo]'")
    pytest.importorskip("matplotlib", reason="pip install '.[demo]'")
    from PIL import Image

    file, plot = tmp_path / "cost.json", tmp_path / "cost.png"
    words = ("--model=torchvision:resnet18", "--attention", "se", "bam", "--batch=2", "--size=64",
             "--rounds=1", "--least-ms=0.1", "--threads=1", "--device=cpu")  # fmt: skip
    assert run(*words, "--json", file, "--plot", plot) == 0
    rows = json.loads(file.read_text())["rows"]
    with torch.device("meta"):
        from torchvision.models import resnet18

        plain = resnet18()
        bams = bam_kernels.insert_bam(plain, at="bottlenecks", example_input=(1, 3, 64, 64))
    added = sum(p.numel() for bam in bams.values() for p in bam.parameters())
    assert rows[-1]["parameters"] - rows[0]["parameters"] == added
    out = capsys.readouterr().out
    assert "FAILED" not in out and "baseline" in out and "load" in out
    with Image.open(plot) as picture:
        assert picture.width > 800 and len(picture.convert("RGB").getcolors(1 << 20)) > 50
    content = file.read_bytes()
    assert run(*words, "--json", file) == 2 and file.read_bytes() == content
    assert "exists; --force writes over it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=resnet"], "--model resnet: expected torchvision:NAME"),
        (["--model=torchvision:alexnet", "--attention", "se"], "--model torchvision:alexnet: at:"),
        (["--batch=1"], "--batch: expected at least 2"),
        (["--device=abacus"], "--device: expected one that is here, got abacus: "),
        (["--plot=x.pdf"], "--plot: expected a name that ends in .png"),
        (["--json=/no/such/folder/x.json"], "--json: no such folder"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert run(*arguments) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("...")]
    assert len(lines) == 1 and lines[0].startswith("bam_kernels compare: error: ")
    assert message in lines[0]


def test_no_gpu_is_one_line(capsys):
    if torch.cuda.is_available():
        pytest.skip("has a GPU; what is tested is a machine without one")
    assert run("--device=cuda") == 2
    assert capsys.readouterr().err.count("\n") == 1
