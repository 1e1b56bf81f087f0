"""What several figures need: the arrays of a method's runs, names of classes, bands, and sentences about both."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from manifold_mixup.lab.errors import CorruptedFile, StorageError
from manifold_mixup.lab.report.collect import Arrays, Experiment, Method
from manifold_mixup.lab.report.figures.style import Figure, colour_of, dash_of, literal, of_method, scatter

__all__ = [
    "Floats",
    "Kept",
    "NamedClass",
    "band",
    "class_names",
    "kept",
    "line_of",
    "log_axis",
    "names_axis",
    "numbers",
    "sentences",
    "spread",
    "summed",
    "thinned",
]

Floats = npt.NDArray[np.float64]
BAND = 0.18
LONG = 13  # letters of a class's name beside an axis


@dataclass
class Kept:
    """What the runs of a method have kept of one kind.

    Attributes:
        arrays: Seed to arrays, for the runs that have all that a figure needs.
        problems: Sentences about runs that have a file and cannot be shown.
    """

    arrays: dict[int, Arrays] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def kept(method: Method, kind: str, names: Sequence[str], *, same: Sequence[str] = ()) -> Kept:
    """Read the arrays of a method's runs; a damaged file costs that run, not the page.

    Args:
        method: The method.
        kind: Which file, such as ``"details"``.
        names: Arrays that have to be there. A run whose file has none of them counts as one that kept nothing.
        same: Arrays whose shape has to be that of the first seed, because they are added up.
    """
    found = Kept()
    for seed, run in sorted(method.runs.items()):
        try:
            arrays = run.arrays(kind)
        except (CorruptedFile, StorageError) as error:
            found.problems.append(f"Seed {seed} of {method.label} is left out: {error}.")
            continue
        if arrays is None or not any(name in arrays for name in names):
            continue
        if missing := [name for name in names if name not in arrays]:
            found.problems.append(f"Seed {seed} of {method.label} is left out: its {kind} lack {', '.join(missing)}.")
            continue
        first = next(iter(found.arrays.values()), arrays)
        if any(arrays[name].shape != first[name].shape for name in same):
            found.problems.append(f"Seed {seed} of {method.label} is left out: its {kind} are of another shape.")
            continue
        found.arrays[seed] = arrays
    return found


def summed(found: Kept, name: str) -> Floats:
    """The sum over the seeds of one array that counts something; what is no finite number counts nothing."""
    total: Floats = np.nansum([_finite(arrays[name]) for arrays in found.arrays.values()], axis=0, dtype=np.float64)
    return total


def _finite(values: npt.NDArray[Any]) -> Floats:
    found = values.astype(np.float64)
    return np.where(np.isfinite(found), found, np.nan)


@dataclass(frozen=True)
class NamedClass:
    """A class in words.

    Attributes:
        name: Its whole name, or its number if the data have no names.
        tick: The name beside an axis: short, ready for plotly.js, different for every class.
    """

    name: str
    tick: str


def class_names(experiment: Experiment, labels: Sequence[int]) -> list[NamedClass]:
    """The names of classes, from the first run whose data name them all; else their numbers.

    Args:
        experiment: The runs.
        labels: Class indices, at least one.
    """
    names = [str(label) for label in labels]
    for run in experiment.runs:
        found = [] if run.folder == Path() else _saved_names(run.folder / "data.json")
        if len(found) > max(labels):
            names = [found[label] for label in labels]
            break
    short = [name if len(name) <= LONG else f"{name[: LONG - 1]}…" for name in names]
    if len(set(short)) < len(short):
        short = [f"{label}: {text}" for label, text in zip(labels, short, strict=True)]
    return [NamedClass(name, literal(tick)) for name, tick in zip(names, short, strict=True)]


def _saved_names(path: Path) -> list[str]:
    """The classes in a run's ``data.json``; none if it cannot be read: numbers do as well."""
    try:
        saved = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return []
    classes = saved.get("classes") if isinstance(saved, dict) else None
    return [str(name) for name in classes] if isinstance(classes, list) else []


def names_axis(ticks: Sequence[str], room: int = 44) -> Figure:
    """Ticks with names at 0, 1, 2, ...: upright where side by side they have no room on a narrow screen.

    Args:
        ticks: The names, ready for plotly.js.
        room: How many letters there is room for.
    """
    longest = max(len(part) for tick in ticks for part in html.unescape(tick).split("<br>"))
    return {
        "tickmode": "array",
        "tickvals": list(range(len(ticks))),
        "ticktext": list(ticks),
        "tickangle": 90 if longest * len(ticks) > room else 0,
        "tickfont": {"size": 10},
        "automargin": True,
    }


def log_axis(low: float, high: float) -> Figure:
    """The range of a logarithmic axis and its ticks: 1, 10, 100, or 1, 2, 5, 10 where it is less than two decades.

    Plotly.js would write 0.2 as 2.
    """
    steps = (1,) if high > 100 * low else (1, 2, 5)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    apart = -(-len(decades) // 6)  # decades between two ticks
    places = [step * 10.0**decade for decade in decades if decade % apart == 0 for step in steps]
    ticks = [place for place in places if low <= place <= high]
    if len(ticks) < 2:
        ticks = sorted({float(f"{place:.2g}") for place in (low, math.sqrt(low * high), high)})
    return {
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
    }


def line_of(method: Method, *, width: float = 2) -> Figure:
    """The line of a method: its colour and its dash."""
    return {"color": colour_of(method.index), "dash": dash_of(method.index), "width": width}


def band(method: Method, x: Floats, low: Floats, high: Floats) -> Figure | None:
    """A filled strip in the method's colour between two lines; None where there is nothing to fill.

    Args:
        method: The method.
        x: Where, ascending, ``(n,)``.
        low: The lower line, ``(n,)``; the strip has a gap where either line is no finite number.
        high: The upper line.
    """
    there = np.isfinite(low) & np.isfinite(high)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], there.astype(np.int8), [0]])))
    xs: list[float | None] = []
    ys: list[float | None] = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if end - start < 2:
            continue
        piece = slice(start, end)
        if xs:  # each piece is a polygon of its own
            xs, ys = [*xs, None], [*ys, None]
        xs += [*x[piece].tolist(), *x[piece][::-1].tolist()]
        ys += [*high[piece].tolist(), *low[piece][::-1].tolist()]
    if not xs:
        return None
    return scatter(
        **of_method(method.label, method.index, first=False),
        mode="lines",
        x=xs,
        y=ys,
        fill="toself",
        fillcolor=colour_of(method.index),
        opacity=BAND,
        line={"width": 0, "color": colour_of(method.index)},
        hoveron="points",
        hoverinfo="skip",
    )


def spread(rows: Floats) -> tuple[Floats, Floats, npt.NDArray[np.intp]]:
    """Mean and sample standard deviation of what is finite in each column, and how many that are.

    Args:
        rows: One row per seed, ``(seeds, n)``.

    Returns:
        Means, NaN where there is nothing; deviations, NaN below two numbers; counts; each ``(n,)``.
    """
    there = np.isfinite(rows)
    count = there.sum(axis=0)
    values = np.where(there, rows, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = values.sum(axis=0) / count
        squares = (np.where(there, rows - mean, 0.0) ** 2).sum(axis=0)
        sd = np.where(count > 1, np.sqrt(squares / (count - 1)), np.nan)
    return mean, sd, count


def thinned(count: int, most: int, keep: int = 0) -> npt.NDArray[np.intp]:
    """At most ``most`` of ``count`` places, evenly spread, the ends and the first ``keep`` among them; ascending."""
    if count <= most:
        return np.arange(count)
    even = np.linspace(0, count - 1, most - keep).round().astype(np.intp)
    chosen: npt.NDArray[np.intp] = np.union1d(np.arange(keep), even)
    return chosen


def numbers(values: Floats) -> list[float | None]:
    """Numbers as JSON has them: None where a number is not finite."""
    return [value if np.isfinite(value) else None for value in values.tolist()]


def sentences(*parts: str) -> str:
    """The sentences that are not empty, each once, as one paragraph."""
    return " ".join(dict.fromkeys(part for part in parts if part))
