"""Every seed of every method, one figure for each measure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from manifold_mixup.lab.measures.catalog import describe
from manifold_mixup.lab.report.collect import Experiment
from manifold_mixup.lab.report.figures.style import (
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
from manifold_mixup.lab.statistics import format_mean_sd, summary

__all__ = ["seeds_figure", "seeds_plots"]


def seeds_plots(experiment: Experiment, names: Sequence[str]) -> list[Plot]:
    """A figure for each measure that any run has."""
    plots = []
    for name in names:
        metric = describe(name)
        said = []
        for method in experiment.methods:
            values = [value for value in method.values(name).values() if math.isfinite(value)]
            if values:
                said.append(f"{method.label} {format_mean_sd(summary(values), metric.digits)}")
        if said:
            unit = f" ({metric.unit})" if metric.unit else ""
            alt = f"{metric.title}{unit} of every run, mean and standard deviation: {', '.join(said)}."
            plots.append(Plot(f"seeds-{name.replace('_', '-')}", metric.title, seeds_figure(experiment, name), alt))
    return plots


def seeds_figure(experiment: Experiment, name: str) -> Figure:
    """One measure: a dot for every seed of every method, and a bar at each mean."""
    metric = describe(name)
    traces, labels = [], []
    for method in experiment.methods:
        values = {seed: value for seed, value in sorted(method.values(name).items()) if math.isfinite(value)}
        label, colour = wrapped(method.label), colour_of(method.index)
        labels.append(label)
        if not values:
            continue
        traces += [
            scatter(
                **of_method(method.label, method.index),
                x=list(values.values()),
                y=[label] * len(values),
                text=[f"seed {seed}" for seed in values],
                marker={"size": 9, "opacity": 0.65, "color": colour, "line": {"width": 0}},
                hovertemplate="%{text}: %{x:.4g}<extra></extra>",
            ),
            scatter(
                **of_method(method.label, method.index, first=False),
                x=[summary(values.values()).mean],
                y=[label],
                marker={"symbol": "line-ns", "size": 22, "line": {"width": 3, "color": colour}},
                hovertemplate="mean %{x:.4g}<extra></extra>",
            ),
        ]
    title = f"{metric.title}, {metric.unit}" if metric.unit else metric.title
    frame = layout(
        height=84 + sum(18 * label.count("<br>") + 30 for label in labels),
        margin={"l": 8, "r": 16, "t": 8, "b": 8},
        xaxis={**axis(), "title": {"text": literal(title)}, "automargin": True, "nticks": 6},
        yaxis={
            **axis(),
            "type": "category",
            "categoryorder": "array",
            "categoryarray": labels,
            "range": [len(labels) - 0.5, -0.5],
            "automargin": True,
        },
    )
    return {"data": traces, "layout": frame}
