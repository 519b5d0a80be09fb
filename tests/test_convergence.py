"""Training on real data: a small CNN with BAM on scikit-learn's digits, fused and in plain PyTorch.

The two curves can only lie on each other while no hidden unit of theirs is on at one and off at the
other: there the gradient jumps, and the curves part by 1e-3 and more, as those of plain PyTorch do
in float32 and in float64, or in two memory formats. So the network around BAM is smooth, and the
seed is one with which no unit of BAM comes near its kink, looked for in plain PyTorch.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn import datasets
from test_module import twin
from test_training_scripts import one_thread  # noqa: F401
from torch import nn

from bam_kernels import BAM, explain

STEPS, BATCH, RATE, TEST_SAMPLES = 200, 8, 0.05, 400
KINK = 3e-6  # the least distance from zero; the values in front of ReLUs agree to about 1e-6
CASES = {"paper": (8, 53), "official": (4, 38)}  # by preset: reduction, first seed


def digits(device):
    """(images [1797, 1, 8, 8], labels): real handwriting, kept in the scikit-learn package."""
    data = datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32, device=device)[:, None] / 16 - 0.3
    return images, torch.tensor(data.target, device=device)


def network(preset, reduction, device):
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.SiLU(),
        BAM(32, reduction, dilation=1, preset=preset),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    ).to(device)


def closest_to_a_kink(bam: nn.Module) -> list[float]:
    """Keeps, while the module trains, the least distance of a hidden unit from zero."""
    closest = [math.inf]

    def watch(module, args, out):
        if module.training:
            closest[0] = min(closest[0], out.detach().abs().min().item())

    spatial, channel = bam.spatial, bam.channel
    plain = [spatial.reduce, *spatial.dilated, *channel.fc[:-1]]
    normed = [*(spatial.hidden_norm or ()), *(channel.hidden_norm or ())]
    for module in normed or plain:
        module.register_forward_hook(watch)
    return closest


def train(model, images, labels, kink=(math.inf,)):
    """(losses of the steps, held-out loss and accuracy): SGD, its rate falling to 0.

    None as soon as `kink`, where given, says that a unit came near it.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[:TEST_SAMPLES], order[TEST_SAMPLES:]
    draw = torch.Generator().manual_seed(1)
    epochs = 1 + STEPS * BATCH // len(rest)
    rest = torch.cat([rest[torch.randperm(len(rest), generator=draw)] for _ in range(epochs)])
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    losses = []
    for step in range(STEPS):
        batch = rest[step * BATCH : (step + 1) * BATCH]
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if kink[0] <= KINK:
            return None
    model.eval()
    with torch.no_grad():
        logits = model(images[held_out])
    accuracy = (logits.argmax(1) == labels[held_out]).double().mean().item()
    test_loss = F.cross_entropy(logits.double(), labels[held_out]).item()
    return torch.tensor(losses, dtype=torch.float64), test_loss, accuracy


def clear_of_kinks(preset, reduction, first_seed, images, labels):
    """The first seed from `first_seed` on with which no unit comes near its kink in plain PyTorch:
    (the network before its training, the outcome of the training)."""
    for seed in range(first_seed, first_seed + 100):
        torch.manual_seed(seed)
        model = network(preset, reduction, images.device)
        plain = copy.deepcopy(model)
        plain[6] = twin(model[6], torch.float32)
        kink = closest_to_a_kink(plain[6])
        outcome = train(plain, images, labels, kink)
        if kink[0] > KINK:
            return model, outcome
    raise AssertionError("no seed of 100 keeps all units away from their kinks")


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("preset", CASES)
def test_the_loss_curves_lie_on_each_other(preset, device, large_tiles):
    """200 steps in float32 from one seed: at the end, on held-out digits, and all along the way."""
    images, labels = digits(device)
    reduction, first_seed = CASES[preset]
    fused, (want, test_loss, accuracy) = clear_of_kinks(
        preset, reduction, first_seed, images, labels
    )
    assert explain(fused[6], torch.randn(BATCH, 32, 4, 4, device=device)).backend == "triton"
    found, found_test_loss, found_accuracy = train(fused, images, labels)

    scale = want.mean()
    assert (found - want).abs().max() / scale < 1e-4, "the curves part"
    assert abs(found[-10:].mean() / want[-10:].mean() - 1) < 1e-4
    assert abs(found_test_loss / test_loss - 1) < 1e-4
    assert want[-10:].mean() < want[:10].mean() / 3, "plain PyTorch does not train"
    assert min(accuracy, found_accuracy) > 0.9
    assert abs(accuracy - found_accuracy) <= 1 / TEST_SAMPLES
