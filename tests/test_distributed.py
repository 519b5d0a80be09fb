"""Many processes, DDP and FSDP2: two on half of a batch each are one on the whole.

The two run on CPU tensors over gloo (see tests/distributed_workers.py), the one wherever the test
session runs kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import PRESETS
from distributed_workers import WORLD, Network, Pair, Watch, train, watch
from tolerances import assert_parity, by_layer, relative_error
from torch import Tensor, nn

from bam_kernels import BAM, reference, use_backend

pytestmark = pytest.mark.usefixtures("large_tiles", "one_thread")

TOLERANCE = 1e-10
"""Largest relative error of two processes against one, in float64."""

STEPS, SAMPLES = 2, 4
UNITS = ("stem_bam", "bam")  # of FSDP2, beside the root

Outcome = dict[str, Tensor]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the workers have; the maps are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Iterator[Callable[[int], Pair]]:
    """Pairs of processes by number, started when asked for; anew where a failure has ended them."""
    started: dict[int, Pair] = {}

    def get(number: int) -> Pair:
        if number not in started or not started[number].alive:
            started[number] = Pair(tmp_path_factory.mktemp("group"))
        return started[number]

    yield get
    for pair in started.values():
        pair.close()


@pytest.fixture
def pair(pairs: Callable[[int], Pair]) -> Pair:
    """The two processes that most tests share."""
    return pairs(0)


def make_data(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A batch of its own for each step, of samples that differ enough for their statistics."""
    inputs = torch.randn(STEPS, SAMPLES, 3, 5, 7, dtype=dtype)
    inputs *= 0.5 + 2 * torch.rand(STEPS, SAMPLES, 1, 1, 1, dtype=dtype)
    return {"inputs": inputs, "targets": torch.randint(5, (STEPS, SAMPLES))}


def synchronised(network: nn.Module) -> nn.Module:
    """A copy whose norms are those that torch converts to, every one."""
    network = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) >= 6 and {type(norm) for norm in norms} == {nn.SyncBatchNorm}
    return network


def frozen(network: nn.Module) -> nn.Module:
    """In training, but for the norms: they keep their statistics and learn their weights."""
    for module in network.train().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return network


def in_plain_pytorch(network: Network, data: dict[str, Tensor]) -> Outcome:
    """The whole batch in one process, on the reference."""
    plain = copy.deepcopy(network)
    for module in plain.modules():
        if isinstance(module, BAM):
            module.__class__ = reference.BAM
    return train(plain, plain, **data, scale=1 / SAMPLES)


def in_one_process(network: Network, data: dict[str, Tensor], device: torch.device) -> Outcome:
    """The whole batch on the fused path, which is held against plain PyTorch first."""
    fused = copy.deepcopy(network).to(device)
    there = {key: value.to(device) for key, value in data.items()}
    with watch(fused) as seen:
        outcome = train(fused, fused, **there, scale=1 / SAMPLES)
    assert_fused(seen)
    assert_same_training(outcome, in_plain_pytorch(network, data))
    return outcome


def assert_fused(seen: Watch) -> None:
    """Both BAMs took the fused path in every step, forward and backward, on whole parameters."""
    assert len(seen.told) == 2 and seen.backends == {"triton"} and not seen.sharded
    for kernel in ("pool_reduce_forward", "gate_forward", "input_gradient"):
        assert seen.kernels[kernel] == 2 * STEPS, kernel


def joined(parts: list[Outcome]) -> Outcome:
    """The outcome of all processes as of one, where all agree on what they share, to the bit."""
    for key, value in parts[0].items():
        if not key.endswith((": out", ": dx")):
            assert all(torch.equal(value, part[key]) for part in parts), key
    whole = dict(parts[0])
    for key in whole:
        if key.endswith(": out"):
            whole[key] = torch.cat([part[key] for part in parts])
        elif key.endswith(": dx"):  # of WORLD times the mean loss, for DDP averages the gradients
            whole[key] = torch.cat([part[key] for part in parts]) / WORLD
    return whole


def assert_same_training(found: Outcome, want: Outcome) -> None:
    """Every step's outputs, gradients, parameters, running statistics and counters."""
    assert [(key, value.shape) for key, value in found.items()] == [
        (key, value.shape) for key, value in want.items()
    ]
    found, want = (
        by_layer(each, lambda key: ": d" in key and not key.endswith(": dx"))
        for each in (found, want)
    )
    for key, value in want.items():
        if key.endswith("num_batches_tracked"):
            assert torch.equal(found[key], value), key
        else:
            error = relative_error(found[key], value)
            assert error <= TOLERANCE, f"{key}: relative error {error:.2e}"


@pytest.mark.parametrize("job,how", (("ddp", {}), ("fsdp", {"units": UNITS})), ids=("ddp", "fsdp"))
@pytest.mark.parametrize("preset", PRESETS)
def test_training(preset, job, how, pair, device, seed):
    """With SyncBatchNorm: statistics, gradients and updates are the whole batch's, and fused.

    Under FSDP2 each BAM is a unit, whose parameters are whole while it is called.
    """
    network, data = Network(preset=preset).double(), make_data()
    replies = pair.run(job, network=synchronised(network), **data, **how)
    for _, seen in replies:
        assert_fused(seen)
    found = joined([outcome for outcome, _ in replies])
    assert_same_training(found, in_one_process(network, data, device))
    for key, before in network.named_buffers():
        after = found[f"step {STEPS - 1}: {key}"]
        if key.endswith("num_batches_tracked"):
            assert after == STEPS, key
        else:
            assert relative_error(after, before) > 1e-3, key


@pytest.mark.parametrize("sizes", ((SAMPLES - 1, 1), (SAMPLES, 0)), ids=str)
def test_uneven_parts(sizes, pair, seed):
    """A process with one sample, or none, takes part in the statistics as any other."""
    network, data = Network().double(), make_data()
    replies = pair.run("ddp", network=synchronised(network), sizes=sizes, **data)
    found = joined([outcome for outcome, _ in replies])
    assert_same_training(found, in_plain_pytorch(network, data))


@pytest.mark.parametrize("mode", ("eval", "frozen"))
def test_fixed_norms(mode, pair, device, seed):
    """Plain batch norms on their running statistics, which stay; the channel MLP is fused too."""
    network, data = Network(preset="official").double(), make_data()
    network = network.eval() if mode == "eval" else frozen(network)
    replies = pair.run("ddp", network=network, **data)
    for _, seen in replies:
        assert_fused(seen)
        assert seen.kernels["channel_mlp_forward"] == 2 * STEPS
    found = joined([outcome for outcome, _ in replies])
    assert_same_training(found, in_one_process(network, data, device))
    for key, before in network.named_buffers():
        assert torch.equal(found[f"step {STEPS - 1}: {key}"], before), key


@pytest.mark.parametrize(
    "options,how",
    (
        ({}, {"gradient_as_bucket_view": True}),
        ({"channel": False}, {"find_unused_parameters": True}),
        ({"spatial": False}, {"static_graph": True}),
    ),
    ids=("both branches", "no channel branch", "no spatial branch"),
)
def test_every_gradient_is_ready_once(options, how, pair, seed):
    """In an order that DDP can reduce in buckets, the same in both processes, and none missing."""
    how = {"bucket_cap_mb": 1e-4} | how  # about a bucket a layer, at the latest in the second step
    network, data = frozen(Network(**options).double()), make_data()
    replies = pair.run("ddp", network=network, **how, **data)
    for _, seen in replies:
        assert_fused(seen)
    found = joined([outcome for outcome, _ in replies])
    assert_same_training(found, in_plain_pytorch(network, data))


def test_accumulated_gradients(pair, seed):
    """no_sync: what is reduced with the last batch is the sum of all gradients."""
    network, data = frozen(Network().double()), make_data()
    found = joined(pair.run("ddp_accumulated", network=network, **data))
    with use_backend("reference"):
        for x, target in zip(data["inputs"], data["targets"], strict=True):
            F.cross_entropy(network(x), target).backward()
    want = {f"step 0: d{key}": p.grad for key, p in network.named_parameters()}
    assert_same_training(found, want)


@pytest.mark.parametrize(
    "unit,backend",
    (
        ("spatial", "reference"),
        ("channel", "reference"),
        ("spatial.reduce", "reference"),
        ("channel.fc.0", "triton"),
        ("channel.norm", "triton"),
        ("spatial.dilated.0", "triton"),
    ),
)
def test_a_part_as_a_unit(unit, backend, pair, seed):
    """A part of a BAM that FSDP2 gathers when it is called is called, and `explain` tells so."""
    network, data = frozen(Network().double()), make_data()
    replies = pair.run("fsdp", network=network, units=(f"bam.{unit}",), **data)
    for _, seen in replies:
        assert {told.backend for told in seen.told["stem_bam"]} == {"triton"}
        for told in seen.told["bam"]:
            assert told.backend == backend
            if backend == "reference":
                assert unit in told.reasons["triton"]
            elif unit.startswith("channel"):
                assert any("channel MLP" in note for note in told.notes)
    found = joined([outcome for outcome, _ in replies])
    assert_same_training(found, in_plain_pytorch(network, data))


MIXED = {
    "whole": {"": torch.bfloat16},
    "norms apart": {"channel.norm": None, "spatial.norm": None, "": torch.bfloat16},
    "branches": {"channel": torch.bfloat16, "spatial": torch.bfloat16},
}


@pytest.mark.parametrize("units", MIXED)
def test_mixed_precision(units, pair, seed):
    """FSDP2 with float32 parameters that are bfloat16 while they compute, on a bfloat16 map."""
    # torch's batch norm on CPU tensors takes no bfloat16 weights beside float32 statistics.
    ours, plain = (
        kind(32, 4, norm_final=units == "norms apart").eval() for kind in (BAM, reference.BAM)
    )
    plain.load_state_dict(ours.state_dict())
    x, dout = (torch.randn(4, 32, 5, 7).bfloat16() for _ in range(2))
    data = {"x": x, "dout": dout, "units": MIXED[units]}
    replies = pair.run("fsdp_mixed", module=ours, **data)
    assert [seen.backends for _, seen in replies] == [
        {"reference" if units == "branches" else "triton"}
    ] * WORLD
    leaf = x.double().requires_grad_()
    truth = plain.double()(leaf)
    truth.backward(dout.double())
    found = {key: torch.cat([outcome[key] for outcome, _ in replies]) for key in ("out", "dx")}
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert_parity("out", found["out"], truth)
    assert_parity("dx", found["dx"], leaf.grad)


def test_same_bits(pairs, seed):
    """Two other processes on the same data leave the same bits, under DDP and under FSDP2."""
    network, data = synchronised(Network(preset="official")), make_data(torch.float32)
    for job, how in (("ddp", {}), ("fsdp", {"units": UNITS})):
        first, second = (
            pairs(number).run(job, network=network, **data, **how) for number in range(2)
        )
        for (a, _), (b, _) in zip(first, second, strict=True):
            assert list(a) == list(b) and len(a) > 100
            for key, value in a.items():
                assert torch.equal(value, b[key]), f"{job}, {key}"


def test_a_failure_is_told(pairs):
    """Of these tests' own machinery: a traceback arrives, and nobody waits for the other rank."""
    pair = pairs(1)
    with pytest.raises(RuntimeError) as failure:
        pair.run("one_fails")
    assert "rank 1: Traceback" in str(failure.value)
    assert "ZeroDivisionError: from rank 1" in str(failure.value)
    assert not pair.alive
