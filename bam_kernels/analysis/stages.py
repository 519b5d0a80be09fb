"""The stages of a network, and what their last layers put out in a forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bam_kernels import reference
from bam_kernels.integrate import fake_run, names, places
from bam_kernels.integrate.dataflow import Call, Flow, record


def stage_layers(
    model: nn.Module, example_input: Tensor | Sequence[int] | None = None
) -> list[str]:
    """The names of the layers that put out the stages' last maps, in the order of the forward.

    The stages that end before a downsampling are those of ``insert_bam(model, at="bottlenecks")``,
    so that with a BAM there the layer's output is the refined map; the stage behind the last
    downsampling, which has no BAM in the paper, is added: ["layer1", ..., "layer4"] for a ResNet.

    Args:
        model: any module; nothing is computed and nothing of it is changed.
        example_input: its input or the shape of it; [1, 3, 224, 224] unless given. A stage whose
            map has a single pixel is not seen.

    Raises:
        TypeError: `model` is no module, `example_input` neither a tensor nor a shape.
        ValueError: the model cannot run on that input, or downsamples its maps nowhere.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    like = fake_run.example(model, example_input)
    try:
        flow = record(model, like)
    except Exception as error:  # the model's own code: it may raise anything
        raise ValueError(
            f"model: to find its stages it is run on an input of shape {list(like.shape)}, which "
            f"failed: {type(error).__name__}: {error}; pass example_input=, or name them with "
            "stages="
        ) from error
    found = [_end(flow, call) if front else call for call, front in places.bottlenecks(flow)]
    if not found:
        raise ValueError(
            f"model: expected a network that downsamples its maps behind a block, found none in "
            f"{type(model).__name__} on an input of shape {list(like.shape)}; name layers with "
            "stages="
        )
    last = _last(flow)
    called = [call.name for call in (*found, *([] if last is None else [last]))]
    return list(dict.fromkeys(called))


def _end(flow: Flow, following: Call) -> Call:
    """What put out the map that `following` takes: a dense block, or the BAM first inside of it."""
    inside = [call for call in flow.calls if call.parent is following]
    if inside and isinstance(inside[0].module, reference.BAM | reference.SqueezeExcite):
        return inside[0]
    makers = [c for c in flow.calls if c.name and c.output is not None
              and c.output in following.inputs]  # fmt: skip
    return makers[0] if makers else following


def _last(flow: Flow) -> Call | None:
    """The outermost layer that puts out the last of the coarsest maps."""
    makers = [c for c in flow.calls if c.name and c.output is not None]
    maps = [call for call in makers if flow.values[call.output].is_map]
    if not maps:
        return None
    smallest = min(_area(flow, call) for call in maps)
    coarsest = [call for call in maps if _area(flow, call) == smallest]
    end = max(call.output for call in coarsest)
    return next(call for call in coarsest if call.output == end)


def _area(flow: Flow, call: Call) -> int:
    height, width = flow.values[call.output].size
    return height * width


def matched_stages(
    model: nn.Module,
    stages: Sequence[str] | None,
    example_input: Tensor | Sequence[int] | None = None,
) -> list[str]:
    """The layers `stages` names (globs are allowed), or `stage_layers` where it is None.

    Raises:
        TypeError, ValueError: as `stage_layers`; a name that no layer has.
    """
    if stages is None:
        return stage_layers(model, example_input)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return list(names.match(model, stages, "stages"))


@contextlib.contextmanager
def watching(
    model: nn.Module, layers: Sequence[str], reduce: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """In each forward within, ``reduce(output)`` of each layer, by its name; hooks, which go.

    The dict holds the last forward's. A layer with a BAM of `insert_bam` is seen refined.

    Raises (in the forward):
        ValueError: a layer puts out something else than a map [N, C, H, W].
    """
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.dim() != 4:
                got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(f"stages: {name!r} puts out {got}, expected a map [N, C, H, W]")
            found[name] = reduce(output.detach())

        return see

    with contextlib.ExitStack() as stack:
        for name in layers:
            stack.callback(model.get_submodule(name).register_forward_hook(hook(name)).remove)
        yield found


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device | None]:
    """`model` in eval mode without gradients, its modes put back behind it; yields its device."""
    modes = {module: module.training for module in model.modules()}
    first = fake_run.first_parameter(model)
    try:
        model.eval()
        with torch.inference_mode():
            yield None if first is None else first.device
    finally:
        for module, training in modes.items():
            module.training = training
