"""Hugging Face `kernels`: plain BAMs of a model run fused after ``kernelize``.

    from bam_kernels.integrate.kernels import register
    register()
    model = kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cuda")

Nothing is downloaded: the layers are those of the installed package.

The tests run on kernels where it is installed, else on a double of its documented protocol.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import nn

from bam_kernels import reference
from bam_kernels.integrate import kernel_layers
from bam_kernels.integrate.by_name import package

DEVICES = ("cpu", "cuda", "rocm", "xpu")
_LAYERS = {"BAM": reference.BAM, "SqueezeExcite": reference.SqueezeExcite}


@dataclasses.dataclass(frozen=True)
class InstalledLayer:
    """In the place of a repository of `kernels`: a layer of `bam_kernels.integrate.kernel_layers`.

    For a class of one's own with the parts of a reference BAM (`channel`, `spatial`, `config`,
    `observer`), in a mapping of one's own.
    """

    layer_name: str

    def load(self) -> type[nn.Module]:
        """The layer's class.

        Raises:
            ValueError: there is none of that name.
        """
        if self.layer_name not in _LAYERS:
            raise ValueError(
                f"layer_name: expected one of {', '.join(_LAYERS)}, got {self.layer_name!r}"
            )
        return getattr(kernel_layers, self.layer_name)

    def __str__(self) -> str:
        return f"bam_kernels, layer `{self.layer_name}`"


def register(devices: Iterable[str] = DEVICES) -> None:
    """Let ``kernelize`` replace the forward of `bam_kernels.reference`'s modules on `devices`.

    The modules of `bam_kernels` itself run fused already, and are left as they are.

    Raises:
        ImportError: `kernels` is not there.
        ValueError: a device that `kernels` does not know.
    """
    kernels = package("kernels", "bam_kernels.integrate.kernels.register")
    names = [f"bam_kernels.{name}" for name in _LAYERS]
    mapping = {
        name: {kernels.Device(type=device): InstalledLayer(layer) for device in devices}
        for name, layer in zip(names, _LAYERS, strict=True)
    }
    kernels.register_kernel_mapping(mapping)
    for name, layer in zip(names, _LAYERS.values(), strict=True):
        # Not in subclasses: ours are fused, and others' forwards are not ours to replace.
        kernels.replace_kernel_forward_from_hub(
            layer, name, condition=lambda module, layer=layer: type(module) is layer
        )
