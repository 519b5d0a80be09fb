"""Same input, same bits; and extremes behave as the reference does."""

from __future__ import annotations

import pytest
import torch
from cases import COMBINES, make_map, name

from bam_kernels import BAM, functional, reference


def bits(t: torch.Tensor) -> torch.Tensor:
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return t.detach().contiguous().view(kinds[t.element_size()])


@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name)
def test_several_runs(dtype, deterministic, device, seed):
    """Output, every gradient and the running statistics, ten times from the same state; three times
    where the programs of a launch are interpreted, one after another."""
    module = BAM(40, 4, device=device, dtype=dtype)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    x = make_map((4, 40, 9, 7), dtype, device, "channels_last").requires_grad_()
    dout = torch.randn_like(x)
    first = None
    torch.use_deterministic_algorithms(deterministic)
    try:
        for _ in range(3 if device.type == "cpu" else 10):
            module.load_state_dict(state)
            module.zero_grad(set_to_none=True)
            x.grad = None
            out = module(x)
            out.backward(dout)
            found = [out, x.grad, *(p.grad for p in module.parameters())]
            found += [b for b in module.buffers() if b.is_floating_point()]
            found = [bits(t).clone() for t in found]
            first = first or found
            assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert first is not None and len(first) > 10


def same(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    """Equal to rounding, with NaN and infinities in the same places."""
    torch.testing.assert_close(
        a.double(), b.double(), rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=name)
@pytest.mark.parametrize("combine", COMBINES)
def test_extreme_logits_and_inputs(combine, dtype, device, seed):
    """Logits of +-1e4 and infinity; inputs with inf, NaN, -0, very small and large numbers."""
    x = make_map((2, 24, 3, 5), dtype, device)
    special = torch.tensor(
        [float("inf"), float("-inf"), float("nan"), -0.0, 1e-38, 3e38], dtype=dtype, device=device
    )
    x[0, :6, 0, 0] = special  # its channels, and position (0, 0), see them
    c = torch.randn(2, 24, dtype=dtype, device=device)
    s = torch.randn(2, 1, 3, 5, dtype=dtype, device=device)
    c[0, 6:12] = torch.tensor([1e4, -1e4, 1e4, -1e4, 80.0, -80.0], dtype=dtype)
    s[0, 0, 1] = torch.tensor([1e4, -1e4, 60.0, -60.0, 0.0], dtype=dtype)
    c[1, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")], dtype=dtype)
    s[1, 0, 2, 0] = float("-inf")
    dout = torch.randn_like(x)
    found = []
    for function in (functional.gate, reference.gate):
        leaves = [t.clone().requires_grad_() for t in (x, c, s)]
        out = function(*leaves, combine, True)
        out.backward(dout)
        found.append([out, *(t.grad for t in leaves)])
    for what, ours, want in zip(("out", "dx", "dc", "ds"), *found, strict=True):
        same(ours, want, what)
    assert found[1][0].isnan().any() and found[1][0].isinf().any()
    # Sample 0's channels and positions without a special input stay finite, gradients too.
    assert found[0][1][0, 6:].isfinite().all()


def test_special_inputs_to_the_heads(device, seed):
    """An inf or NaN reaches its channel's mean and its position's reduction, and nothing else."""
    x = make_map((2, 20, 5, 7), torch.float32, device)
    x[0, 3, 1, 2] = float("inf")
    x[1, 17, 4, 6] = float("nan")
    weight = torch.randn(3, 20, device=device)
    pooled, reduced = functional.pool_reduce(x, weight)
    want = x.mean(dim=(2, 3)), torch.einsum("hc,ncij->nhij", weight, x)
    same(pooled, want[0], "pooled")
    same(reduced, want[1], "reduced")
    assert (~pooled.isfinite()).sum() == 2 and (~reduced.isfinite()).sum() == 6


@pytest.mark.parametrize("preset", ("paper", "official"))
def test_a_module_on_special_inputs(preset, device, seed):
    module = BAM(24, 4, preset=preset, device=device).eval()
    x = make_map((3, 24, 5, 7), torch.float32, device)
    x[1, 2, 3, 4] = float("nan")
    x[2, 2, 3, 4] = float("inf")
    want = reference.BAM.forward(module, x)
    same(module(x), want, "out")
    assert want[0].isfinite().all() and want[1].isnan().any()
