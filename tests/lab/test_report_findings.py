"""The verdict of the page: in what each method is better or worse than the first, and which one is best."""

import statistics

import pytest
import scipy.stats

from lab.report_runs import experiment_of
from lab.reporting import page, run, runs
from manifold_mixup.lab.report.findings import better_when, verdict

SPACE, MINUS = "\N{NO-BREAK SPACE}", "\N{MINUS SIGN}"
FIRST = [3.0, 3.5, 4.0, 3.2]
NOISE = [0.05, -0.05, 0.02, 0.0]
RATIO = ("within_between_ratio",)


def shifted(by, noise=NOISE):
    return [value + by + extra for value, extra in zip(FIRST, noise, strict=True)]


def said(results, *names):
    """Title to parts of every finding."""
    return {finding.title: finding.parts for finding in verdict(experiment_of(results), names)}


def signed(value, digits):
    return f"{value:+.{digits}f}".replace("-", MINUS)


def difference(ours, theirs, digits, unit):
    """The words for a difference, by scipy's paired t interval."""
    low, high = scipy.stats.ttest_rel(ours, theirs).confidence_interval()
    mean = statistics.fmean(a - b for a, b in zip(ours, theirs, strict=True))
    return (
        f"({signed(mean, digits)}{SPACE * bool(unit)}{unit}, 95{SPACE}% interval {signed(low, digits)} to "
        f"{signed(high, digits)}, {len(ours)}{SPACE}seeds)"
    )


# ---------------------------------------------------------------- method by method


@pytest.mark.parametrize(
    ("name", "title", "digits", "unit", "better"),
    [
        ("test_error", "test error", 2, "points", -1),
        ("test_accuracy", "test accuracy", 1, "points", 1),
        ("margin", "margin", 3, "", 1),
        ("my_brier", "my_brier", 3, "", -1),
    ],
)
@pytest.mark.parametrize("side", [-1, 1])
def test_a_significant_difference_is_better_or_worse_with_its_size_and_interval(
    name, title, digits, unit, better, side
):
    theirs = shifted(side)
    found = said(runs("none", FIRST, name) + runs("other", theirs, name), name)
    word = "better" if side == better else "worse"
    assert found == {"other against none": (f"{word} in {title} {difference(theirs, FIRST, digits, unit)}",)}


@pytest.mark.parametrize(("side", "word"), [(-1, "lower"), (1, "higher")])
def test_a_measure_without_a_better_side_is_lower_or_higher(side, word):
    assert better_when("within_between_ratio") is None
    theirs = shifted(side)
    found = said(runs("none", FIRST, "within_between_ratio") + runs("a", theirs, "within_between_ratio"), *RATIO)
    assert found == {"a against none": (f"{word} in within / between {difference(theirs, FIRST, 3, '')}",)}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([3.1, 3.4, 4.1, 3.1], "no significant difference in test error"),
        ([2.0], f"one seed in common, so nothing can be said of its certainty: test error {MINUS}1.00{SPACE}points"),
        ([2.0, None, 3.0, 2.2], "no comparison in test error, where a run has no finite number"),
        ([None], "no comparison in test error, where a run has no finite number"),
        (
            [2.0, 2.5, 3.0, 2.2],
            "the same difference in every seed, so nothing can be said of its certainty: test error "
            f"{MINUS}1.00{SPACE}points",
        ),
        (
            FIRST,
            f"the same difference in every seed, so nothing can be said of its certainty: test error 0.00{SPACE}points",
        ),
    ],
)
def test_what_is_not_known_is_said_and_never_called_better(values, words):
    assert said(runs("none", FIRST) + runs("other", values), "test_error") == {"other against none": (words,)}


def test_without_a_common_seed_there_is_no_comparison():
    results = [run("none", 0), run("other", 1)]
    assert said(results, "test_error") == {
        "other against none": ("no seed in common, so there is no comparison",),
    }


def test_the_measures_of_a_method_are_grouped_by_what_they_show():
    names = {
        "test_error": (FIRST, shifted(-1)),
        "test_nll": (FIRST, shifted(-2)),
        "test_ece": (FIRST, shifted(1)),
        "within_between_ratio": (FIRST, shifted(-1)),
        "low_confidence_share": (FIRST, [3.1, 3.4, 4.1, 3.1]),
        "my_error": (FIRST, shifted(0, [0] * 4)),
        "margin": (FIRST, [None, *FIRST[1:]]),
    }
    results = [
        run(label, seed, {name: both[place][seed] for name, both in names.items()})
        for place, label in enumerate(("none", "other"))
        for seed in range(4)
    ]
    (parts,) = said(results, *names).values()
    starts = (
        "better in test error (",
        "worse in test ECE (",
        "lower in within / between (",
        "no significant difference in low confidence",
        "the same difference in every seed, so nothing can be said of its certainty: my_error 0.000",
        "no comparison in margin, where",
    )
    assert len(parts) == len(starts)
    for part, start in zip(parts, starts, strict=True):
        assert part.startswith(start)
    assert " and test NLL (" in parts[0]


# ---------------------------------------------------------------- the best of all


def three(a=FIRST, b=None, c=None, name="test_error"):
    return runs("none", a, name) + runs("b", b or shifted(-1), name) + runs("c", c or shifted(-0.9, NOISE[::-1]), name)


def test_the_best_method_is_named_with_those_that_it_stands_apart_from():
    b, c = shifted(-1), shifted(-0.99, [0.2, -0.2, 0.1, 0.0])
    assert scipy.stats.ttest_rel(b, c).pvalue > 0.05
    found = said(three(b=b, c=c), "test_error")
    assert list(found) == ["Lowest test error", "b against none", "c against none"]
    mean = f"{statistics.fmean(b):.2f}{SPACE}%"
    assert found["Lowest test error"] == (
        f"b, {mean} in the mean",
        "significantly so against none",
        "not told apart from c",
    )


def test_of_an_accuracy_the_highest_is_best_and_the_first_method_can_be_it():
    found = said(three(FIRST, shifted(-1), shifted(-2), "test_accuracy"), "within_between_ratio", "test_accuracy")
    mean = f"{statistics.fmean(FIRST):.1f}{SPACE}%"
    assert found["Highest test accuracy"] == (f"none, {mean} in the mean", "significantly so against b and c")


def test_nothing_is_apart_where_every_difference_is_the_same():
    found = said(three(b=[v - 1 for v in FIRST], c=[v - 0.5 for v in FIRST]), "test_error")
    assert found["Lowest test error"][1:] == ("not told apart from none and c",)


@pytest.mark.parametrize(
    "results",
    [
        runs("none", FIRST) + runs("b", shifted(-1)),
        runs("none", [3.0]) + runs("b", [2.0]) + runs("c", [1.0]),
        runs("none", FIRST) + runs("b", shifted(-1)) + [run("c", 9, {"test_error": 1.0})],
        runs("none", FIRST) + runs("b", [1.0, None, 1.0, 1.0]) + runs("c", shifted(-1)),
    ],
    ids=["two methods", "one seed", "no common seed", "diverged"],
)
def test_no_best_method_is_named_where_it_could_not_be_fair(results):
    assert not [title for title in said(results, "test_error") if "against" not in title]


def test_a_measure_without_a_better_side_has_no_best_method():
    results = three(name="within_between_ratio")
    assert not [title for title in said(results, *RATIO) if "against" not in title]


def test_the_best_method_is_found_and_judged_over_the_seeds_that_all_have():
    close = [5.0, 5.3, 5.1, 5.2, 5.1, 5.2]
    results = [*runs("none", [6.0, 7.0, 9.0, 9.0, 9.0, 9.0]), *runs("b", close), *runs("c", [6.0, 5.9])]
    # over all six seeds b is below none beyond chance: over the two that c has as well, it is not
    assert scipy.stats.ttest_rel(close, [6.0, 7.0, 9.0, 9.0, 9.0, 9.0]).pvalue < 0.05
    assert scipy.stats.ttest_rel(close[:2], [6.0, 7.0]).pvalue > 0.05
    best = said(results, "test_error")["Lowest test error"]
    assert best == (f"b, 5.15{SPACE}% in the mean", "not told apart from none and c")


# ---------------------------------------------------------------- on the page


def test_the_verdict_stands_on_the_page_with_the_comma_of_a_label_in_quotes(tmp_path):
    found = page(tmp_path, runs("none", FIRST) + runs("a, b", shifted(-1)) + runs("c", shifted(1, NOISE[::-1])))
    lists = [attrs.get("class") for tag, attrs in found.tags if tag == "ul"]
    assert lists[:1] == ["verdict"]
    mean = f"{statistics.fmean(shifted(-1)):.2f}"
    words = found.words
    assert f"Lowest test error: “a, b”, {mean} % in the mean; significantly so against none and c." in words
    assert "a, b against none: better in test error (" in words
    assert "c against none: worse in test error (" in words
    assert words.index("Verdict Lowest") < words.index("The same, measure by measure")


def test_one_method_has_no_verdict(tmp_path):
    found = page(tmp_path, runs("none", FIRST))
    assert said(runs("none", FIRST), "test_error") == {}
    assert "verdict" not in [attrs.get("class") for tag, attrs in found.tags if tag == "ul"]


def test_the_verdict_of_nothing_is_empty():
    experiment = experiment_of(runs("none", FIRST))
    experiment.methods.clear()
    assert verdict(experiment, ["test_error"]) == []
