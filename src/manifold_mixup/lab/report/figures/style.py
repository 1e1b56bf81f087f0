"""The page's interactive figures, as plain plotly.js specifications.

Colours that start with ``var(`` are looked up in the page's style sheet by its script, so that every figure follows
light and dark mode. Arrays travel as base64, plotly.js' own compact form.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from manifold_mixup.lab.measures.catalog import describe
from manifold_mixup.lab.report.collect import Experiment
from manifold_mixup.lab.report.pictures import CLASS_COLOURS, SURFACE_COLOURS, Pictures
from manifold_mixup.lab.statistics import summary

__all__ = ["hidden_figure", "literal", "seeds_figure", "surface_figure"]

Figure = dict[str, Any]


def literal(text: str) -> str:
    """Text for plotly.js, which reads tags and entities in every label: this makes it show them as they are."""
    return html.escape(text, quote=False)


def seeds_figure(experiment: Experiment, name: str) -> Figure:
    """One measure: a dot for every seed of every method, and a bar at each mean."""
    metric = describe(name)
    dots: dict[str, list[Any]] = {"x": [], "y": [], "text": []}
    means: dict[str, list[Any]] = {"x": [], "y": []}
    labels = []
    for method in experiment.methods:
        values = {seed: value for seed, value in method.values(name).items() if np.isfinite(value)}
        label = _wrapped(method.label)
        labels.append(label)
        dots["x"] += values.values()
        dots["y"] += [label] * len(values)
        dots["text"] += [f"seed {seed}" for seed in values]
        if values:
            means["x"].append(summary(values.values()).mean)
            means["y"].append(label)
    traces = [
        _scatter(
            **means,
            marker={"symbol": "line-ns", "size": 22, "line": {"width": 3, "color": "var(--accent)"}},
            hovertemplate="mean %{x:.4g}<extra></extra>",
        ),
        _scatter(
            **dots,
            marker={"size": 9, "opacity": 0.65, "color": "var(--ink)", "line": {"width": 0}},
            hovertemplate="%{text}: %{x:.4g}<extra></extra>",
        ),
    ]
    title = f"{metric.title}, {metric.unit}" if metric.unit else metric.title
    layout = _layout(
        height=84 + sum(18 * label.count("<br>") + 30 for label in labels),
        margin={"l": 8, "r": 16, "t": 8, "b": 8},
        xaxis={**_axis(), "title": {"text": literal(title)}, "automargin": True, "nticks": 6},
        yaxis={
            **_axis(),
            "type": "category",
            "categoryorder": "array",
            "categoryarray": labels,
            "range": [len(labels) - 0.5, -0.5],
            "automargin": True,
        },
    )
    return {"data": traces, "layout": layout}


def surface_figure(pictures: Pictures) -> Figure:
    """The decision surface in input space, with the training points."""
    left, right, bottom, top = (float(edge) for edge in pictures.extent)
    height, width = pictures.surface.shape
    percent = np.rint(100 * np.nan_to_num(pictures.surface.astype(np.float64), nan=0.5)).clip(0, 100).astype(np.uint8)
    cell = ((right - left) / width, (top - bottom) / height)
    surface = {
        "type": "heatmap",
        "z": _array(percent),
        "x0": left + cell[0] / 2,
        "dx": cell[0],
        "y0": bottom + cell[1] / 2,
        "dy": cell[1],
        "zmin": 0,
        "zmax": 100,
        "zsmooth": "fast",
        "colorscale": [[stop, f"rgb{colour}"] for stop, colour in SURFACE_COLOURS],
        "showscale": False,
        "hovertemplate": "(%{x:.1f}, %{y:.1f}): %{z} % blue<extra></extra>",
    }
    layout = _square(
        {**_axis(), "range": [left, right], "constrain": "domain"},
        {**_axis(), "range": [bottom, top], "scaleanchor": "x", "constrain": "domain"},
    )
    return {"data": [surface, *_classes(pictures.train_x, pictures.train_y)], "layout": layout}


def hidden_figure(pictures: Pictures) -> Figure:
    """The bottleneck's outputs: of inputs drawn uniformly from the square, and above them of the training points."""
    uniform = _scatter(
        x=_array(pictures.uniform_hidden[:, 0]),
        y=_array(pictures.uniform_hidden[:, 1]),
        marker={"size": 3, "color": "var(--ink)", "opacity": 0.5},
        text=[f"{100 * top:.0f} %" for top in pictures.uniform_top.tolist()],
        hovertemplate="uniform input, top probability %{text}<extra></extra>",
    )
    layout = _square(_axis(), _axis())
    return {"data": [uniform, *_classes(pictures.train_hidden, pictures.train_y)], "layout": layout}


def _classes(points: npt.NDArray[np.floating], labels: npt.NDArray[np.integer]) -> list[Figure]:
    traces = []
    for label, (colour, name) in enumerate(zip(CLASS_COLOURS, ("red", "blue"), strict=True)):
        chosen = points[labels == label]
        traces.append(
            _scatter(
                x=_array(chosen[:, 0]),
                y=_array(chosen[:, 1]),
                marker={"size": 6, "color": colour, "line": {"width": 0.7, "color": "#ffffff"}},
                hovertemplate=f"{name} training point<extra></extra>",
            )
        )
    return traces


def _scatter(**keys: Any) -> Figure:
    return {"type": "scatter", "mode": "markers", **keys}


def _axis() -> Figure:
    return {"gridcolor": "var(--line)", "linecolor": "var(--line)", "zeroline": False, "fixedrange": False}


def _square(x: Mapping[str, Any], y: Mapping[str, Any]) -> Figure:
    return _layout(
        height=300, margin={"l": 34, "r": 8, "t": 8, "b": 26}, xaxis={**x, "nticks": 6}, yaxis={**y, "nticks": 6}
    )


def _layout(**keys: Any) -> Figure:
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--muted)"},
        "showlegend": False,
        "hovermode": "closest",
        "dragmode": False,  # a finger on a figure scrolls the page
        **keys,
    }


def _wrapped(label: str, width: int = 20) -> str:
    """A label in lines of about ``width`` characters, so that it leaves room for the dots on a narrow screen."""
    lines = [""]
    for word in label.split():
        while len(word) > width:
            lines, word = [*lines, word[:width]], word[width:]
        joined = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], joined] if len(joined) <= width else [*lines, word]
    return "<br>".join(literal(line) for line in lines if line)


def _array(values: npt.NDArray[Any]) -> Figure:
    """An array in plotly.js' base64 form."""
    kind = {"float32": "f4", "float64": "f8", "uint8": "u1"}[str(values.dtype)]
    packed: Figure = {"dtype": kind, "bdata": base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()}
    if values.ndim == 2:
        packed["shape"] = f"{values.shape[0]}, {values.shape[1]}"
    return packed
