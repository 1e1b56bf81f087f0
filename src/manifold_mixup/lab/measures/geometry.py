"""How classes lie on the sphere, by hidden states of length 1.

The measures are those of Roth et al. 2020, "Revisiting Training Strategies and Generalization Performance in Deep
Metric Learning", arXiv 2002.08473, section 5. ``pi_intra`` and ``pi_inter`` are mean distances within classes and
between their centres, ``pi_density`` is their quotient, and ``rho`` is how far the spectrum of all states together is
from a flat one. Not to be confused with ``spectra``, whose values are of one class at a time.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from manifold_mixup.lab.measures.base import Measure, Metric, Subject
from manifold_mixup.lab.measures.hidden import FEATURES, StateOptions, labelled_states
from manifold_mixup.lab.measures.spectra import singular_values

__all__ = ["MEASURES", "GeometryOptions", "class_distances", "mean_distance", "on_sphere", "rho"]

BLOCK = 1024  # rows whose distances are in memory at a time

Distance = Literal["euclidean", "cosine"]


class GeometryOptions(StateOptions):
    """The paper writes a distance without naming it; its code takes 1 minus the cosine."""

    layer: str = Field(default=FEATURES, description="a module's name, 'input', 'features' or 'logits'")
    distance: Distance = Field(default="euclidean", description="euclidean, or cosine: 1 minus the cosine")
    drop: int = Field(default=1, ge=0, description="rho: how many of the largest singular values are left out")
    reverse: bool = Field(default=False, description="rho: the divergence of the spectrum from the flat one instead")


def on_sphere(states: Tensor) -> Tensor:
    """Every row divided by its Euclidean length, in float64; a row of zeros stays one."""
    states = states.double()
    length = states.norm(dim=-1, keepdim=True)
    points: Tensor = states / length.masked_fill(length == 0, 1)
    return points


def mean_distance(points: Tensor, distance: Distance) -> float:
    """Mean distance of all pairs of different rows; NaN if there is one row or none.

    Args:
        points: ``(n, features)`` float64, of length 1 or 0; the cosine of a row of zeros with any other is 0.
        distance: ``"euclidean"``, or ``"cosine"``: 1 minus the cosine.
    """
    pairs = len(points) * (len(points) - 1) / 2
    if pairs == 0:
        return math.nan
    if distance == "cosine":
        # The sum of all products of two different rows, from the square of the sum of all rows.
        products = points.sum(dim=0).square().sum() - points.square().sum()
        return float((1 - products / (2 * pairs)).clamp(min=0))
    total = 0.0
    for start in range(0, len(points), BLOCK):
        block, rest = points[start : start + BLOCK], points[start + BLOCK :]
        total += float(torch.pdist(block).sum())
        # Not by products of rows: their rounding errors keep equal rows apart.
        total += float(torch.cdist(block, rest, compute_mode="donot_use_mm_for_euclid_dist").sum())
    return total / pairs


def class_distances(states: Tensor, y: Tensor, distance: Distance = "euclidean") -> dict[str, float]:
    """How tight and how far apart classes are.

    Args:
        states: Hidden states of any length, ``(n, features)``, at least one.
        y: Classes, ``(n,)``.
        distance: See :func:`mean_distance`.

    Returns:
        ``pi_intra``
            Mean over classes of the mean distance between different examples of one class; NaN if no class has two.
        ``pi_inter``
            Mean distance between the centres of different classes, means that are put back on the sphere; NaN if there
            is one class.
        ``pi_density``
            ``pi_intra / pi_inter``.
        ``geometry_classes``
            How many classes have examples.
        ``geometry_single_classes``
            How many of them have one only: they have a centre, but ``pi_intra`` leaves them out.

        A state that is not finite makes the distances that it enters NaN.
    """
    points = on_sphere(states)
    labels = sorted(set(y.tolist()))
    within, centres = [], []
    for label in labels:
        rows = points[y == label]
        within += [mean_distance(rows, distance)] if len(rows) > 1 else []
        centres.append(rows.mean(dim=0))
    intra = sum(within) / len(within) if within else math.nan
    inter = mean_distance(on_sphere(torch.stack(centres)), distance)
    return {
        "pi_intra": intra,
        "pi_inter": inter,
        "pi_density": _quotient(intra, inter),
        "geometry_classes": float(len(labels)),
        "geometry_single_classes": float(len(labels) - len(within)),
    }


def rho(states: Tensor, *, drop: int = 1, reverse: bool = False) -> float:
    """How far the spectrum of hidden states is from a flat one, in nats: 0 if all directions are used alike.

    The Kullback-Leibler divergence KL(flat || s), where s are the min(n, features) singular values (not their squares)
    of the states of length 1, un-centred, without the ``drop`` largest, divided by their sum.

    Args:
        states: Hidden states of any length, ``(n, features)``, at least one.
        drop: How many of the largest values are left out.
        reverse: KL(s || flat) instead, which is finite whatever s is.

    Returns:
        At least 0. Infinite if a value that is left is 0, as with a dead unit, and ``reverse`` is off; a value counts
        as 0 up to max(n, features) times float64's precision times the largest. NaN if nothing but zeros is left, or a
        state is not finite.
    """
    return _divergence(_spectrum(states)[drop:], reverse)


def _divergence(values: Tensor, reverse: bool) -> float:
    total = values.sum()
    if len(values) == 0 or total.isnan() or total == 0:
        return math.nan
    share = values / total
    if reverse:
        divergence = math.log(len(share)) - torch.special.entr(share).sum()
    else:
        divergence = -math.log(len(share)) - share.log().mean()
    return float(divergence.clamp(min=0))


def _spectrum(states: Tensor) -> Tensor:
    """Singular values of states of length 1, with 0 for what rounding leaves of one."""
    values = singular_values(on_sphere(states))
    zero = values[0] * (max(states.shape) * torch.finfo(values.dtype).eps)
    return values.masked_fill(values <= zero, 0)


def _quotient(numerator: float, denominator: float) -> float:
    if denominator == 0:
        return math.nan if numerator == 0 or math.isnan(numerator) else math.inf
    return numerator / denominator


def compute(subject: Subject, options: GeometryOptions) -> dict[str, float]:
    """Distances, rho, and how many singular values are 0 (``rho_zeros``), of one layer, from the same examples."""
    states, y = labelled_states(subject, options.layer, options)
    values = _spectrum(states)
    return {
        **class_distances(states, y, options.distance),
        "rho": _divergence(values[options.drop :], options.reverse),
        "rho_zeros": math.nan if values.isnan().any() else float((values == 0).sum()),
    }


MEASURES: tuple[Measure, ...] = (
    Measure(
        name="geometry",
        title="distances within and between classes, and spectral decay, of hidden states of length 1",
        source="Roth et al. 2020, arXiv 2002.08473, section 5",
        options=GeometryOptions,
        compute=compute,
        metrics={
            "pi_intra": Metric("π intra", "", 3, "mean distance within classes, of hidden states of length 1"),
            "pi_inter": Metric("π inter", "", 3, "mean distance between the centres of classes on the sphere"),
            "pi_density": Metric("π density", "", 3, "distance within classes over distance between their centres"),
            "rho": Metric(
                "spectral decay (rho)",
                "nats",
                3,
                "how far the singular values of all hidden states are from being equal; 0 is flat",
            ),
            "rho_zeros": Metric(
                "unused directions", "", 0, "singular values that are 0, as of dead units; any makes rho infinite"
            ),
            "geometry_classes": Metric("classes", "", 0, "classes that have examples"),
            "geometry_single_classes": Metric(
                "classes of one", "", 0, "classes of a single example, which have no distance within"
            ),
        },
    ),
)
