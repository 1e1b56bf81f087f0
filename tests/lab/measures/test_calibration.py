"""The temperature against searches over a grid and scipy's minimiser, and what it does to the numbers."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import brier_score_loss, log_loss

from lab.measures.subjects import Given, subject
from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.measures.calibration import compute, fit_temperature
from manifold_mixup.lab.measures.registry import MEASURES, always, measure
from manifold_mixup.lab.options import NoOptions


def overconfident(n=400, classes=5, scale=3.0, seed=0):
    """Logits that are ``scale`` times as large as those that the labels were drawn from."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    y = np.array([rng.choice(classes, p=p) for p in probabilities])
    return torch.tensor(logits * scale), torch.tensor(y)


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def nll(logits, y, temperature):
    return log_loss(y.numpy(), softmax(logits.numpy() / temperature), labels=range(logits.shape[1]))


@pytest.mark.parametrize("scale", [0.2, 1.0, 8.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_agrees_with_a_grid_and_with_scipys_minimiser(scale, classes):
    logits, y = overconfident(classes=classes, scale=scale)
    found = fit_temperature(logits, y)
    grid = np.exp(np.linspace(-5, 5, 2001))
    best = grid[np.argmin([torch.nn.functional.cross_entropy(logits / t, y).item() for t in grid])]
    assert found == pytest.approx(best, rel=0.006)  # a step of the grid is 0.5 %
    theirs = minimize_scalar(lambda t: nll(logits, y, math.exp(t)), bounds=(-5, 5), method="bounded")
    assert found == pytest.approx(math.exp(theirs.x), rel=1e-4)
    assert nll(logits, y, found) <= theirs.fun + 1e-12


def test_the_temperature_undoes_a_scale():
    logits, y = overconfident()
    assert fit_temperature(7 * logits, y) == pytest.approx(7 * fit_temperature(logits, y), rel=1e-8)
    assert fit_temperature(logits + 5, y) == pytest.approx(fit_temperature(logits, y), rel=1e-8)
    assert 2.5 < fit_temperature(logits, y) < 3.5


def test_all_right_is_at_the_lower_bound_and_worse_than_nothing_at_the_upper_one():
    right = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.1, 0.0]])
    assert fit_temperature(right, torch.tensor([0, 1])) == 0.01
    assert fit_temperature(right * 1000, torch.tensor([0, 1])) == 0.01
    assert fit_temperature(right, torch.tensor([2, 0])) == 100.0
    assert fit_temperature(right[:1], torch.tensor([0])) == 0.01  # a single example


def test_where_the_nll_does_not_depend_on_it_the_temperature_is_1():
    assert fit_temperature(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])) == 1.0
    assert fit_temperature(torch.eye(3) * 1e6, torch.arange(3)) == 1.0  # 0 for all temperatures allowed


def test_classes_that_are_ruled_out_do_not_disturb_unless_one_is_the_true_one():
    logits, y = overconfident(classes=4)
    more = torch.cat([logits, torch.full((len(logits), 2), -math.inf)], dim=1)
    assert fit_temperature(more, y) == pytest.approx(fit_temperature(logits, y), rel=1e-9)
    assert math.isnan(fit_temperature(more, torch.full_like(y, 5)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_temperature_mends_logits_that_are_no_numbers(bad):
    logits, y = overconfident(n=20)
    logits[3, 1] = bad
    assert math.isnan(fit_temperature(logits, y))
    task = subject(Given(), validation=(logits, y), test=overconfident(n=20, seed=1))
    assert all(math.isnan(value) for value in compute(task, NoOptions()).values())
    assert set(measure(task, [(MEASURES["calibration"], NoOptions())]).values()) == {None}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_of_any_floating_type(dtype):
    logits, y = overconfident()
    assert fit_temperature(logits.to(dtype), y) == fit_temperature(logits.to(dtype).double(), y)


def test_the_scaled_numbers_are_those_of_the_test_logits_divided_by_the_temperature():
    validation, test = overconfident(seed=1), overconfident(seed=2)
    task = subject(Given(), validation=validation, test=test)
    found = compute(task, NoOptions())
    temperature = found["temperature"]
    assert temperature == fit_temperature(*validation) != fit_temperature(*test)
    probabilities = softmax(test[0].numpy() / temperature)
    y = test[1].numpy()
    assert found["test_nll_scaled"] == pytest.approx(nll(*test, temperature), rel=1e-9)
    theirs = brier_score_loss(y, probabilities, labels=range(5), scale_by_half=False)
    assert found["test_brier_scaled"] == pytest.approx(theirs, rel=1e-9)
    before = MEASURES["classification"].compute(task, NoOptions())
    again = MEASURES["classification"].compute(subject(Given(), test=(test[0] / temperature, y)), NoOptions())
    for name in ("nll", "ece", "brier"):
        assert found[f"test_{name}_scaled"] == again[f"test_{name}"] < before[f"test_{name}"]
    assert again["test_error"] == before["test_error"]  # predictions stay


def test_without_a_validation_split_records_do_without_and_asking_for_it_is_an_error():
    data = overconfident(n=10)
    for parts in ({"test": data}, {"test": data, "validation": (data[0][:0], data[1][:0])}):
        task = subject(Given(), **parts)
        assert "calibration" not in [entry.name for entry, _ in always(task)]
        with pytest.raises(UsageError, match="measure 'calibration' needs a validation split"):
            measure(task, [(MEASURES["calibration"], NoOptions())])
    task = subject(Given(), test=data, validation=data)
    assert "calibration" in [entry.name for entry, _ in always(task)]


def test_every_number_has_words():
    task = subject(Given(), test=overconfident(n=10), validation=overconfident(n=10))
    found = compute(task, NoOptions())
    assert all(MEASURES["calibration"].describe(name).meaning for name in found)
    assert MEASURES["calibration"].describe("test_nll") is None
