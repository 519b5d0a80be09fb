"""How maps are walked: which strides are taken as they lie, which copied; and 64-bit offsets."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from cases import LAYOUTS, make_map, name

from bam_kernels import BAM, functional, layout
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


def far_strides(shape: tuple[int, ...], axis: str, kind: str) -> tuple[int, ...]:
    """Strides that put the map's last element past 2^31 elements, along `axis`."""
    _, c, h, w = shape
    far = 2**31 + 64
    inner, outer = (c, h * w) if kind == "channels_last" else (h * w, c)
    n_stride, outer_stride = (far, inner) if axis == "samples" else (inner, far // (outer - 1))
    if axis == "outer":
        n_stride = outer_stride * outer
    if kind == "channels_last":
        return (n_stride, 1, outer_stride * w, outer_stride)
    return (n_stride, outer_stride, w, 1)


def far_map(shape: tuple[int, ...], strides: tuple[int, ...], device: torch.device):
    """A float16 map with these strides; its storage is reserved, and only its own pages touched."""
    last = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    assert last > 2**31
    if device.type != "cpu" and torch.cuda.mem_get_info()[0] < 6 * (last + 1):
        pytest.skip("needs a GPU with about 32 GB of free memory")
    try:
        storage = torch.empty(last + 1, dtype=torch.float16, device=device)
    except torch.OutOfMemoryError:  # another process was quicker
        pytest.skip("needs a GPU with about 32 GB of free memory")
    return storage.as_strided(shape, strides)


@pytest.mark.parametrize("kind", ("nchw", "channels_last"))
@pytest.mark.parametrize("axis", ("samples", "outer"))
def test_offsets_past_32_bits(axis, kind, device, seed, monkeypatch):
    """Maps whose last element lies past 2^31 elements; int32 offsets would go elsewhere.

    A whole module, forward and backward, with x, dout, out and dx like that, against the same
    module on dense maps: the tiles are the same, and so are the bits.
    """
    shape = (2, 20, 4, 8)
    strides = far_strides(shape, axis, kind)
    module = BAM(20, 4, device=device, dtype=torch.float16, preset="official")
    module.spatial.dilated.requires_grad_(False)
    dense = torch.randn(shape, device=device).half()
    dense_dout = torch.randn(shape, device=device).half()
    fmt = torch.channels_last if kind == "channels_last" else torch.contiguous_format
    made, empty_like = [], torch.empty_like

    def empty_far(t, **options):
        """Outputs like the far x lie as it does: torch.empty_like would make them dense."""
        if t.stride() != strides or options:
            return empty_like(t, **options)
        made.append(far_map(shape, strides, device))
        return made[-1]

    found = []
    with configs.override(**dict.fromkeys(configs.KERNELS, configs.Tile(16, 32, 4, 1))):
        for far in (False, True):
            state = copy.deepcopy(module)
            if far:
                x, dout = far_map(shape, strides, device), far_map(shape, strides, device)
                x.copy_(dense)
                dout.copy_(dense_dout)
                assert layout.walkable(x) is x
                monkeypatch.setattr(torch, "empty_like", empty_far)
            else:
                x, dout = (t.contiguous(memory_format=fmt) for t in (dense, dense_dout))
            leaf = x.detach().requires_grad_()
            out = state(leaf)
            (dx,) = torch.autograd.grad(out, leaf, dout, retain_graph=True)
            (dweight,) = torch.autograd.grad(out, state.spatial.reduce.weight, dout)
            monkeypatch.undo()
            found.append([t.contiguous() for t in (out.detach(), dx, dweight)])
    assert len(made) >= 2, "out and dx did not lie past 2^31"
    for near, distant in zip(*found, strict=True):
        assert near.norm() > 0
        assert torch.equal(near, distant)
