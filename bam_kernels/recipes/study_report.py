"""What a study found: means, intervals, a table, a plot."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

from bam_kernels.files import replacing

COLUMNS = (
    "", "test error %", "standard deviation", "95 % interval", "less than baseline",
    "95 % interval", "parameters", "step ms",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mean:
    """Of n values, one a seed.

    Attributes:
        mean: of them.
        deviation: their standard deviation, over n - 1; NaN for one value.
        half: half the width of Student's 95 % interval of the mean; NaN for one value.
    """

    mean: float
    deviation: float
    half: float


def mean_of(values: list[float]) -> Mean:
    """Mean, standard deviation and 95 % interval of values that are independent and normal."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return Mean(values[0], math.nan, math.nan)
    deviation = statistics.stdev(values)
    half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Mean(statistics.mean(values), deviation, half)


def summary(
    errors: dict[str, list[float]], parameters: dict[str, int], seconds: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """A record a variant, the first of which is the baseline.

    ``gain`` is the baseline's error less the variant's, seed by seed: their mean and its interval.
    """
    first = next(iter(errors.values()))
    found = []
    for name, values in errors.items():
        gains = [a - b for a, b in zip(first, values, strict=True)]
        found.append(
            {
                "variant": name,
                "parameters": parameters[name],
                "step_ms": 1e3 * statistics.median(seconds[name]),
                "errors": values,
                "error": _plain(mean_of(values)),
                "gain": None if values is first else _plain(mean_of(gains)),
            }
        )
    return found


def _plain(mean: Mean) -> dict[str, float | None]:
    """JSON has no NaN."""
    values = dataclasses.asdict(mean)
    return {key: None if math.isnan(value) else value for key, value in values.items()}


def rows(found: list[dict[str, Any]]) -> list[list[str]]:
    """The table's cells, by `COLUMNS`."""

    def interval(mean: dict[str, float | None]) -> str:
        half = mean["half"]
        return "" if half is None else f"{mean['mean'] - half:.2f} .. {mean['mean'] + half:.2f}"

    lines = []
    for each in found:
        error, gain = each["error"], each["gain"]
        deviation = error["deviation"]
        lines.append(
            [
                each["variant"],
                f"{error['mean']:.2f}",
                "" if deviation is None else f"{deviation:.2f}",
                interval(error),
                "" if gain is None else f"{gain['mean']:+.2f}",
                "" if gain is None else interval(gain),
                str(each["parameters"]),
                f"{each['step_ms']:.1f}",
            ]
        )
    return lines


def markdown(data: dict[str, Any]) -> str:
    """The table of a study's JSON."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows(data["variants"])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def provenance(data: dict[str, Any]) -> str:
    """What a study was run with, in a line."""
    settings, machine = data["settings"], data["machine"]
    recipe = settings["recipe"]
    return (
        f"{settings['model']}, r = {settings['reduction']}, {recipe['epochs']} epochs, "
        f"{settings['seeds']} seeds, {data['test_images']} test images, {machine['cpu']}, torch "
        f"{data['versions']['torch']}, commit {data['commit'][:12]}, {data['date_utc'][:10]}"
    )


def write(path: Path, data: dict[str, Any]) -> None:
    """A study's JSON."""
    with replacing(path) as part:
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def draw(path: Path, data: dict[str, Any]) -> None:
    """A PNG: each seed's error, the mean with its interval, and the gains over the baseline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = data["variants"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.4), layout="constrained")
    for x, each in enumerate(found):
        values = each["errors"]
        spread = [0.25 * (i / max(1, len(values) - 1) - 0.5) for i in range(len(values))]
        left.plot([x + s for s in spread], values, "o", color="0.6", markersize=4)
        _bar(left, x, each["error"])
        if each["gain"] is not None:
            gains = [a - b for a, b in zip(found[0]["errors"], values, strict=True)]
            right.plot([x + s for s in spread], gains, "o", color="0.6", markersize=4)
            _bar(right, x, each["gain"])
    names = [each["variant"] for each in found]
    left.set_xticks(range(len(names)), names)
    right.set_xticks(range(1, len(names)), names[1:])
    right.axhline(0, color="0.3", linewidth=0.8)
    left.set_ylabel("test error, %")
    right.set_ylabel("less error than baseline, points")
    left.set_title(f"{data['settings']['model']} on {data['settings']['recipe']['dataset']}")
    right.set_title("the same seed with and without")
    figure.supxlabel(
        f"grey: one of {len(found[0]['errors'])} seeds; black: mean and its 95 % interval",
        fontsize=9,
    )
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)


def _bar(axes: Any, x: float, mean: dict[str, float | None]) -> None:
    axes.errorbar(x, mean["mean"], yerr=mean["half"] or 0, fmt="s", color="k", capsize=5)
