"""The losses of recipes against their definitions, written out."""

import math

import pytest
import torch
from torch.nn import functional as F

from manifold_mixup.lab.config import TrainConfig
from manifold_mixup.lab.criterion import bce_softmax, cross_entropy, make_criterion
from manifold_mixup.target import MixedTarget


def batch(n=6, classes=4):
    logits = torch.randn(n, classes, dtype=torch.float64, requires_grad=True)
    return logits, torch.randint(classes, (n,)), torch.randint(classes, (n,))


def written_out(logits, soft):
    """Binary cross-entropy of the softmax, one number after the other."""
    total = 0.0
    for row, targets in zip(logits.detach().softmax(1).tolist(), soft.tolist(), strict=True):
        total += sum(-t * math.log(p) - (1 - t) * math.log(1 - p) for p, t in zip(row, targets, strict=True))
    return total / soft.numel()


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_bce_softmax_is_its_definition(lam, smoothing):
    logits, y, z = batch()
    soft = lam * F.one_hot(y, 4).double() + (1 - lam) * F.one_hot(z, 4)
    soft = (1 - smoothing) * soft + smoothing / 4
    assert bce_softmax(logits, MixedTarget(y, z, lam), smoothing).item() == pytest.approx(written_out(logits, soft))
    assert bce_softmax(logits, y, smoothing).item() == pytest.approx(
        written_out(logits, (1 - smoothing) * F.one_hot(y, 4) + smoothing / 4)
    )


def test_bce_softmax_of_a_weight_per_example():
    logits, y, z = batch()
    lam = torch.rand(6, dtype=torch.float64)
    soft = lam[:, None] * F.one_hot(y, 4) + (1 - lam[:, None]) * F.one_hot(z, 4)
    assert bce_softmax(logits, MixedTarget(y, z, lam)).item() == pytest.approx(written_out(logits, soft))


def test_bce_softmax_stays_finite_where_a_class_is_certain():
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    loss = bce_softmax(logits, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(50.0)  # 100, the cut-off, twice among four numbers
    assert logits.grad.isfinite().all()


def test_bce_softmax_under_autocast_is_computed_in_full_precision():
    logits, y, _ = batch()
    with torch.autocast("cpu", torch.bfloat16):
        assert bce_softmax(logits.float(), y).item() == pytest.approx(bce_softmax(logits, y).item(), rel=1e-5)


def test_cross_entropy_is_that_of_the_smoothed_mixed_distribution():
    logits, y, z = batch()
    soft = 0.9 * (0.3 * F.one_hot(y, 4).double() + 0.7 * F.one_hot(z, 4)) + 0.1 / 4
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    assert cross_entropy(logits, MixedTarget(y, z, 0.3), 0.1).item() == pytest.approx(expected.item())


def test_a_recipe_chooses():
    logits, y, _ = batch()
    assert make_criterion(TrainConfig())(logits, y).item() == pytest.approx(F.cross_entropy(logits, y).item())
    bce = make_criterion(TrainConfig(loss="bce-softmax", label_smoothing=0.1))
    assert bce(logits, y).item() == pytest.approx(bce_softmax(logits, y, 0.1).item())
    smooth = make_criterion(TrainConfig(label_smoothing=0.1))
    assert smooth(logits, y).item() == pytest.approx(F.cross_entropy(logits, y, label_smoothing=0.1).item())
