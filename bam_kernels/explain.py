"""Which backend runs for a module and an input, and why the others do not."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from bam_kernels import functional, fusable, inference
from bam_kernels.dispatch import BACKENDS, choose_backend, requested_backend, why_not
from bam_kernels.modules import BAM, SqueezeExcite


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; its string is made for reading.

    Attributes:
        backend: the one that runs: "triton", "cpp" or "reference".
        requested: what was asked for; "auto" unless set.
        reasons: by backend that does not run, why not.
        notes: parts of the module that run as PyTorch's own operators, and why.
    """

    backend: str
    requested: str
    reasons: dict[str, str]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"runs on {self.backend!r} (asked for: {self.requested!r})"]
        lines += [f"  not on {name!r}: {reason}" for name, reason in self.reasons.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def explain(module: BAM | SqueezeExcite, x: Tensor) -> Explanation:
    """Say which backend `module(x)` runs on, without running it.

    Args:
        module: a `bam_kernels.BAM` or `bam_kernels.SqueezeExcite`.
        x: an input [N, C, H, W] of the module.

    Raises:
        TypeError: the module is not one of ours.
        TypeError, ValueError, BackendUnavailableError: as `module(x)` would.
    """
    if not isinstance(module, BAM | SqueezeExcite):
        raise TypeError(
            f"module: expected a bam_kernels.BAM or SqueezeExcite, got {type(module).__name__}"
        )
    channel, spatial = module.channel, getattr(module, "spatial", None)
    functional.check_module_input(x, channel, spatial)
    requested, backend = requested_backend(), choose_backend(x)
    reasons: dict[str, str] = {}
    for name in BACKENDS:
        if name not in ("auto", backend):
            reasons[name] = _why_not_chosen(name, backend, requested, x.device.type)
    notes: list[str] = []
    if backend != "reference":
        whole = "the batch is empty" if x.shape[0] == 0 else fusable.unfusable(channel, spatial)
        if whole is not None:
            reasons[backend] = whole
            backend = "reference"
        elif not _in_one_operator(module, x, backend):
            if channel is not None:
                part = fusable.unfusable_mlp(channel, x.shape[0])
                notes += [] if part is None else [f"the channel MLP runs as PyTorch's own: {part}"]
            if spatial is not None:
                part = fusable.unfusable_spatial(spatial, x)
                notes += (
                    [] if part is None else [f"the spatial branch runs as PyTorch's own: {part}"]
                )
    return Explanation(backend, requested, reasons, tuple(notes))


def _in_one_operator(module: BAM | SqueezeExcite, x: Tensor, backend: str) -> bool:
    """Whether the call is inference, all of it in the backend's kernels."""
    if module.observer is not None:
        return False
    combine, residual, spatial = "sum", False, None
    if isinstance(module, BAM):
        combine, residual = module.config.combine, module.config.residual
        spatial = module.spatial
    found = inference.arguments(x, module.channel, spatial, combine, residual)
    return found is not None and (backend == "cpp" or inference.fits_triton(found, x))


def _why_not_chosen(name: str, backend: str, requested: str, device_type: str) -> str:
    """Asks a backend only where it has been asked already: the first question may compile it."""
    before = f"{backend!r} was chosen before it"
    if name == "cpp" and device_type == "cpu" and (backend == "triton" or requested != "auto"):
        return before
    return why_not(name, device_type) or before
