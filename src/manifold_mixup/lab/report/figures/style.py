"""What all figures of the page have in common: plain plotly.js specifications, colours, axes.

Colours that start with ``var(`` are looked up in the page's style sheet by its script, so that every figure follows
light and dark mode. Arrays travel as base64, plotly.js' own compact form.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "SERIES",
    "Figure",
    "Plot",
    "array",
    "axis",
    "colour_of",
    "dash_of",
    "layout",
    "literal",
    "of_method",
    "scatter",
    "square",
    "wrapped",
]

Figure = dict[str, Any]
SERIES = 8  # colours of the style sheet: --series-1 to --series-8
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Plot:
    """A figure of the page.

    Attributes:
        key: Its name among the figures of its experiment, in letters, digits and hyphens: the name of its file when it
            is exported.
        title: What it shows, in a few words; plain text.
        figure: The specification for plotly.js: ``data`` and ``layout``.
        alt: What whoever cannot see it should know: the numbers that matter, in a sentence or two; plain text.
        note: A sentence below the title; may be empty.
    """

    key: str
    title: str
    figure: Figure
    alt: str
    note: str = ""


def literal(text: str) -> str:
    """Text for plotly.js, which reads tags and entities in every label: this makes it show them as they are."""
    return html.escape(text, quote=False)


def colour_of(index: int) -> str:
    """The colour of the method at this place, from 0; the same in all figures."""
    return f"var(--series-{index % SERIES + 1})"


def dash_of(index: int) -> str:
    """The line of the method at this place: beyond the number of colours, methods differ in their dashes."""
    return DASHES[index // SERIES % len(DASHES)]


def of_method(label: str, index: int, *, first: bool = True) -> Figure:
    """The keys that every trace of a method has: the page's legend shows and hides traces by ``legendgroup``.

    Args:
        label: The method's label.
        index: Its place.
        first: Whether this is the trace that stands for the method in an exported figure's legend.
    """
    return {"name": literal(label), "legendgroup": f"method-{index}", "showlegend": first}


def scatter(**keys: Any) -> Figure:
    """A trace of markers, unless ``mode`` says otherwise."""
    return {"type": "scatter", "mode": "markers", **keys}


def axis() -> Figure:
    """What all axes share."""
    return {"gridcolor": "var(--line)", "linecolor": "var(--line)", "zeroline": False, "fixedrange": False}


def square(x: Mapping[str, Any], y: Mapping[str, Any]) -> Figure:
    """The layout of a small picture with two axes."""
    return layout(
        height=300, margin={"l": 34, "r": 8, "t": 8, "b": 26}, xaxis={**x, "nticks": 6}, yaxis={**y, "nticks": 6}
    )


def layout(**keys: Any) -> Figure:
    """What all layouts share, with what this one has of its own; ``height``, in pixels, is needed."""
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--muted)"},
        "showlegend": False,
        "hovermode": "closest",
        "dragmode": False,  # a finger on a figure scrolls the page
        **keys,
    }


def wrapped(label: str, width: int = 20) -> str:
    """A label in lines of about ``width`` characters, so that it leaves room for the dots on a narrow screen."""
    lines = [""]
    for word in label.split():
        while len(word) > width:
            lines, word = [*lines, word[:width]], word[width:]
        joined = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], joined] if len(joined) <= width else [*lines, word]
    return "<br>".join(literal(line) for line in lines if line)


def array(values: npt.NDArray[Any]) -> Figure:
    """An array in plotly.js' base64 form."""
    kind = {"float32": "f4", "float64": "f8", "uint8": "u1"}[str(values.dtype)]
    packed: Figure = {"dtype": kind, "bdata": base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()}
    if values.ndim == 2:
        packed["shape"] = f"{values.shape[0]}, {values.shape[1]}"
    return packed
