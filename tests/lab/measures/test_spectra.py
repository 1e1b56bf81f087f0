"""Singular values class by class against numpy and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import nn

from lab.measures.subjects import PIXELS, Given, convolutional, images, left_alone, subject
from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.measures.registry import MEASURES
from manifold_mixup.lab.measures.spectra import SpectraOptions, compute, effective_rank, singular_values, spectra

NUMBERS = ("largest", "rest", "effective_rank", "rank")


def by_numpy(rows, scale_rows=None):
    """The four numbers of one matrix, by numpy's svd and matrix_rank and scipy's entropy."""
    rows = np.asarray(rows, dtype=np.float64)
    values = np.linalg.svd(rows, compute_uv=False)
    uncentred = values if scale_rows is None else np.linalg.svd(np.asarray(scale_rows, np.float64), compute_uv=False)
    least = uncentred.max() * max(rows.shape) * np.finfo(np.float32).eps
    return [values[0], values[1:].sum(), np.exp(entropy(values)), np.linalg.matrix_rank(rows, tol=least)]


def expected(states, y):
    states = np.asarray(states, dtype=np.float64)
    groups = [states[y == c] for c in np.unique(y)]
    centred = [(g - g.mean(axis=0), g) for g in groups if len(g) > 1]
    rows = {
        "svd_": np.mean([by_numpy(g) for g in groups], axis=0),
        "svd_centred_": np.mean([by_numpy(*pair) for pair in centred], axis=0),
        "svd_all_": by_numpy(states),
        "svd_all_centred_": by_numpy(states - states.mean(axis=0), states),
    }
    found = {f"{prefix}{n}": v for prefix, values in rows.items() for n, v in zip(NUMBERS, values, strict=True)}
    return {**found, "svd_classes": len(groups), "svd_centred_classes": len(centred)}


@pytest.mark.parametrize(("n", "features"), [(60, 5), (12, 30), (9, 9)])
def test_agrees_with_numpy_with_more_rows_and_with_more_features(n, features):
    rng = np.random.default_rng(n)
    states = (rng.normal(size=(n, features)) * rng.uniform(0.1, 2, size=features) + 3).astype(np.float32)
    y = rng.permutation(np.arange(n) % 4) * 2  # class 1, 3, 5 and so on are absent
    assert spectra(torch.from_numpy(states), torch.from_numpy(y)) == pytest.approx(expected(states, y), rel=1e-9)


def test_classes_on_lines_have_rank_two_uncentred_and_one_centred():
    g = torch.Generator().manual_seed(0)
    lines = [torch.randn(10, generator=g)[:, None] * torch.randn(6, generator=g) for _ in range(3)]
    states = torch.cat([line + torch.randn(6, generator=g) for line in lines])
    y = torch.arange(3).repeat_interleave(10)
    found = spectra(states, y)
    assert found["svd_rank"] == 2
    assert found["svd_centred_rank"] == 1
    assert found["svd_centred_effective_rank"] == pytest.approx(1, abs=1e-4)
    assert found["svd_centred_rest"] == pytest.approx(0, abs=1e-4)
    assert found["svd_all_rank"] == 6


def test_equal_rows_have_no_spread():
    # 0.1 and so on are no binary fractions, and 7 rows no power of two: what centring leaves is rounding.
    states = torch.tensor([[0.1, 0.7, -0.3]]).repeat(14, 1)
    found = spectra(states, torch.arange(14) % 2)
    assert [found[f"svd_centred_{n}"] for n in NUMBERS] == pytest.approx([0, 0, 0, 0], abs=1e-12)
    length = math.sqrt(7 * (0.01 + 0.49 + 0.09))
    assert [found[f"svd_{n}"] for n in NUMBERS] == pytest.approx([length, 0, 1, 1], abs=1e-6)


def test_rounding_of_single_precision_is_no_spread_either():
    states = 100 + 1e-5 * torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    assert states.std() > 0
    found = spectra(states, torch.zeros(20, dtype=torch.long))
    assert found["svd_centred_rank"] == found["svd_centred_effective_rank"] == 0
    assert 0 < found["svd_centred_largest"] < 1e-2


def test_states_of_zeros():
    found = spectra(torch.zeros(4, 3), torch.tensor([0, 0, 1, 1]))
    assert all(found[f"{p}{n}"] == 0 for p in ("svd_", "svd_centred_", "svd_all_", "svd_all_centred_") for n in NUMBERS)


def test_classes_of_one_example_are_left_out_of_the_centred_averages_and_counted():
    states, y = torch.randn(9, 4), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 5])
    found, without = spectra(states, y), spectra(states[:8], y[:8])
    assert (found["svd_classes"], found["svd_centred_classes"]) == (3, 2)
    for n in NUMBERS:
        assert found[f"svd_centred_{n}"] == without[f"svd_centred_{n}"]
    alone = float(states[8].double().norm())
    assert found["svd_largest"] == pytest.approx((2 * without["svd_largest"] + alone) / 3)
    only = spectra(states[:2], torch.tensor([0, 1]))
    assert only["svd_centred_classes"] == 0
    assert all(math.isnan(only[f"svd_centred_{n}"]) for n in NUMBERS)
    assert only["svd_rank"] == only["svd_effective_rank"] == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_state_that_is_no_number_makes_everything_it_enters_unknown(bad):
    states = torch.randn(8, 3)
    states[2, 1] = bad
    found = spectra(states, torch.arange(8) % 2)
    assert found.pop("svd_classes") == found.pop("svd_centred_classes") == 2
    assert all(math.isnan(value) for value in found.values())


def test_effective_rank_counts_equal_values():
    assert effective_rank(torch.full((5,), 0.3, dtype=torch.float64)) == pytest.approx(5)
    assert effective_rank(torch.tensor([2.0, 2.0, 0.0], dtype=torch.float64)) == pytest.approx(2)
    assert effective_rank(torch.tensor([7.0], dtype=torch.float64)) == 1
    assert effective_rank(torch.zeros(3)) == 0
    assert math.isnan(effective_rank(torch.tensor([1.0, math.nan])))


def test_small_values_survive_in_double_precision():
    # A product of the matrix with its transpose would lose everything below 1e-8 of the largest value.
    u, v = (torch.linalg.qr(torch.randn(n, 3, dtype=torch.float64)).Q for n in (40, 5))
    values = torch.tensor([1.0, 1e-6, 1e-11], dtype=torch.float64)
    found = singular_values(u * values @ v.T)
    torch.testing.assert_close(found[:3], values, rtol=1e-4, atol=0)


def test_the_first_hidden_layer_of_the_network_is_measured_unless_another_is_named():
    x, y = images(30)
    model = convolutional()
    task = subject(model, pixels=PIXELS, test=(x, y), train=images(12, seed=1))
    with pytest.raises(UsageError, match="spectra:layer=features"):
        compute(task, SpectraOptions())
    task.hidden = ["2", "4"]
    with torch.no_grad():
        states = model[:3](PIXELS.normalise(x)).mean(dim=(2, 3))
    assert compute(task, SpectraOptions()) == pytest.approx(expected(states.numpy(), y.numpy()), rel=1e-4)
    model.train()
    model[1].eval()
    with left_alone(model):
        train = compute(task, SpectraOptions(layer="0", reduce="flatten", split="train", per_class=3))
    assert train["svd_rank"] == 3  # three rows of 180 numbers
    assert train["svd_all_rank"] == 9


def test_every_number_has_words():
    found = spectra(torch.randn(6, 2), torch.arange(6) % 2)
    described = {name: MEASURES["spectra"].describe(name) for name in found}
    assert None not in described.values()
    assert len({metric.title for metric in described.values()}) == len(found)


def test_states_that_are_given_are_measured_as_they_are():
    x, y = torch.randn(20, 4), torch.arange(20) % 2
    task = subject(nn.Sequential(Given(), nn.Linear(4, 2)), test=(x, y))
    assert compute(task, SpectraOptions(layer="features")) == spectra(x, y)
