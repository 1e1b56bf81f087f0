"""From the runs of an experiment to its table and the sentences above it, every word by a rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from manifold_mixup.lab.measures.catalog import Metric, describe
from manifold_mixup.lab.report.collect import Experiment, Method
from manifold_mixup.lab.statistics import Difference, Summary, format_mean_sd, paired_difference, summary

__all__ = ["NOTHING", "Cell", "Finding", "Row", "findings", "listed", "number", "remarks", "table"]

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"
BOUND = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Cell:
    """One measure of one method.

    Attributes:
        value: Mean ± standard deviation.
        notes: What a reader must know about it: missing or diverged runs.
        difference: Mean difference to the first method, empty for the first method itself.
        interval: Its 95 % interval, empty where there is none.
        verdict: Why there is no interval, or that it holds 0.
        significant: Whether the interval leaves out 0.
    """

    value: str
    notes: tuple[str, ...] = ()
    difference: str = ""
    interval: str = ""
    verdict: str = ""
    significant: bool = False


@dataclass(frozen=True)
class Row:
    """One method of the table."""

    label: str
    n: int
    note: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Finding:
    """What one measure shows: its sentence starts with the title, and goes on with these parts."""

    title: str
    parts: tuple[str, ...]


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


def _called(label: str) -> str:
    """A label within a sentence: in quotes if it holds a comma, so that an enumeration stays readable."""
    return f"\N{LEFT DOUBLE QUOTATION MARK}{label}\N{RIGHT DOUBLE QUOTATION MARK}" if "," in label else label


def table(experiment: Experiment, names: Sequence[str], *, best: bool = False) -> list[Row]:
    """Methods x measures, each with its difference to the first method.

    Args:
        experiment: The runs.
        names: The measures, one per column.
        best: Whether to take the weights with the best validation score instead of the last ones.
    """
    first = experiment.methods[0]
    rows = []
    for method in experiment.methods:
        cells = tuple(_cell(method, None if method is first else first, name, best) for name in names)
        rows.append(Row(method.label, len(method.runs), _missing(experiment, method), cells))
    return rows


def _missing(experiment: Experiment, method: Method) -> str:
    # A failure knows the label of the recipe; two methods that share it are told apart by a suffix.
    base = method.record.label
    failed = [seed for seed in _failed_seeds(experiment, base) if seed not in method.runs]
    missing = [seed for seed in experiment.seeds if seed not in method.runs and seed not in failed]
    notes = [f"failed at {_seeds(failed)}"] if failed else []
    notes += [f"no run at {_seeds(missing)}"] if missing else []
    return "; ".join(notes)


def _failed_seeds(experiment: Experiment, label: str) -> list[int]:
    return sorted({failure.seed for failure in experiment.failures if failure.label == label})


def _seeds(seeds: Sequence[int]) -> str:
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {listed(seeds)}"


def _cell(method: Method, first: Method | None, name: str, best: bool) -> Cell:
    metric = describe(name)
    values = method.values(name, best=best)
    finite = [value for value in values.values() if math.isfinite(value)]
    lost = [seed for seed, value in values.items() if not math.isfinite(value)]
    notes = []
    if len(values) < len(method.runs):
        notes.append(f"measured in {len(values)} of {len(method.runs)} runs")
    if lost:
        notes.append(f"no finite number at {_seeds(lost)}" + (", left out of the mean" if finite else ""))
    shown = _mean_sd(summary(finite), metric) if finite else NOTHING
    if first is None or not values:
        return Cell(shown, tuple(notes))
    difference = paired_difference(values, first.values(name, best=best))
    text = number(difference.mean, metric.digits, sign=True) if math.isfinite(difference.mean) else ""
    interval = "" if difference.low is None else _interval(difference, metric)
    return Cell(shown, tuple(notes), text, interval, _verdict(difference), difference.significant)


def _mean_sd(found: Summary, metric: Metric) -> str:
    return format_mean_sd(found, metric.digits).replace("-", MINUS)


def _verdict(difference: Difference) -> str:
    if difference.n == 0:
        return "no common seed"
    if not math.isfinite(difference.mean):
        return "no difference: a run has no finite number"
    if difference.n == 1:
        return "one common seed, so no interval"
    if difference.low is None:
        return f"the same in all {difference.n} seeds, so no interval"
    return "" if difference.significant else "no significant difference"


def _interval(difference: Difference, metric: Metric) -> str:
    low, high = difference.low or 0.0, difference.high or 0.0
    return f"[{number(low, metric.digits, sign=True)}, {number(high, metric.digits, sign=True)}]"


def findings(experiment: Experiment, names: Sequence[str]) -> list[Finding]:
    """One sentence per measure: which methods are significantly lower or higher than the first, and which are not.

    Empty if there is a single method, or no method has two seeds in common with the first.
    """
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
                title += f" ({_called(first.label)} {_with_unit(mean, metric)})"
            found.append(Finding(title, _parts(compared, metric, name, first)))
    return found


def _parts(compared: Sequence[tuple[Method, Difference]], metric: Metric, name: str, first: Method) -> tuple[str, ...]:
    parts = []
    for word, chosen in (("lower", -1), ("higher", 1)):
        hits = [(m, d) for m, d in compared if d.significant and math.copysign(1, d.mean) == chosen]
        if hits:
            parts.append(f"{word} with {listed([_clause(m, metric, name, first) for m, _ in hits])}")
    even = [_called(method.label) for method, d in compared if not d.significant and d.low is not None]
    if len(even) == len(compared) > 1:
        return ("no significant difference with any other method",)
    without = [(_called(m.label), d.mean) for m, d in compared if d.low is None]
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
    return f"{_called(method.label)} ({_with_unit(summary([ours[seed] for seed in common]).mean, metric)})"


def _with_unit(value: float, metric: Metric) -> str:
    return number(value, metric.digits) + (f"{BOUND}{metric.unit}" if metric.unit else "")


def remarks(experiment: Experiment, names: Sequence[str]) -> list[str]:
    """What has to be known to read the table: how many seeds, what failed, how many comparisons were made."""
    first, *others = experiment.methods
    notes = []
    pairs = [paired_difference(m.values(name), first.values(name)) for m in others for name in names]
    intervals = sum(pair.low is not None for pair in pairs)
    if not others:
        notes.append(f"There is one method, {_called(first.label)}, so there is nothing to compare.")
    elif not any(pair.n > 1 for pair in pairs):
        notes.append(
            f"No method has two seeds in common with {_called(first.label)}: differences are shown without an "
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
            f"Every comparison is with {_called(first.label)}, seed by seed, by the 95{BOUND}% t interval of the mean "
            f"difference, not adjusted for the number of comparisons.{chance}"
        )
    short = [f"{_called(row.label)} ({row.note})" for row in table(experiment, []) if row.note]
    if short:
        notes.append(f"Not every method has every seed: {listed(short)}.")
    met = {method.record.label for method in experiment.methods}
    absent = dict.fromkeys(failure.label for failure in experiment.failures if failure.label not in met)
    for label in absent:
        notes.append(f"{_called(label)} has no finished run: it failed at {_seeds(_failed_seeds(experiment, label))}.")
    if experiment.repeated:
        notes.append(f"{experiment.repeated} repeated runs of the same method and seed were replaced by later ones.")
    return notes
