"""What a whole module moves and launches: the figures that the library exists for.

Counted under Triton's interpreter, tensor by tensor, with the eager operators beside the kernels.
"""

from __future__ import annotations

import pytest
import torch
from cases import COMBINES, LAYOUTS, make_map, name
from conftest import kernel_device

from bam_kernels import BAM, SqueezeExcite, functional, reference
from bam_kernels.backends.triton import configs
from bam_kernels.testing.traffic import measure

pytestmark = pytest.mark.skipif(
    kernel_device().type != "cpu", reason="the meter counts what Triton's interpreter does"
)


def passes(module, shape, layout="nchw", dtype=torch.float32):
    """(forward, backward) meters of one training step, and the input."""
    x = make_map(shape, dtype, torch.device("cpu"), layout).requires_grad_()
    dout = make_map(shape, dtype, torch.device("cpu"), layout)
    with measure(strict=True) as forward:
        out = module(x)
    with measure(strict=True) as backward:
        out.backward(dout)
    return forward, backward, x.detach()


# ResNet-50's three bottlenecks; the middle one in the layout that the others have not.
SITES = (
    ((2, 256, 56, 56), "channels_last"),
    ((4, 512, 28, 28), "nchw"),
    ((4, 1024, 14, 14), "channels_last"),
)


@pytest.mark.parametrize("shape,layout", SITES, ids=name)
@pytest.mark.parametrize("preset", ("paper", "official"))
def test_three_passes_forward_and_five_backward(preset, shape, layout, seed, large_tiles):
    """And in how many launches, and how little is kept for the backward."""
    kept = Kept()
    with kept:
        forward, backward, x = passes(BAM(shape[1], preset=preset), shape, layout)
    assert forward.passes(x) <= 3.0 + 1e-3
    assert backward.passes(x) <= 5.0 + 1e-3
    assert forward.device_launches <= 10
    assert backward.device_launches <= 14
    assert kept.beyond(x) <= 0.1
    assert forward.outside_bytes == backward.outside_bytes == 0


@pytest.mark.parametrize("preset", ("paper", "official"))
def test_eager_moves_three_times_as_much(preset, seed):
    """The reference by the same meter, so that the figures above mean something."""
    shape = (2, 64, 14, 14)
    kept = Kept()
    with kept:
        forward, backward, x = passes(reference.BAM(64, preset=preset), shape)
    assert forward.passes(x) > 9 and backward.passes(x) > 15
    assert forward.device_launches > 15 and backward.device_launches > 20
    assert kept.beyond(x) > 1


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Storages that a graph keeps for its backward."""

    def __init__(self) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}
        super().__init__(self.pack, lambda t: t)

    def pack(self, t: torch.Tensor) -> torch.Tensor:
        if not isinstance(t, torch.nn.Parameter) and not isinstance(t._base, torch.nn.Parameter):
            self.storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    def beyond(self, x: torch.Tensor) -> float:
        """Their bytes in sizes of x, which they hold too and which is not counted."""
        size = x.untyped_storage().nbytes()
        assert x.untyped_storage().data_ptr() in self.storages
        return sum(storage.nbytes() for storage in self.storages.values()) / size - 1


def test_squeeze_excite_takes_three_passes(seed, large_tiles):
    forward, backward, x = passes(SqueezeExcite(64), (2, 64, 14, 14))
    assert forward.passes(x) == pytest.approx(3.0, abs=0.01)
    assert backward.passes(x) <= 5.0
    assert forward.device_launches <= 4


def test_inference_moves_no_more(seed, large_tiles):
    module = BAM(64).eval()
    x = torch.randn(2, 64, 14, 14)
    with torch.no_grad(), measure(strict=True) as traffic:
        module(x)
    assert traffic.passes(x) == pytest.approx(3.0, abs=0.01)


def test_frozen_parts_cost_nothing(seed, large_tiles):
    """No walk over x for a weight that is frozen, no dx for an input that needs none."""
    module = BAM(64, device="cpu")
    module.spatial.reduce.requires_grad_(False)
    x = torch.randn(2, 64, 14, 14)
    leaf = x.clone().requires_grad_()
    out, dout = module(leaf), torch.randn_like(x)
    with measure(strict=True) as backward:
        out.backward(dout)
    # Reductions: dout and x; the gradient: dout and dx.
    assert backward.passes(x) == pytest.approx(4.0, abs=0.01)
    out = BAM(64)(x)
    with measure(strict=True) as backward:
        out.backward(dout)
    # Reductions: dout and x; dW0: x.
    assert backward.passes(x) == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape,dtype",
    (
        ((2, 37, 7, 9), torch.float16),
        ((2, 37, 7, 9), torch.float32),
        ((3, 20, 1, 1), torch.float16),
        ((1, 16, 5, 3), torch.float32),
    ),
    ids=name,
)
def test_no_byte_outside_of_a_tensor(shape, layout, dtype, seed):
    """Every kernel, forward and backward, on odd sizes, slices and both memory formats."""
    n, c, h, w = shape
    x = make_map(shape, dtype, torch.device("cpu"), layout).requires_grad_()
    channel = torch.randn(n, c, requires_grad=True)
    spatial = torch.randn(n, 1, h, w, requires_grad=True)
    weight = torch.randn(3, c).to(dtype).requires_grad_()
    bias = torch.randn(3).to(dtype).requires_grad_()
    tile = configs.Tile(16, 16, 4, 1)
    with (
        configs.override(**dict.fromkeys(configs.KERNELS, tile)),
        measure(strict=True) as traffic,
    ):
        for combine in COMBINES:
            functional.gate(x, channel, spatial, combine).sum().backward()
        pooled, reduced = functional.pool_reduce(x, weight, bias)
        (pooled.square().sum() + reduced.square().sum()).backward()
        BAM(c, 4, preset="official", dtype=dtype)(torch.cat([x.detach()] * 2)).sum().backward()
    assert len(traffic.launches) > 15
    assert traffic.outside_bytes == 0
    assert not any(launch.atomics for launch in traffic.launches)


def test_x_is_read_once_by_the_heads_and_once_by_the_gate(seed):
    """With the shipped tables: distinct bytes of x equal all bytes of x, kernel by kernel."""
    x = torch.randn(2, 64, 14, 14)
    with torch.no_grad(), measure(strict=True) as traffic:
        BAM(64).eval()(x)
    readers = [launch.tensors["x"] for launch in traffic.launches if "x" in launch.tensors]
    assert len(readers) == 2
    for tensor in readers:
        assert tensor.read_bytes == tensor.distinct_read_bytes == x.numel() * 4
