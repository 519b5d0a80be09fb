"""The networks by name, and `create`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bam_kernels.models import attention as attentions
from bam_kernels.models import detection, libraries, preactivation, resnet, srresnet
from bam_kernels.models.description import Description

_FAMILIES = (resnet, preactivation, libraries, srresnet, detection)
_BY_NAME = {each.name: each for family in _FAMILIES for each in family.DESCRIPTIONS}


def names() -> list[str]:
    """Every network's name, a family after the other."""
    return list(_BY_NAME)


def get(name: str) -> Description:
    """The description of a network: its data set, input size, number of classes, paper's row.

    Raises:
        TypeError: `name` is no str.
        ValueError: no network has that name.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {type(name).__name__} {name!r}")
    if name not in _BY_NAME:
        raise ValueError(f"name: expected one of {', '.join(_BY_NAME)}, got {name!r}")
    return _BY_NAME[name]


def create(
    name: str,
    *,
    attention: str | None = None,
    num_classes: int | None = None,
    in_channels: int = 3,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    attention_module: Callable[..., nn.Module] | None = None,
    **options: Any,
) -> nn.Module:
    """A network of the paper, in training mode, with or without attention.

    Args:
        name: one of `names`.
        attention: None; "bam", BAMs at the bottlenecks; "bam-c", one in every block (Table 2);
            "se", a SqueezeExcite in every block (Table 10); "block", one more block of the
            network's own kind in each BAM's place (Table 1c).
        num_classes: of the last layer; the paper's data set's unless given.
        in_channels: of the images.
        device: where the parameters are made.
        dtype: of the parameters.
        attention_module: makes the attention modules, ``attention_module(channels, **options)``:
            `bam_kernels.BAM` or `bam_kernels.SqueezeExcite` unless given; their peers in
            `bam_kernels.reference` have the same keys.
        **options: of BAM (reduction, dilation, num_dilated, combine, channel, spatial, residual,
            preset, ...), or of SqueezeExcite (reduction).

    Shapes: [N, in_channels, H, W] to logits [N, num_classes] for the classifiers;
        `Description.input_size` has the paper's H and W.

    Raises:
        ValueError: no such network, or attention that it has not; a number or option out of range.
        TypeError: an argument of the wrong type, or an option that the attention does not take.
        ImportError: a package is missing that this network is built with.
    """
    description = get(name)
    where = _device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
    attentions.check(description, attention, attention_module, options)
    if num_classes is None:
        num_classes = description.num_classes
    elif description.num_classes is None:
        raise ValueError(f"num_classes: {name} puts out an image; expected not to be given")
    else:
        _check_count("num_classes", num_classes)
    _check_count("in_channels", in_channels)
    for package in description.requires:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{name} is built with {package}; pip install 'bam_kernels[models]'")
    with where:
        model = description.build(num_classes, in_channels).to(dtype=dtype)
        if attention is not None:
            example = (1, in_channels, *description.input_size)
            attentions.refine(model, description, attention, attention_module, example, options)
    return model


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.get_default_device()
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected a torch.device or its name, got {device!r}") from error


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
