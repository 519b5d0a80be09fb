"""ResNet-50 with a BAM behind each of its first three stages, as a whole (Sec. 5.1)."""

from __future__ import annotations

import copy

import pytest
import suite
import torch
from torch import nn

import bam_kernels
from bam_kernels import insert_bam, reference
from bam_kernels.benchmarking import timing
from bam_kernels.benchmarking.sites import CHANNELS_LAST

_STAGES = ("layer1", "layer2", "layer3")


@pytest.fixture
def run(pytestconfig: pytest.Config) -> suite.Suite:
    return pytestconfig.suite


def _network(run: suite.Suite, side: str, dtype: str, layout: str, training: bool):
    """The network, the callable to time, its input, and its error against the plain network in
    float64."""
    resnet = pytest.importorskip("torchvision.models.resnet", reason="pip install torchvision")
    blocks = (1, 1, 1, 1) if run.tiny else (3, 4, 6, 3)
    size = 32 if run.tiny else 224
    batch = max(2, run.batch // 2)
    plain = resnet.ResNet(resnet.Bottleneck, blocks)
    insert_bam(plain, _STAGES, module=reference.BAM)
    ours = resnet.ResNet(resnet.Bottleneck, blocks)
    insert_bam(ours, _STAGES, module=bam_kernels.BAM)
    ours.load_state_dict(plain.state_dict())
    network = ours if side == suite.FUSED else plain
    fmt = torch.channels_last if layout == CHANNELS_LAST else torch.contiguous_format
    kind = getattr(torch, dtype)
    x = torch.randn(batch, 3, size, size, device=run.device).to(kind).contiguous(memory_format=fmt)
    exact = copy.deepcopy(plain).double().to(run.device).eval()
    network = network.to(run.device, kind).to(memory_format=fmt).eval()
    with torch.no_grad():
        error = timing.relative_error(network(x), exact(x.double()))
    # Eager rounds its way through 161 layers as well: what is looked for is a wrong wiring.
    assert error <= (1e-3 if dtype == "float32" else 0.1)
    network.train(training)
    call = run.compiled(network) if side == suite.COMPILE else network
    return network, call, x, error


def test_resnet50_inference(run, measure, dtype, layout, network_side):
    with run.backend(network_side), torch.no_grad():
        _, call, x, error = _network(run, network_side, dtype, layout, training=False)
        measure(
            lambda: call(x),
            relative_error=error,
            peak_bytes=timing.peak_bytes(lambda: call(x), run.device),
        )


def test_resnet50_training_step(run, measure, dtype, layout, network_side):
    with run.backend(network_side):
        network, call, x, error = _network(run, network_side, dtype, layout, training=True)
        target = torch.randint(1000, (len(x),), device=run.device)

        def step():
            nn.functional.cross_entropy(call(x).float(), target).backward()
            network.zero_grad(set_to_none=True)

        measure(step, relative_error=error, peak_bytes=timing.peak_bytes(step, run.device))
