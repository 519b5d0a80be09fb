"""The update of batch norms' running statistics, those of a whole module at once."""

from __future__ import annotations

from bam_kernels.ops.registry import backend_of, register


def _update_running(means, *rest):
    if means:
        backend_of(means[0]).update_running(means, *rest)


register(
    "update_running(Tensor(a!)[] means, Tensor(b!)[] variances, Tensor(c!)[] counters,"
    " Tensor[] batch_means, Tensor[] batch_variances, SymInt[] counts, float[] momenta) -> ()",
    _update_running,
    lambda *_: None,
)
