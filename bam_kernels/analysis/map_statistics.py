"""Mean and spread of 2-D maps over a whole data set, to compare maps by (Sec. 6.2).

"All the 2D maps are normalized according to the global statistics at each stage computed from the
whole ImageNet-1K training set": a map that is normalised by itself shows a maximum wherever it is,
however little it stands out.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bam_kernels.files import replacing

FORMAT = 1


@dataclasses.dataclass
class RunningStatistics:
    """Count, mean, spread, least and most of values that stream by.

    Batches are joined by their means and their sums of squared deviations (Chan, Golub and LeVeque,
    1983), in float64: unlike E[x^2] - E[x]^2 this does not cancel.
    """

    count: int = 0
    mean: float = 0.0
    squared_deviations: float = 0.0
    least: float = math.inf
    most: float = -math.inf

    def update(self, values: Tensor) -> None:
        """Take in every number of a tensor.

        Raises:
            ValueError: NaN or infinity is among them.
        """
        if not values.numel():
            return
        if not values.isfinite().all():
            raise ValueError("values: expected finite numbers, got NaN or infinity")
        wide = values.detach().double()
        count, mean = wide.numel(), float(wide.mean())
        total, difference = self.count + count, mean - self.mean
        self.squared_deviations += float((wide - mean).square().sum())
        self.squared_deviations += difference**2 * self.count * count / total
        self.mean += difference * count / total
        self.count = total
        self.least = min(self.least, float(wide.min()))
        self.most = max(self.most, float(wide.max()))

    @property
    def std(self) -> float:
        """The population's standard deviation; 0 before any value."""
        return math.sqrt(self.squared_deviations / self.count) if self.count else 0.0

    def normalize(self, values: Tensor) -> Tensor:
        """How many standard deviations above the mean; zeros where nothing ever varied."""
        std = self.std
        return (values - self.mean) / std if std > 0 else torch.zeros_like(values)


@dataclasses.dataclass
class GlobalStatistics:
    """`RunningStatistics` of each kind of map at each stage: ``statistics["layer1.bam"]["after"]``.

    Attributes:
        stages: by stage and kind.
        images: how many were taken in.
    """

    stages: dict[str, dict[str, RunningStatistics]] = dataclasses.field(default_factory=dict)
    images: int = 0

    def __getitem__(self, stage: str) -> dict[str, RunningStatistics]:
        return self.stages[stage]

    def update(self, maps: Mapping[str, Mapping[str, Tensor]]) -> None:
        """A batch: by stage and kind, maps [N, H, W].

        Raises:
            ValueError: no map, different N, or NaN or infinity in one.
        """
        counts = {len(each) for kinds in maps.values() for each in kinds.values()}
        if len(counts) != 1:
            raise ValueError(f"maps: expected maps [N, H, W] of one N, got N of {sorted(counts)}")
        for stage, kinds in maps.items():
            for kind, each in kinds.items():
                found = self.stages.setdefault(stage, {}).setdefault(kind, RunningStatistics())
                try:
                    found.update(each)
                except ValueError as error:
                    raise ValueError(f"stage {stage!r}, {kind}: {error}") from error
        self.images += counts.pop()

    def save(self, path: Path) -> None:
        """As JSON, whole or not at all; `load` gives the same numbers again.

        Raises:
            OSError: the file cannot be written.
        """
        content = {
            "format": FORMAT,
            "what": "statistics of 2-D maps: mean |F| over channels before and after BAM, mean M",
            "images": self.images,
            "stages": {
                stage: {kind: {**dataclasses.asdict(each), "std": each.std}
                        for kind, each in kinds.items()}
                for stage, kinds in self.stages.items()
            },
        }  # fmt: skip
        with replacing(path) as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> GlobalStatistics:
        """Read what `save` wrote.

        Raises:
            ValueError: no such file, or another's; one line.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError(f"no statistics of format {FORMAT}")
            stages = {
                stage: {kind: _read(each) for kind, each in kinds.items()}
                for stage, kinds in content["stages"].items()
            }
            images = int(content["images"])
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a file of map statistics: {error}") from error
        return cls(stages, images)

    def check(self, maps: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise ValueError unless there are statistics for each of these maps."""
        for stage, kinds in maps.items():
            for kind in kinds:
                if kind not in self.stages.get(stage, {}):
                    raise ValueError(
                        f"statistics: expected those of {kind!r} at {stage!r}, got "
                        + (
                            ", ".join(self.stages.get(stage, {}))
                            or ", ".join(self.stages)
                            or "none"
                        )
                    )


def _read(each: Mapping[str, Any]) -> RunningStatistics:
    fields = {f.name for f in dataclasses.fields(RunningStatistics)}
    values = {name: each[name] for name in fields}
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values.values()):
        raise ValueError(f"expected numbers, got {dict(each)}")
    return RunningStatistics(**values)
