"""A MixedTarget means λ·ℓ(output, y) + (1 - λ)·ℓ(output, y'), for every loss, or it raises."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle
import re
from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from manifold_mixup.errors import BatchMismatch, LayerNotReached, ManifoldMixupError, MixedTargetMisuse
from manifold_mixup.target import MixedTarget

F64 = torch.float64
LAMS = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
SEEDS = st.integers(0, 2**31)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def partner_of(y: Tensor) -> Tensor:
    return y.roll(1, 0)


def mixed(y: Tensor, lam: float | Tensor = 0.3, **kwargs: Any) -> MixedTarget:
    return MixedTarget(y, partner_of(y), lam, **kwargs)


class Case(NamedTuple):
    """A loss: its arguments but one, the name of that one, y to give for it, and what gradients are taken of."""

    arguments: dict[str, Any]
    name: str
    y: Tensor
    leaf: Tensor


def losses(n: int = 4) -> dict[str, Case]:
    """Every loss of torch.nn.functional."""
    x, z, classes = rand(n, 5).requires_grad_(), rand(n, 5), torch.randint(5, (n,))
    share, signs = torch.rand(n, 5, dtype=F64), torch.randint(2, (n, 5)).to(F64) * 2 - 1
    multi = torch.tensor([[0, 3, -1, 1, 1], [2, -1, 0, 0, 0], [4, 1, 2, -1, 3]] * n)[:n]
    lengths = {"input_lengths": torch.full((n,), 9), "target_lengths": torch.full((n,), 3)}
    ctc = {"log_probs": (x + rand(9, n, 5)).log_softmax(-1), **lengths}
    table = {
        "binary_cross_entropy": ({"input": x.sigmoid()}, "target", share),
        "binary_cross_entropy_with_logits": ({"input": x}, "target", share),
        "cosine_embedding_loss": ({"input1": x, "input2": z}, "target", signs[:, 0]),
        "cross_entropy": ({"input": x}, "target", classes),
        "ctc_loss": (ctc, "targets", torch.randint(1, 5, (n, 3))),
        "gaussian_nll_loss": ({"input": x, "var": share + 0.1}, "target", z),
        "hinge_embedding_loss": ({"input": x}, "target", signs),
        "huber_loss": ({"input": x}, "target", z),
        "kl_div": ({"input": x.log_softmax(1)}, "target", share),
        "l1_loss": ({"input": x}, "target", z),
        "linear_cross_entropy": ({"input": x, "linear_weight": rand(7, 5)}, "target", classes),
        "margin_ranking_loss": ({"input1": x[:, 0], "input2": z[:, 0]}, "target", signs[:, 0]),
        "mse_loss": ({"input": x}, "target", z),
        "multi_margin_loss": ({"input": x}, "target", classes),
        "multilabel_margin_loss": ({"input": x}, "target", multi),
        "multilabel_soft_margin_loss": ({"input": x}, "target", (signs + 1) / 2),
        "nll_loss": ({"input": x.log_softmax(1)}, "target", classes),
        "poisson_nll_loss": ({"input": x}, "target", share),
        "smooth_l1_loss": ({"input": x}, "target", z),
        "soft_margin_loss": ({"input": x}, "target", signs),
        "triplet_margin_loss": ({"anchor": x, "negative": z}, "positive", rand(n, 5)),
        "triplet_margin_with_distance_loss": ({"anchor": x, "negative": z}, "positive", rand(n, 5)),
    }
    return {name: Case(*entry, x) for name, entry in table.items()}


NAMES = sorted(losses())
MODULES = sorted(name for name in dir(nn) if name.endswith("Loss") and name != "AdaptiveLogSoftmaxWithLoss")


def call(name: str, case: Case, target: Any, **kwargs: Any) -> Tensor:
    return getattr(F, name)(**case.arguments, **{case.name: target}, **kwargs)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0]


# ---------------------------------------------------------------- the losses of torch.nn.functional


def test_no_loss_of_torch_is_forgotten():
    by_name = {name for name in dir(F) if re.search(r"loss$|entropy|kl_div", name)}
    by_argument = {
        n for n, f in vars(F).items() if inspect.isfunction(f) and "reduction" in inspect.signature(f).parameters
    }
    assert set(NAMES) == by_name | by_argument
    assert {"CrossEntropyLoss", "CTCLoss", "MSELoss"} < set(MODULES)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_is_weighted(name, reduction):
    case = losses()[name]
    if name == "kl_div" and reduction == "mean":
        reduction = "batchmean"
    one, other = (call(name, case, y, reduction=reduction) for y in (case.y, partner_of(case.y)))
    loss = call(name, case, mixed(case.y, 0.3), reduction=reduction)
    torch.testing.assert_close(loss, 0.3 * one + 0.7 * other)
    assert not torch.allclose(one, other)
    expected = 0.3 * gradient(one, case.leaf) + 0.7 * gradient(other, case.leaf)
    torch.testing.assert_close(gradient(loss, case.leaf), expected)


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_takes_one_lam_per_example(name):
    case, lam = losses()[name], torch.tensor([0.0, 0.2, 0.9, 1.0])
    one, other = (call(name, case, y, reduction="none") for y in (case.y, partner_of(case.y)))
    expected = torch.stack(
        [weight * a + (1 - weight) * b for weight, a, b in zip(lam.double(), one, other, strict=True)]
    )
    loss = call(name, case, mixed(case.y, lam), reduction="none")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, case.leaf), gradient(expected, case.leaf))
    for reduction in ("batchmean" if name == "kl_div" else "mean", "sum"):
        with pytest.raises(MixedTargetMisuse, match='reduction="none".*average afterwards'):
            call(name, case, mixed(case.y, lam), reduction=reduction)


@pytest.mark.parametrize("name", NAMES)
def test_lam_1_is_the_plain_loss_bit_for_bit(name):
    case = losses()[name]
    for target, y in ((mixed(case.y, 1.0), case.y), (mixed(case.y, 0.0), partner_of(case.y))):
        plain, loss = (call(name, case, t, reduction="sum") for t in (y, target))
        assert torch.equal(loss, plain)
        assert torch.equal(gradient(loss, case.leaf), gradient(plain, case.leaf))


@pytest.mark.parametrize("name", MODULES)
def test_every_loss_module(name):
    kind = getattr(nn, name)
    function = re.search(r"F\.(\w+)\(", inspect.getsource(kind.forward))[1]
    case = losses()[function]
    module = nn.LinearCrossEntropyLoss(5, 7, dtype=F64) if name == "LinearCrossEntropyLoss" else kind(reduction="sum")
    names = [n for n in inspect.signature(module.forward).parameters if n != case.name]

    def apply(y: Any) -> Tensor:
        given = {n: case.arguments["input" if n == "log_input" else n] for n in names}
        return module(**given, **{case.name: y})

    one, other = apply(case.y), apply(partner_of(case.y))
    torch.testing.assert_close(apply(mixed(case.y, 0.3)), 0.3 * one + 0.7 * other)
    assert torch.equal(apply(mixed(case.y, 1.0)), one)


@pytest.mark.parametrize("name", NAMES)
def test_torch_hands_every_argument_of_a_loss_on(name):
    """Else a class weight or a margin is lost without a word. One is lost by torch 2.13, and restored."""
    function, (arguments, target, y, _) = getattr(F, name), losses()[name]

    class Probe:
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return inspect.signature(function).bind(*args, **(kwargs or {})).arguments

    optional = {n: object() for n in inspect.signature(function).parameters if n not in arguments and n != target}
    got = function(**arguments, **optional, **{target: Probe()})
    lost = {n for n, value in (arguments | optional).items() if got.get(n) is not value}
    assert lost <= ({"weight"} if name == "l1_loss" else set())
    for required in arguments:
        assert isinstance(function(**{**arguments, target: y, required: Probe()}), dict), required


def test_the_weight_of_l1_loss_is_not_lost():
    x, y, weight = rand(4, 3), rand(4, 3), torch.rand(4, 3, dtype=F64)
    one, other = (F.l1_loss(x, t, weight=weight) for t in (y, partner_of(y)))
    torch.testing.assert_close(F.l1_loss(x, mixed(y, 0.3), weight=weight), 0.3 * one + 0.7 * other)
    torch.testing.assert_close(F.l1_loss(x, mixed(y, 1.0)), F.l1_loss(x, y))


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
def test_deprecated_reductions_are_understood():
    x, y, lam = rand(4, 3), torch.tensor([0, 1, 2, 1]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    loss = F.cross_entropy(x, mixed(y, lam), reduce=False, reduction="mean")
    torch.testing.assert_close(loss, F.cross_entropy(x, mixed(y, lam), reduction="none"))
    for reduced in ({"reduce": True}, {"size_average": False}):
        with pytest.raises(MixedTargetMisuse, match='reduction="none"'):
            F.cross_entropy(x, mixed(y, lam), reduction="none", **reduced)


def test_losses_that_cannot_be_mixed_say_so():
    head = nn.AdaptiveLogSoftmaxWithLoss(5, 7, [2, 4], div_value=2.0)
    y = torch.tensor([0, 3, 6, 1])
    with pytest.raises(MixedTargetMisuse, match=r"target\.loss"):
        head(torch.randn(4, 5), mixed(y))
    x = torch.randn(4, 5)
    one, other = head(x, y).loss, head(x, partner_of(y)).loss
    torch.testing.assert_close(mixed(y, 0.3).loss(lambda x, y: head(x, y).loss, x), 0.3 * one + 0.7 * other)
    with pytest.raises(MixedTargetMisuse, match="take one out first"):
        F.cross_entropy(x, MixedTarget((y, y), (y, y), 0.5))


# ---------------------------------------------------------------- against slow, obvious references


def slow_cross_entropy(
    logits: Tensor, y: Tensor, weight: Tensor, smoothing: float, ignore_index: int, reduction: str
) -> Tensor:
    """Element by element, from the definition. logits: (n, C, m), y: (n, m)."""
    total, share, rows = 0.0, 0.0, []
    for scores, labels in zip(logits.unbind(), y.unbind(), strict=True):
        row = []
        for j, label in enumerate(labels.tolist()):
            log_p = scores[:, j] - scores[:, j].exp().sum().log()
            if label == ignore_index:
                row.append(log_p.sum() * 0)
                continue
            hit = -(1 - smoothing) * weight[label] * log_p[label]
            row.append(hit - smoothing / len(weight) * (weight * log_p).sum())
            total, share = total + row[-1], share + weight[label]
        rows.append(torch.stack(row))
    return {"none": torch.stack(rows), "sum": total, "mean": total / share}[reduction]


@given(
    seed=SEEDS,
    n=st.integers(1, 4),
    m=st.integers(1, 3),
    classes=st.integers(2, 4),
    lam=LAMS,
    smoothing=st.sampled_from([0.0, 0.1]),
    ignored=st.booleans(),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    per_example=st.booleans(),
)
def test_cross_entropy_on_dense_maps(seed, n, m, classes, lam, smoothing, ignored, reduction, per_example):
    torch.manual_seed(seed)
    logits, weight = rand(n, classes, m).requires_grad_(), torch.rand(classes, dtype=F64) + 0.1
    y, partner = torch.randint(classes, (2, n, m)).unbind()
    if ignored:
        y[torch.rand(n, m) < 0.3] = -7
        assume(bool((y != -7).any()))
    one, other = (slow_cross_entropy(logits, t, weight, smoothing, -7, reduction) for t in (y, partner))
    own: Any = lam
    if per_example:
        assume(reduction == "none")
        own = torch.rand(n, dtype=F64)
        expected = torch.stack([own[i] * one[i] + (1 - own[i]) * other[i] for i in range(n)])
    else:
        expected = lam * one + (1 - lam) * other
    settings = {"weight": weight, "label_smoothing": smoothing, "ignore_index": -7, "reduction": reduction}
    target = MixedTarget(y, partner, own)
    for loss in (
        F.cross_entropy(logits, target, **settings),
        nn.CrossEntropyLoss(**settings)(logits, target),
        target.loss(lambda out, t: F.cross_entropy(out, t, **settings), logits),
    ):
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


@given(
    seed=SEEDS,
    n=st.integers(1, 5),
    inner=st.lists(st.integers(1, 3), max_size=2),
    lam=LAMS,
    smoothing=st.sampled_from([0.0, 0.2]),
)
def test_both_forms_of_cross_entropy_agree(seed, n, inner, lam, smoothing):
    torch.manual_seed(seed)
    logits, y = rand(n, 4, *inner).requires_grad_(), torch.randint(4, (n, *inner))
    target = mixed(y, lam)
    soft = target.soft(4, dtype=F64)
    assert soft.shape == logits.shape
    weight = torch.rand(4, dtype=F64)
    for settings in ({}, {"reduction": "sum", "weight": weight}, {"reduction": "none", "weight": weight}):
        hard, easy = (F.cross_entropy(logits, t, label_smoothing=smoothing, **settings) for t in (target, soft))
        torch.testing.assert_close(hard, easy)
        torch.testing.assert_close(gradient(hard, logits), gradient(easy, logits))
    lams = torch.rand(n, dtype=F64)
    target = mixed(y, lams)
    hard, easy = (F.cross_entropy(logits, t, reduction="none") for t in (target, target.soft(4, dtype=F64)))
    torch.testing.assert_close(hard, easy)


def test_class_weights_normalise_each_half_on_its_own():
    """With weights and a mean the two forms differ: each loss is divided by the weights of its own labels."""
    logits, weight = rand(4, 3), torch.tensor([1.0, 5.0, 20.0], dtype=F64)
    y, partner = torch.tensor([0, 0, 1, 0]), torch.tensor([2, 2, 1, 0])
    target = MixedTarget(y, partner, 0.3)
    loss, log_p = F.cross_entropy(logits, target, weight=weight), logits.log_softmax(1)
    one, other = ((weight[t] * -log_p[range(4), t]).sum() / weight[t].sum() for t in (y, partner))
    torch.testing.assert_close(loss, 0.3 * one + 0.7 * other)
    assert not torch.isclose(loss, F.cross_entropy(logits, target.soft(3, dtype=F64), weight=weight))


def test_multi_label_and_regression():
    x, y = rand(4, 3), torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]], dtype=F64)
    target = mixed(y, 0.3)
    torch.testing.assert_close(target.soft(), 0.3 * y + 0.7 * partner_of(y))
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(bce(x, target), bce(x, target.soft()))
    by_hand = sum(
        share * ((x[i, j] - labels[i, j]) ** 2).item() / 12
        for share, labels in ((0.3, y), (0.7, partner_of(y)))
        for i in range(4)
        for j in range(3)
    )
    torch.testing.assert_close(F.mse_loss(x, target).item(), by_hand)
    assert not torch.isclose(F.mse_loss(x, target), F.mse_loss(x, target.soft()))  # not linear in y


def focal(logits: Tensor, y: Tensor) -> Tensor:
    log_p = logits.log_softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


@given(seed=SEEDS, lam=LAMS)
def test_a_loss_of_ones_own(seed, lam):
    torch.manual_seed(seed)
    logits, y = rand(4, 3).requires_grad_(), torch.randint(3, (4,))
    expected = 0.0
    for share, labels in ((lam, y), (1 - lam, partner_of(y))):
        for scores, label in zip(logits, labels.tolist(), strict=True):
            p = scores.exp()[label] / scores.exp().sum()
            expected = expected - share * (1 - p) ** 2 * p.log() / 4
    loss = mixed(y, lam).loss(focal, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))
    with pytest.raises(MixedTargetMisuse, match=r"target\.loss"):
        focal(logits, mixed(y, lam))


@given(seed=SEEDS, lam=LAMS, reduction=st.sampled_from(["none", "sum", "mean"]))
def test_ctc_mixes_targets_and_lengths_together(seed, lam, reduction):
    torch.manual_seed(seed)
    log_probs = rand(12, 3, 5).log_softmax(-1).requires_grad_()
    y, lengths, steps = torch.randint(1, 5, (3, 4)), torch.tensor([4, 2, 1]), torch.tensor([12, 11, 10])
    expected = 0.0
    for share, order in ((lam, [0, 1, 2]), (1 - lam, [2, 0, 1])):
        rows = torch.stack(
            [
                F.ctc_loss(
                    log_probs[: steps[i], i], y[k, : lengths[k]], steps[i : i + 1], lengths[k : k + 1], reduction="sum"
                )
                for i, k in enumerate(order)
            ]
        )
        reduced = {"none": rows, "sum": rows.sum(), "mean": (rows / lengths[order]).mean()}[reduction]
        expected = expected + share * reduced
    target = MixedTarget((y, lengths), (partner_of(y), partner_of(lengths)), lam)
    for loss in (
        F.ctc_loss(log_probs, target[0], steps, target[1], reduction=reduction),
        nn.CTCLoss(reduction=reduction)(log_probs, *(part for part in (target[0], steps, target[1]))),
        target.loss(lambda out, t: F.ctc_loss(out, t[0], steps, t[1], reduction=reduction), log_probs),
    ):
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient(loss, log_probs), gradient(expected, log_probs))


def test_targets_of_different_draws_do_not_meet():
    log_probs, steps = rand(12, 3, 5).log_softmax(-1), torch.full((3,), 12)
    y, lengths, lam = torch.randint(1, 5, (3, 4)), torch.tensor([4, 2, 1]), torch.tensor([0.1, 0.2, 0.3])
    assert F.ctc_loss(log_probs, mixed(y, 0.3), steps, mixed(lengths, 0.3)).isfinite()
    assert F.ctc_loss(log_probs, mixed(y, lam), steps, mixed(lengths, lam.clone()), reduction="none").isfinite().all()
    for one, other in (
        (mixed(y, 0.3), mixed(lengths, 0.4)),
        (mixed(y, lam), mixed(lengths, 0.3)),
        (mixed(y, lam), mixed(lengths, 1 - lam)),
        (mixed(y, 0.3, ready=lambda: None), mixed(lengths, 0.3, ready=lambda: None)),
    ):
        with pytest.raises(MixedTargetMisuse, match="different draws"):
            F.ctc_loss(log_probs, one, steps, other, reduction="none")


# ---------------------------------------------------------------- loss, soft, accuracy


@pytest.mark.parametrize(("lam", "labels"), [(1.0, "y"), (0.0, "y_partner")])
def test_a_half_of_weight_zero_is_not_evaluated(lam, labels):
    target, seen = mixed(torch.tensor([0, 1, 2]), lam), []

    def criterion(output: Tensor, y: Tensor) -> Tensor:
        seen.append(y)
        return output.sum() / 3

    output = torch.randn(3)
    assert torch.equal(target.loss(criterion, output), output.sum() / 3)
    assert len(seen) == 1
    assert seen[0] is getattr(target, labels)


def test_loss_with_one_lam_per_example():
    x, y, lam = rand(4, 3), torch.tensor([0, 1, 2, 1]), torch.tensor([0.1, 0.5, 0.9, 1.0])
    one, other = F.cross_entropy(x, y, reduction="none"), F.cross_entropy(x, partner_of(y), reduction="none")
    for name, criterion in (("none", lambda x, y: F.cross_entropy(x, y, reduction="none")), ("mean", F.cross_entropy)):
        target = mixed(y, lam)
        if name == "mean":
            with pytest.raises(MixedTargetMisuse, match='reduction="none".*average afterwards'):
                target.loss(criterion, x)
        else:
            torch.testing.assert_close(target.loss(criterion, x), lam * one + (1 - lam) * other, check_dtype=False)
    with pytest.raises(MixedTargetMisuse, match=r"4 examples, but the loss has shape \(1,\)"):
        mixed(y, lam).loss(lambda x, y: F.cross_entropy(x, y).view(1), x)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert mixed(y, lam.double()).loss(lambda x, y: x, torch.ones(4, dtype=dtype)).dtype == dtype


def test_a_criterion_has_to_return_a_tensor():
    with pytest.raises(MixedTargetMisuse, match="not a dict"):
        mixed(torch.tensor([0, 1])).loss(lambda x, y: {"loss": x}, torch.ones(2))


@given(seed=SEEDS, n=st.integers(0, 4), inner=st.lists(st.integers(0, 3), max_size=2), lam=LAMS, per=st.booleans())
def test_soft_is_the_mixed_one_hot(seed, n, inner, lam, per):
    torch.manual_seed(seed)
    y, partner = torch.randint(5, (2, n, *inner)).unbind()
    lams = torch.rand(n, dtype=F64) if per else torch.full((n,), lam, dtype=F64)
    soft = MixedTarget(y.int(), partner.int(), lams if per else lam).soft(5, dtype=F64)
    expected = torch.zeros(n, 5, *inner, dtype=F64)
    for i in range(n):
        for place in np.ndindex(*inner):
            expected[(i, int(y[(i, *place)]), *place)] += lams[i]
            expected[(i, int(partner[(i, *place)]), *place)] += 1 - lams[i]
    torch.testing.assert_close(soft, expected)


def test_soft_dtypes_and_errors():
    y = torch.tensor([0, 1, 2])
    assert mixed(y).soft(3).dtype == torch.get_default_dtype()
    assert mixed(y.half()).soft().dtype == torch.half
    lam = torch.tensor([0.2, 0.5, 1.0])
    torch.testing.assert_close(mixed(y.double(), lam).soft(), lam.double() * y + (1 - lam.double()) * partner_of(y))
    torch.testing.assert_close(mixed(y > 1, 0.25).soft(), torch.tensor([0.75, 0.0, 0.25]))
    for wrong in (-100, 3):
        for labels in (torch.tensor([0, wrong, 2]), torch.tensor([wrong, 1, 2])):
            with pytest.raises(ValueError, match=rf"Label {wrong} lies outside \[0, 3\).*ignore_index.*loss form"):
                MixedTarget(y, labels, 0.5).soft(3)
            with pytest.raises(ValueError, match=f"Label {wrong}"):
                MixedTarget(labels, y, 0.5).soft(3)
    with pytest.raises(ValueError, match="number of classes"):
        mixed(y).soft()


@given(seed=SEEDS, n=st.integers(1, 4), inner=st.lists(st.integers(1, 3), max_size=2), lam=LAMS, per=st.booleans())
def test_accuracy_counts_hits_by_weight(seed, n, inner, lam, per):
    torch.manual_seed(seed)
    logits, (y, partner) = torch.randn(n, 3, *inner), torch.randint(3, (2, n, *inner)).unbind()
    y[torch.rand(y.shape) < 0.2] = -100
    lams = torch.rand(n, dtype=F64) if per else torch.full((n,), lam, dtype=F64)
    hits = total = 0.0
    for i in range(n):
        for place in np.ndindex(*inner):
            scores = [float(logits[(i, c, *place)]) for c in range(3)]
            for weight, labels in ((float(lams[i]), y), (1 - float(lams[i]), partner)):
                label = int(labels[(i, *place)])
                if label != -100:
                    hits += weight * (scores.index(max(scores)) == label)
                    total += weight
    accuracy = MixedTarget(y, partner, lams if per else lam).accuracy(logits)
    assert accuracy.shape == ()
    assume(total > 1e-6)
    assert float(accuracy) == pytest.approx(hits / total, abs=1e-5)


def test_accuracy_with_an_ignore_index_of_ones_own():
    y = torch.tensor([0, 1, 255])
    assert float(MixedTarget(y, y, 0.5).accuracy(torch.eye(3), ignore_index=255)) == 1.0
    assert float(MixedTarget(y, y, 0.5).accuracy(torch.eye(3))) == pytest.approx(2 / 3)


def test_accuracy_refuses_what_would_broadcast_or_mislead():
    y = torch.tensor([0, 1, 2])
    for logits, labels in ((torch.randn(3, 4), y.unsqueeze(1)), (torch.randn(3), y), (torch.randn(4, 4), y)):
        with pytest.raises(BatchMismatch, match="shapes are"):
            mixed(labels).accuracy(logits)
    for labels in (y.float(), y > 0):
        with pytest.raises(MixedTargetMisuse, match="class indices"):
            mixed(labels).accuracy(torch.randn(3, 4))


def test_mixed_says_whether_it_is():
    y = torch.tensor([0, 1])
    assert mixed(y, 0.5).mixed is True
    assert mixed(y, 1).mixed is False
    assert mixed(y, torch.tensor([1.0, 0.5])).mixed is True
    assert mixed(y, torch.ones(2)).mixed is False


# ---------------------------------------------------------------- ready


def uses() -> dict[str, Callable[[MixedTarget], Any]]:
    """Everything that must ask first, on a target for which all of them make sense."""
    logits = torch.randn(4, 5)
    return {
        "accuracy": lambda t: t.accuracy(logits),
        "soft": lambda t: t.soft(5),
        "loss": lambda t: t.loss(F.cross_entropy, logits),
        "view": lambda t: F.cross_entropy(logits, t.view(2, 2).view(-1)),
        "rows": lambda t: F.cross_entropy(logits[:2], t[:2]),
        "to": lambda t: t.to(torch.int64).long().clone().detach().contiguous().cpu().accuracy(logits),
        "pad": lambda t: F.pad(t.view(4, 1), (0, 1), value=3)[:, 0].accuracy(logits),
        "torch.flatten": lambda t: torch.flatten(t).soft(5),
        "copy": lambda t: copy.copy(t).accuracy(logits),
        "deepcopy": lambda t: copy.deepcopy(t).accuracy(logits),
    }


@pytest.mark.parametrize("lam", [0.3, 1.0, torch.tensor([0.1, 0.2, 0.3, 1.0])], ids=["batch", "one", "example"])
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_asks_whether_the_network_has_mixed(name, lam):
    case, asked = losses()[name], []

    def refuse() -> None:
        raise LayerNotReached("not yet")

    call(name, case, mixed(case.y, lam, ready=lambda: asked.append(1)), reduction="none")
    assert asked == [1]
    with pytest.raises(LayerNotReached, match="not yet"):
        call(name, case, mixed(case.y, lam, ready=refuse), reduction="none")


@pytest.mark.parametrize("name", sorted(uses()))
def test_every_use_asks_whether_the_network_has_mixed(name):
    use, asked, y = uses()[name], [], torch.tensor([0, 1, 2, 4])

    def refuse() -> None:
        raise LayerNotReached("not yet")

    use(mixed(y, ready=lambda: asked.append(1)))
    assert asked == [1]
    with pytest.raises(LayerNotReached, match="not yet"):
        use(mixed(y, ready=refuse))


def test_nothing_is_computed_before_ready_agrees():
    def refuse() -> None:
        raise LayerNotReached("not yet")

    def criterion(*_: Any) -> Tensor:
        raise AssertionError("called too early")

    with pytest.raises(LayerNotReached):
        mixed(torch.tensor([0, 1]), ready=refuse).loss(criterion, None)


def test_looking_at_a_target_asks_nothing():
    def refuse() -> None:
        raise LayerNotReached("not yet")

    target = mixed(torch.tensor([0, 1]), ready=refuse)
    assert (target.mixed, target.shape, len(target), repr(target)[:11]) == (True, (2,), 2, "MixedTarget")
    assert torch.equal(target.to(torch.int32)[:1].y, torch.tensor([0], dtype=torch.int32))


# ---------------------------------------------------------------- moves

# Every entry of y is its own number, so that it tells from which row it came.
MOVES: dict[str, Callable[[Any], Any]] = {
    "to": lambda t: t.to(torch.float64),
    "to keyword": lambda t: t.to(dtype=torch.int16, copy=True),
    "cpu": lambda t: t.cpu(),
    "long": lambda t: t.long(),
    "float": lambda t: t.float(),
    "contiguous": lambda t: t.contiguous(),
    "detach": lambda t: t.detach(),
    "clone": lambda t: t.clone(),
    "view": lambda t: t.view(-1),
    "view size": lambda t: t.view(torch.Size((4, 6))),
    "view splits": lambda t: t.view(8, 3),
    "reshape": lambda t: t.reshape(4, 6),
    "reshape tuple": lambda t: t.reshape((12, 2)),
    "flatten": lambda t: t.flatten(),
    "flatten inner": lambda t: t.flatten(1),
    "flatten first": lambda t: t.flatten(0, 1),
    "squeeze": lambda t: t.unsqueeze(1).squeeze(),
    "squeeze dim": lambda t: t.unsqueeze(2).squeeze(2),
    "unsqueeze": lambda t: t.unsqueeze(-1),
    "torch.reshape": lambda t: torch.reshape(t, (4, 6)),
    "torch.flatten": lambda t: torch.flatten(t, start_dim=1),
    "torch.flatten keyword": lambda t: torch.flatten(input=t),
    "torch.squeeze": lambda t: torch.squeeze(torch.unsqueeze(t, 1)),
    "torch.clone": lambda t: torch.clone(torch.detach(t)),
    "slice": lambda t: t[1:3],
    "negative slice": lambda t: t[:-1],
    "step": lambda t: t[::2],
    "nothing": lambda t: t[:0],
    "mask": lambda t: t[torch.tensor([True, False, True, True])],
    "mask of all entries": lambda t: t[torch.arange(24).view(4, 2, 3) % 5 == 0],
    "index tensor": lambda t: t[torch.tensor([3, 0, 0])],
    "index list": lambda t: t[[2, 1]],
    "tuple of slices": lambda t: t[1:, 1],
    "ellipsis": lambda t: t[..., 1:],
    "none left": lambda t: t[..., :0],
    "ellipsis and number": lambda t: t[..., 0],
    "all": lambda t: t[...],
    "rows and columns": lambda t: t[[0, 2], 1],
    "columns": lambda t: t[:, [1, 0], 2],
    "new axis inside": lambda t: t[:, None],
    "shifted": lambda t: t[:, 1, 1:].contiguous().view(-1),
}


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("name", MOVES)
def test_moves_act_on_both_halves_and_lam_follows(name, per_example):
    y = torch.arange(24).view(4, 2, 3)
    lam = torch.tensor([0.1, 0.2, 0.3, 0.4]) if per_example else 0.7
    target = MixedTarget(y, y + 100, lam)
    moved = MOVES[name](target)
    assert type(moved) is MixedTarget
    for half, plain in ((moved.y, y), (moved.y_partner, y + 100)):
        expected = MOVES[name](plain)
        assert half.dtype == expected.dtype
        assert torch.equal(half, expected)
    assert (moved.shape, moved.ndim, moved.dtype) == (moved.y.shape, moved.y.ndim, moved.y.dtype)
    assert (moved.size(), moved.size(0), moved.dim(), moved.numel()) == (
        moved.y.size(),
        *moved.y.shape[:1],
        moved.y.dim(),
        moved.y.numel(),
    )
    assert (torch.numel(moved), len(moved), moved.device) == (moved.y.numel(), len(moved.y), y.device)
    if not per_example:
        assert moved.lam == 0.7
    elif moved.numel():
        assert torch.equal(
            moved.lam, lam[moved.y.flatten(1)[:, 0].long() // 6] if moved.dim() > 1 else lam[moved.y // 6]
        )
    else:
        assert torch.equal(moved.lam, lam[: len(moved)])


def slices(size: int) -> st.SearchStrategy[slice]:
    return st.slices(size).filter(lambda s: s.step is None or s.step > 0)  # tensors have no negative steps


@given(data=st.data(), seed=SEEDS)
def test_any_index_keeps_every_lam_with_its_row(data, seed):
    """Row numbers by brute force: whatever index is accepted, each new row holds entries of one old row, its own."""
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    n = shape[0]
    numbers = st.integers(0, n - 1)
    first = data.draw(
        st.one_of(
            slices(n),
            st.just(...),
            st.lists(numbers, min_size=1, max_size=4),
            st.lists(numbers, min_size=1, max_size=4).map(torch.tensor),
            st.lists(st.booleans(), min_size=n, max_size=n).map(torch.tensor),
        )
    )
    rest = [data.draw(st.one_of(slices(k), st.integers(0, k - 1), st.just([0]), st.none())) for k in shape[1:]]
    index = (first, *rest) if first is not ... else (..., *rest[-1:])
    y, lam = torch.arange(math.prod(shape)).view(shape), torch.rand(n)
    expected = y[index]
    if not expected.dim():
        return
    try:
        moved = MixedTarget(y, -y, lam)[index]
    except MixedTargetMisuse:
        rows = (expected // (y.numel() // n)).flatten(1) if expected.dim() > 1 else expected[:, None]
        assert not rows.shape[1] or bool((rows != rows[:, :1]).any())
        return
    assert torch.equal(moved.y, expected)
    assert torch.equal(moved.y_partner, -expected)
    assert moved.lam.shape == moved.shape[:1]
    for own, row in zip(moved.lam.tolist(), moved.y.tolist(), strict=True):
        for entry in np.ravel(row).astype(int):
            assert own == float(lam[entry // (y.numel() // n)])


def test_moves_that_would_mix_up_lam_are_refused():
    y, lam = torch.arange(24).view(4, 6), torch.tensor([0.1, 0.2, 0.3, 0.4])
    moves = {
        "merge": lambda t: t.view(2, 12),
        "across": lambda t: t.reshape(3, 8),
        "new batch": lambda t: t.unsqueeze(0),
        "lost batch": lambda t: t[:1, :1].squeeze(),
        "transposing index": lambda t: t[None],
        "matrix of rows": lambda t: t[torch.tensor([[0, 1], [2, 3]])],
    }
    for name, move in moves.items():
        with pytest.raises(MixedTargetMisuse, match="different λ"):
            raise AssertionError(f"{name}: {move(mixed(y, lam))}")
        move(mixed(y, 0.3))  # with one λ there is nothing to mix up


def test_single_examples_are_refused():
    for index in (0, -1, (0,), (1, ...), torch.tensor(2), (..., 0), True, np.int64(1)):
        for lam in (0.3, torch.tensor([0.1, 0.2, 0.3])):
            with pytest.raises(MixedTargetMisuse, match=r"one example.*target\[i:i \+ 1\]"):
                mixed(torch.tensor([0, 1, 2]), lam)[index]
    for index in ((1, slice(None)), (..., 1, slice(None)), (..., 1, 1), (torch.tensor(1), 0)):
        with pytest.raises(MixedTargetMisuse, match="one example"):
            mixed(torch.zeros(3, 2))[index]
    with pytest.raises(IndexError):
        mixed(torch.tensor([0, 1, 2]))[[7]]


def test_lam_follows_to_the_device_and_keeps_its_dtype():
    y, lam = torch.tensor([0, 1, 2]), torch.tensor([0.1, 0.2, 0.3], dtype=F64)
    for target in (mixed(y, lam), MixedTarget({"a": y}, {"a": y}, lam)):
        moved = target.to("meta")
        assert (moved.device.type, moved.lam.device.type, moved.lam.dtype) == ("meta", "meta", F64)
        assert target.to(torch.float16).lam.dtype == F64
        assert target.float().lam.dtype == F64


def test_padding_as_language_models_do():
    y = torch.tensor([[1, 2], [3, 4]])
    for lam in (0.3, torch.tensor([0.1, 0.2])):
        padded = F.pad(mixed(y, lam), (0, 1), value=-100)
        assert padded.y.tolist() == [[1, 2, -100], [3, 4, -100]]
        assert padded.y_partner.tolist() == [[3, 4, -100], [1, 2, -100]]
        assert padded.lam is lam
        with pytest.raises(MixedTargetMisuse, match="rows"):
            F.pad(mixed(y, lam), (0, 0, 0, 2))


# ---------------------------------------------------------------- structures


class Boxes(NamedTuple):
    corners: Tensor
    labels: Tensor


@dataclasses.dataclass
class Spans:
    start: Tensor
    end: Tensor
    note: None = None


def structures() -> dict[str, tuple[Any, list[Any]]]:
    """A structure of labels 0..3, and how to get at its entries."""
    a, b = torch.tensor([0, 1, 2]), torch.tensor([[3.0], [2], [1]])
    return {
        "tuple": ((a, b), [0, 1]),
        "list": ([a, b], [0, -1]),
        "named tuple": (Boxes(b, a), [0, 1]),
        "dict": ({"x": a, 7: b}, ["x", 7]),
        "ordered": (OrderedDict(x=a, y=b), ["x", "y"]),
        "user dict": (UserDict(x=a, y=b), ["x", "y"]),
        "nested": ({"x": (a, {"y": b})}, ["x"]),
    }


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if hasattr(value, "values") else value
    return [tensor for part in parts for tensor in flat(part)]


def rolled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return partner_of(value)
    if isinstance(value, Boxes):
        return Boxes(*map(rolled, value))
    if hasattr(value, "items"):
        return type(value)({key: rolled(entry) for key, entry in value.items()})
    return type(value)(map(rolled, value))


@pytest.mark.parametrize("name", structures())
def test_structures(name):
    y, keys = structures()[name]
    target = MixedTarget(y, rolled(y), 0.3)
    rows = target.to(F64)[[2, 0]]
    assert type(rows.y) is type(y)
    for half, plain in ((rows.y, y), (rows.y_partner, rolled(y))):
        for got, expected in zip(flat(half), flat(plain), strict=True):
            assert torch.equal(got, expected[[2, 0]].to(F64))
    assert len(target) == len(y)
    assert target.device == torch.device("cpu")
    for key in keys:
        assert target[key].y is y[key]
        assert all(map(torch.equal, flat(target[key].y_partner), flat(rolled(y)[key])))

    def criterion(output: Tensor, y: Any) -> Tensor:
        return sum(((output - tensor) ** 2).sum() * i for i, tensor in enumerate(flat(y), 1))

    output = torch.randn(3)
    expected = 0.3 * criterion(output, y) + 0.7 * criterion(output, rolled(y))
    torch.testing.assert_close(target.loss(criterion, output), expected)
    lam = torch.tensor([0.1, 0.2, 0.3])
    assert torch.equal(MixedTarget(y, rolled(y), lam)[1:].lam, lam[1:])
    for use in (lambda: target.view(-1), lambda: target.shape, lambda: target.soft(4), lambda: target.accuracy(output)):
        with pytest.raises(MixedTargetMisuse, match=r"take one out first.*target\.loss"):
            use()


def test_structures_are_read_as_what_they_are():
    a, b = torch.tensor([0, 1, 2]), torch.tensor([2, 2, 1])
    one, two = MixedTarget((a, b), (b, a), 0.3)
    assert (one.y is a, one.y_partner is b, two.y is b, one.lam) == (True, True, True, 0.3)
    target = MixedTarget({"x": a, "y": b}, {"x": b, "y": a}, 0.3)
    assert (list(target), list(target.keys()), "x" in target, "z" in target) == (["x", "y"], ["x", "y"], True, False)
    assert [entry.y_partner is half for entry, half in zip(target.values(), (b, a), strict=True)] == [True, True]
    assert dict(**target)["y"].y is b
    assert dict(target.items())["x"].y is a
    with pytest.raises(KeyError):
        target["z"]
    assert MixedTarget(Boxes(a, b), Boxes(b, a), 0.3).labels.y_partner is a
    spans = MixedTarget(Spans(a, b), Spans(b, a), 0.3)
    assert (spans.end.y_partner is a, spans.note) == (True, None)
    assert not hasattr(mixed(a), "keys")


# ---------------------------------------------------------------- models that compute their own loss


class OwnLoss(nn.Module):
    """Token by token, as language models do it."""

    def __init__(self, shift: str, reduction: str = "mean") -> None:
        super().__init__()
        self.shift, self.reduction = shift, reduction
        self.tokens, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, ids: Tensor, labels: Any = None) -> Tensor:
        logits = self.head(self.tokens(ids))
        if self.shift == "slice":
            logits, labels = logits[..., :-1, :].reshape(-1, 11), labels[..., 1:].reshape(-1)
        elif self.shift == "pad":
            labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1).to(logits.device)
            logits = logits.float().view(-1, 11)
        else:
            logits, labels = logits.view(-1, 11), torch.flatten(labels).long()
        return F.cross_entropy(logits, labels, ignore_index=-100, reduction=self.reduction)


@pytest.mark.parametrize("shift", ["slice", "pad", "none"])
def test_a_model_that_computes_its_own_loss(shift):
    model, ids = OwnLoss(shift), torch.randint(11, (4, 5))
    y = ids.clone()
    y[0, 2], y[3, 4] = -100, -100
    loss = model(ids, labels=mixed(y, 0.3))
    expected = 0.3 * model(ids, labels=y) + 0.7 * model(ids, labels=partner_of(y))
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(*(torch.autograd.grad(t, model.parameters()) for t in (loss, expected)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_inside_a_compiled_model():
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    asked: list[int] = []
    model, ids = OwnLoss("pad"), torch.randint(11, (4, 5))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for lam in (0.3, 0.8, 0.1, 0.6, 1.0):
        torch.testing.assert_close(compiled(ids, mixed(ids, lam)), model(ids, mixed(ids, lam)))
    assert len(graphs) <= 3  # the first λ, any other, and λ = 1
    compiled(ids, mixed(ids, 0.7, ready=lambda: asked.append(1)))
    assert asked == [1]
    model = OwnLoss("pad", "none")
    target = mixed(ids, torch.rand(4))
    torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(ids, target), model(ids, target))


# ---------------------------------------------------------------- everything else is refused

Y = torch.tensor([0, 1, 2, 1])
LOGITS = torch.randn(4, 3)
MISUSES: dict[str, Callable[[MixedTarget], Any]] = {
    "hits": lambda t: LOGITS.argmax(1) == t,
    "hits, turned": lambda t: t == LOGITS.argmax(1),
    "misses": lambda t: LOGITS.argmax(1) != t,
    "eq": lambda t: LOGITS.argmax(1).eq(t),
    "torch.eq": lambda t: torch.eq(LOGITS.argmax(1), t),
    "is it None": lambda t: t == None,  # noqa: E711
    "less": lambda t: t < 2,
    "at least": lambda t: t >= 2,
    "negative": lambda t: -t,
    "invert": lambda t: ~t,
    "bool": lambda t: bool(t),
    "if": lambda t: 1 if t else 0,
    "float": lambda t: float(t),
    "int": lambda t: int(t),
    "list": lambda t: list(t),
    "unpack": lambda t: (lambda y_a, y_b, lam: None)(*t),
    "for": lambda t: [label for label in t],  # noqa: C416
    "reversed": lambda t: reversed(t),
    "in": lambda t: 1 in t,
    "assign rows": lambda t: t.__setitem__(slice(None), 0),
    "stack": lambda t: torch.stack([t]),
    "cat": lambda t: torch.cat([t, t]),
    "sum": lambda t: torch.sum(t),
    "where": lambda t: torch.where(t, 1, 0),
    "one_hot": lambda t: F.one_hot(t),
    "C++ loss": lambda t: torch.binary_cross_entropy_with_logits(LOGITS, t),
    "gather": lambda t: LOGITS.gather(1, t),
    "index": lambda t: LOGITS[t],
    "index assignment": lambda t: LOGITS.clone().__setitem__(t, 0.0),
    "index itself": lambda t: t[t],
    "in place": lambda t: LOGITS.clone().add_(t),
    "item": lambda t: t.item(),
    "sum method": lambda t: t.sum(),
    "float_power": lambda t: t.float_power(2),
    "numpy": lambda t: np.asarray(t),
    "numpy equal": lambda t: np.arange(4) == t,
    "numpy mean": lambda t: np.mean(t),
    "numpy method": lambda t: t.numpy(),
} | {
    f"{name}{', reflected' * turned}": (lambda t, f=f, turned=turned: f(LOGITS.sum(1), t) if turned else f(t, 2))
    for turned in (False, True)
    for name, f in {
        "add": lambda a, b: a + b,
        "subtract": lambda a, b: a - b,
        "multiply": lambda a, b: a * b,
        "matrix multiply": lambda a, b: a @ b,
        "divide": lambda a, b: a / b,
        "floor": lambda a, b: a // b,
        "remainder": lambda a, b: a % b,
        "power": lambda a, b: a**b,
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
        "shift": lambda a, b: a << b,
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("lam", [0.3, torch.tensor([0.1, 0.2, 0.3, 0.4])], ids=["batch", "example"])
@pytest.mark.parametrize("name", MISUSES)
def test_misuse_names_what_to_call(name, lam):
    with pytest.raises(MixedTargetMisuse) as caught:
        MISUSES[name](mixed(Y, lam))
    for hint in ("target.accuracy(logits)", "target.y ", "target.loss(", "target.soft("):
        assert hint in str(caught.value)


def test_the_error_is_what_callers_expect():
    for kind in (ManifoldMixupError, TypeError, AttributeError):
        with pytest.raises(kind):
            mixed(Y).item()


def test_protocols_see_an_ordinary_object():
    target = mixed(Y, 0.3, ready=lambda: None)
    assert not hasattr(target, "__cuda_array_interface__")
    assert not hasattr(target, "item")
    with pytest.raises(AttributeError) as caught:
        target.__dlpack__  # noqa: B018
    assert not isinstance(caught.value, MixedTargetMisuse)
    assert inspect.unwrap(target) is target
    assert ("y", Y) in [(name, value) for name, value in inspect.getmembers(target) if name == "y"]
    assert len({target, target}) == 1
    assert repr(target) == "MixedTarget(y=int64[4], y_partner=int64[4], lam=0.3)"
    pair = MixedTarget({"a": Y}, {"a": Y}, torch.rand(4))
    assert repr(pair) == "MixedTarget(y={'a': int64[4]}, y_partner={'a': int64[4]}, lam=<4 of them>)"
    assert MixedTarget.view.__doc__.startswith("As ``Tensor.view``")
    assert inspect.getdoc(MixedTarget.to)


def test_copies():
    def ready() -> None:
        return None

    target = mixed(Y, 0.3, ready=ready)
    shallow, deep, pickled = copy.copy(target), copy.deepcopy(target), pickle.loads(pickle.dumps(target))
    for twin in (shallow, deep, pickled):
        assert torch.equal(twin.y, Y)
        assert torch.equal(twin.y_partner, partner_of(Y))
        assert twin.lam == 0.3
    assert (shallow.y is Y, deep.y is Y) == (True, False)
    assert (shallow.ready, deep.ready, pickled.ready) == (ready, ready, None)
    assert target.ready is ready


# ---------------------------------------------------------------- what it may be made of


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: MixedTarget(Y, Y, 1.5), ValueError, "1.5"),
        (lambda: MixedTarget(Y, Y, -0.1), ValueError, "-0.1"),
        (lambda: MixedTarget(Y, Y, math.nan), ValueError, "nan"),
        (lambda: MixedTarget(Y, Y, torch.tensor([0.1, 0.2, 0.3, math.nan])), ValueError, "nan"),
        (lambda: MixedTarget(Y, Y, torch.tensor(0.5)), ValueError, "one λ per example"),
        (lambda: MixedTarget(Y, Y, torch.ones(4, dtype=torch.long)), ValueError, "int64"),
        (lambda: MixedTarget(Y, Y, torch.rand(3)), BatchMismatch, "3 values of λ for 4"),
        (lambda: MixedTarget(Y, Y[:3], 0.5), BatchMismatch, r"int64\[4\] and int64\[3\]"),
        (lambda: MixedTarget((Y, Y[:3]), (Y, Y[:3]), 0.5), BatchMismatch, "first dimension"),
        (lambda: MixedTarget(torch.tensor(1), torch.tensor(1), 0.5), BatchMismatch, "first dimension"),
        (lambda: MixedTarget({"a": Y}, {"b": Y}, 0.5), TypeError, "structure"),
        (lambda: MixedTarget((Y, Y), [Y, Y], 0.5), TypeError, "structure"),
        (lambda: MixedTarget([0, 1], [1, 0], 0.5), TypeError, r"y\[0\] is a int"),
        (lambda: MixedTarget({"a": (Y, "b")}, {"a": (Y, "b")}, 0.5), TypeError, r"y\['a'\]\[1\] is a str"),
        (lambda: MixedTarget(Spans(Y, 3), Spans(Y, 3), 0.5), TypeError, r"y\.end is a int"),
        (lambda: MixedTarget(Y.numpy(), Y.numpy(), 0.5), TypeError, "ndarray"),
        (lambda: MixedTarget(Y, Y.numpy(), 0.5), TypeError, "y_partner is a ndarray"),
        (lambda: MixedTarget((), (), 0.5), TypeError, "no tensor"),
    ],
)
def test_what_it_cannot_be_made_of(make, kind, words):
    with pytest.raises(kind, match=words):
        make()


def test_target_knows_nothing_of_networks():
    source = inspect.getsource(inspect.getmodule(MixedTarget))
    imported = set(re.findall(r"^from manifold_mixup\.(\w+) import", source, re.MULTILINE))
    assert imported == {"errors", "losses", "structure", "target_checks"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape", "rows"), [((16, 10), (16,)), ((4, 5, 7), (4, 7)), ((3, 6, 2, 2), (3, 2, 2))])
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum"}, {"reduction": "none"}, {"weight": None}, {"ignore_index": 2}], ids=str
)
def test_the_shared_softmax_changes_no_bit_of_the_cross_entropy(dtype, shape, rows, options):
    output, (y, partner) = torch.randn(shape).to(dtype).requires_grad_(), torch.randint(shape[1], (2, *rows))
    options = {**options, "weight": torch.rand(shape[1]).to(dtype)} if "weight" in options else options
    mixed = F.cross_entropy(output, MixedTarget(y, partner, 0.3), **options)
    apart = 0.3 * F.cross_entropy(output, y, **options) + 0.7 * F.cross_entropy(output, partner, **options)
    assert torch.equal(mixed, apart)
    if dtype == torch.float64:
        ours, theirs = (torch.autograd.grad(loss.sum(), output)[0] for loss in (mixed, apart))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_shared_softmax_is_as_precise_as_the_cross_entropy_under_autocast(dtype):
    output, (y, partner) = torch.randn(32, 10).to(dtype), torch.randint(10, (2, 32))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = F.cross_entropy(output, MixedTarget(y, partner, 0.3))
        apart = 0.3 * F.cross_entropy(output, y) + 0.7 * F.cross_entropy(output, partner)
    assert mixed.dtype == apart.dtype
    assert torch.equal(mixed, apart)


def test_a_mixed_cross_entropy_takes_one_softmax():
    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.__name__)
            return func(*args, **(kwargs or {}))

    y, partner = torch.randint(10, (2, 8))
    with Count():
        F.cross_entropy(torch.randn(8, 10), MixedTarget(y, partner, 0.3))
    assert sum("log_softmax" in name for name in calls) == 1
