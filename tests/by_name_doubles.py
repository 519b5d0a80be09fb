"""Doubles of the packages that build layers by name, for where they are not installed.

Each does what its package documents, in as few words as the tests need: how it finds a layer, what
it hands it, and what it does with the result.
"""

from __future__ import annotations

import ast
import inspect
import sys
import types
from types import MethodType
from typing import Any

import pytest
from torch import nn


def _install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> types.ModuleType:
    """A package `name` of the given members, with those above it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
    vars(sys.modules[name]).update(members)
    return sys.modules[name]


class Conv(nn.Conv2d):
    """A convolution that takes its input channels first."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int) -> None:
        super().__init__(c_in, c_out, kernel, stride, kernel // 2)


def ultralytics(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """ultralytics.nn.tasks: its parser takes rows [from, repeats, layer, arguments].

    A layer is looked up among the module's globals. An argument that is a string is the parser's
    local variable of that name, if there is one, else a literal. An unknown layer gets its
    arguments as they are, and has as many output channels as its input; `Conv` takes its own in
    front, and has its first argument as many.
    """

    def parse_model(d: dict[str, Any], ch: int) -> tuple[nn.Sequential, list[int]]:
        ch, layers, c2 = [ch], [], ch
        for i, (f, n, m, args) in enumerate(d["backbone"] + d["head"]):
            layer, args = vars(tasks)[m], list(args)
            for j, a in enumerate(args):
                if isinstance(a, str):
                    args[j] = locals()[a] if a in locals() else ast.literal_eval(a)
            if layer is tasks.Conv:
                c2 = args[0]
                args = [ch[f], *args]
            else:
                c2 = ch[f]
            made = [layer(*args) for _ in range(n)]
            layers.append(made[0] if n == 1 else nn.Sequential(*made))
            ch = [*ch, c2] if i else [c2]
        return nn.Sequential(*layers), []

    tasks = _install(monkeypatch, "ultralytics.nn.tasks", parse_model=parse_model, Conv=Conv)
    return tasks


def mmengine(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """mmengine.registry.MODELS, and mmcv's build_plugin_layer on it.

    A registry maps a name to a class or function, and builds a config by calling what its `type`
    names with the rest. A plugin must be a class; it is built with `in_channels`, and its name in
    the block is the class's `_abbr_` and a postfix.
    """

    class Registry:
        def __init__(self) -> None:
            self.module_dict: dict[str, Any] = {}

        def get(self, key: str) -> Any:
            return self.module_dict.get(key)

        def register_module(self, name: str, force: bool = False, module: Any = None) -> Any:
            if name in self.module_dict and not force:
                raise KeyError(f"{name} is registered")
            self.module_dict[name] = module
            return module

        def build(self, cfg: dict[str, Any]) -> Any:
            return self.get(cfg["type"])(**{k: v for k, v in cfg.items() if k != "type"})

    def build_plugin_layer(
        cfg: dict[str, Any], postfix: str = "", **kwargs: Any
    ) -> tuple[str, nn.Module]:
        layer = registry.MODELS.get(cfg["type"])
        if not inspect.isclass(layer):
            raise TypeError("a plugin is a class")
        rest = {k: v for k, v in cfg.items() if k != "type"}
        return f"{layer._abbr_}{postfix}", layer(**kwargs, **rest)

    registry = _install(monkeypatch, "mmengine.registry", MODELS=Registry())
    _install(monkeypatch, "mmcv.cnn", build_plugin_layer=build_plugin_layer)
    return registry


def kernels(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """kernels: kernelize gives each module of an extensible class a layer's forward.

    A class is extensible by its attributes `kernel_layer_name` and `kernel_condition`. The layer is
    loaded from the mapping's repository; it has no constructor and no members but two flags.
    """
    mapping: dict[str, dict[str, Any]] = {}

    def replace_kernel_forward_from_hub(cls: type, layer_name: str, condition: Any = None) -> None:
        cls.kernel_layer_name = layer_name
        cls.kernel_condition = staticmethod(condition or (lambda module: True))

    def register_kernel_mapping(new: dict[str, dict[Any, Any]]) -> None:
        for name, repos in new.items():
            for device, repo in repos.items():
                mapping.setdefault(name, {})[device.type] = repo

    class Device:
        def __init__(self, type: str) -> None:
            if type not in ("cpu", "cuda", "rocm", "xpu"):
                raise ValueError(f"Unknown device type: {type}")
            self.type = type

    class Mode:
        INFERENCE = "inference"
        TRAINING = "training"

    def kernelize(model: nn.Module, *, mode: str, device: str) -> nn.Module:
        for module in model.modules():
            name = getattr(type(module), "kernel_layer_name", None)
            if name is None or not type(module).kernel_condition(module):
                continue
            layer = mapping[name][device].load()
            allowed = {n for n, _ in inspect.getmembers(nn.Module)}
            extra = {n for n, _ in inspect.getmembers(layer)} - allowed
            assert layer.__init__ is nn.Module.__init__
            assert extra <= {"can_torch_compile", "has_backward"}
            module.forward = MethodType(layer.forward, module)
        return model

    return _install(
        monkeypatch,
        "kernels",
        Device=Device,
        Mode=Mode,
        kernelize=kernelize,
        register_kernel_mapping=register_kernel_mapping,
        replace_kernel_forward_from_hub=replace_kernel_forward_from_hub,
    )
