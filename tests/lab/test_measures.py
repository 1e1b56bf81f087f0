"""Error, likelihood and calibration against implementations of their own."""

import math
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss
from torch import nn

from lab.measures.subjects import PIXELS, Given, convolutional, images, left_alone, subject
from manifold_mixup.lab.errors import LabError, MissingExtra
from manifold_mixup.lab.measures import classification, evaluate
from manifold_mixup.lab.measures.catalog import MAIN, OWN, describe
from manifold_mixup.lab.measures.classification import brier_score, calibration_error, label_ranks
from manifold_mixup.lab.measures.inference import evaluation_mode
from manifold_mixup.lab.measures.registry import MEASURES, always, measure
from manifold_mixup.lab.options import NoOptions


def measured(logits, y, **options):
    return evaluate(Given(), torch.as_tensor(logits), torch.as_tensor(y), **options)


def classified(**parts):
    return classification.compute(subject(Given(), **parts), NoOptions())


def ece_by_hand(probabilities, y, bins=15):
    """The definition, bin by bin, in plain Python."""
    total = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        inside = [i for i, p in enumerate(probabilities) if low <= p.max() < high or (b == bins - 1 and p.max() == 1)]
        if inside:
            confidence = sum(probabilities[i].max() for i in inside) / len(inside)
            accuracy = sum(probabilities[i].argmax() == y[i] for i in inside) / len(inside)
            total += abs(confidence - accuracy) * len(inside) / len(y)
    return 100 * total


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_agrees_with_numpy_and_sklearn(classes, scale):
    rng = np.random.default_rng(classes)
    logits = rng.normal(size=(400, classes)) * scale
    y = rng.integers(classes, size=400)
    found = measured(logits, y)
    probabilities = softmax(logits)
    assert found["test_error"] == pytest.approx(100 * (1 - accuracy_score(y, probabilities.argmax(axis=1))))
    assert found["test_nll"] == pytest.approx(log_loss(y, probabilities, labels=range(classes)), rel=1e-9)
    assert found["test_ece"] == pytest.approx(ece_by_hand(probabilities, y), abs=1e-3)


def test_ece_with_empty_bins_and_accuracy_that_falls_with_confidence():
    # 10 predictions at 0.55, all right, 10 at 0.95, all wrong; every other bin is empty.
    # Sorting accuracies and confidences separately would pair 0.95 with "right" and report 0.30 instead of 0.70.
    logits = torch.tensor([[0.55, 0.45]] * 10 + [[0.95, 0.05]] * 10, dtype=torch.float64).log()
    y = torch.tensor([0] * 10 + [1] * 10)
    found = measured(logits, y)
    assert found["test_ece"] == pytest.approx(100 * (0.5 * 0.45 + 0.5 * 0.95), abs=1e-4)
    assert found["test_error"] == 50.0


def test_logits_between_zero_and_one_are_logits_all_the_same():
    logits, y = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1])
    assert measured(logits, y)["test_ece"] == pytest.approx(100 * (1 - softmax(logits).max(axis=1).mean()), abs=1e-4)


def drawn(seed, n=150):
    """Logits of a random scale, from hardly sure to sure beyond float32, and labels that agree with some of them."""
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 12))
    logits = rng.normal(size=(n, classes)) * 10 ** rng.uniform(-1, 1.5)
    y = np.where(rng.random(n) < rng.random(), logits.argmax(axis=1), rng.integers(classes, size=n))
    return logits, y


def test_ece_of_200_networks_is_the_definition_and_not_the_one_with_bins_sorted_apart():
    sorted_apart = 0
    for seed in range(200):
        logits, y = drawn(seed)
        probabilities = softmax(logits)
        expected = ece_by_hand(probabilities, y)
        assert 100 * calibration_error(torch.tensor(logits), torch.tensor(y)) == pytest.approx(expected, abs=1e-3)
        # a peer's fault: accuracies and confidences of the bins are sorted on their own before they are subtracted
        bins = np.minimum((probabilities.max(axis=1) * 15).astype(int), 14)
        used = [bins == b for b in range(15) if (bins == b).any()]
        shares = np.array([inside.mean() for inside in used])
        right = probabilities.argmax(axis=1) == y
        accuracies = np.sort([right[inside].mean() for inside in used])
        confidences = np.sort([probabilities.max(axis=1)[inside].mean() for inside in used])
        sorted_apart += abs(100 * (np.abs(accuracies - confidences) * shares).sum() - expected) > 0.1
    assert sorted_apart > 20


@pytest.mark.parametrize("sure", [1.0, 1 - 1e-9])
def test_a_confidence_of_one_is_in_the_last_bin_with_those_just_below(sure):
    # 10 at 0.95, all right, 10 at 1, all wrong, are one bin of confidence 0.975 and accuracy 0.5. A bin of its own for
    # the confidence 1, torchmetrics' 16th, would make it 0.525.
    probabilities = torch.tensor([[0.95, 0.05]] * 10 + [[sure, 1 - sure]] * 10, dtype=torch.float64)
    found = calibration_error(probabilities.log(), torch.tensor([0] * 10 + [1] * 10))
    assert found == pytest.approx(0.475, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_brier_score_agrees_with_loops_and_sklearn(seed):
    logits, y = drawn(seed)
    probabilities = softmax(logits)
    classes = logits.shape[1]
    by_hand = sum(
        (row[c] - (c == label)) ** 2 for row, label in zip(probabilities, y, strict=True) for c in range(classes)
    )
    found = brier_score(torch.tensor(logits), torch.tensor(y))
    assert found == pytest.approx(by_hand / len(y), rel=1e-9)
    theirs = brier_score_loss(y, probabilities, labels=range(classes), scale_by_half=False)
    assert found == pytest.approx(theirs, rel=1e-9)
    assert classified(test=(logits, y))["test_brier"] == found


def test_brier_score_of_known_predictions_runs_from_0_to_2():
    sure = torch.eye(3, dtype=torch.float64) * 1000
    assert brier_score(sure, torch.arange(3)) == 0.0
    assert brier_score(sure, torch.tensor([1, 2, 0])) == 2.0
    assert brier_score(torch.zeros(4, 2), torch.tensor([0, 1, 1, 0])) == 0.5  # twice the square of one half


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_agrees_with_torchmetrics(k):
    from torchmetrics.functional.classification import multiclass_accuracy

    logits, y = torch.randn(300, 9, dtype=torch.float64), torch.randint(9, (300,))
    theirs = multiclass_accuracy(logits.softmax(dim=1), y, num_classes=9, top_k=k, average="micro")
    assert (label_ranks(logits, y) < k).double().mean().item() == pytest.approx(theirs.item(), abs=1e-6)
    if k == 5:
        assert classified(test=(logits, y))["test_top5_error"] == pytest.approx(100 - 100 * theirs.item(), abs=1e-4)


def test_equal_logits_rank_by_class_and_the_first_of_them_is_predicted():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(3, (400, 7), generator=generator).double()
    y = torch.randint(7, (400,), generator=generator)
    rows = zip(logits.tolist(), y.tolist(), strict=True)
    by_hand = [sorted(range(7), key=lambda c: (-row[c], c)).index(label) for row, label in rows]
    assert label_ranks(logits, y).tolist() == by_hand
    found = classified(test=(logits, y))
    assert found["test_error"] == pytest.approx(100 * sum(rank > 0 for rank in by_hand) / 400)
    assert found["test_top5_error"] == pytest.approx(100 * sum(rank > 4 for rank in by_hand) / 400)


def test_a_constant_prediction_is_class_0_and_its_top_5_are_the_first_five():
    found = classified(test=(torch.zeros(20, 10), torch.arange(20) % 10))
    assert found["test_error"] == 90.0
    assert found["test_top5_error"] == 50.0
    assert found["test_nll"] == pytest.approx(math.log(10))
    assert found["test_ece"] == pytest.approx(0.0, abs=1e-5)  # a tenth is right, and it says so
    assert found["test_brier"] == pytest.approx(0.9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_of_any_floating_type_are_measured_in_float64(dtype):
    logits, y = torch.randn(60, 8).to(dtype), torch.randint(8, (60,))
    assert classified(test=(logits, y)) == classified(test=(logits.double(), y))
    assert measured(logits, y) == measured(logits.double(), y)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_whole_type(dtype):
    logits, y = torch.randn(60, 8), torch.randint(8, (60,))
    assert measured(logits, y.to(dtype)) == measured(logits, y)


def test_a_class_that_no_example_has_and_a_single_example():
    logits, y = torch.randn(50, 6).double(), torch.arange(50) % 5
    found = classified(test=(logits, y))
    assert found["test_nll"] == pytest.approx(log_loss(y, softmax(logits.numpy()), labels=range(6)), rel=1e-9)
    assert found["test_ece"] == pytest.approx(ece_by_hand(softmax(logits.numpy()), y.numpy()), abs=1e-3)
    one = classified(test=(torch.tensor([[0.0, 3.0]]), torch.tensor([1])))
    top = 1 / (1 + math.exp(-3))
    expected = {"error": 0, "nll": -math.log(top), "ece": 100 * (1 - top), "brier": 2 * (1 - top) ** 2}
    assert one == pytest.approx({f"test_{name}": value for name, value in expected.items()}, abs=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_probabilities_is_in_no_top_5_and_has_no_brier_score(bad):
    logits = torch.zeros(2, 6)
    logits[0, 0] = bad
    found = classified(test=(logits, torch.tensor([0, 0])))
    assert found["test_error"] == found["test_top5_error"] == 50.0
    assert all(math.isnan(found[f"test_{name}"]) for name in ("nll", "ece", "brier"))
    assert measure(subject(Given(), test=(logits, [0, 0])), [(MEASURES["classification"], NoOptions())]) == {
        "test_error": 50.0,
        "test_top5_error": 50.0,
        "test_nll": None,
        "test_ece": None,
        "test_brier": None,
    }


def test_every_split_with_examples_is_measured_and_training_by_its_first_ones(monkeypatch):
    monkeypatch.setattr(classification, "TRAIN_EXAMPLES", 10)
    x, y = torch.randn(40, 5), torch.arange(40) % 5  # of five classes all are in the top 5
    none = (torch.zeros(0, 5), torch.zeros(0))
    found = classified(test=(x[:30], y[:30]), validation=(x[30:], y[30:]), train=(x[3:], y[3:]))
    assert set(found) == {f"{p}_{n}" for p in ("test", "validation", "train") for n in ("error", "nll", "ece", "brier")}
    for part, rows in {"test": slice(30), "validation": slice(30, 40), "train": slice(3, 13)}.items():
        expected = measured(x[rows], y[rows], prefix=part)
        assert {name: found[name] for name in expected} == expected
    assert set(classified(test=(x, y), validation=none)) == {f"test_{n}" for n in ("error", "nll", "ece", "brier")}
    assert classified(test=none) == {}


def test_the_network_is_left_as_it_was_and_runs_once_over_each_split():
    model = convolutional(classes=7).train()
    task = subject(model, pixels=PIXELS, test=images(20, 7), validation=images(15, 7, seed=1))
    model.train()[1].eval()
    seen = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with left_alone(model):
        found = measure(task, always(task))
    handle.remove()
    assert sum(seen) == 35
    assert {"test_top5_error", "validation_nll", "temperature", "test_nll_scaled"} <= set(found)
    assert all(MEASURES["classification"].describe(n) or MEASURES["calibration"].describe(n) for n in found)


def test_certain_and_right_is_perfect():
    found = measured(torch.eye(4) * 1000, torch.arange(4))
    assert found == {"test_error": 0.0, "test_nll": 0.0, "test_ece": 0.0}


def test_batch_size_prefix_and_low_precision():
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3), torch.randn(37, 5), torch.randint(3, (37,))
    whole, parts = evaluate(model, x, y), evaluate(model, x, y, batch_size=4)
    assert parts == pytest.approx(whole, abs=1e-4)
    assert evaluate(model, x, y, prefix="best") == {k.replace("test", "best"): v for k, v in whole.items()}
    half = evaluate(model.to(torch.bfloat16), x.to(torch.bfloat16), y)
    assert half == pytest.approx(whole, rel=0.05, abs=0.1)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).train()
    model[1].eval()  # frozen by its owner
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.randn(10, 3), torch.randint(2, (10,))
    assert evaluate(model, x, y) == evaluate(model, x, y)  # dropout was off
    assert [m.training for m in model] == [True, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_modes_come_back_after_an_exception():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    model[1].eval()
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not model[0].training
        raise KeyError
    assert [model.training, model[0].training, model[1].training] == [True, True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_probabilities_is_wrong_and_nll_and_ece_are_nan(bad):
    found = measured(torch.tensor([[bad, 0.0], [0.0, 5.0]]), torch.tensor([0, 1]))
    assert found["test_error"] == 50.0
    assert math.isnan(found["test_nll"])
    assert math.isnan(found["test_ece"])


def test_minus_infinity_is_a_class_ruled_out():
    logits = torch.tensor([[-math.inf, 0.0]])
    assert measured(logits, torch.tensor([1])) == {"test_error": 0.0, "test_nll": 0.0, "test_ece": 0.0}
    wrong = measured(logits, torch.tensor([0]))
    assert wrong["test_nll"] == math.inf
    assert wrong["test_error"] == wrong["test_ece"] == 100.0


@pytest.mark.parametrize(
    ("logits", "y", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), "no rows"),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.long), "one class index per row"),
        (torch.zeros(3, 2), torch.zeros(3), "one class index per row"),
        (torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.long), "one class index per row"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), "2 classes"),
        (torch.zeros(3, 2), torch.tensor([0, 1, -1]), "from -1 to 1"),
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), "logits of shape"),
        (torch.zeros(3, 2, 2), torch.zeros(3, dtype=torch.long), "logits of shape"),
    ],
)
def test_bad_input_says_what_is_wrong(logits, y, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Given(), logits, y)


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="batch_size"):
        measured(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), batch_size=0)


def test_without_torchmetrics_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.classification", None)
    with pytest.raises(MissingExtra, match=r"manifold-mixup\[lab\]"):
        measured(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))


def test_a_torchmetrics_that_cannot_be_imported_is_one_clear_error(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torchmetrics":
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(LabError, match=r"nms does not exist.*reinstall torch and torchvision"):
        measured(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))


def test_every_known_measure_has_words_and_an_unknown_one_its_own_name():
    for name in (*MAIN, *OWN, "train_error", "validation_nll"):
        assert describe(name).meaning
        assert "_" not in describe(name).title
    assert describe("validation_nll").title == "validation NLL"
    assert MEASURES["classification"].describe("train_top5_error").title == "training top-5 error"
    assert MEASURES["classification"].describe("test_nll_scaled") is None
    assert describe("flips_of_a_coin").title == "flips_of_a_coin"
