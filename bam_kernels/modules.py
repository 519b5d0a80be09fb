"""The modules that a network holds: the reference's parameters, and the fused forward."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.fx import Proxy

from bam_kernels import functional, fx, reference


class BAM(reference.BAM):
    """The Bottleneck Attention Module on fused kernels: same arguments, state_dict and numbers.

    See `bam_kernels.reference.BAM` for the arguments. Which backend runs is decided at each call,
    by `bam_kernels.use_backend`, ``BAM_KERNELS_BACKEND`` or the input's device;
    `bam_kernels.explain(module, x)` tells which and why.

    Shapes: [N, C, H, W] to [N, C, H, W], in the input's dtype and memory format.

    Raises (forward):
        TypeError, ValueError: a bad input; see `bam_kernels.functional.bam`.
        BackendUnavailableError: a backend was asked for by name and cannot run.
    """

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return fx.leaf(self, x, super().forward)
        if self.check_square:
            _warn_unless_square(x)
        return functional.bam(
            x,
            self.channel,
            self.spatial,
            combine=self.config.combine,
            residual=self.config.residual,
            observer=self.observer,
        )


_warned = False


def _warn_unless_square(x: Tensor) -> None:
    """Warn, once a process, of an input on which the authors' code pools over less than H x W.

    Not in what is being compiled, traced or exported, where a comparison of H and W would tie the
    program to sizes.
    """
    global _warned
    if torch.compiler.is_compiling() or _warned or torch.jit.is_tracing():
        return
    sizes = x.shape[2:] if isinstance(x, Tensor) and x.dim() == 4 else ()
    if len(sizes) == 0 or any(type(size) is not int for size in sizes) or sizes[0] == sizes[1]:
        return
    _warned = True
    h, w = sizes
    warnings.warn(
        f"preset='official' pools over all of {h}x{w}; the authors' code pools over a window of "
        f"{h}x{h}, which differs where H != W. pool='square' does as theirs, pool='global' is "
        "without this warning",
        UserWarning,
        stacklevel=5,  # where the module is called, past torch's two frames
    )


class SqueezeExcite(reference.SqueezeExcite):
    """Squeeze-and-Excitation (the paper's Table 10) on the same kernels: x * sigmoid(MLP(pool(x))).

    See `bam_kernels.reference.SqueezeExcite` for the arguments.
    """

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return fx.leaf(self, x, super().forward)
        return functional.bam(x, self.channel, None, residual=False, observer=self.observer)
