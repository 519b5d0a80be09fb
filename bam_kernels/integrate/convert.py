"""`convert_state_dict`: the keys of one BAM made another's, in whole networks' state dicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bam_kernels.integrate.clients import CLIENTS, OWN, Client

NAMES = (OWN.name, *CLIENTS)
"""What state dicts can be converted from and to: our keys, and each client's."""

_COUNTER = "num_batches_tracked"
_KINDS = {
    "layer": ("weight", "bias"),
    "norm": ("weight", "bias", "running_mean", "running_var", _COUNTER),
}


@dataclasses.dataclass(frozen=True)
class Converted:
    """A BAM of a state dict.

    Attributes:
        prefix: of its keys, "layer1.bam." or "".
        channels: C.
        hidden: C // r.
        mlp_layers: hidden layers of its MLP.
        num_dilated: 3x3 convolutions.
        layers: by name of ours, the source's name.
    """

    prefix: str
    channels: int
    hidden: int
    mlp_layers: int
    num_dilated: int
    layers: dict[str, str]


def convert_state_dict(state_dict: Mapping[str, Any], source: str, target: str) -> dict[str, Any]:
    """Rename the keys of every BAM in a state dict, that of a BAM or of a whole network.

    The names are ``bam_kernels``, for the keys of `bam_kernels.BAM`, and ``official``,
    ``pytorchcv``, ``fightingcv`` and ``changzy00``, for the keys of those. What has been converted
    to ``bam_kernels`` loads into a network with ``BAM(C, preset=source)`` in the same places.

    BAMs are found by the names of their layers, under any prefix ("module.layer1.bam."). All other
    keys, the order of keys and the values stay; values are the same objects, not copies. The
    modules' versions, which torch keeps beside an ``OrderedDict`` of a state dict, go along.

    Between two clients it takes the same arithmetic, as ``official`` and ``pytorchcv`` have it. Our
    keys do not tell how the branches are combined: from ``bam_kernels`` it takes the same layers.

    Args:
        state_dict: by key, tensors; not changed.
        source: whose keys these are.
        target: whose keys they shall be.

    Returns:
        A new dict, or OrderedDict where that is what came.

    Raises:
        TypeError: not a mapping with keys that are str.
        ValueError: an unknown name; no BAM of `source` found; a BAM with a key too few or too many
            or a tensor of another shape; layers that `target` does not have, or lacks, or another
            arithmetic; two keys that would be one.
    """
    return convert(state_dict, source, target)[0]


def convert(
    state_dict: Mapping[str, Any], source: str, target: str
) -> tuple[dict[str, Any], tuple[Converted, ...]]:
    """`convert_state_dict`, and the BAMs that were found."""
    for name, value in (("source", source), ("target", target)):
        if value not in NAMES:
            raise ValueError(f"{name}: expected one of {', '.join(NAMES)}, got {value!r}")
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a dict, got {type(state_dict).__name__}")
    odd = next((key for key in state_dict if not isinstance(key, str)), None)
    if odd is not None:
        raise TypeError(f"state_dict: expected keys of type str, got {type(odd).__name__} {odd!r}")
    theirs, others = _client(source), _client(target)
    reason = _other_arithmetic(source, target)
    if reason is not None:
        raise ValueError(f"target: {reason}")
    found = tuple(_read(state_dict, prefix, theirs) for prefix in prefixes(state_dict, theirs))
    if not found:
        raise ValueError(f"state_dict: expected the keys of {theirs.what}, {_instead(state_dict)}")
    renamed: dict[str, str] = {}
    for bam in found:
        names = _target_names(bam, others)
        for ours, name in bam.layers.items():
            renamed[bam.prefix + name] = bam.prefix + names[ours]

    keys = {key: _renamed(key, renamed) for key in state_dict}
    if len(set(keys.values())) < len(keys):
        seen: set[str] = set()
        twice = next(key for key in keys.values() if key in seen or seen.add(key))
        raise ValueError(f"state_dict: two of its keys would be {twice!r}")
    made = type(state_dict)() if isinstance(state_dict, dict) else {}
    made.update((keys[key], value) for key, value in state_dict.items())
    versions = getattr(state_dict, "_metadata", None)
    if versions is not None:
        made._metadata = _versions(versions, renamed)
    return made, found


def prefixes(state_dict: Mapping[str, Any], client: Client) -> list[str]:
    """Where there are BAMs of a client: prefixes with a layer of its in each of both branches."""
    names = set(client.names())
    lengths = {name.count(".") + 1 for name in names}
    seen: dict[str, set[str]] = {}
    for key in state_dict:
        parts = key.split(".")[:-1] if isinstance(key, str) else []
        for length in lengths:
            name = ".".join(parts[-length:])
            if len(parts) >= length and name in names:
                prefix = "".join(f"{part}." for part in parts[:-length])
                seen.setdefault(prefix, set()).add(name.partition(".")[0])
    return [prefix for prefix, branches in seen.items() if len(branches) == 2]


def _client(name: str) -> Client:
    return OWN if name == OWN.name else CLIENTS[name]


def _instead(state_dict: Mapping[str, Any]) -> str:
    for client in (OWN, *CLIENTS.values()):
        if prefixes(state_dict, client):
            return f"found those of {client.what} (source={client.name!r})"
    held = next((k for k, v in state_dict.items() if isinstance(v, Mapping)), None)
    return "found none" if held is None else f"found none; it holds a dict itself, {held!r}"


def _other_arithmetic(source: str, target: str) -> str | None:
    """Why two clients' BAMs are not the same function of the same weights; None if they are."""
    if OWN.name in (source, target):
        return None
    a, b = CLIENTS[source].arithmetic(), CLIENTS[target].arithmetic()
    other = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    if not other:
        return None
    return f"expected a BAM that computes what {source} does, but {target} differs in " + ", ".join(
        other
    )


def _read(state_dict: Mapping[str, Any], prefix: str, client: Client) -> Converted:
    """The BAM under a prefix.

    Raises:
        ValueError: a key too few or too many, or a wrong shape.
    """
    where = f"state_dict: {client.what} at {prefix.removesuffix('.')!r}"
    roots = tuple(f"{prefix}{branch}." for branch in (client.channel, client.spatial))
    inside = {key.removeprefix(prefix) for key in state_dict if key.startswith(roots)}
    present = {key.rpartition(".")[0] for key in inside}
    depth = client.depth(present.__contains__)
    layers = client.layers(*depth, present.__contains__)
    expected = {
        f"{name}.{part}": part for ours, name in layers.items() for part in _KINDS[_kind(ours)]
    }
    missing = [key for key, part in expected.items() if key not in inside and part != _COUNTER]
    if missing:
        raise ValueError(f"{where}: expected the key {_list(prefix, missing)}, got none")
    extra = sorted(inside - expected.keys())
    if extra:
        raise ValueError(f"{where}: expected no key {_list(prefix, extra)}")
    for key in inside:
        value = state_dict[prefix + key]
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{where}: expected a tensor at {prefix + key!r}, got {type(value).__name__}"
            )
    first, reduce = (state_dict[f"{prefix}{layers[ours]}.weight"].shape for ours in _WIDTHS)
    if len(first) != 2 or len(reduce) != 4:
        raise ValueError(
            f"{where}: expected weights [h, C] and [h, C, 1, 1] of {layers[_WIDTHS[0]]!r} and "
            f"{layers[_WIDTHS[1]]!r}, got {list(first)} and {list(reduce)}"
        )
    channels, hidden = first[1], reduce[0]
    for ours, name in layers.items():
        for part in _KINDS[_kind(ours)]:
            value = state_dict.get(f"{prefix}{name}.{part}")
            shape = _shape(ours, part, channels, hidden, depth[0])
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(
                    f"{where}: expected shape {list(shape)} at '{prefix}{name}.{part}' with "
                    f"{channels} channels, {hidden} inside, got {list(value.shape)}"
                )
    return Converted(prefix, channels, hidden, *depth, layers)


_WIDTHS = ("channel.fc.0", "spatial.reduce")


def _kind(ours: str) -> str:
    return "norm" if "norm" in ours else "layer"


def _shape(ours: str, part: str, channels: int, hidden: int, mlp_layers: int) -> tuple[int, ...]:
    """Of a tensor of ours."""
    branch, layer, index = (*ours.split("."), "")[:3]
    if part == _COUNTER:
        return ()
    inner = hidden
    if branch == "channel":
        width = channels if layer == "norm" or index == str(mlp_layers) else hidden
        inner = channels if index == "0" else hidden
        return (width, inner) if part == "weight" and layer == "fc" else (width,)
    width = 1 if layer in ("project", "norm") else hidden
    if part != "weight" or _kind(ours) == "norm":
        return (width,)
    kernel = 3 if layer == "dilated" else 1
    return (width, channels if layer == "reduce" else inner, kernel, kernel)


def _list(prefix: str, keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(repr(prefix + key) for key in keys[:3]) + more


def _target_names(bam: Converted, target: Client) -> dict[str, str]:
    """By our layers' names, the target's.

    Raises:
        ValueError: the target has other layers.
    """
    where = f"target: BAM at {bam.prefix.removesuffix('.')!r}"
    depth = bam.mlp_layers, bam.num_dilated
    reason = target.why_not(*depth)
    if reason is not None:
        raise ValueError(f"{where}: {reason}")
    names = target.layers(*depth)
    without = [ours for ours in bam.layers if ours not in names]
    if without:
        raise ValueError(f"{where}: {target.name} has no layer for {_list('', without)}")
    wanting = [ours for ours in names if ours not in bam.layers]
    if wanting and not target.optional_norms:
        raise ValueError(f"{where}: {target.name} has {_list('', wanting)}, the source has not")
    return names


def _renamed(key: str, layers: dict[str, str]) -> str:
    layer, _, part = key.rpartition(".")
    return f"{layers[layer]}.{part}" if layer in layers else key


def _versions(versions: Mapping[str, Any], renamed: dict[str, str]) -> dict[str, Any]:
    """The versions of modules, by name; those of containers that are no more do no harm."""
    return type(versions)((renamed.get(name, name), each) for name, each in versions.items())
