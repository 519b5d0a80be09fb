"""Which client's BAM a module is: by its layers' names, kinds and sizes, never by its class's name
alone; and ours over the same layers."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from bam_kernels.config import BAMConfig, resolve
from bam_kernels.integrate.clients import CLIENTS, Client
from bam_kernels.modules import BAM

_Norm = nn.modules.batchnorm._BatchNorm

HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)
"""The attributes in which a module keeps its hooks, and what is said of them."""

_NAMES = ("bam", "bamblock", "bamlayer", "bammodule", "bottleneckattentionmodule")


@dataclasses.dataclass(frozen=True)
class Match:
    """A client's BAM.

    Attributes:
        client: whose it is.
        options: of `bam_kernels.BAM`, under which it has these layers; the pooling, which no layer
            tells, is not among them.
        layers: by our name, the module; they become parts of ours as they are.
        branches: the client's (channel, spatial).
    """

    client: Client
    options: dict[str, Any]
    layers: dict[str, nn.Module]
    branches: tuple[nn.Module, nn.Module]

    @property
    def config(self) -> BAMConfig:
        return resolve(**self.options)


def find(module: nn.Module) -> Match | str | None:
    """The client's BAM that `module` is; or why not, where it is near to one; else None."""
    parts = dict(module.named_modules(remove_duplicate=False))
    for client in CLIENTS.values():
        if any(name in parts for name in (client.reduce, client.last_fc, client.project)):
            try:
                return _match(module, client, parts)
            except _OtherError as reason:
                return str(reason)
    if type(module).__name__.lower().replace("_", "") in _NAMES:
        if isinstance(module, GraphModule):
            return "it is a torch.fx.GraphModule, as strip() makes them"
        children = ", ".join(name for name, _ in module.named_children()) or "none"
        return f"its layers are those of no known BAM (its children: {children})"
    return None


def build(match: Match, module: nn.Module, pool: str | None) -> BAM:
    """Ours over the layers of a client's BAM, in its training mode; its hooks are not ours yet."""
    made = BAM(**match.options, pool=pool, device="meta")
    for name, layer in match.layers.items():
        holder, _, last = name.rpartition(".")
        made.get_submodule(holder)._modules[last] = layer
    layers = set(match.layers.values())
    for branch, theirs in zip((made.channel, made.spatial), match.branches, strict=True):
        for part in (branch, *branch.children(), *(branch.hidden_norm or ())):
            if part not in layers:  # those keep modes of their own
                part.training = theirs.training
    made.training = module.training
    return made


class _OtherError(Exception):
    """A module is not a client's BAM; says why."""


def _match(module: nn.Module, client: Client, parts: dict[str, nn.Module]) -> Match:
    depth = client.depth(parts.__contains__)
    names = client.layers(*depth)
    layers = {ours: _layer(client, parts, ours, name) for ours, name in names.items()}
    theirs = set(names.values())
    inside = tuple(f"{name}." for name in theirs)
    outside = {
        name: part
        for name, part in parts.items()
        if name not in theirs and not name.startswith(inside)
    }
    for name, part in outside.items():
        own = [*part._parameters, *part._buffers]
        if own:
            where = f"{name}.{own[0]}" if name else own[0]
            raise _OtherError(f"{client.what} has no {where!r}")
    if len({id(layer) for layer in layers.values()}) < len(layers):
        raise _OtherError("it has a layer in two places")
    tensors = [t for part in layers.values() for t in (*part.parameters(), *part.buffers())]
    odd = next((t for t in tensors if type(t) not in (Tensor, nn.Parameter)), None)
    if odd is not None:
        raise _OtherError(f"it holds a {type(odd).__name__}, which is not a plain tensor")
    _check_calls(module, outside)
    branches = parts[client.channel], parts[client.spatial]
    return Match(client, _options(client, layers, depth), layers, branches)


def _layer(client: Client, parts: dict[str, nn.Module], ours: str, name: str) -> nn.Module:
    layer = parts.get(name)
    if layer is None:
        raise _OtherError(f"it has no {name!r}, as {client.what} has")
    kind: type[nn.Module] = nn.Linear if ours.startswith("channel.fc") else nn.Conv2d
    kind = _Norm if "norm" in ours else kind
    if not isinstance(layer, kind):
        what = "a batch norm" if kind is _Norm else kind.__name__
        raise _OtherError(f"its {name!r} is {type(layer).__name__}; expected {what}")
    if kind is not _Norm and layer.bias is None:
        raise _OtherError(f"its {name!r} has no bias, as {client.what} has")
    return layer


def _check_calls(module: nn.Module, outside: dict[str, nn.Module]) -> None:
    """Whether calling the module runs more than its class's forward and its layers.

    Raises:
        _OtherError: it does.
    """
    for name, part in outside.items():
        what = f"its {name!r}" if name else "it"
        if isinstance(part, GraphModule):
            raise _OtherError(f"{what} is a torch.fx.GraphModule")
        if "forward" in vars(part):
            raise _OtherError(f"{what} has a forward of its own instance")
        forwards = [kind for kind in type(part).__mro__ if "forward" in vars(kind)][:-1]
        if len(forwards) > 1 and not type(part).__module__.startswith("torch."):
            raise _OtherError(
                f"{what} is a {type(part).__name__}, whose forward overrides that of "
                f"{forwards[1].__name__}"
            )
        if type(part).__call__ is not nn.Module.__call__:
            raise _OtherError(f"{what} is a {type(part).__name__}, which has a __call__ of its own")
        if name and any(vars(part).get(hooks) for hooks in HOOKS):
            raise _OtherError(f"{what} has hooks, and ours has no such part")


def _options(
    client: Client, layers: dict[str, nn.Module], depth: tuple[int, int]
) -> dict[str, Any]:
    """Of `bam_kernels.BAM`.

    Raises:
        _OtherError: layers that do not fit each other.
    """
    channels, hidden = layers["spatial.reduce"].in_channels, layers["spatial.reduce"].out_channels
    for name, layer in layers.items():
        found = _widths(layer)
        expected = _expected_widths(name, channels, hidden, depth[0])
        if found != expected:
            raise _OtherError(
                f"its layer for {name} is {type(layer).__name__} of {found}; expected {expected} "
                f"with {channels} channels, {hidden} inside"
            )
    convs = [layers[f"spatial.dilated.{i}"] for i in range(depth[1])]
    for conv in (layers["spatial.reduce"], layers["spatial.project"]):
        if (conv.kernel_size, conv.stride, conv.padding) != ((1, 1), (1, 1), (0, 0)):
            raise _OtherError("its reduction or projection is no plain 1x1 convolution")
    dilation, padding = convs[0].dilation[0], convs[0].padding[0]
    for conv in convs:
        expected = ((3, 3), (1, 1), (dilation,) * 2, (padding,) * 2, 1, "zeros")
        found = (conv.kernel_size, conv.stride, conv.dilation, conv.padding, conv.groups)
        if (*found, conv.padding_mode) != expected:
            raise _OtherError("its dilated convolutions are not 3x3, of one dilation and padding")
    if padding > dilation:
        raise _OtherError("its dilated convolutions make the map larger")
    return {
        "channels": channels,
        "reduction": _reduction(channels, hidden),
        "preset": client.name,
        "dilation": dilation,
        "num_dilated": depth[1],
        "mlp_layers": depth[0],
        "padding": padding,
    }


def _widths(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels // layer.groups, layer.out_channels
    return (layer.num_features,)


def _expected_widths(name: str, channels: int, hidden: int, mlp_layers: int) -> tuple[int, ...]:
    inside = {
        "channel.norm": (channels,),
        "spatial.norm": (1,),
        "spatial.reduce": (channels, hidden),
        "spatial.project": (hidden, 1),
        "channel.fc.0": (channels, channels if mlp_layers == 0 else hidden),
        f"channel.fc.{mlp_layers}": (channels if mlp_layers == 0 else hidden, channels),
    }
    return inside.get(name, (hidden,) if "norm" in name else (hidden, hidden))


def _reduction(channels: int, hidden: int) -> int:
    """r with channels // r == hidden, 16 where that is one.

    Raises:
        _OtherError: there is none.
    """
    if channels // 16 == hidden:
        return 16
    if hidden == 0 or channels // (channels // hidden) != hidden:
        raise _OtherError(f"its width inside, {hidden}, is no whole part of {channels} channels")
    return channels // hidden
