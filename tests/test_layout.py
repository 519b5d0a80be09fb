"""How maps are walked: which strides are taken as they lie, which copied; and 64-bit offsets."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import LAYOUTS, make_map, name

from bam_kernels import functional, layout
from bam_kernels.backends.triton import configs


def elements(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """x read through its `layout.strides`, as [N, C, P]."""
    st = layout.strides(x, channels_last)
    n, c, h, w = x.shape
    step = (1, st.outer) if channels_last else (st.outer, 1)
    return x.as_strided((n, c, h * w), (st.n, *step), x.storage_offset())


@pytest.mark.parametrize(
    "shape", [s for s in itertools.product((1, 2), (1, 3), (1, 4), (1, 5))], ids=name
)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_strides_address_every_element(kind, shape, seed):
    """Over all degenerate axes: a length of 1 has an arbitrary stride that must not be used."""
    x = make_map(shape, torch.float32, torch.device("cpu"), kind)
    walked = layout.walkable(x)
    assert torch.equal(walked, x)
    flat = walked.reshape(*shape[:2], -1)
    orders = [last for last in (False, True) if layout.strides(walked, last) is not None]
    assert layout.is_channels_last(walked) in orders
    for last in orders:
        assert torch.equal(elements(walked, last), flat)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_only_what_cannot_be_walked_is_copied(kind):
    x = make_map((2, 37, 9, 11), torch.float32, torch.device("cpu"), kind)
    assert (layout.walkable(x) is x) == (kind != "strided")
    assert layout.is_channels_last(x) == kind.endswith("channels_last")


@pytest.mark.parametrize(
    "order", list(itertools.permutations(range(4))), ids=lambda o: "".join(map(str, o))
)
def test_any_permutation_of_the_axes(order, device, seed):
    """A map whose memory lies in any order gives the same values, and eager's strides."""
    shape = (2, 5, 3, 4)
    memory = torch.randn([shape[i] for i in order], dtype=torch.float64, device=device)
    x = memory.permute([order.index(i) for i in range(4)])
    assert x.shape == shape
    c = torch.randn(2, 5, dtype=torch.float64, device=device)
    s = torch.randn(2, 1, 3, 4, dtype=torch.float64, device=device)
    weight = torch.randn(2, 5, dtype=torch.float64, device=device)
    m = torch.sigmoid(c[:, :, None, None] + s)
    torch.testing.assert_close(functional.gate(x, c, s), x + x * m, rtol=1e-12, atol=1e-12)
    pooled, reduced = functional.pool_reduce(x, weight)
    torch.testing.assert_close(pooled, x.mean((2, 3)))
    torch.testing.assert_close(reduced, torch.einsum("hc,ncij->nhij", weight, x))


@pytest.mark.parametrize("kind", ("nchw", "channels_last"))
@pytest.mark.parametrize("axis", ("samples", "outer"))
def test_offsets_past_32_bits(axis, kind, device, seed):
    """Maps whose last element lies past 2^31 elements; int32 offsets would read elsewhere.

    The storage is reserved, not filled: only the pages that hold the map are touched.
    """
    shape = (2, 3, 4, 8)
    n, c, h, w = shape
    far = 2**31 + 64
    inner, outer = (c, h * w) if kind == "channels_last" else (h * w, c)
    n_stride, outer_stride = (far, inner) if axis == "samples" else (inner, far // (outer - 1))
    if axis == "outer":
        n_stride = outer_stride * outer
    strides = (
        (n_stride, 1, outer_stride * w, outer_stride)
        if kind == "channels_last"
        else (n_stride, outer_stride, w, 1)
    )
    last = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    assert last > 2**31
    if device.type != "cpu" and torch.cuda.mem_get_info()[0] < 3 * (last + 1):
        pytest.skip("needs a GPU with about 16 GB of free memory")
    storage = torch.empty(last + 1, dtype=torch.float16, device=device)
    x = storage.as_strided(shape, strides)
    x.copy_(torch.randn(shape, device=device))
    assert layout.walkable(x) is x
    channel = torch.randn(n, c, device=device)
    spatial = torch.randn(n, 1, h, w, device=device)
    weight = torch.randn(2, c, device=device).half()
    dense = x.float()
    with configs.override(**dict.fromkeys(configs.KERNELS, configs.Tile(16, 32, 4, 1))):
        leaf = x.detach().requires_grad_()
        out = functional.gate(leaf, channel, spatial)
        pooled, reduced = functional.pool_reduce(leaf, weight)
    m = torch.sigmoid(channel[:, :, None, None] + spatial)
    torch.testing.assert_close(out.float(), dense + dense * m, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(pooled.float(), dense.mean((2, 3)), rtol=2e-3, atol=2e-3)
    want = torch.einsum("hc,ncij->nhij", weight.float(), dense)
    torch.testing.assert_close(reduced.float(), want, rtol=4e-3, atol=4e-3)
