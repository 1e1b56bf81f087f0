"""Means, spreads and paired intervals against numpy and scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from manifold_mixup.lab.statistics import Summary, format_mean_sd, paired_difference, summary


def test_summary_agrees_with_numpy():
    values = np.random.default_rng(0).normal(3, 2, size=7)
    found = summary(values)
    assert (found.n, found.mean, found.sd) == (7, pytest.approx(values.mean()), pytest.approx(values.std(ddof=1)))


def test_one_value_has_no_spread_and_none_is_refused():
    assert summary([2.5]) == Summary(1, 2.5, None)
    with pytest.raises(ValueError, match="no values"):
        summary([])


def test_equal_values_have_a_spread_of_exactly_zero():
    assert summary([0.1] * 5).sd == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_run_is_not_dropped_from_a_mean(bad):
    found = summary([1.0, bad, 3.0])
    assert found.n == 3
    assert not math.isfinite(found.mean)
    assert math.isnan(found.sd)


@pytest.mark.parametrize("n", [2, 3, 5, 20])
@pytest.mark.parametrize("shift", [0.0, 0.5, 5.0])
def test_paired_difference_agrees_with_scipy(n, shift):
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=n) + shift, rng.normal(size=n)
    found = paired_difference(dict(enumerate(a)), dict(enumerate(b)))
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval(0.95)
    assert found.n == n
    assert found.mean == pytest.approx((a - b).mean())
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert found.significant == bool(test.pvalue < 0.05)


def test_the_interval_covers_the_truth_19_times_in_20():
    rng = np.random.default_rng(1)
    trials = 2000
    misses = sum(
        paired_difference(dict(enumerate(row)), dict.fromkeys(range(5), 0.0)).significant
        for row in rng.normal(size=(trials, 5))
    )
    assert abs(misses / trials - 0.05) < 4 * math.sqrt(0.05 * 0.95 / trials)


def test_pairs_are_matched_by_seed_and_not_by_position():
    a, b = {3: 10.0, 1: 1.0, 2: 5.0, 9: 99.0}, {1: 0.5, 2: 4.0, 3: 9.25, 7: -99.0}
    found = paired_difference(a, b)
    test = stats.ttest_rel([1.0, 5.0, 10.0], [0.5, 4.0, 9.25])
    assert (found.n, found.mean) == (3, pytest.approx(0.75))
    assert found.low == pytest.approx(test.confidence_interval().low)


def test_without_two_common_seeds_there_is_no_interval():
    none, one = paired_difference({1: 1.0}, {2: 1.0}), paired_difference({1: 3.0}, {1: 1.0, 2: 5.0})
    assert none.n == 0
    assert math.isnan(none.mean)
    assert (one.n, one.mean, one.low, one.high, one.significant) == (1, 2.0, None, None, False)


@pytest.mark.parametrize("gap", [0.0, 0.1, -7.5])
def test_equal_differences_are_no_certainty(gap):
    b = {0: 92.3, 1: 91.7, 2: 95.1, 3: 90.2}
    found = paired_difference({seed: value + gap for seed, value in b.items()}, b)
    assert found.mean == pytest.approx(gap)
    assert (found.n, found.low, found.high, found.significant) == (4, None, None, False)


def test_a_small_but_real_spread_is_not_taken_for_rounding():
    b = {0: 0.0, 1: 1e-9, 2: 3e-9}
    found = paired_difference({0: 1e-9, 1: 3e-9, 2: 3.5e-9}, b)
    assert found.low is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_run_is_not_dropped_from_a_difference(bad):
    found = paired_difference({0: 1.0, 1: bad, 2: 2.0}, {0: 0.0, 1: 0.5, 2: 0.0})
    assert found.n == 3
    assert not math.isfinite(found.mean)
    assert (found.low, found.high, found.significant) == (None, None, False)


def test_format():
    assert format_mean_sd(summary([1.0, 2.0, 3.0])) == "2.00 ± 1.00"
    assert format_mean_sd(summary([1.2345]), digits=3) == "1.234"
    assert format_mean_sd(summary([1.0, math.nan])) == "nan ± nan"
