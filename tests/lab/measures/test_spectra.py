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
from manifold_mixup.lab.measures.spectra import (
    KEPT,
    SpectraOptions,
    arrays,
    compute,
    effective_rank,
    singular_values,
    spectra,
    spectra_arrays,
)

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


def recomputed(kept):
    """The numbers of the spectra from the arrays alone, but for the numerical rank."""
    several = kept["examples"] > 1
    rows = {
        "svd_": (kept["by_class"], kept["effective_rank"]),
        "svd_centred_": (kept["by_class_centred"][several], kept["effective_rank_centred"][several]),
    }
    found = {"svd_classes": len(kept["classes"]), "svd_centred_classes": int(several.sum())}
    for prefix, (values, ranks) in rows.items():
        found[f"{prefix}largest"] = float(values[:, 0].mean())
        found[f"{prefix}rest"] = float(values[:, 1:].nansum(dim=1).mean())
        found[f"{prefix}effective_rank"] = float(ranks.mean())
    for prefix, values in (("svd_all_", kept["all"]), ("svd_all_centred_", kept["all_centred"])):
        found |= {f"{prefix}largest": float(values[0]), f"{prefix}rest": float(values[1:].sum())}
        found[f"{prefix}effective_rank"] = float(np.exp(entropy(values.numpy())))
    return found


@pytest.mark.parametrize(("n", "features"), [(60, 5), (12, 30), (41, 9)])
def test_the_averages_are_those_of_the_arrays(n, features):
    rng = np.random.default_rng(n)
    states = (rng.normal(size=(n, features)) * rng.uniform(0.1, 2, size=features) + 3).astype(np.float32)
    y = np.concatenate([[7], rng.permutation(np.arange(n - 1) % 3) * 2])  # classes 0, 2, 4 and one example of 7
    kept = spectra_arrays(torch.from_numpy(states), torch.from_numpy(y))
    numbers = spectra(torch.from_numpy(states), torch.from_numpy(y))
    assert recomputed(kept) == pytest.approx(
        {k: v for k, v in numbers.items() if not k.endswith("_rank") or "eff" in k}
    )
    assert kept["classes"].tolist() == [0, 2, 4, 7]
    assert kept["examples"].tolist() == [int((y == c).sum()) for c in (0, 2, 4, 7)]
    for i, c in enumerate((0, 2, 4, 7)):
        values = np.linalg.svd(states[y == c].astype(np.float64), compute_uv=False)
        row = kept["by_class"][i]
        assert row[: len(values)].tolist() == pytest.approx(values.tolist(), rel=1e-9)
        assert row[len(values) :].isnan().all()
        assert kept["effective_rank"][i].item() == pytest.approx(np.exp(entropy(values)))
    assert kept["by_class_centred"][3].isnan().all()
    assert kept["effective_rank_centred"].isnan().tolist() == [False, False, False, True]
    assert {name: value.dtype for name, value in kept.items() if value.dtype != torch.float64} == {
        "classes": torch.int64,
        "examples": torch.int64,
    }


def test_the_arrays_hold_the_first_512_values_and_the_rank_of_all_of_them():
    states = torch.randn(530, 520)
    kept = spectra_arrays(states, torch.zeros(530, dtype=torch.long))
    shapes = {name: tuple(kept[name].shape) for name in ("by_class", "by_class_centred", "all", "all_centred")}
    assert shapes == {"by_class": (1, 512), "by_class_centred": (1, 512), "all": (512,), "all_centred": (512,)}
    whole = singular_values(states)
    assert torch.equal(kept["by_class"][0], whole[:KEPT])
    assert kept["effective_rank"].item() == effective_rank(whole)
    assert kept["effective_rank"].item() > effective_rank(whole[:KEPT])


def test_arrays_of_a_state_that_is_no_number():
    states, y = torch.randn(8, 3), torch.arange(8) % 2
    states[2, 1] = math.nan
    kept = spectra_arrays(states, y)
    assert kept["by_class"].isnan().tolist() == [[True] * 3, [False] * 3]
    assert kept["effective_rank_centred"].isnan().tolist() == [True, False]
    assert kept["all"].isnan().all()


def test_arrays_and_numbers_share_one_pass_and_the_layer_is_named():
    model = convolutional()
    task = subject(model, pixels=PIXELS, test=images(30))
    with pytest.raises(UsageError, match="spectra:layer=features"):
        arrays(task, SpectraOptions())
    task.hidden = ["2", "4"]
    rows = []
    handle = model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    numbers, kept = compute(task, SpectraOptions()), arrays(task, SpectraOptions())
    assert sum(rows) == 30
    assert bytes(kept["layer"].tolist()).decode() == "2"
    assert recomputed({name: value for name, value in kept.items() if name != "layer"})["svd_rest"] == pytest.approx(
        numbers["svd_rest"]
    )
    other = arrays(task, SpectraOptions(layer="6"))
    handle.remove()
    assert bytes(other["layer"].tolist()).decode() == "6"
    assert not torch.equal(other["all"], kept["all"])
    again = task.on({"test": task.parts["test"]})
    assert torch.equal(arrays(again, SpectraOptions())["all"], kept["all"])
