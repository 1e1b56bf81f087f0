"""Singular values of hidden states, class by class, and how many directions each class uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from manifold_mixup.lab.report.collect import Arrays, Experiment, Method
from manifold_mixup.lab.report.figures.kept import (
    Floats,
    Kept,
    NamedClass,
    band,
    class_names,
    kept,
    line_of,
    log_axis,
    names_axis,
    numbers,
    sentences,
    spread,
    thinned,
)
from manifold_mixup.lab.report.figures.style import Figure, Plot, axis, colour_of, layout, of_method, scatter
from manifold_mixup.lab.statistics import format_mean_sd, summary

__all__ = ["spectra_plots"]

POINTS, FIRST = 400, 20  # values of a drawn spectrum, and how many of the largest are always among them
DEPTH = 1e-5  # of the largest value: below, rounding is drawn
NAMED = 20  # classes that are named beside the axis


@dataclass(frozen=True)
class _Spectrum:
    """What the seeds of a method have.

    Attributes:
        method: The method.
        seeds: How many seeds.
        layer: Name of the layer; empty if it is not known.
        classes: Labels of the classes, ascending, ``(c,)``.
        by_class: Singular values, mean over the seeds, ``(c, m)``; NaN where no seed has one.
        ranks: Effective ranks, ``(seeds, c)``.
    """

    method: Method
    seeds: int
    layer: str
    classes: list[int]
    by_class: Floats
    ranks: Floats

    @property
    def rank(self) -> str:
        """The effective rank, mean over the classes: mean and standard deviation over the seeds."""
        by_seed = spread(self.ranks.T)[0]
        found = by_seed[np.isfinite(by_seed)].tolist()
        return format_mean_sd(summary(found), 1) if found else ""


def spectra_plots(experiment: Experiment) -> list[Plot]:
    """For the states as they are, and centred: the spectra, and the effective rank of each class."""
    plots: list[Plot] = []
    for suffix, centred in (("", False), ("_centred", True)):
        names = ["classes", f"by_class{suffix}", f"effective_rank{suffix}"]
        found = [(method, kept(method, "spectra", names)) for method in experiment.methods]
        for method, arrays in found:
            _of_one_layer(method, arrays)
        spectra = [_spectrum(method, arrays.arrays, suffix) for method, arrays in found if arrays.arrays]
        spectra = [spectrum for spectrum in spectra if (np.nan_to_num(spectrum.by_class) > 0).any()]
        if not spectra:
            continue
        problems = [problem for _, arrays in found for problem in arrays.problems]
        plots.append(_values(spectra, problems, centred=centred))
        if any(np.isfinite(spectrum.ranks).any() for spectrum in spectra):
            plots.append(_ranks(experiment, spectra, centred=centred))
    return plots


def _layer(arrays: Arrays) -> str:
    return arrays["layer"].astype(np.uint8).tobytes().decode("utf-8", "replace") if "layer" in arrays else ""


def _of_one_layer(method: Method, found: Kept) -> None:
    """Leave out the seeds of which another layer was measured than of the first one."""
    layers = {seed: _layer(arrays) for seed, arrays in found.arrays.items()}
    first = next(iter(layers.values()), "")
    for seed, layer in layers.items():
        if layer != first:
            del found.arrays[seed]
            words = f"its spectra are of the layer {layer}, not of {first}"
            found.problems.append(f"Seed {seed} of {method.label} is left out: {words}.")


def _layers_in_words(spectra: Sequence[_Spectrum]) -> str:
    layers = {spectrum.method.label: spectrum.layer for spectrum in spectra if spectrum.layer}
    if len(set(layers.values())) > 1:
        words = "; ".join(f"{layer} of {label}" for label, layer in layers.items())
        return f"Not all methods were measured at the same layer: {words}."
    return "".join(f"Hidden states of the layer {layer}." for layer in set(layers.values()))


def _spectrum(method: Method, seeds: dict[int, Arrays], suffix: str) -> _Spectrum:
    """Sort the seeds' rows by class: not every seed need have every class, nor as many values."""
    runs = list(seeds.values())
    classes = sorted({int(label) for arrays in runs for label in arrays["classes"].ravel().tolist()})
    width = max(arrays[f"by_class{suffix}"].shape[-1] for arrays in runs)
    values = np.full((len(runs), len(classes), width), np.nan)
    ranks = np.full((len(runs), len(classes)), np.nan)
    for i, arrays in enumerate(runs):
        rows = zip(
            arrays["classes"].ravel().tolist(),
            arrays[f"by_class{suffix}"],
            arrays[f"effective_rank{suffix}"].ravel().tolist(),
            strict=False,
        )
        for label, row, rank in rows:
            place = classes.index(int(label))
            values[i, place, : len(row)] = row
            ranks[i, place] = rank
    mean = spread(values.reshape(len(runs), -1))[0].reshape(len(classes), width)
    return _Spectrum(method, len(runs), _layer(runs[0]), classes, mean, ranks)


def _values(spectra: Sequence[_Spectrum], problems: Sequence[str], *, centred: bool) -> Plot:
    bands, lines = [], []
    top, bottom = 0.0, math.inf
    for spectrum in spectra:
        positive = np.where(spectrum.by_class > 0, spectrum.by_class, np.nan)
        top, bottom = max(top, float(np.nanmax(positive))), min(bottom, float(np.nanmin(positive)))
    floor = max(bottom / 1.2, top * DEPTH)
    for spectrum in spectra:
        x, mean, low, high = _over_classes(spectrum)
        strip = band(spectrum.method, x, np.maximum(low, floor), np.maximum(high, floor))
        bands += [] if strip is None or len(spectrum.classes) < 2 else [strip]
        lines.append(_line(spectrum, x, mean))
    frame = layout(
        height=300,
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        xaxis={**axis(), "title": {"text": "index"}, "automargin": True, "nticks": 6},
        yaxis={
            **axis(),
            "title": {"text": "singular value"},
            "automargin": True,
            **log_axis(floor, 1.2 * top),
        },
    )
    note = sentences(
        _layers_in_words(spectra),
        "Arithmetic mean over classes and seeds, at each index over the classes that have as many values; the axis is "
        "logarithmic.",
        "The band is from the smallest to the largest class." if bands else "",
        "The states of a class less their mean." if centred else "",
        f"Values below {DEPTH:g} of the largest, mostly rounding, are not shown." if bottom < top * DEPTH else "",
        *problems,
    )
    title = f"Singular values by class{', centred' if centred else ''}"
    key = f"spectrum{'-centred' if centred else ''}"
    return Plot(key, title, {"data": [*bands, *lines], "layout": frame}, _alt(spectra), note)


def _over_classes(spectrum: _Spectrum) -> tuple[Floats, Floats, Floats, Floats]:
    """Indices from 1, and over the classes the mean, the smallest and the largest value at each of them."""
    mean, _, count = spread(spectrum.by_class)
    there = count > 0
    low = np.where(there, np.where(np.isfinite(spectrum.by_class), spectrum.by_class, np.inf).min(axis=0), np.nan)
    high = np.where(there, np.where(np.isfinite(spectrum.by_class), spectrum.by_class, -np.inf).max(axis=0), np.nan)
    chosen = thinned(len(mean), POINTS, FIRST)
    return chosen.astype(np.float64) + 1, mean[chosen], low[chosen], high[chosen]


def _line(spectrum: _Spectrum, x: Floats, mean: Floats) -> Figure:
    method = spectrum.method
    rank = f"<br>effective rank {spectrum.rank}" if spectrum.rank else ""
    return scatter(
        **of_method(method.label, method.index),
        mode="lines+markers" if len(x) <= NAMED else "lines",
        x=x.tolist(),
        y=numbers(np.where(mean > 0, mean, np.nan)),  # a logarithmic axis has no place for 0
        line=line_of(method),
        marker={"size": 5, "color": colour_of(method.index)},
        hovertemplate=f"%{{fullData.name}}<br>value %{{x}}: %{{y:.4~g}}{rank}<extra></extra>",
    )


def _alt(spectra: Sequence[_Spectrum]) -> str:
    parts = []
    for spectrum in spectra:
        mean = spread(spectrum.by_class)[0]
        second = f", second {mean[1]:.3g}" if len(mean) > 1 and np.isfinite(mean[1]) else ""
        rank = f", effective rank {spectrum.rank}" if spectrum.rank else ""
        parts.append(f"{spectrum.method.label}: largest {mean[0]:.3g}{second}{rank}")
    return f"Means over classes and seeds. {'; '.join(parts)}."


def _ranks(experiment: Experiment, spectra: Sequence[_Spectrum], *, centred: bool) -> Plot:
    labels = sorted({label for spectrum in spectra for label in spectrum.classes})
    names = class_names(experiment, labels)
    places = {label: place for place, label in enumerate(labels)}
    traces = []
    for k, spectrum in enumerate(spectra):
        aside = 0.6 * ((k + 0.5) / len(spectra) - 0.5)  # methods stand beside each other
        traces.append(_dots(spectrum, places, names, aside))
    x = {**axis(), "automargin": True, "range": [-0.6, len(labels) - 0.4]}
    if len(labels) <= NAMED:
        x |= names_axis([name.tick for name in names])
    else:
        x |= {"nticks": 6, "title": {"text": "class, by number"}}
    frame = layout(
        height=280,
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        xaxis=x,
        yaxis={
            **axis(),
            "title": {"text": "effective rank"},
            "automargin": True,
            "nticks": 6,
            "rangemode": "tozero",
        },
    )
    several = any(spectrum.seeds > 1 for spectrum in spectra)
    words = "; ".join(f"{spectrum.method.label} {spectrum.rank}" for spectrum in spectra if spectrum.rank)
    return Plot(
        f"effective-rank{'-centred' if centred else ''}",
        f"Effective rank by class{', centred' if centred else ''}",
        {"data": traces, "layout": frame},
        f"Effective rank, mean over the classes{', ± standard deviation over the seeds' if several else ''}: {words}.",
        "Mean over the seeds; the bars are one standard deviation to either side." if several else "",
    )


def _dots(spectrum: _Spectrum, places: dict[int, int], names: Sequence[NamedClass], aside: float) -> Figure:
    """The effective rank of each class of a method, with error bars where there are several seeds."""
    method = spectrum.method
    mean, sd, _ = spread(spectrum.ranks)
    at = [places[label] for label in spectrum.classes]
    trace = scatter(
        **of_method(method.label, method.index),
        x=[round(place + aside, 4) for place in at],
        y=numbers(mean),
        text=[names[place].tick for place in at],
        marker={"size": 7, "color": colour_of(method.index)},
        hovertemplate="%{fullData.name}<br>%{text}: %{y:.2f}<extra></extra>",
    )
    if np.isfinite(sd).any():
        bars = {"type": "data", "array": numbers(sd), "visible": True}
        trace["error_y"] = {**bars, "color": colour_of(method.index), "thickness": 1.2, "width": 2}
    return trace
