"""The operators ``torch.ops.bam_kernels.*``: schemas, fakes and autograd.

Python owns the namespace, so that the operators exist wherever torch does; which backend computes
them is decided at each call. They check nothing: `bam_kernels.functional` does, before it calls
them. All are functional and of fixed arity; an output that is not asked for is empty.

First derivatives run on the backend's own backward operators. Where a graph of the backward is
asked for (``create_graph=True``), the gradient is that of the plain PyTorch composition of the same
operator (`bam_kernels.backends.reference`), which autograd can differentiate any number of times.

``pool_reduce_linked`` and ``gate_linked`` are one differentiable function in two parts, as used by
a whole module, where both read the same x. Apart, each would make an x-sized gradient and autograd
would add them: 9 passes over x-sized memory. Linked, the gate's gradient of x stays in factors:
dout * (1 + M(c, s)) travels as its factors dout, c and s, as the gradients of three link outputs of
``pool_reduce_linked`` (which hold no data), and one kernel there makes the sum: 5 passes. The true
gradient of x leaves ``pool_reduce_linked``; no factor is visible outside of the pair.
"""

from bam_kernels.ops import (  # noqa: F401 - importing them registers the operators
    bam,
    channel_mlp,
    gate,
    linked,
    pool_reduce,
    running_statistics,
    spatial_branch,
)
