"""The attention process: features before BAM, the map, features behind it (Sec. 6.2, Fig. 5)."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from bam_kernels.analysis.attention import attention_maps, attention_modules
from bam_kernels.analysis.class_means import ClassMeans, images_of, labelled
from bam_kernels.analysis.figure import Stage
from bam_kernels.analysis.map_statistics import GlobalStatistics
from bam_kernels.analysis.stages import evaluating, matched_stages, watching


@dataclasses.dataclass(frozen=True)
class Process:
    """One BAM at work on a batch.

    Attributes:
        before: F averaged in magnitude over the channels, [N, H, W].
        attention: M averaged over the channels, [N, H, W], or [N, 1, 1] without a spatial branch.
        after: F' averaged in magnitude over the channels, [N, H, W].
        profile: M averaged over the positions, [N, C].
        baseline: the features of a network without BAM at the same stage, averaged in magnitude
            over the channels, [N, H, W]; None where no such network was given.
    """

    before: Tensor
    attention: Tensor
    after: Tensor
    profile: Tensor
    baseline: Tensor | None = None

    @property
    def maps(self) -> dict[str, Tensor]:
        """The 2-D maps that there are: "baseline", "before", "attention", "after"."""
        found = {} if self.baseline is None else {"baseline": self.baseline}
        return {**found, "before": self.before, "attention": self.attention, "after": self.after}

    def stage(self, name: str, index: int) -> Stage:
        """Image `index` alone, on the CPU, for a picture."""
        each = {**self.maps, "profile": self.profile}
        return Stage(name, **{kind: values[index].cpu() for kind, values in each.items()})


def mean_magnitude(features: Tensor) -> Tensor:
    """[N, C, H, W] to [N, H, W]: the mean of |F| over the channels, in float32 or float64."""
    wide = features.detach()
    return (wide.float() if wide.itemsize < 4 else wide).abs().mean(dim=1)


@contextlib.contextmanager
def attention_process(model: nn.Module) -> Iterator[dict[str, Process]]:
    """By name, what each BAM and SqueezeExcite of `model` does in a forward within.

        with attention_process(model) as process:
            model(images)
        process["layer1.bam"].after          # [N, H, W]

    Filled at the end of each module's forward, over what the forward before left, and kept behind
    the context, as in `attention_maps`.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is no BAM in it.
    """
    found: dict[str, Process] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def see(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            before, after = mean_magnitude(args[0]), mean_magnitude(output)
            attention = maps[name]
            found[name] = Process(before, attention.spatial_map, after, attention.channel_profile)

        return see

    with attention_maps(model) as maps, contextlib.ExitStack() as stack:
        for name, module in attention_modules(model).items():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        yield found


Runner = Callable[[Tensor], dict[str, Process]]
"""Images [N, 3, H, W] to what each BAM did with them, by its name."""


@contextlib.contextmanager
def running(
    model: nn.Module,
    *,
    modules: Sequence[str] | None = None,
    baseline: nn.Module | None = None,
    baseline_stages: Sequence[str] | None = None,
    example_input: Tensor | Sequence[int] | None = None,
) -> Iterator[Runner]:
    """A function that runs `model`, and `baseline` beside it, both in eval mode without gradients.

    Args:
        model: a network with BAMs.
        modules: names of BAMs ("layer1.bam"), or globs of them; all unless given.
        baseline: a network of the same stages without BAM.
        baseline_stages: the layers of it that stand beside the BAMs, as many and in their order;
            unless given the model's first BAM stands beside the first of its stages, and so on,
            as `stage_layers` finds them.
        example_input: for that.

    Raises:
        TypeError, ValueError: no module, no BAM in it, a name that none has; a baseline with too
            few stages, or whose maps differ in size.
    """
    wanted = _chosen(model, modules)
    layers: list[str] = []
    if baseline is not None:
        layers = matched_stages(baseline, baseline_stages, example_input)
        if baseline_stages is None:
            # All BAMs stand beside the first stages; those wanted keep theirs.
            present = list(attention_modules(model))
            if len(present) <= len(layers):
                layers = [layers[present.index(name)] for name in wanted]
        if len(layers) != len(wanted):
            raise ValueError(
                f"baseline: expected {len(wanted)} stages, one a BAM ({', '.join(wanted)}), got "
                f"{len(layers)} ({', '.join(layers)}); name them with baseline_stages="
            )
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(evaluating(model))
        process = stack.enter_context(attention_process(model))
        beside: dict[str, Tensor] = {}
        if baseline is not None:
            stack.enter_context(evaluating(baseline))
            beside = stack.enter_context(watching(baseline, layers, mean_magnitude))

        def run(images: Tensor) -> dict[str, Process]:
            images = images.to(device)
            model(images)
            missing = [name for name in wanted if name not in process]
            if missing:
                raise ValueError(f"modules: {missing[0]!r} does not run in the model's forward")
            found = {name: process[name] for name in wanted}
            if baseline is not None:
                baseline(images)
                for name, layer in zip(wanted, layers, strict=True):
                    if layer not in beside or beside[layer].shape != found[name].before.shape:
                        got = list(beside[layer].shape) if layer in beside else "none"
                        raise ValueError(
                            f"baseline: expected a map {list(found[name].before.shape)} of "
                            f"{layer!r} beside {name!r}, got {got}"
                        )
                    found[name] = dataclasses.replace(found[name], baseline=beside[layer])
            return found

        yield run


def _chosen(model: nn.Module, modules: Sequence[str] | None) -> list[str]:
    present = list(attention_modules(model))
    if modules is None:
        return present
    if isinstance(modules, str):
        raise TypeError(f"modules: expected a list of names, got str {modules!r}")
    chosen: dict[str, None] = {}
    for pattern in modules:
        matching = [pattern] if pattern in present else fnmatch.filter(present, pattern)
        if not matching:
            raise ValueError(f"modules: expected names among {', '.join(present)}, got {pattern!r}")
        chosen |= dict.fromkeys(matching)
    if not chosen:
        raise ValueError("modules: expected at least one name, got none")
    return list(chosen)


def global_statistics(model: nn.Module, loader: Iterable[Any], **options: Any) -> GlobalStatistics:
    """The statistics of the 2-D maps over a data set, which maps are normalised by (Sec. 6.2).

    Args:
        model: a network with BAMs.
        loader: batches of images [N, 3, H, W], or tuples that begin with them.
        **options: of `running`: modules, baseline, baseline_stages, example_input.

    Raises:
        TypeError, ValueError: as `running`; no image in the loader; maps that are not finite.
    """
    found = GlobalStatistics()
    with running(model, **options) as run:
        for images in images_of(loader):
            found.update({name: process.maps for name, process in run(images).items()})
    return found


@dataclasses.dataclass(frozen=True)
class ClassAttention:
    """What one BAM attends to on average for each class; NaN for a class without images.

    Attributes:
        profiles: M averaged over the positions and a class's images, [K, C] float64.
        spatial: M averaged over the channels and a class's images, [K, H, W] float64.
        counts: images of each class, [K].
    """

    profiles: Tensor
    spatial: Tensor
    counts: Tensor


def class_attention(
    model: nn.Module, loader: Iterable[Any], *, modules: Sequence[str] | None = None
) -> dict[str, ClassAttention]:
    """By BAM, its channel profile and its spatial map as means over the images of each class.

    Sums in float64 over all images; no maps are kept.

    Args:
        model: a network with BAMs.
        loader: batches (images, labels), labels of an integer type from 0; images of one size.
        modules: names of BAMs, or globs of them; all unless given.

    Raises:
        TypeError, ValueError: as `running`; batches of something else, or without an image.
    """
    profiles: dict[str, ClassMeans] = {}
    spatial: dict[str, ClassMeans] = {}
    with running(model, modules=modules) as run:
        for images, labels in labelled(loader):
            for name, process in run(images).items():
                profiles.setdefault(name, ClassMeans()).add(process.profile, labels)
                spatial.setdefault(name, ClassMeans()).add(process.attention, labels)
    return {
        name: ClassAttention(profiles[name].means, spatial[name].means, profiles[name].counts)
        for name in profiles
    }
