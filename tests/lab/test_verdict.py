"""The rule by which our runs decide a claim, against intervals computed by hand with scipy."""

import math

import pytest
from scipy import stats

from manifold_mixup.lab.verdict import judge

BETTER = {0: 3.0, 1: 3.2, 2: 3.1}
WORSE = {0: 4.0, 1: 4.1, 2: 4.2}


def test_a_clear_difference_holds_on_the_claimed_side_and_not_on_the_other():
    assert judge("c", BETTER, WORSE, lower_is_better=True).outcome == "holds"
    assert judge("c", WORSE, BETTER, lower_is_better=True).outcome == "does not hold"
    assert judge("c", BETTER, WORSE, lower_is_better=False).outcome == "does not hold"
    assert judge("c", WORSE, BETTER, lower_is_better=False).outcome == "holds"


def test_the_reason_holds_the_interval_of_scipys_paired_t():
    found = judge("c", BETTER, WORSE, lower_is_better=True, digits=3)
    differences = [BETTER[s] - WORSE[s] for s in BETTER]
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert found.reason == f"{sum(differences) / 3:+.3f} [{low:+.3f}, {high:+.3f}], n = 3"


@pytest.mark.parametrize("shift", [0.9, 1.1])
def test_the_outcome_changes_where_scipys_p_value_passes_five_percent(shift):
    spread = [-1.0, 0.0, 1.0, 0.5]
    half = stats.t.ppf(0.975, 3) * stats.tstd(spread) / 2
    base = dict.fromkeys(range(4), 10.0)
    moved = {seed: 10 - shift * half - (value - 0.125) for seed, value in enumerate(spread)}
    p = stats.ttest_rel(list(moved.values()), list(base.values())).pvalue
    outcome = judge("c", moved, base, lower_is_better=True).outcome
    assert (outcome, p < 0.05) == (("holds", True) if shift > 1 else ("undecided", False))


@pytest.mark.parametrize(
    ("better", "than", "outcome", "why"),
    [
        ({}, WORSE, "not run", "one of them"),
        ({}, {}, "not run", "either"),
        ({0: 1.0}, {0: 2.0}, "undecided", "-1.00, one seed: no interval"),
        ({0: 1.0}, {1: 2.0}, "undecided", "no seed in common"),
        ({0: 1.0, 1: math.nan}, {0: 2.0, 1: 2.0}, "undecided", "a run diverged"),
        ({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0}, "undecided", "-1.00, n = 2, equal differences: no interval"),
    ],
)
def test_without_an_interval_nothing_is_decided(better, than, outcome, why):
    found = judge("c", better, than, lower_is_better=True)
    assert (found.outcome, why in found.reason) == (outcome, True)
