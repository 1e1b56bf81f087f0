"""From the runs of an experiment to the sentences above its table, every word by a rule."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from manifold_mixup.lab.measures.catalog import Metric, describe
from manifold_mixup.lab.report.collect import Experiment, Method
from manifold_mixup.lab.statistics import Difference, paired_difference, summary

__all__ = ["Finding", "better_when", "called", "findings", "listed", "missing", "number", "remarks", "verdict"]

MINUS = "\N{MINUS SIGN}"
BOUND = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Finding:
    """What one measure, or one method, shows: a sentence that starts with the title and goes on with the parts."""

    title: str
    parts: tuple[str, ...]


def better_when(name: str) -> Literal["lower", "higher"] | None:
    """Which way a measure is better; None where that depends on what one wants."""
    if re.search(r"accuracy|(^|_)margin", name):
        return "higher"
    return "lower" if re.search(r"error|nll|ece|brier", name) else None


def number(value: float, digits: int, *, sign: bool = False) -> str:
    """A number for people, with a true minus sign; "not a number" for NaN."""
    if math.isnan(value):
        return "not a number"
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def listed(items: Sequence[object]) -> str:
    """Items joined as a person would: "a", "a and b", "a, b and c"."""
    words = [str(item) for item in items]
    return " and ".join(words) if len(words) < 3 else ", ".join(words[:-1]) + " and " + words[-1]


def called(label: str) -> str:
    """A label within a sentence: in quotes if it holds a comma, so that an enumeration stays readable."""
    return f"\N{LEFT DOUBLE QUOTATION MARK}{label}\N{RIGHT DOUBLE QUOTATION MARK}" if "," in label else label


def _seeds(seeds: Sequence[int]) -> str:
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {listed(seeds)}"


# ---------------------------------------------------------------- method by method


def verdict(experiment: Experiment, names: Sequence[str]) -> list[Finding]:
    """For every method but the first: in what it is better or worse than the first, by how much and how surely.

    Empty if there is a single method.
    """
    if not experiment.methods:
        return []
    first, *others = experiment.methods
    compared = [Finding(f"{method.label} against {first.label}", _compared(method, first, names)) for method in others]
    return [*_leader(experiment, names), *compared]


def _leader(experiment: Experiment, names: Sequence[str]) -> list[Finding]:
    """Which method is best in the mean of the first test measure that has a better side, and significantly so.

    Over the seeds that all methods have; nothing if that is fewer than two, or fewer than three methods.
    """
    name = next((n for n in names if n.startswith("test_") and better_when(n) is not None), None)
    if name is None or len(experiment.methods) < 3:
        return []
    values = {method.index: method.values(name) for method in experiment.methods}
    common = set.intersection(*(set(found) for found in values.values()))
    if len(common) < 2 or not all(math.isfinite(found[seed]) for found in values.values() for seed in common):
        return []
    sign = 1 if better_when(name) == "lower" else -1
    means = {index: summary([found[seed] for seed in common]).mean for index, found in values.items()}
    best = min(experiment.methods, key=lambda method: sign * means[method.index])
    apart: list[str] = []
    close: list[str] = []
    for method in experiment.methods:
        if method is not best:
            found = paired_difference(*({s: values[m.index][s] for s in common} for m in (best, method)))
            (apart if found.significant else close).append(called(method.label))
    metric = describe(name)
    parts = [f"{called(best.label)}, {_with_unit(means[best.index], metric)} in the mean"]
    parts += [f"significantly so against {listed(apart)}"] if apart else []
    parts += [f"not told apart from {listed(close)}"] if close else []
    word = "Lowest" if sign == 1 else "Highest"
    return [Finding(f"{word} {metric.title}", tuple(parts))]


def _compared(method: Method, first: Method, names: Sequence[str]) -> tuple[str, ...]:
    groups: dict[str, list[str]] = {}
    for name in names:
        metric, words = describe(name), describe(name).title
        found = paired_difference(method.values(name), first.values(name))
        if found.significant:
            way = "lower" if found.mean < 0 else "higher"
            if (better := better_when(name)) is not None:
                groups.setdefault("better" if way == better else "worse", []).append(
                    f"{words} ({_size(found, metric, sign=True)})"
                )
            else:
                groups.setdefault(way, []).append(f"{words} ({_size(found, metric, sign=True)})")
        elif found.low is not None:
            groups.setdefault("even", []).append(words)
        elif found.n == 1 and math.isfinite(found.mean):
            groups.setdefault("one", []).append(f"{words} {_with_unit(found.mean, metric, sign=True)}")
        elif found.n and not math.isfinite(found.mean):
            groups.setdefault("lost", []).append(words)
        elif found.n:
            groups.setdefault("same", []).append(f"{words} {_with_unit(found.mean, metric, sign=True)}")
    said = (
        ("better", "better in {}"),
        ("worse", "worse in {}"),
        ("lower", "lower in {}"),
        ("higher", "higher in {}"),
        ("even", "no significant difference in {}"),
        ("same", "the same difference in every seed, so nothing can be said of its certainty: {}"),
        ("one", "one seed in common, so nothing can be said of its certainty: {}"),
        ("lost", "no comparison in {}, where a run has no finite number"),
    )
    parts = tuple(text.format(listed(groups[key])) for key, text in said if key in groups)
    return parts or ("no seed in common, so there is no comparison",)


def _size(found: Difference, metric: Metric, *, sign: bool) -> str:
    """A difference with its interval and its number of seeds."""
    assert found.low is not None
    assert found.high is not None
    low, high = (number(end, metric.digits, sign=sign) for end in (found.low, found.high))
    return f"{_with_unit(found.mean, metric, sign=sign)}, 95{BOUND}% interval {low} to {high}, {found.n}{BOUND}seeds"


def _with_unit(value: float, metric: Metric, *, sign: bool = False) -> str:
    unit = {"%": "points"}.get(metric.unit, metric.unit) if sign else metric.unit  # a difference of percentages
    return number(value, metric.digits, sign=sign) + (f"{BOUND}{unit}" if unit else "")


# ---------------------------------------------------------------- measure by measure


def findings(experiment: Experiment, names: Sequence[str]) -> list[Finding]:
    """One sentence per measure: which methods are significantly lower or higher than the first, and which are not.

    Empty if there is a single method, or no method has two seeds in common with the first.
    """
    if not experiment.methods:
        return []
    first, *others = experiment.methods
    found = []
    for name in names:
        metric = describe(name)
        reference = first.values(name)
        compared = [(method, paired_difference(method.values(name), reference)) for method in others]
        compared = [(method, difference) for method, difference in compared if difference.n > 1]
        if compared:
            mean = summary(reference.values()).mean
            title = metric.title[0].upper() + metric.title[1:]
            if math.isfinite(mean):
                title += f" ({called(first.label)} {_with_unit(mean, metric)})"
            found.append(Finding(title, _parts(compared, metric, name, first)))
    return found


def _parts(compared: Sequence[tuple[Method, Difference]], metric: Metric, name: str, first: Method) -> tuple[str, ...]:
    parts = []
    for word, chosen in (("lower", -1), ("higher", 1)):
        hits = [(m, d) for m, d in compared if d.significant and math.copysign(1, d.mean) == chosen]
        if hits:
            parts.append(f"{word} with {listed([_clause(m, metric, name, first) for m, _ in hits])}")
    even = [called(method.label) for method, d in compared if not d.significant and d.low is not None]
    if len(even) == len(compared) > 1:
        return ("no significant difference with any other method",)
    without = [(called(m.label), d.mean) for m, d in compared if d.low is None]
    groups = (
        ("no significant difference", even),
        ("the same number in every seed", [label for label, mean in without if mean == 0]),
        (
            "the same difference in every seed, so no interval",
            [label for label, m in without if m and math.isfinite(m)],
        ),
        (
            "a run without a finite number, so no interval",
            [label for label, mean in without if not math.isfinite(mean)],
        ),
    )
    return (*parts, *(f"{words}: {listed(labels)}" for words, labels in groups if labels))


def _clause(method: Method, metric: Metric, name: str, first: Method) -> str:
    """``dropout (2.43 %)``: its mean over the seeds that the comparison is about."""
    ours = method.values(name)
    common = sorted(ours.keys() & first.values(name).keys())
    return f"{called(method.label)} ({_with_unit(summary([ours[seed] for seed in common]).mean, metric)})"


# ---------------------------------------------------------------- what has to be known


def missing(experiment: Experiment, method: Method) -> str:
    """Which seeds a method lacks, and why."""
    # A failure knows the label of the recipe; two methods that share it are told apart by a suffix.
    failed = [seed for seed in _failed(experiment, method.record.label) if seed not in method.runs]
    going = sorted({run.seed for run in method.going} - set(failed))
    absent = [seed for seed in experiment.seeds if seed not in {*method.runs, *failed, *going}]
    groups = (("failed at", failed), ("not finished at", going), ("no run at", absent))
    return "; ".join(f"{words} {_seeds(seeds)}" for words, seeds in groups if seeds)


def _failed(experiment: Experiment, label: str) -> list[int]:
    return sorted({failure.seed for failure in experiment.failures if failure.label == label})


def remarks(experiment: Experiment, names: Sequence[str]) -> list[str]:
    """What has to be known to read the table: how many seeds, what failed, how many comparisons were made."""
    if not experiment.methods:
        return ["No run is finished yet, so there are no numbers."]
    first, *others = experiment.methods
    notes = []
    pairs = [paired_difference(m.values(name), first.values(name)) for m in others for name in names]
    intervals = sum(pair.low is not None for pair in pairs)
    if not others:
        notes.append(f"There is one method, {called(first.label)}, so there is nothing to compare.")
    elif not any(pair.n > 1 for pair in pairs):
        notes.append(
            f"No method has two seeds in common with {called(first.label)}: differences are shown without an "
            "interval, and nothing can be called significant."
        )
    else:
        chance = (
            f" At 5{BOUND}% each, {intervals} comparisons of methods without any difference would show about "
            f"{0.05 * intervals:.1f} significant ones by chance."
            if intervals > 1
            else ""
        )
        notes.append(
            f"Every comparison is with {called(first.label)}, seed by seed, by the 95{BOUND}% t interval of the mean "
            f"difference, not adjusted for the number of comparisons.{chance}"
        )
    short = [f"{called(m.label)} ({note})" for m in experiment.methods if (note := missing(experiment, m))]
    if short:
        notes.append(f"Not every method has every seed: {listed(short)}.")
    met = {method.record.label for method in experiment.methods}
    absent = dict.fromkeys(failure.label for failure in experiment.failures if failure.label not in met)
    for label in absent:
        notes.append(f"{called(label)} has no finished run: it failed at {_seeds(_failed(experiment, label))}.")
    waiting = [called(method.label) for method in experiment.waiting if method.label not in absent]
    if waiting:
        notes.append(f"No finished run yet: {listed(waiting)}.")
    if experiment.repeated:
        notes.append(f"{experiment.repeated} repeated runs of the same method and seed were replaced by later ones.")
    return notes
