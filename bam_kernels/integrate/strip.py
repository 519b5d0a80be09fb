"""`strip`: the plain PyTorch modules of a network with BAMs, for those who ship without us."""

from __future__ import annotations

import copy

from torch import nn
from torch.fx import Graph, GraphModule, Tracer

from bam_kernels import modules, reference
from bam_kernels.integrate import insert

_ATTENTION = (modules.BAM, modules.SqueezeExcite, reference.BAM, reference.SqueezeExcite)
_BRANCHES = (reference.ChannelBranch, reference.SpatialBranch)
_OURS = (*_ATTENTION, *_BRANCHES)
_OWN = {"config", "observer", "check_square", "pool", "bare_reduction", "shrinkage"}
"""Attributes of classes of ours, or about them; what they say of the arithmetic is in the graph."""


def strip(model: nn.Module, *, inplace: bool = True) -> nn.Module:
    """Turn every BAM and SqueezeExcite in `model` into modules of torch alone.

    Each becomes a `torch.fx.GraphModule` over the same layers: the same Parameter objects and
    buffers under the same state_dict keys, in the same training mode, dtype and on the same device,
    with the hooks that were registered on it. The reference modules are stripped as well. What
    `torch.save` writes of the model then loads, runs and trains where bam_kernels is not installed,
    as far as the rest of the model does; so do its ONNX, torch.export and TorchScript programs.

    The numbers are those of `bam_kernels.reference`. A GraphModule does not keep forward hooks when
    it is copied or pickled; hooks of the model's other modules stay.

    Args:
        model: any module; one that holds no BAM stays as it is.
        inplace: False strips a deep copy instead.

    Returns:
        `model`, changed; where it is itself a BAM or SqueezeExcite, the new module.

    Raises:
        TypeError: `model` is no module, or holds an instance of a subclass of ours, whose forward
            is not ours to translate. The model is unchanged.
        ValueError: a BAM has a forward of its own, or is being observed by
            `bam_kernels.attention_maps`. The model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        _check(name, module)
    if not inplace:
        model = copy.deepcopy(model)
    return _Stripper().strip(model)


def _check(name: str, module: nn.Module) -> None:
    if not isinstance(module, _OURS):
        return
    where = f"model: {name!r}" if name else "model"
    if type(module) not in _OURS:
        raise TypeError(
            f"{where}: expected bam_kernels' own classes, got the subclass {type(module).__name__}"
        )
    if "forward" in vars(module):
        raise ValueError(f"{where}: expected the class's own forward, got one of the instance's")
    if getattr(module, "observer", None) is not None:
        raise ValueError(f"{where}: expected no observer; leave attention_maps() first")


class _Stripper:
    """One pass over a model; a module that is used in several places is stripped once."""

    def __init__(self) -> None:
        self._done: dict[int, tuple[nn.Module, nn.Module]] = {}
        self._hook = None

    def strip(self, module: nn.Module) -> nn.Module:
        known = self._done.get(id(module))
        if known is not None:
            return known[1]
        result = module
        if type(module) in _OURS:
            # First the graph, of the module as it is: its children may be branches of ours.
            result = _graph_module(module)
        self._done[id(module)] = (module, result)  # the old one too: its id stays its own
        for name, child in module._modules.items():
            if child is not None:
                result._modules[name] = self.strip(child)
        hooks = result._forward_hooks
        for key, hook in hooks.items():
            if hook is insert._refine_output:
                hooks[key] = self._refine()
        return result

    def _refine(self):
        """`insert_bam`'s hook as a method of torch's: ``module.bam(output)``."""
        if self._hook is None:
            graph = Graph()
            module, _, output = map(graph.placeholder, ("module", "args", "output"))
            graph.output(graph.call_method(insert._CHILD, (module, output)))
            self._hook = GraphModule(nn.Module(), graph, "RefineOutput").forward
        return self._hook


class _Layers(Tracer):
    """Every module that is called is a leaf: the forward of one module, and no deeper."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _graph_module(module: nn.Module) -> GraphModule:
    # Copied, and without types and traces: these name our files, and TorchScript reads the types.
    graph, traced = Graph(), _Layers().trace(module)
    graph.output(graph.graph_copy(traced, {}))
    for node in graph.nodes:
        node.type = None
        node.meta.clear()
    result = GraphModule(module, graph, type(module).__name__)
    # GraphModule keeps what its graph names, in that order; the keys' order is the module's.
    own = vars(result)
    for name, value in vars(module).items():
        if name in ("_modules", "_parameters", "_buffers"):
            own[name] = dict(value)
        elif name not in _OWN and name != "forward":
            own[name] = value  # hooks: the same dictionaries, so that their handles go on working
    return result
