"""The class-selectivity index of every channel, stage by stage (Sec. 6.1, Fig. 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bam_kernels.analysis.class_means import ClassMeans, labelled
from bam_kernels.analysis.stages import evaluating, matched_stages, watching


def selectivity_index(class_means: Tensor) -> Tensor:
    """(mu_max - mu_rest) / (mu_max + mu_rest) of every channel (Morcos et al., 2018).

    mu_max is a channel's highest class-conditional mean activity, mu_rest the mean of those of all
    other classes, every class counting the same however many images it has. 0: the same for every
    class. 1: active for a single class. Between the two for activities that are not negative.

    Args:
        class_means: [K, C], not negative; a row of NaN is a class without images, and left out.

    Returns:
        [C] float64; NaN for a dead unit, which is active for no class: its index is 0 / 0.

    Raises:
        ValueError: not two classes with images; a negative mean.
    """
    means = class_means.double()
    means = means[~means.isnan().any(dim=1)]
    if len(means) < 2:
        raise ValueError(f"class_means: expected at least 2 classes with images, got {len(means)}")
    if (means < 0).any():
        raise ValueError(f"class_means: expected none below 0, got {float(means.min()):.3g}")
    highest, preferred = means.max(dim=0)
    # The highest is left out of the sum, not subtracted from it: that would cancel.
    rest = means.scatter(0, preferred[None], 0.0).sum(dim=0) / (len(means) - 1)
    return (highest - rest) / (highest + rest)


@dataclasses.dataclass(frozen=True)
class Selectivity(Mapping[str, Tensor]):
    """By stage the indices [C], float64, NaN for dead units: ``selectivity["layer1"]``.

    Attributes:
        indices: what it is a mapping of.
        class_means: by stage, the mean activity of each channel for each class, [K, C] float64; NaN
            for a class without images.
        counts: images of each class, [K].
    """

    indices: dict[str, Tensor]
    class_means: dict[str, Tensor]
    counts: Tensor

    def __getitem__(self, stage: str) -> Tensor:
        return self.indices[stage]

    def __iter__(self) -> Iterator[str]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def alive(self, stage: str) -> Tensor:
        """The indices of the units that are active for some class, [at most C]."""
        found = self.indices[stage]
        return found[~found.isnan()]

    def record(self) -> dict[str, Any]:
        """As a JSON object: by stage mean, median, dead units and the indices (null: dead)."""
        stages = {}
        for name, found in self.indices.items():
            alive = self.alive(name)
            stages[name] = {
                "channels": len(found),
                "dead": len(found) - len(alive),
                "mean": float(alive.mean()) if len(alive) else None,
                "median": float(alive.quantile(0.5)) if len(alive) else None,
                "indices": [None if x != x else x for x in found.tolist()],
            }
        return {"images_of_class": self.counts.tolist(), "stages": stages}


def class_selectivity(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    stages: Sequence[str] | None = None,
    example_input: Tensor | Sequence[int] | None = None,
) -> Selectivity:
    """The class selectivity of every channel at the end of each stage, over a data set.

    A channel's activity for an image is its mean over the positions, behind a ReLU: where a stage
    ends in one, as a ResNet's do, with and without BAM, that changes nothing; of a map that may be
    negative (pre-activation networks, linear bottlenecks) it takes the positive part, so that
    an index lies between 0 and 1. The means by class are sums in float64 over all images; no
    features are kept, and how the loader cuts its batches makes no difference.

    The model runs in eval mode on the device of its first parameter, and has its modes back behind.

    Args:
        model: a network; in its stages with BAM the refined map is taken.
        loader: batches (images, labels), labels of an integer type from 0.
        stages: names of layers that put out maps [N, C, H, W], or globs of them; `stage_layers`
            of the model unless given.
        example_input: for that, as in `stage_layers`.

    Returns:
        By stage the indices [C]; see `Selectivity`.

    Raises:
        TypeError: no module, or batches of something else.
        ValueError: no stage found, or not by this name, or one that puts out no map; no images,
            those of one class only, or labels that do not fit; activities that are not finite.
    """
    layers = matched_stages(model, stages, example_input)
    means = {name: ClassMeans() for name in layers}
    with evaluating(model) as device, watching(model, layers, _activity) as activities:
        for images, labels in labelled(loader):
            activities.clear()
            model(images.to(device))
            for name, mean in means.items():
                if name not in activities:
                    raise ValueError(f"stages: {name!r} does not run in the model's forward")
                try:
                    mean.add(activities[name], labels)
                except ValueError as error:
                    raise ValueError(f"stage {name!r}: {error}") from error
    class_means = {name: mean.means for name, mean in means.items()}
    return Selectivity(
        {name: selectivity_index(found) for name, found in class_means.items()},
        class_means,
        means[layers[0]].counts,
    )


def _activity(output: Tensor) -> Tensor:
    """[N, C, H, W] to [N, C], in float64."""
    return F.relu(output).mean(dim=(2, 3), dtype=torch.float64)
