"""Which classes are taken for which, and the mistakes that a network is surest of."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from manifold_mixup.lab.report.collect import Experiment, Method
from manifold_mixup.lab.report.figures.kept import Floats, NamedClass, class_names, kept, sentences, summed
from manifold_mixup.lab.report.figures.style import Figure, Plot, axis, layout, of_method

__all__ = ["Mistake", "Mistakes", "confusion_plots", "mistakes"]

WRITTEN, NAMED = 12, 20  # classes up to which the cells hold numbers, and the axes all names
MOST = 12  # mistakes that are shown of a method
COMMONEST = 3
STRONGEST = 0.6  # opacity of a full cell: writing in the page's ink stays readable on it, light and dark
COLOUR = "47,129,247"
# the colour grows with the square root: the few per cent beside the diagonal are what is looked for
SCALE = [[(k / 8) ** 2, f"rgba({COLOUR},{STRONGEST * k / 8:.3f})"] for k in range(9)]


@dataclass(frozen=True)
class Mistake:
    """A test example that was predicted wrong.

    Attributes:
        true: Name of its class.
        predicted: Name of the class that it was taken for.
        confidence: The probability of the latter, from 0 to 1.
        seed: Seed of the run.
        index: Its place in the test split.
        image: A PNG in base64; empty if the example is no image that can be shown.
    """

    true: str
    predicted: str
    confidence: float
    seed: int
    index: int
    image: str


@dataclass(frozen=True)
class Mistakes:
    """The mistakes that a method is surest of.

    Attributes:
        label: What the method is called in tables.
        index: Its place among the methods, from 0.
        mistakes: The surest first.
    """

    label: str
    index: int
    mistakes: tuple[Mistake, ...]


def confusion_plots(experiment: Experiment) -> list[Plot]:
    """One confusion matrix for each method, in % of each true class, all seeds together."""
    plots = []
    for method in experiment.methods:
        found = kept(method, "details", ["confusion"], same=["confusion"])
        counts = summed(found, "confusion") if found.arrays else np.zeros((0, 0))
        if counts.ndim == 2 and counts.shape[0] == counts.shape[1] and counts.sum() > 0:
            names = class_names(experiment, range(len(counts)))
            lost = sum(
                int(arrays["confusion_lost"].sum()) for arrays in found.arrays.values() if "confusion_lost" in arrays
            )
            words = [f"{lost} examples have no prediction: a probability is not a number."] if lost else []
            plots.append(_plot(method, counts, names, [*words, *found.problems]))
    return plots


def _plot(method: Method, counts: Floats, names: Sequence[NamedClass], remarks: Sequence[str]) -> Plot:
    totals = counts.sum(axis=1)
    empty = [name.name for name, total in zip(names, totals.tolist(), strict=True) if not total]
    note = sentences(
        "In % of each true class, all seeds together; the colour grows with the square root.",
        f"{len(empty)} of {len(names)} classes have no examples." if empty else "",
        *remarks,
    )
    figure = _figure(method, counts, [name.tick for name in names])
    return Plot(f"confusion-{method.index}", f"Confusion: {method.label}", figure, _alt(counts, names), note)


def _figure(method: Method, counts: Floats, ticks: Sequence[str]) -> Figure:
    totals = counts.sum(axis=1)
    shares = [
        [round(100 * count / total, 2) if total else None for count in row]
        for row, total in zip(counts.tolist(), totals.tolist(), strict=True)
    ]
    heat: Figure = {
        "type": "heatmap",
        **of_method(method.label, method.index, first=False),
        "x": list(ticks),
        "y": list(ticks),
        "z": shares,
        "customdata": counts.astype(np.int64).tolist(),
        "zmin": 0,
        "zmax": 100,
        "colorscale": SCALE,
        "showscale": False,
        "xgap": 1 if len(ticks) <= NAMED else 0,
        "ygap": 1 if len(ticks) <= NAMED else 0,
        "hoverongaps": False,
        "hovertemplate": "%{y} taken for %{x}: %{z:.1f} %, %{customdata} examples<extra></extra>",
    }
    if len(ticks) <= WRITTEN:
        heat |= {
            "text": [["" if not share else f"{share:.{1 if share < 10 else 0}f}" for share in row] for row in shares],
            "texttemplate": "%{text}",
            "textfont": {"size": 10, "color": "var(--ink)"},
        }
    sides = {**axis(), "type": "category", "showgrid": False, "automargin": True}
    sides |= {"dtick": 1, "tickfont": {"size": 10}} if len(ticks) <= NAMED else {"nticks": 6}
    frame = layout(
        height=340,
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        xaxis={**sides, "title": {"text": "predicted", "standoff": 6}, "tickangle": 90},
        yaxis={**sides, "title": {"text": "true", "standoff": 6}, "autorange": "reversed"},
    )
    return {"data": [heat], "layout": frame}


def _alt(counts: Floats, names: Sequence[NamedClass]) -> str:
    totals = counts.sum(axis=1)
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:COMMONEST]
    parts = []
    for true, predicted in zip(*(part.tolist() for part in np.unravel_index(order, wrong.shape)), strict=True):
        count = wrong[true, predicted]
        if count > 0:
            share = 100 * count / totals[true]
            parts.append(f"{names[true].name} taken for {names[predicted].name}, {int(count)} times ({share:.1f} %)")
    right = f"{100 * float(np.trace(counts)) / float(counts.sum()):.1f} % of the predictions are right."
    return f"{right} Commonest confusions: {'; '.join(parts)}." if parts else f"{right} There are no confusions."


def mistakes(experiment: Experiment) -> list[Mistakes]:
    """The mistakes that each method is surest of, of all its seeds; without the methods that kept none."""
    wanted = [f"mistakes_{name}" for name in ("index", "true", "predicted", "confidence")]
    found = []
    for method in experiment.methods:
        rows = []
        for seed, arrays in kept(method, "details", wanted).arrays.items():
            images = arrays.get("mistakes_image")
            for row, (index, true, predicted, sure) in enumerate(
                zip(*(arrays[name].ravel().tolist() for name in wanted), strict=False)
            ):
                if np.isfinite(sure):
                    image = images[row] if images is not None and row < len(images) else None
                    rows.append((-sure, seed, index, true, predicted, image))
        rows.sort(key=lambda row: row[:3])
        if rows:
            found.append(Mistakes(method.label, method.index, _shown(experiment, rows[:MOST])))
    return found


def _shown(experiment: Experiment, rows: Sequence[tuple[Any, ...]]) -> tuple[Mistake, ...]:
    labels = sorted({int(label) for row in rows for label in row[3:5]})
    names = dict(zip(labels, (named.name for named in class_names(experiment, labels)), strict=True))
    return tuple(
        Mistake(names[int(true)], names[int(predicted)], -sure, seed, int(index), "" if image is None else _png(image))
        for sure, seed, index, true, predicted, image in rows
    )


def _png(image: npt.NDArray[Any]) -> str:
    """An image ``(C, H, W)`` as PNG in base64: grey for one channel, colour for three; else empty."""
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        return ""
    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode("ascii")
