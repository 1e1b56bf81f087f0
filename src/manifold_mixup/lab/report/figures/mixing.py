"""What the mixing methods drew: how often each layer was mixed, and λ against its Beta distribution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from manifold_mixup.lab.report.collect import Experiment, Method
from manifold_mixup.lab.report.figures.kept import Floats, line_of, names_axis, sentences
from manifold_mixup.lab.report.figures.style import (
    SERIES,
    Figure,
    Plot,
    axis,
    colour_of,
    layout,
    literal,
    of_method,
    scatter,
    wrapped,
)

__all__ = ["Mixed", "deviation", "expected", "mixing_plots"]

LEAST = 5  # examples that a bin of the chi-square test should expect
NOT_MIXED = "not mixed"
ALPHA = "\N{GREEK SMALL LETTER ALPHA}"
PATTERNS = ("", "/", "x", "-")  # bars beyond the number of colours, as lines differ in their dashes


@dataclass(frozen=True)
class Mixed:
    """The counts of a method, all its seeds together.

    Attributes:
        method: The method.
        unit: ``"batches"`` or ``"examples"``.
        layers: How often each layer was mixed.
        unmixed: How often none was.
        lam: Counts of λ in equal bins of [0, 1], ``(bins,)``.
        alpha: λ was drawn from Beta(alpha, alpha); None if from no such distribution, or not always the same.
    """

    method: Method
    unit: str
    layers: dict[str, int]
    unmixed: int
    lam: Floats
    alpha: float | None

    @property
    def total(self) -> int:
        """How many batches, or examples."""
        return sum(self.layers.values()) + self.unmixed


def mixing_plots(experiment: Experiment) -> list[Plot]:
    """The share of each layer, and the histogram of λ; two of each where unlabelled examples were mixed as well."""
    found, unlabelled = _of(experiment, "mixing"), _of(experiment, "mixing_unlabelled")
    if not unlabelled:
        return found
    found = [replace(plot, title=f"{plot.title}, labelled examples") for plot in found]
    return found + [
        replace(plot, key=f"{plot.key}-unlabelled", title=f"{plot.title}, unlabelled examples") for plot in unlabelled
    ]


def _of(experiment: Experiment, key: str) -> list[Plot]:
    """The two figures of one of the logs in the records."""
    found = [mixed for method in experiment.methods if (mixed := _pooled(method, key)) is not None]
    layers = [mixed for mixed in found if mixed.total]
    drawn = [mixed for mixed in found if mixed.lam.sum()]
    return [*([_layers(layers)] if layers else []), *([_lam(drawn)] if drawn else [])]


def _pooled(method: Method, key: str) -> Mixed | None:
    found = [run.record.train.get(key) for run in method.runs.values()]
    logs = [log for log in found if isinstance(log, Mapping) and log.get("layers") is not None and log.get("lam")]
    logs = [log for log in logs if log.get("unit") == logs[0].get("unit") and len(log["lam"]) == len(logs[0]["lam"])]
    if not logs:
        return None
    layers: dict[str, int] = {}
    for log in logs:
        for name, count in log["layers"].items():
            layers[name] = layers.get(name, 0) + count
    lam: Floats = np.array([log["lam"] for log in logs], dtype=np.float64).sum(axis=0)
    unmixed = sum(log.get("unmixed", 0) for log in logs)
    return Mixed(method, str(logs[0].get("unit", "batches")), layers, unmixed, lam, _alpha(logs))


def _alpha(logs: Sequence[Mapping[str, Any]]) -> float | None:
    found = {log.get("alpha") for log in logs}
    alpha = found.pop() if len(found) == 1 else None
    return float(alpha) if isinstance(alpha, (int, float)) and 0 < alpha < math.inf else None


def _layers(found: Sequence[Mixed]) -> Plot:
    names = list(dict.fromkeys(name for mixed in found for name in mixed.layers))
    shown = [wrapped(name, 10) or "(whole)" for name in names]
    rest = any(mixed.unmixed for mixed in found)
    ticks = [*shown, *([NOT_MIXED] if rest else [])]
    traces = []
    for mixed in found:
        counts = [mixed.layers.get(name, 0) for name in names] + ([mixed.unmixed] if rest else [])
        traces.append(_bars(mixed, counts))
    frame = layout(
        height=300,
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        barmode="group",
        bargap=0.25,
        xaxis={**axis(), **names_axis(ticks), "range": [-0.5, len(ticks) - 0.5]},
        yaxis={
            **axis(),
            "title": {"text": "share, %"},
            "automargin": True,
            "nticks": 6,
            "rangemode": "tozero",
        },
    )
    words = []
    for mixed in found:
        parts = [f"{name} {100 * count / mixed.total:.1f} %" for name, count in mixed.layers.items()]
        parts += [f"{NOT_MIXED} {100 * mixed.unmixed / mixed.total:.1f} %"] if mixed.unmixed else []
        words.append(f"{mixed.method.label}, {mixed.total} {mixed.unit}: {', '.join(parts)}")
    units = " or ".join(dict.fromkeys(mixed.unit for mixed in found))
    note = f"Share of all {units} of training, all seeds together."
    return Plot(
        "mixed-layers", "Which layers were mixed", {"data": traces, "layout": frame}, f"{'. '.join(words)}.", note
    )


def _bars(mixed: Mixed, counts: Sequence[int]) -> Figure:
    method = mixed.method
    marker: Figure = {"color": colour_of(method.index)}
    if pattern := PATTERNS[method.index // SERIES % len(PATTERNS)]:
        marker["pattern"] = {"shape": pattern}
    return {
        "type": "bar",
        **of_method(method.label, method.index),
        "x": list(range(len(counts))),
        "y": [round(100 * count / mixed.total, 4) for count in counts],
        "text": [f"{count} {literal(mixed.unit)}" for count in counts],
        "textposition": "none",
        "marker": marker,
        "hovertemplate": "%{fullData.name}<br>%{x}: %{y:.1f} %, %{text}<extra></extra>",
    }


def expected(alpha: float, bins: int) -> Floats:
    """The probability of each of the equal bins of [0, 1] under Beta(alpha, alpha), exact also where α is below 1."""
    from scipy import stats

    shares: Floats = np.diff(stats.beta.cdf(np.linspace(0, 1, bins + 1), alpha, alpha))
    return shares


def deviation(mixed: Mixed) -> str:
    """How well the λ of a method fit their distribution, in a sentence's part; empty where that cannot be said.

    Pearson's chi-square test, with neighbouring bins joined until each expects five. The last bin is left out where
    there are unmixed batches, because a λ of exactly 1 may be among those.
    """
    from scipy import stats

    if mixed.alpha is None:
        return ""
    counts, shares = mixed.lam, expected(mixed.alpha, len(mixed.lam))
    if mixed.unmixed:
        counts, shares = counts[:-1], shares[:-1]
    if mixed.unit == "examples" and not (counts % 2).any():
        counts = counts / 2  # both examples of a pair were mixed with one λ: it is one draw
    n = counts.sum()
    if n == 0:
        return ""
    observed, wanted = _joined(counts, shares / shares.sum() * n)
    if len(observed) < 2:
        return ""
    p = float(stats.chi2.sf(((observed - wanted) ** 2 / wanted).sum(), len(observed) - 1))
    chance = "less than 1 in 1000" if p < 0.001 else f"{100 * p:.1f} %"
    return f"of samples drawn from Beta({mixed.alpha:g}, {mixed.alpha:g}), {chance} would be as far off or further"


def _joined(counts: Floats, wanted: Floats) -> tuple[Floats, Floats]:
    """Neighbouring bins joined, from the left, until each expects at least :data:`LEAST`."""
    observed, sums = [0.0], [0.0]
    for count, share in zip(counts.tolist(), wanted.tolist(), strict=True):
        if sums[-1] >= LEAST:
            observed.append(0.0)
            sums.append(0.0)
        observed[-1] += count
        sums[-1] += share
    if len(sums) > 1 and sums[-1] < LEAST:
        last, few = observed.pop(), sums.pop()
        observed[-1] += last
        sums[-1] += few
    return np.array(observed), np.array(sums)


def _lam(found: Sequence[Mixed]) -> Plot:
    lines, dotted, words = [], [], []
    for mixed in found:
        bins = len(mixed.lam)
        lines.append(_steps(mixed, mixed.lam / mixed.lam.sum() * bins, mixed.lam))
        text = f"{mixed.method.label}: {int(mixed.lam.sum())} {mixed.unit}"
        if mixed.alpha is not None:
            dotted.append(_steps(mixed, expected(mixed.alpha, bins) * bins))
            part = deviation(mixed)
            text += f", {ALPHA} = {mixed.alpha:g}" + (f"; {part} (chi-square test)" if part else "")
        words.append(text)
    frame = layout(
        height=300,
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        xaxis={**axis(), "title": {"text": "λ"}, "automargin": True, "nticks": 6, "range": [-0.01, 1.01]},
        yaxis={
            **axis(),
            "title": {"text": "density"},
            "automargin": True,
            "nticks": 6,
            "rangemode": "tozero",
        },
    )
    note = sentences(
        "All seeds together.",
        f"Dotted: what Beta({ALPHA}, {ALPHA}) puts into each bin on average." if dotted else "",
    )
    return Plot(
        "lambda", "λ as it was drawn", {"data": [*dotted, *lines], "layout": frame}, f"{'. '.join(words)}.", note
    )


def _steps(mixed: Mixed, density: Floats, counts: Floats | None = None) -> Figure:
    """A histogram's outline; the expected one if there are no counts."""
    method = mixed.method
    line = line_of(method) if counts is not None else {**line_of(method, width=1.5), "dash": "dot"}
    heights = density.tolist()
    edges = np.linspace(0, 1, len(heights) + 1)
    ranges = [f"{low:.2f} to {high:.2f}" for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]
    if counts is not None:
        ranges = [f"{text}: {int(n)} {literal(mixed.unit)}" for text, n in zip(ranges, counts.tolist(), strict=True)]
    return scatter(
        **of_method(method.label, method.index, first=counts is not None),
        mode="lines",
        x=[round(edge, 6) for edge in edges.tolist()],
        y=[*heights, heights[-1]],
        text=[*ranges, ranges[-1]],
        line={**line, "shape": "hv"},
        hovertemplate="%{fullData.name}<br>λ %{text}, density %{y:.3~f}"
        f"{' expected' if counts is None else ''}<extra></extra>",
    )
