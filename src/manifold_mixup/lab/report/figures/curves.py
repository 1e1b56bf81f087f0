"""Training and validation curves: the mean over the seeds, with a band of one standard deviation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from manifold_mixup.lab.report.collect import Experiment, Method
from manifold_mixup.lab.report.figures.kept import Floats, band, line_of, log_axis, numbers, sentences, spread, thinned
from manifold_mixup.lab.report.figures.style import Figure, Plot, axis, layout, of_method, scatter

__all__ = ["curve_plots"]

POINTS = 400
FACTOR = 10  # a quantity that spans more than this is drawn on a logarithmic axis

Logs = Mapping[int, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class _Quantity:
    """One number of the log's lines."""

    name: str
    key: str
    title: str
    unit: str
    logarithmic: bool


QUANTITIES = (
    _Quantity("train_loss", "training-loss", "Training loss", "", True),
    _Quantity("validation_error", "validation-error", "Validation error", "%", False),
    _Quantity("validation_nll", "validation-nll", "Validation NLL", "nats", True),
)


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
    """

    method: Method
    x: Floats
    mean: Floats
    sd: Floats
    count: npt.NDArray[np.intp]
    uneven: bool


def curve_plots(experiment: Experiment) -> list[Plot]:
    """Training loss, validation error and validation NLL against epochs, or against steps if no run made an epoch.

    A mean is over the seeds that have got as far, all at the same steps. Where some have not, at least two have to
    have. Runs that are not finished take part.
    """
    logs = {id(method): method.logs() for method in (*experiment.methods, *experiment.waiting)}
    methods = [method for method in (*experiment.methods, *experiment.waiting) if logs[id(method)]]
    epochs = _counts_epochs([log for method in methods for log in logs[id(method)].values()])
    plots = []
    for quantity in QUANTITIES:
        curves = [_curve(method, logs[id(method)], quantity.name, epochs=epochs) for method in methods]
        curves = [curve for curve in curves if np.isfinite(curve.mean).any()]
        if curves:
            plots.append(_plot(experiment, quantity, curves, epochs=epochs))
    return plots


def _counts_epochs(logs: Sequence[Sequence[Mapping[str, Any]]]) -> bool:
    found = [_value(line, "epoch") for log in logs for line in log]
    return bool(found) and all(map(math.isfinite, found)) and max(found) >= 1


def _value(line: Mapping[str, Any], name: str) -> float:
    value = line.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def _curve(method: Method, logs: Logs, name: str, *, epochs: bool) -> _Curve:
    by_seed: list[dict[float, float]] = []
    places: dict[float, float] = {}
    for log in logs.values():
        lines = [(_value(line, "step"), line) for line in log if name in line]
        lines = [(step, line) for step, line in lines if math.isfinite(step)]
        by_seed.append({step: _value(line, name) for step, line in lines})
        places |= {step: _value(line, "epoch") if epochs else step for step, line in lines}
    last = [max(values, default=-math.inf) for values in by_seed]
    steps = []
    for step in sorted(places):
        reached = sum(end >= step for end in last)
        if reached == sum(step in values for values in by_seed) and (reached > 1 or len(by_seed) == 1):
            steps.append(step)
    rows = np.array([[values.get(step, math.inf) for step in steps] for values in by_seed]).reshape(len(by_seed), -1)
    lost = np.isnan(rows).any(axis=0)  # a line without a finite number; infinite: a seed that has not got there
    mean, sd, count = spread(rows)
    mean[lost] = sd[lost] = math.nan
    x = np.array([places[step] for step in steps], dtype=np.float64)
    chosen = thinned(len(steps), POINTS)
    return _Curve(method, x[chosen], mean[chosen], sd[chosen], count[chosen], len(set(last)) > 1)


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
    cut = floor is not None and any(bool((curve.mean - curve.sd < floor).any()) for curve in curves)
    return sentences(
        "Mean over the seeds; the band is one standard deviation to either side." if bands else "",
        going,
        "Where not all seeds have got as far, the mean is over those that have, at least two."
        if any(curve.uneven for curve in curves)
        else "",
        "The axis is logarithmic." if floor is not None else "",
        "The band is cut off below the axis." if cut else "",
    )
