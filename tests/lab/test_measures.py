"""Error, NLL and calibration against implementations of their own."""

import math
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from manifold_mixup.lab.errors import LabError, MissingExtra
from manifold_mixup.lab.measures import evaluate
from manifold_mixup.lab.measures.catalog import MAIN, OWN, describe
from manifold_mixup.lab.measures.inference import evaluation_mode


class Given(nn.Module):
    """Returns its inputs as logits."""

    def forward(self, x):
        return x


def measured(logits, y, **options):
    return evaluate(Given(), torch.as_tensor(logits), torch.as_tensor(y), **options)


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
    assert describe("flips_of_a_coin").title == "flips_of_a_coin"
