"""Accuracy against the strength of what is done to the test images: deformations, noise, attacks."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from manifold_mixup.lab.measures.settings import NUMBER
from manifold_mixup.lab.report.collect import Experiment, Method
from manifold_mixup.lab.report.figures.kept import Floats, line_of, numbers, sentences, spread
from manifold_mixup.lab.report.figures.style import Figure, Plot, axis, colour_of, layout, of_method, scatter

__all__ = ["FAMILIES", "Family", "strength_plots"]


@dataclass(frozen=True)
class Family:
    """Numbers that differ in one strength.

    Attributes:
        measure: The measure that gives them.
        pattern: As the measure registers it: its last group is the strength; with a group before it, each of that
            group's values is a figure of its own.
        key: Of the figure; ``{}`` stands for that group's value.
        title: Of the figure, likewise.
        x: What the strength is.
        clean: The strength that leaves the images as they are.
    """

    measure: str
    pattern: str
    key: str
    title: str
    x: str
    clean: float = 0.0


FAMILIES = (
    Family("deformations", rf"rotation_{NUMBER}_accuracy", "rotation", "Rotated test images", "largest angle, °"),
    Family("deformations", rf"shear_{NUMBER}_accuracy", "shear", "Sheared test images", "largest angle, °"),
    Family("deformations", rf"zoom_{NUMBER}_accuracy", "zoom", "Scaled test images", "side of the box shown, %", 100.0),
    Family("noise", rf"noise_{NUMBER}_accuracy", "noise", "Test images with Gaussian noise", "sd, white is 1"),
    Family("fgsm", rf"fgsm_{NUMBER}_accuracy", "fgsm", "Attack by one step (FGSM)", "ε, 255ths of white"),
    Family(
        "fgsm",
        rf"fgsm_normalised_{NUMBER}_accuracy",
        "fgsm-normalised",
        "Attack by one step (FGSM), normalised units",
        "ε, sd of the channel",
    ),
    Family("pgd", rf"pgd(\d+)_{NUMBER}_accuracy", "pgd{}", "Attack by {} steps (PGD)", "ε, 255ths of white"),
)


@dataclass(frozen=True)
class _Line:
    """A method's accuracies in %, by rising strength, ``(n,)`` each; NaN where nothing is finite."""

    method: Method
    strength: Floats
    mean: Floats
    sd: Floats
    clean: float | None
    partial: bool

    @property
    def is_clean(self) -> list[bool]:
        """At which strengths the number is the accuracy on the unchanged images."""
        return [strength == self.clean for strength in self.strength.tolist()]


def strength_plots(experiment: Experiment) -> list[Plot]:
    """One figure for each kind of change of which at least two strengths are known, the unchanged images among them."""
    names = list(dict.fromkeys(name for run in experiment.runs for name in run.metrics))
    plots = []
    for family in FAMILIES:
        variants: dict[str, dict[float, str]] = {}
        for name in names:
            if match := re.fullmatch(family.pattern, name):
                *before, strength = match.groups()
                with contextlib.suppress(ValueError):  # such as 1.2.3, which the pattern lets pass
                    variants.setdefault("".join(before), {})[float(strength)] = name
        for variant in sorted(variants, key=lambda text: (len(text), text)):
            lines = [_line(method, family, variants[variant]) for method in experiment.methods]
            lines = [line for line in lines if np.isfinite(line.mean).any()]
            if len({strength for line in lines for strength in line.strength[np.isfinite(line.mean)].tolist()}) > 1:
                plots.append(_plot(family, variant, lines))
    return plots


def _line(method: Method, family: Family, names: dict[float, str]) -> _Line:
    """A method's numbers; the clean accuracy is that of the seeds which have any of the others."""
    values = {strength: method.values(name) for strength, name in names.items()}
    seeds = sorted({seed for found in values.values() for seed in found})
    clean = None
    if family.clean not in values:
        own = {seed: _clean(method, seed) for seed in seeds}
        if any(math.isfinite(value) for value in own.values()):
            values[family.clean], clean = own, family.clean
    strengths = sorted(strength for strength, found in values.items() if found)
    rows = [[values[strength].get(seed, math.nan) for strength in strengths] for seed in seeds]
    mean, sd, _ = spread(np.array(rows, dtype=np.float64).reshape(len(seeds), len(strengths)))
    partial = any(_examples(method, seed, family.measure) is not None for seed in seeds)
    return _Line(method, np.array(strengths, dtype=np.float64), mean, sd, clean, partial)


def _clean(method: Method, seed: int) -> float:
    metrics = method.runs[seed].metrics
    error, accuracy = metrics.get("test_error"), metrics.get("test_accuracy")
    if accuracy is not None:
        return accuracy
    return math.nan if error is None else 100 - error


def _examples(method: Method, seed: int, measure: str) -> int | None:
    """On how many test examples a later evaluation measured; None if on all."""
    found = method.runs[seed].result.measures.get(measure, {}).get("examples")
    return found if isinstance(found, int) else None


def _plot(family: Family, variant: str, lines: Sequence[_Line]) -> Plot:
    frame = layout(
        height=300,
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        xaxis={**axis(), "title": {"text": family.x}, "automargin": True, "nticks": 6},
        yaxis={**axis(), "title": {"text": "accuracy, %"}, "automargin": True, "nticks": 6},
    )
    figure = {"data": [_trace(line, family) for line in lines], "layout": frame}
    alt = f"Mean accuracy in % by {family.x}. {'; '.join(map(_words, lines))}."
    bars = any(bool(np.isfinite(line.sd).any()) for line in lines)
    counts = {n for line in lines for seed in line.method.runs if (n := _examples(line.method, seed, family.measure))}
    note = sentences(
        "Mean over the seeds; the bars are one standard deviation to either side." if bars else "",
        f"Open markers are the accuracy on the whole unchanged test split; the rest is measured on its first "
        f"{' or '.join(map(str, sorted(counts)))} examples."
        if any(line.partial and line.clean is not None for line in lines)
        else "",
    )
    return Plot(family.key.format(variant), family.title.format(variant), figure, alt, note)


def _trace(line: _Line, family: Family) -> Figure:
    method = line.method
    unchanged = line.is_clean
    text = [
        ("unchanged images" if clean else f"{family.x}: {strength:g}") + (f" (± {sd:.2f})" if np.isfinite(sd) else "")
        for strength, clean, sd in zip(line.strength.tolist(), unchanged, line.sd.tolist(), strict=True)
    ]
    trace = scatter(
        **of_method(method.label, method.index),
        mode="lines+markers",
        x=line.strength.tolist(),
        y=numbers(line.mean),
        text=text,
        line=line_of(method),
        marker={
            "size": 8,
            "color": colour_of(method.index),
            "symbol": ["circle-open" if line.partial and clean else "circle" for clean in unchanged],
        },
        hovertemplate="%{fullData.name}<br>%{text}: %{y:.2f} %<extra></extra>",
    )
    if np.isfinite(line.sd).any():
        bars = {"type": "data", "array": numbers(line.sd), "visible": True}
        trace["error_y"] = {**bars, "color": colour_of(method.index), "thickness": 1.2, "width": 3}
    return trace


def _words(line: _Line) -> str:
    pairs = zip(line.strength.tolist(), line.mean.tolist(), strict=True)
    return f"{line.method.label}: " + ", ".join(
        f"{mean:.1f} at {strength:g}" for strength, mean in pairs if math.isfinite(mean)
    )
