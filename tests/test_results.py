"""The command results: tables, plots, and the README's tables; what it says of other files."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bam_kernels import cli
from bam_kernels.benchmarking import results

pytest.importorskip("rich", reason="the CPU benchmark's table is made by a module that needs it")

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
CPU = ROOT / "benchmarks" / "results" / "cpu-xeon-2-threads.json"
TRAFFIC = ROOT / "benchmarks" / "results" / "traffic.json"


def gpu_data() -> dict:
    """As benchmarks/gpu.py writes it, with drawn times."""
    cases = []
    for mode in ("training", "inference"):
        for layout in ("channels_last", "nchw"):
            case = {"site": "layer1", "channels": 256, "height": 56, "width": 56, "batch": 32}
            case |= {"dtype": "float16", "layout": layout, "mode": mode, "preset": "paper"}
            names = ("fused", "eager", "compile", "fused_graphed", "eager_graphed")
            peers = {name: {"median_ms": random.uniform(0.1, 9)} for name in names}
            peers["compile_graphed"] = {"error": "no capture"}
            ratio = peers["eager"]["median_ms"] / peers["fused"]["median_ms"]
            cases.append({"case": case, "peers": peers, "ratio_plain": ratio,
                          "ratio_graphed": None, "share_of_copy": {"fused": 0.4}})  # fmt: skip
    broken = dict(cases[0]["case"], preset="official")
    cases.append({"case": broken, "error": "out of memory"})
    environment = {"device": "a GPU", "torch": "2.14", "triton": "3.8", "commit": "a" * 40,
                   "dirty": False}  # fmt: skip
    return {"format": 1, "sections": ["times"], "environment": environment, "cases": cases}


@pytest.fixture
def gpu(tmp_path: Path, seed: int) -> Path:
    random.seed(seed)
    path = tmp_path / "gpu-made-up.json"
    path.write_text(json.dumps(gpu_data()))
    return path


def command(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    status = cli.main(["results", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_the_readme_is_up_to_date():
    """As a process of its own, as in a hook or in CI."""
    done = subprocess.run(
        [sys.executable, "-m", "bam_kernels", "results", str(CPU), str(TRAFFIC), "--check",
         "README.md"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "up to date" in done.stdout


def test_tables_are_printed(capsys, gpu):
    status, out, err = command(capsys, TRAFFIC, CPU, gpu)
    assert status == 0 and not err
    readme = README.read_text(encoding="utf-8")
    blocks = out.strip().split("\n\n")
    assert blocks[1] in readme and blocks[3] in readme
    assert blocks[1].count("\n") == 13 and blocks[3].count("\n") > 10
    for name, line in ((TRAFFIC.name, blocks[0]), (CPU.name, blocks[2]), (gpu.name, blocks[4])):
        assert line.startswith(f"{name}: ") and "commit" in line
    lines = blocks[5].splitlines()
    assert len(lines) == 2 + 5 and len({line.count("|") for line in lines}) == 1
    data = json.loads(gpu.read_text())
    for line, entry in zip(lines[2:], data["cases"], strict=True):
        cells = line.strip("| ").split(" | ")
        assert cells[0] == entry["case"]["mode"] and cells[4] == "32x256x56x56"
        if "peers" in entry:
            assert cells[5] == f"{entry['peers']['fused']['median_ms']:.3f}"
            assert cells[10] == "-"  # broken off
            assert cells[11:] == [f"{entry['ratio_plain']:.2f}", "-", "0.40"]
        else:
            assert set(cells[5:]) == {"-"}


def test_a_document_is_updated_in_its_places_alone(capsys, gpu, tmp_path):
    document = tmp_path / "PAGE.md"
    before = "# Überschrift\n\n<!-- results: gpu -->\nold\n\nolder\n<!-- end -->\n\nbehind\n"
    before += "<!-- results: traffic -->\n<!-- end -->\n<!-- results: cpu -->\nkept\n<!-- end -->\n"
    document.write_bytes(before.encode())
    document.chmod(0o640)
    status, out, err = command(capsys, gpu, TRAFFIC, "--check", document)
    assert (status, out) == (1, "") and "is out of date" in err and err.count("\n") == 1
    assert document.read_bytes() == before.encode()
    status, out, _ = command(capsys, gpu, TRAFFIC, "--update", document)
    assert status == 0 and out == f"{document}: updated\n"
    tables = {p: results.table(results.load(p)) for p in (gpu, TRAFFIC)}
    expected = before.replace("old\n\nolder", tables[gpu]).replace(
        "traffic -->\n", f"traffic -->\n{tables[TRAFFIC]}\n"
    )
    assert document.read_bytes() == expected.encode()
    assert document.stat().st_mode & 0o777 == 0o640
    assert command(capsys, gpu, TRAFFIC, "--check", document)[0] == 0
    assert command(capsys, gpu, TRAFFIC, "--update", document)[1].endswith("up to date\n")
    # A digit is enough.
    document.write_text(expected.replace("| 3.0 |", "| 3.1 |", 1))
    assert command(capsys, gpu, TRAFFIC, "--check", document)[0] == 1
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_a_place_may_be_a_files_own(capsys, gpu, tmp_path):
    other = tmp_path / "gpu-other.json"
    other.write_text(gpu.read_text())
    document = tmp_path / "PAGE.md"
    document.write_bytes(
        b"<!-- results: gpu-other -->\r\n<!-- end -->\r\n<!-- results: gpu -->\r\n<!-- end -->\r\n"
    )
    assert command(capsys, gpu, other, "--update", document)[0] == 0
    text = document.read_bytes()
    assert text.count(b"a GPU") == 0 and text.count(b"| training |") == 6
    assert text.count(b"\n") == text.count(b"\r\n") == 4 + 2 * 7


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (None, "expected a document to read"),
        ("no places", "expected a line <!-- results: gpu --> for"),
        ("<!-- results: gpu -->\n", "expected <!-- end -->"),
        ("<!-- results: gpu -->\n<!-- results: cpu -->\n<!-- end -->\n", ":2: expected <!-- end"),
        ("<!-- results: gpu -->\n<!-- end -->\n" * 2, ":3: expected one place gpu"),
    ],
)
@pytest.mark.parametrize("option", ["--update", "--check"])
def test_a_document_without_its_place(option, document, words, capsys, gpu, tmp_path):
    path = tmp_path / "PAGE.md"
    if document is not None:
        path.write_text(document)
    status, out, err = command(capsys, gpu, option, path)
    assert (status, out) == (2, "") and err.count("\n") == 1 and words in err and str(path) in err
    assert not path.exists() if document is None else path.read_text() == document


def test_two_files_for_one_place(capsys, gpu, tmp_path):
    document = tmp_path / "PAGE.md"
    document.write_text("<!-- results: gpu -->\n<!-- end -->\n")
    status, _, err = command(capsys, gpu, gpu, "--update", document)
    assert status == 2 and "expected one file for <!-- results: gpu -->" in err


def test_a_smoke_run_is_told_and_kept_out_of_documents(capsys, gpu, tmp_path):
    data = json.loads(gpu.read_text()) | {"not_a_measurement": True}
    gpu.write_text(json.dumps(data))
    status, out, _ = command(capsys, gpu)
    assert status == 0 and out.count("NOT A MEASUREMENT") == 2
    document = tmp_path / "PAGE.md"
    document.write_text("<!-- results: gpu -->\n<!-- end -->\n")
    status, _, err = command(capsys, gpu, "--update", document)
    assert status == 2 and "expected a measurement" in err and "|" not in document.read_text()


# --- files that are none ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "expected a file to read, got No such file"),
        ("", "expected JSON"),
        ('{"rows": [', "expected JSON"),
        (b"\xff\xfe\x00", "expected JSON"),
        ("[]", "expected results of the CPU benchmark, the GPU run or the traffic meter, got JSON"),
        ("{}", "got keys none"),
        ('{"machine_info": {}, "benchmarks": []}', "got keys machine_info, benchmarks"),
        ('{"rows": []}', "got keys rows"),
        ('{"rows": 3}', "got keys rows"),
    ],
)
def test_another_tools_file(text, words, capsys, tmp_path):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    plots = tmp_path / "plots"
    status, out, err = command(capsys, TRAFFIC, path, "--plot", plots)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert str(path) in err and words in err and not plots.exists()


def data_of(kind: str) -> dict:
    return gpu_data() if kind == "gpu" else json.loads(
        (CPU if kind == "cpu" else TRAFFIC).read_text())  # fmt: skip


@pytest.mark.parametrize("kind", results.KINDS)
def test_another_version(kind, capsys, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data_of(kind) | {"format": 99}))
    status, _, err = command(capsys, path)
    assert status == 2 and f"expected {kind} results of format 1, got format 99" in err


PLACES = {
    "traffic": [
        ("rows[1].module",), ("rows[2].shape",), ("rows[3].passes.backward",),
        ("rows[4].launches.inference",), ("rows[5].peak",), ("rows[6].kept_for_backward",),
        ("rows[7].layout",), ("rows[8].preset",),
    ],
    "cpu": [
        ("machine",), ("versions",), ("rows[1].mode",), ("rows[2].sides",), ("rows[0].ratios",),
        ("rows[3].site",), ("rows[4].best_peer",), ("rows[1].preset",),
        ("rows[2].sides.ours nchw.median_ms",),
    ],
    "gpu": [
        ("cases",), ("environment.device",), ("cases[0].case",), ("cases[1].case.batch",),
        ("cases[2].peers",), ("cases[3].peers.fused.median_ms",), ("cases[0].case.layout",),
    ],
}  # fmt: skip


# Any value of these can be printed; those need not be there.
ANY, OPTIONAL = ("environment.device",), ("cases[3].peers.fused.median_ms",)
SPOILT = [
    (kind, place, spoil)
    for kind, found in PLACES.items()
    for (place,) in found
    for spoil, fine in (("missing", OPTIONAL), ("wrong", ANY))
    if place not in fine
]


@pytest.mark.parametrize(("kind", "place", "spoil"), SPOILT)
def test_a_part_that_is_missing_or_of_another_type(kind, place, spoil, capsys, tmp_path):
    data = copy.deepcopy(data_of(kind))
    *way, last = place.replace("[", ".").replace("]", "").split(".")
    inside = data
    for step in way:
        inside = inside[int(step) if step.isdigit() else step]
    if spoil == "missing":
        del inside[last]
    else:
        inside[last] = True
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data))
    status, out, err = command(capsys, path)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert place in err and str(path) in err and "expected" in err and "got" in err


# --- plots ------------------------------------------------------------------------------------


def test_plots(capsys, gpu, tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    np = pytest.importorskip("numpy")
    plots = tmp_path / "a" / "plots"
    cpu, traffic = tmp_path / "cpu.json", tmp_path / "traffic.json"
    for source, path in ((CPU, cpu), (TRAFFIC, traffic)):  # half of each: drawing takes its time
        data = json.loads(source.read_text())
        data["rows"] = [row for row in data["rows"] if row["preset"] == "official"]
        path.write_text(json.dumps(data))
    status, _, err = command(capsys, gpu, traffic, cpu, "--plot", plots)
    assert status == 0
    names = {path.name for path in plots.iterdir()}
    assert names == {"cpu-official.png", "traffic-official.png", "gpu-made-up-paper.png"}
    for name in names:
        assert name in err
        pixels = np.asarray(image.open(plots / name).convert("RGB"))
        assert pixels.shape[1] == 1560 and pixels.shape[0] > 900
        for part in np.array_split(pixels, 2, axis=1):  # panels on both sides, of two bars' colours
            assert all((part == color).all(axis=-1).sum() > 500 for color in
                       ((0xE6, 0x9F, 0x00), (0, 0x72, 0xB2) if "traffic" in name else
                        (0, 0x9E, 0x73)))  # fmt: skip


def test_the_bars_are_the_files_numbers():
    from bam_kernels.benchmarking import results_figure

    panels = results_figure.cpu_panels(data_of("cpu"))["paper"]
    for row in data_of("cpu")["rows"]:
        if row["preset"] == "paper":
            bars = panels[f"{row['mode']}, {row['dtype']}"][row["site"]]
            # The best peer over ours in our faster format: the larger of the file's ratios.
            assert min(bars.values()) == pytest.approx(max(row["ratios"].values()))
    data = gpu_data()
    panels = results_figure.gpu_panels(data)["paper"]
    peers = data["cases"][1]["peers"]
    bars = panels["training, float16, nchw"]["32x256x56x56"]
    ms = {name: peer.get("median_ms") for name, peer in peers.items()}
    assert bars == {
        "eager": ms["eager"] / ms["fused"],
        "torch.compile": ms["compile"] / ms["fused"],
        "eager, CUDA graph": ms["eager_graphed"] / ms["fused_graphed"],
    }
    passes = results_figure._traffic(data_of("traffic"))["official"]["2x256x56x56, nchw"]
    assert passes["backward"] == {"eager": 27.0, "fused": 5.0}


def test_plots_of_one_name_do_not_overwrite_each_other(capsys, tmp_path):
    other = tmp_path / TRAFFIC.name
    other.write_text(TRAFFIC.read_text())
    status, _, err = command(capsys, TRAFFIC, other, "--plot", tmp_path / "plots")
    assert status == 2 and "traffic twice" in err and not (tmp_path / "plots").exists()


def test_a_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").touch()
    status, out, err = command(capsys, TRAFFIC, "--plot", tmp_path / "file" / "plots")
    assert (status, out) == (2, "") and err.count("\n") == 1 and "--plot" in err
