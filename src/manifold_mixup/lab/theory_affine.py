"""Theorem 1 and Corollary 1 of Verma et al. 2019 with an affine head and free representations: exact, pass or fail.

The residual of a mixture under an affine head is the mixture of the residuals, r = λ r_i + (1 - λ) r_j. With pairs
drawn independently and λ ~ Beta(α, α), E λ² = (α + 1) / (4α + 2) and E λ(1 - λ) = α / (4α + 2): the objective is

    (α + 1) / (2α + 1) · mean |r|²  +  α / (2α + 1) · |mean r|².

It lies between (α + 1) / (2α + 1) times the plain squared error mean |r|² and that error: both have the same zeros.
It is minimised by turns, over the head for fixed representations and over the representations for a fixed head. Both
halves are linear least squares and exact, and neither depends on α. The second moves a representation only in
directions that the head sees, so what the initial values had in the others stays.

The least value for every dim follows from the theorem of Eckart and Young: the best b removes mean r, and what is left
is the best approximation of the centred targets by a matrix of rank dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_mixup.lab import streams
from manifold_mixup.lab.theory_checks import (
    ALPHA,
    Check,
    at_least,
    at_most,
    flatness,
    labels,
    mixed_squares,
    moved_outputs,
    one_hot,
    segment_deviations,
)

__all__ = ["SHAPES", "Affine", "affine_checks", "check_solution", "closed_form", "least_loss", "solve"]

SHAPES = tuple((d, dim) for d in (2, 3, 5, 10) for dim in (d - 2, d - 1, d, d + 3) if dim >= 1)
SMALLEST, LARGEST = 15, 25  # examples of the first and the last class: unequal, so that no singular values are equal
ALTERNATIONS = 500
ZERO = 1e-20  # a squared error that is called zero: residuals of 1e-10, where rounding leaves about 1e-15
ZERO_LENGTH = 1e-9  # the same for lengths, in units of targets or of the distance between classes
AGREEMENT = 1e-9  # relative, of a loss that was reached with the least possible one
SAMPLES = 20_000
STANDARD_ERRORS = 5.0  # a sampled mean is farther from its expectation in one of two million cases
SETTING = "free representations, affine head"


@dataclass(frozen=True)
class Affine:
    """The head h ↦ W h + b: ``weight`` is ``(d, dim)``, ``bias`` ``(d,)``, float64."""

    weight: Tensor
    bias: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """Outputs ``(n, d)`` of representations ``(n, dim)``."""
        return states @ self.weight.T + self.bias


def closed_form(residuals: Tensor, alpha: float = ALPHA) -> float:
    """The Manifold Mixup objective of an affine head.

    Args:
        residuals: Outputs minus targets at the examples themselves, ``(n, d)``.
        alpha: λ ~ Beta(α, α); 0 is plain training.
    """
    alone = (alpha + 1) / (2 * alpha + 1)
    plain, common = residuals.square().sum(dim=1).mean(), residuals.mean(dim=0).square().sum()
    return float(alone * plain + (1 - alone) * common)


def least_loss(targets: Tensor, dim: int, alpha: float = ALPHA) -> float:
    """The least value of the objective over all representations of dimension ``dim`` and all affine heads.

    Args:
        targets: One-hot ``(n, d)``. The centred targets have rank d - 1, so it is 0 for dim >= d - 1.
        dim: Dimension of the representations.
        alpha: λ ~ Beta(α, α).
    """
    rank = targets.shape[1] - 1  # the last singular value is zero but for rounding
    values = torch.linalg.svdvals(targets - targets.mean(dim=0))[dim:rank]
    return (alpha + 1) / (2 * alpha + 1) * float(values.square().sum()) / len(targets)


def solve(states: Tensor, targets: Tensor, alternations: int = ALTERNATIONS) -> tuple[Tensor, Affine]:
    """Minimise the objective over representations and affine head by turns, from given representations.

    Args:
        states: Initial representations ``(n, dim)``, float64.
        targets: ``(n, d)``.
        alternations: How often both are improved at most; it stops early at a zero.

    Returns:
        Representations and head.
    """
    centred, mean = targets - targets.mean(dim=0), targets.mean(dim=0)
    head = Affine(torch.zeros(targets.shape[1], states.shape[1]).double(), mean)
    for _ in range(alternations):
        middle = states.mean(dim=0)
        # Not the default driver, gelsy: equal inputs gave it different last digits (torch 2.13).
        weight = torch.linalg.lstsq(states - middle, centred, driver="gelsd").solution.T
        head = Affine(weight, mean - weight @ middle)
        # Every residual loses the part that the head can reach, the shortest way; so does their mean.
        states = states - (head(states) - targets) @ torch.linalg.pinv(weight, rtol=1e-12).T
        if closed_form(head(states) - targets) < ZERO * 1e-6:
            break
    return states, head


def affine_checks(d: int, dim: int, seed: int, alternations: int = ALTERNATIONS) -> Iterator[Check]:
    """All checks of one number of classes and one dimension, from random representations.

    Args:
        d: Number of classes, at least 2.
        dim: Dimension of the representations, at least d - 2.
        seed: Of the representations and of what is sampled.
        alternations: See :func:`solve`.
    """
    generator = streams.generator(seed, f"theory/affine/{d}/{dim}")
    y = labels([round(SMALLEST + (LARGEST - SMALLEST) * c / (d - 1)) for c in range(d)])
    targets = one_hot(y, d)
    states = torch.randn(len(y), dim, generator=generator, dtype=torch.float64)
    start = Affine(torch.randn(d, dim, generator=generator, dtype=torch.float64), torch.zeros(d, dtype=torch.float64))
    yield from _objective(states, start, targets, (d, dim, seed), generator)
    states, head = solve(states, targets, alternations)
    yield from check_solution(states, head, y, seed, generator)


def _objective(
    states: Tensor, head: Affine, targets: Tensor, where: tuple[int, int, int], generator: torch.Generator
) -> Iterator[Check]:
    """Whether the closed form is the objective, and lies where it should, at a point that is no minimum."""
    residuals = head(states) - targets
    form, plain = closed_form(residuals), closed_form(residuals, alpha=0)
    squares = mixed_squares(head, states, targets, SAMPLES, generator)
    error = float(squares.std()) / math.sqrt(SAMPLES)
    yield at_most(
        "closed form",
        "the objective by sampling pairs and λ is the closed form, to standard errors",
        where,
        abs(float(squares.mean()) - form) / error,
        STANDARD_ERRORS,
        note=f"closed form {form:.6g}, {SAMPLES} pairs {float(squares.mean()):.6g} ± {error:.2g}",
        setting=SETTING,
    )
    least = (ALPHA + 1) / (2 * ALPHA + 1)
    yield at_most(
        "same zeros",
        "the objective lies between (alpha + 1)/(2 alpha + 1) times the plain squared error and that error: "
        "with an affine head, plain training has the same zeros; distance outside",
        where,
        max(least - form / plain, form / plain - 1, 0),
        1e-12,
        note=f"{form / plain:.4f} times the plain one; allowed {least:.4f} to 1",
        setting=SETTING,
    )


def check_solution(
    states: Tensor, head: Affine, y: Tensor, seed: int, generator: torch.Generator, setting: str = SETTING
) -> Iterator[Check]:
    """Whether representations and an affine head are what theorem and corollary say of a minimum.

    Args:
        states: Representations ``(n, dim)``, float64.
        head: The head.
        y: Classes ``(n,)``, sorted.
        seed: For the record.
        generator: Draws pairs.
        setting: For the record.
    """
    d, dim = len(head.bias), states.shape[1]
    where, targets = (d, dim, seed), one_hot(y, d)
    loss, least = closed_form(head(states) - targets), least_loss(targets, dim)
    if dim < d - 1:
        yield at_most(
            "least loss",
            "(a) for dim = d - 2 the loss cannot reach 0, but the bound of Eckart and Young: relative distance from it",
            where,
            abs(loss / least - 1),
            AGREEMENT,
            note=f"reached {loss:.9f}, least possible {least:.9f}",
            setting=setting,
        )
        return
    yield at_most("loss", "(a) for dim >= d - 1 the loss reaches 0", where, loss, ZERO, setting=setting)
    wrong, _ = segment_deviations(head, states, y, targets, generator)
    yield at_most(
        "segments",
        "(b) outputs are affine on segments between classes, the mixed targets: largest distance from them",
        where,
        float(wrong.max()),
        ZERO_LENGTH,
        setting=setting,
    )
    yield from _flat_classes(states, head, y, where, generator, setting)


def _flat_classes(
    states: Tensor, head: Affine, y: Tensor, where: tuple[int, int, int], generator: torch.Generator, setting: str
) -> Iterator[Check]:
    """Consequences (c) to (e): how flat the classes lie where the loss is 0."""
    d, dim, _ = where
    flat = flatness(states, y, d)
    allowed = dim - d + 1
    yield at_most(
        "rank",
        "(c) a class uses at most dim - d + 1 directions",
        where,
        flat.rank if math.isfinite(flat.spread) else math.nan,
        allowed,
        note=f"spread outside them {flat.excess:.1e} of the distance between classes",
        setting=setting,
    )
    if allowed:
        yield at_least(
            "rank filled",
            "(c) and may use all of them: from random representations every class does",
            where,
            flat.least_rank,
            allowed,
            note=f"spread {flat.spread:.2g} of the distance between classes",
            setting=setting,
        )
        yield at_most(
            "null space",
            "(e) moving by the difference of two examples of a class changes no output, largest change",
            where,
            float(moved_outputs(head, states, y, generator).max()),
            ZERO_LENGTH,
            provided=flat.absolute >= 0.1,  # the initial values had a spread of about 1 in each direction
            note=f"root mean square spread of a class {flat.absolute:.2f}",
            setting=setting,
        )
    else:
        yield at_most(
            "spread",
            "(d) for dim = d - 1 a class is one point, spread in units of the distance between classes",
            where,
            flat.spread,
            ZERO_LENGTH,
            setting=setting,
        )
