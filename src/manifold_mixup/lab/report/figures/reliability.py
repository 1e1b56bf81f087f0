"""Reliability diagrams: how often a network is right, against how sure it says it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from manifold_mixup.lab.report.collect import Experiment, Method
from manifold_mixup.lab.report.figures.kept import Floats, Kept, kept, line_of, sentences, spread, summed
from manifold_mixup.lab.report.figures.style import Figure, Plot, axis, colour_of, layout, of_method, scatter

__all__ = ["reliability_plots"]

BEFORE, AFTER = "reliability", "reliability_scaled"
SMALLEST, LARGEST = 5.0, 18.0  # markers, in pixels


@dataclass(frozen=True)
class _Diagram:
    """The bins of a method, all its seeds together: empty ones are left out.

    Attributes:
        method: The method.
        seeds: How many seeds.
        count: Examples in each bin, ``(bins,)``.
        confidence: Mean top probability in %.
        accuracy: Share of right predictions in %.
    """

    method: Method
    seeds: int
    count: Floats
    confidence: Floats
    accuracy: Floats

    @property
    def ece(self) -> float:
        """The expected calibration error in % of all seeds together, which is not the mean of the seeds' own."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float((self.count * gaps).sum() / self.count.sum())


def reliability_plots(experiment: Experiment) -> list[Plot]:
    """Accuracy against confidence, before and after temperature scaling."""
    plots = []
    for name, key, title in (
        (BEFORE, "reliability", "Reliability"),
        (AFTER, "reliability-scaled", "Reliability after temperature scaling"),
    ):
        found = [(method, kept(method, "details", [name], same=[name])) for method in experiment.methods]
        diagrams = [diagram for method, arrays in found if (diagram := _diagram(method, arrays, name)) is not None]
        if diagrams:
            temperatures = _temperatures(found) if name == AFTER else ""
            problems = [problem for _, arrays in found for problem in arrays.problems]
            note = sentences(
                "On the dashed line a network is right as often as it says. Larger markers hold more examples.",
                temperatures,
                *problems,
            )
            plots.append(Plot(key, title, _figure(diagrams), _alt(diagrams), note))
    return plots


def _diagram(method: Method, found: Kept, name: str) -> _Diagram | None:
    if not found.arrays:
        return None
    table = summed(found, name)
    if table.ndim != 2 or table.shape[1] != 3 or not (table[:, 0] > 0).any():
        return None
    count, confidence, right = table[table[:, 0] > 0].T
    return _Diagram(method, len(found.arrays), count, 100 * confidence / count, 100 * right / count)


def _temperatures(found: Sequence[tuple[Method, Kept]]) -> str:
    parts = []
    for method, arrays in found:
        values = [float(a["temperature"].flat[0]) for a in arrays.arrays.values() if a.get("temperature", _NONE).size]
        mean, sd, count = (part[0] for part in spread(np.array([values]).reshape(-1, 1)))
        if count:
            parts.append(f"{method.label} {mean:.3g}" + (f" ± {sd:.2g}" if count > 1 else ""))
    return f"Temperatures, chosen on the validation split: {'; '.join(parts)}." if parts else ""


_NONE = np.empty(0)


def _figure(diagrams: Sequence[_Diagram]) -> Figure:
    diagonal = scatter(
        mode="lines",
        x=[0, 100],
        y=[0, 100],
        line={"width": 1.5, "dash": "dash", "color": "var(--muted)"},
        hoverinfo="skip",
        showlegend=False,
    )
    share = {"range": [-2, 102], "nticks": 6, "automargin": True}
    frame = layout(
        height=320,
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        xaxis={**axis(), **share, "title": {"text": "confidence, %"}},
        yaxis={**axis(), **share, "title": {"text": "accuracy, %"}},
    )
    return {"data": [diagonal, *(_trace(diagram) for diagram in diagrams)], "layout": frame}


def _trace(diagram: _Diagram) -> Figure:
    method = diagram.method
    share = diagram.count / diagram.count.sum()
    text = [
        f"{int(count)} examples, {100 * part:.1f} % of all"
        for count, part in zip(diagram.count.tolist(), share.tolist(), strict=True)
    ]
    return scatter(
        **of_method(method.label, method.index),
        mode="lines+markers",
        x=diagram.confidence.tolist(),
        y=diagram.accuracy.tolist(),
        text=text,
        line=line_of(method),
        marker={
            "size": (SMALLEST + (LARGEST - SMALLEST) * np.sqrt(share)).round(2).tolist(),  # areas tell the shares
            "color": colour_of(method.index),
            "opacity": 0.8,
            "line": {"width": 0},
        },
        hovertemplate=(
            "%{fullData.name}<br>confidence %{x:.1f} %, accuracy %{y:.1f} %<br>%{text}"
            f"<br>ECE of all seeds together: {diagram.ece:.2f} %<extra></extra>"
        ),
    )


def _alt(diagrams: Sequence[_Diagram]) -> str:
    parts = []
    for diagram in diagrams:
        mean = float((diagram.count * (diagram.confidence - diagram.accuracy)).sum() / diagram.count.sum())
        word = "too sure" if mean > 0 else "not sure enough"
        parts.append(f"{diagram.method.label} {diagram.ece:.2f} % (on average {abs(mean):.2f} % {word})")
    return f"ECE of all seeds together: {'; '.join(parts)}."
