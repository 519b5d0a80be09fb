"""Where the paper puts BAMs, found in a network by the shapes of its maps and not by names.

**Bottlenecks** (Sec. 3, Table 2: "right before the downsampling"). The way from the input to the
coarsest map leads through certain values whatever branch is taken: not through the inside of a
residual block, which its shortcut passes by. Where two such values follow each other and the second
is smaller, a stage ends, and the last module that put out the first is the place. A stage holds a
block. What stands before a network's first block is its stem and has no place, as in the paper's
ResNets, which have none before the max pooling.

**Blocks** (Table 2, BAM-C: "every convolutional block"). A module whose own forward joins what it
made of its input with another branch, or with its input itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from torch import nn

from bam_kernels.integrate import fake_run
from bam_kernels.integrate.channels import channels_of, loops_over_children, runs_children_in_order
from bam_kernels.integrate.dataflow import Call, Flow, Value, record, shrinks

AT = ("bottlenecks", "blocks")
"""The places that have a name."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer whose output, or in `front` of which the map is refined, of so many channels."""

    name: str
    module: nn.Module
    channels: int
    front: bool = False


def find(model: nn.Module, at: str, like: fake_run.Example) -> list[Place]:
    """The places `at`, in the order of the forward.

    In front of a layer is a place only where what puts out the map can have no further child: a
    dense block with a loop of its own over its layers.

    Raises:
        TypeError, ValueError: `at` is none of `AT`; the model cannot run; it has no such place; a
            place's output is no [N, C, H, W].
    """
    if not isinstance(at, str):
        raise TypeError(f"at: expected one of {', '.join(AT)}, got {type(at).__name__} {at!r}")
    if at not in AT:
        raise ValueError(f"at: expected one of {', '.join(AT)}, got {at!r}")
    try:
        flow = record(model, like)
    except Exception as error:  # the model's own code: it may raise anything
        raise ValueError(
            f"model: at={at!r} needs a run, and one on an input of shape {list(like.shape)} "
            f"failed: {type(error).__name__}: {error}; pass example_input=, or the part of the "
            "model that takes one tensor"
        ) from error
    found = bottlenecks(flow) if at == "bottlenecks" else [(c, False) for c in _blocks(flow)]
    if not found:
        raise ValueError(f"at: {_MISSING[at].format(type(model).__name__, list(like.shape))}")
    places: dict[str, Place] = {}
    for call, front in found:
        maps = [c.entering if front else c.result for c in flow.calls if c.name == call.name]
        channels = channels_of(call.name, maps, like.square, "at")
        module = model.get_submodule(call.name)
        places[call.name] = Place(call.name, module, channels, front)
    return list(places.values())


_MISSING = {
    "bottlenecks": "expected a network that downsamples its maps [N, C, H, W] behind a block, "
    "found no such place in {} on an input of shape {}; name the layers with after=",
    "blocks": "expected a network of blocks whose branches join (residual blocks, say), "
    "found none in {} on an input of shape {}; name the layers with after=",
}


# --- bottlenecks ------------------------------------------------------------------------------


def bottlenecks(flow: Flow) -> list[tuple[Call, bool]]:
    """The calls at whose ends stages end, or (True) at whose beginnings."""
    made = {call.output for call in flow.calls if call.name}
    maps = [v for v in flow.values if v.is_map and (v.index in made or _downsamples(flow, v))]
    if not maps:
        return []
    # The last of the coarsest maps: in a network with a decoder, the end of the encoder.
    end = min(maps, key=lambda v: (v.size[0] * v.size[1], -v.index))
    chain = [v for v in flow.values if v.is_map and v.dominates(end)]
    drops = [i for i in range(len(chain) - 1) if shrinks(chain[i].size, chain[i + 1].size)]
    if not drops:
        return []
    last = chain[drops[-1] + 1].index
    first_join = next((v.index for v in flow.values[:last] if v.joins), None)
    found: list[tuple[Call, bool]] = []
    begin = 0
    for drop in drops:
        before = chain[begin - 1].index if begin else -1
        run, begin = chain[begin : drop + 1], drop + 1
        stage = _Stage(flow, run, before, first_join)
        place = stage.place(chain[drop + 1])
        if place is not None:
            found.append(place)
    return found


def _downsamples(flow: Flow, value: Value) -> bool:
    return any(shrinks(flow.values[source].size, value.size) for source in value.sources)


class _Stage:
    """The values of one resolution on every way, and what was made since the resolution before."""

    def __init__(
        self, flow: Flow, run: Sequence[Value], before: int, first_join: int | None
    ) -> None:
        self._flow, self._run, self._joined = flow, run, first_join is not None
        size = run[-1].size
        self._work = [
            v.index
            for v in flow.values[max(before + 1, first_join or 0) : run[-1].index + 1]
            if (v.keeps or v.joins) and not shrinks(v.size, size) and not shrinks(size, v.size)
        ]

    def place(self, smaller: Value) -> tuple[Call, bool] | None:
        """Where the stage ends, `smaller` being the first of the next one's: see bottlenecks."""
        candidates = {v.index: v for v in self._run if self._has_block(v)}
        if not candidates:
            return None
        last, following = self._run[-1], None
        if self._joined:
            # The boundary of the outermost module that downsamples and has a whole stage before it:
            # a block's own expansion, or a transition's convolution, belongs to what follows.
            for call in self._downsampling(smaller).calls:
                entering = [candidates[i] for i in call.inputs if i in candidates]
                if entering:
                    last, following = entering[-1], call
                    break
        if following is not None and self._only_loops(last) and self._opens(following):
            return following, True
        # What is put out by no module (a functional ReLU) is refined where a module last was.
        for value in reversed([v for v in candidates.values() if v.index <= last.index]):
            maker = self._maker(value)
            if maker is not None:
                return maker, False
        return None

    def _has_block(self, value: Value) -> bool:
        return any(index <= value.index for index in self._work)

    def _downsampling(self, smaller: Value) -> Value:
        values = self._flow.values
        return next(
            v
            for v in values[self._run[-1].index + 1 : smaller.index + 1]
            if _downsamples(self._flow, v)
        )

    def _makers(self, value: Value) -> list[Call]:
        """The modules that put out `value`, the outermost first."""
        return [c for c in self._flow.calls if c.output == value.index and c.name]

    def _maker(self, value: Value) -> Call | None:
        """The outermost module that puts out `value`, and nothing else, and can have a child."""
        for call in self._makers(value):
            if not loops_over_children(call.module) and self._called_once(call):
                return call
        return None

    def _only_loops(self, value: Value) -> bool:
        makers = self._makers(value)
        return bool(makers) and all(loops_over_children(call.module) for call in makers)

    def _opens(self, call: Call) -> bool:
        """Whether a child can be put first into the module called."""
        return runs_children_in_order(call.module) and self._called_once(call)

    def _called_once(self, call: Call) -> bool:
        return sum(other.name == call.name for other in self._flow.calls) == 1


# --- blocks -----------------------------------------------------------------------------------


def _blocks(flow: Flow) -> list[Call]:
    residual = _outermost(_hosts(flow, "add"))
    # A block that changes the number of channels may lack the shortcut of its siblings.
    kinds = {type(call.module) for call in residual} - {nn.Sequential}
    blocks = _outermost(
        residual + [c for c in flow.calls if type(c.module) in kinds and _puts_out_map(flow, c)]
    )
    # A concatenation inside of a residual block is its own affair (a Res2Net's groups), and one
    # around residual blocks is a stage of them.
    blocks += _outermost(
        call
        for call in _hosts(flow, "cat")
        if not any(call is b or _inside(call, b) or _inside(b, call) for b in blocks)
    )
    order = {id(call): i for i, call in enumerate(flow.calls)}
    return sorted(blocks, key=lambda call: order[id(call)])


def _hosts(flow: Flow, how: str) -> list[Call]:
    """The calls whose forward joins branches from one and the same map that they took."""
    found: dict[int, Call] = {}
    for value in flow.values:
        if value.joins != how:
            continue
        # An adder that is a module (nn.quantized.FloatFunctional) joins for the one that calls it.
        own = [call for call in value.calls if next(call.module.parameters(), None) is not None]
        if not own or not own[-1].name or not _puts_out_map(flow, own[-1]):
            continue
        host = own[-1]
        while how == "cat" and _passes_on(host.parent, host):
            host = host.parent  # a dense block's loop over its layers, a module of its own
        inputs = [flow.values[i] for i in host.inputs if flow.values[i].is_map]
        convolves = any(v.convolves and host in v.calls for v in flow.values[: value.index])
        if len(inputs) == 1 and inputs[0].dominates(value) and convolves:
            found[id(host)] = host
    return list(found.values())


def _passes_on(parent: Call | None, call: Call) -> bool:
    """Whether a module of some forward of its own gives what it takes to `call`."""
    return (
        parent is not None
        and parent.inputs == call.inputs
        and bool(parent.name)
        and not isinstance(parent.module, nn.Sequential)
    )


def _puts_out_map(flow: Flow, call: Call) -> bool:
    return bool(call.name) and call.output is not None and flow.values[call.output].is_map


def _outermost(calls: Iterable[Call]) -> list[Call]:
    """Those that were made in the course of no other one, each once."""
    each = list(dict.fromkeys(calls))
    return [call for call in each if not any(_inside(call, other) for other in each)]


def _inside(call: Call, other: Call) -> bool:
    """Whether `call` was made in the course of `other`."""
    parent = call.parent
    while parent is not None and parent is not other:
        parent = parent.parent
    return parent is other
