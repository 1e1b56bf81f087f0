"""Training and validation curves: the mean over the seeds, with a band of one standard deviation."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from manifold_mixup.lab.report.collect import Experiment, Method
from manifold_mixup.lab.report.figures.kept import Floats, band, line_of, log_axis, numbers, sentences, spread, thinned
from manifold_mixup.lab.report.figures.style import Figure, Plot, axis, layout, of_method, scatter

__all__ = ["curve_plots", "part_plots"]

POINTS = 400
RARE = 10  # lines of the log that are averaged where not every line has every number
FACTOR = 10  # a quantity that spans more than this is drawn on a logarithmic axis


@dataclass(frozen=True)
class _Quantity:
    """One number of the log's lines.

    Attributes:
        name: What the log calls it.
        key: Of its figure.
        title: Of its figure.
        unit: Empty if it has none.
        logarithmic: Whether its axis may be logarithmic.
        of_steps: Whether it is of the steps since the line before. Of a long curve a point is then the mean over
            several lines; and a line may lack it, because there was no such step.
    """

    name: str
    key: str
    title: str
    unit: str
    logarithmic: bool
    of_steps: bool


QUANTITIES = (
    _Quantity("train_loss", "training-loss", "Training loss", "", True, True),
    _Quantity("validation_error", "validation-error", "Validation error", "%", False, False),
    _Quantity("validation_nll", "validation-nll", "Validation NLL", "nats", True, False),
)
PARTS = (
    _Quantity("graph_loss", "graph-loss", "Loss of steps on the graph", "", True, True),
    _Quantity("labelled_loss", "labelled-loss", "Loss of labelled examples", "", True, True),
    _Quantity("unlabelled_loss", "unlabelled-loss", "Loss of unlabelled examples", "", True, True),
    _Quantity("unlabelled_weight", "unlabelled-weight", "Weight of unlabelled examples", "", False, True),
)


@dataclass(frozen=True)
class _Log:
    """What a method's runs have logged.

    Attributes:
        method: The method.
        seeds: For each seed its lines, by step.
        epochs: For each step at which any seed has a line the epoch; ascending, NaN where it is not said.
        kinds: Which numbers stand in one line together.
    """

    method: Method
    seeds: Sequence[Mapping[float, Mapping[str, Any]]]
    epochs: Mapping[float, float]
    kinds: Set[frozenset[str]]


@dataclass(frozen=True)
class _Curve:
    """A method's mean over its seeds.

    Attributes:
        method: The method.
        x: Epochs or steps, ascending, ``(n,)``.
        mean: NaN where a seed's number is not finite.
        sd: NaN below two seeds.
        count: How many seeds a mean is over.
        uneven: Whether some of its seeds have got further than others.
        window: How many steps a point is the mean of; 0 where points are lines of the log.
    """

    method: Method
    x: Floats
    mean: Floats
    sd: Floats
    count: npt.NDArray[np.intp]
    uneven: bool
    window: int


def curve_plots(experiment: Experiment) -> list[Plot]:
    """Training loss, validation error and validation NLL against epochs, or against steps.

    Steps are taken if no run made an epoch, and where an epoch is one of the labelled examples alone.

    A mean is over the seeds that have got as far, all at the same steps. Where some have not, at least two have to
    have. Runs that are not finished take part.
    """
    logs = _logs(experiment)
    epochs = [epoch for log in logs for epoch in log.epochs.values()]
    counted = bool(epochs) and all(map(math.isfinite, epochs)) and max(epochs) >= 1
    return _plots(experiment, QUANTITIES, logs, epochs=counted and experiment.tasks <= {"classification"})


def part_plots(experiment: Experiment) -> list[Plot]:
    """The parts of the loss of methods that look at unlabelled examples, against steps; none without such methods."""
    logs = _logs(experiment)
    if not any("unlabelled_loss" in kind for log in logs for kind in log.kinds):
        return []
    return _plots(experiment, PARTS, logs, epochs=False)


def _logs(experiment: Experiment) -> list[_Log]:
    """The logs of the methods that have any."""
    found = []
    for method in (*experiment.methods, *experiment.waiting):
        seeds = [
            {step: line for line in log if math.isfinite(step := _value(line, "step"))}
            for log in method.logs().values()
        ]
        if seeds:
            epochs = {step: _value(line, "epoch") for seed in seeds for step, line in seed.items()}
            kinds = {frozenset(line) for seed in seeds for line in seed.values()}
            found.append(_Log(method, seeds, dict(sorted(epochs.items())), kinds))
    return found


def _plots(
    experiment: Experiment, quantities: Sequence[_Quantity], logs: Sequence[_Log], *, epochs: bool
) -> list[Plot]:
    plots = []
    for quantity in quantities:
        curves = [_curve(log, quantity, epochs=epochs) for log in logs]
        curves = [curve for curve in curves if np.isfinite(curve.mean).any()]
        if curves:
            plots.append(_plot(experiment, quantity, curves, epochs=epochs))
    return plots


def _value(line: Mapping[str, Any], name: str) -> float:
    value = line.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def _curve(log: _Log, quantity: _Quantity, *, epochs: bool) -> _Curve:
    name = quantity.name
    by_seed = [{step: _value(line, name) for step, line in seed.items() if name in line} for seed in log.seeds]
    last = [max(values, default=-math.inf) for values in by_seed]
    ends = _windows(list(log.epochs), RARE if len(log.kinds) > 1 else 1) if quantity.of_steps else []
    if ends:
        by_seed = [_averaged(values, ends) for values in by_seed]
    steps = []
    for step in ends or log.epochs:
        there = sum(step in values for values in by_seed)
        reached = there if ends else sum(end >= step for end in last)
        if reached == there >= min(2, len(by_seed)):
            steps.append(step)
    rows = np.array([[values.get(step, math.inf) for step in steps] for values in by_seed]).reshape(len(by_seed), -1)
    lost = np.isnan(rows).any(axis=0)  # a line without a finite number; infinite: a seed that has not got there
    mean, sd, count = spread(rows)
    mean[lost] = sd[lost] = math.nan
    x = np.array([log.epochs[step] if epochs else step for step in steps], dtype=np.float64)
    chosen = thinned(len(steps), POINTS)
    uneven = len({max(seed, default=-math.inf) for seed in log.seeds}) > 1
    window = round(ends[0]) if ends else 0
    return _Curve(log.method, x[chosen], mean[chosen], sd[chosen], count[chosen], uneven, window)


def _windows(steps: Sequence[float], least: int) -> list[float]:
    """The last steps of windows of equally many lines, at most :data:`POINTS`; none where a window is one line.

    Args:
        steps: At which there are lines, ascending.
        least: Lines of a window.
    """
    size = max(-(-len(steps) // POINTS), least)
    return [*steps[size - 1 : -1 : size], steps[-1]] if size > 1 and steps else []


def _averaged(values: Mapping[float, float], ends: Sequence[float]) -> dict[float, float]:
    """The mean of a seed's numbers in each window that has one, by its end."""
    found: dict[float, list[float]] = {}
    for step, value in values.items():
        found.setdefault(ends[bisect_left(ends, step)], []).append(value)
    return {end: sum(inside) / len(inside) for end, inside in found.items()}


def _plot(experiment: Experiment, quantity: _Quantity, curves: Sequence[_Curve], *, epochs: bool) -> Plot:
    drawn = np.concatenate([curve.mean[np.isfinite(curve.mean)] for curve in curves])
    logarithmic = quantity.logarithmic and bool(drawn.min() > 0) and drawn.max() > FACTOR * drawn.min()
    floor = float(drawn.min()) / 2 if logarithmic else -math.inf
    unit = "epochs" if epochs else "steps"
    bands, lines = [], []
    top = float(drawn.max())
    for curve in curves:
        high = curve.mean + curve.sd
        strip = band(curve.method, curve.x, np.maximum(curve.mean - curve.sd, floor), high)
        if strip is not None:
            bands.append(strip)
            top = max(top, float(np.nanmax(high)))
        lines.append(_line(curve, quantity, unit))
    title = f"{quantity.title}, {quantity.unit}" if quantity.unit else quantity.title
    y = {**axis(), "title": {"text": title}, "automargin": True, "nticks": 6}
    if quantity.name == "unlabelled_weight":  # which may not change at all
        y |= {"rangemode": "tozero"}
    if logarithmic:
        y |= log_axis(floor, 1.1 * top)
    frame = layout(
        height=300,
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        xaxis={**axis(), "title": {"text": unit}, "automargin": True, "nticks": 6, "rangemode": "tozero"},
        yaxis=y,
    )
    note = _note(experiment, curves, bands=bool(bands), floor=floor if logarithmic else None)
    return Plot(quantity.key, quantity.title, {"data": [*bands, *lines], "layout": frame}, _alt(quantity, curves), note)


def _line(curve: _Curve, quantity: _Quantity, unit: str) -> Figure:
    text = [
        f" ± {sd:.3g}, mean of {count} seeds" if np.isfinite(sd) else ""
        for sd, count in zip(curve.sd.tolist(), curve.count.tolist(), strict=True)
    ]
    few = int(np.isfinite(curve.mean).sum()) < 2
    end = f" {quantity.unit}" if quantity.unit else ""
    return scatter(
        **of_method(curve.method.label, curve.method.index),
        mode="lines+markers" if few else "lines",
        x=curve.x.tolist(),
        y=numbers(curve.mean),
        text=text,
        line=line_of(curve.method),
        marker={"size": 6, "color": line_of(curve.method)["color"]},
        hovertemplate=f"%{{fullData.name}}<br>%{{x:.4~g}} {unit}: %{{y:.4~g}}{end}%{{text}}<extra></extra>",
    )


def _alt(quantity: _Quantity, curves: Sequence[_Curve]) -> str:
    parts = []
    for curve in curves:
        place = int(np.flatnonzero(np.isfinite(curve.mean))[-1])
        unit = f" {quantity.unit}" if quantity.unit else ""
        deviation = f" ± {curve.sd[place]:.3g}" if np.isfinite(curve.sd[place]) else ""
        parts.append(f"{curve.method.label} {curve.mean[place]:.3g}{deviation}{unit}")
    return f"Last values, mean over seeds: {'; '.join(parts)}."


def _note(experiment: Experiment, curves: Sequence[_Curve], *, bands: bool, floor: float | None) -> str:
    unfinished = sum(bool(going.log) for going in experiment.going)
    going = "1 run that is not finished takes part." if unfinished == 1 else ""
    going = f"{unfinished} runs that are not finished take part." if unfinished > 1 else going
    windows = sorted({curve.window for curve in curves if curve.window})
    cut = floor is not None and any(bool((curve.mean - curve.sd < floor).any()) for curve in curves)
    return sentences(
        "Mean over the seeds; the band is one standard deviation to either side." if bands else "",
        going,
        "Where not all seeds have got as far, the mean is over those that have, at least two."
        if any(curve.uneven for curve in curves)
        else "",
        f"A point is the mean over {' or '.join(map(str, windows))} steps." if windows else "",
        "The axis is logarithmic." if floor is not None else "",
        "The band is cut off below the axis." if cut else "",
    )
