"""What the checks of the theory share: their form, and the quantities that they look at.

Every quantity takes representations and any head, so that affine and deep heads, and networks trained with and without
mixing, are measured alike. ``d`` is the number of classes, ``dim`` the dimension of the representations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from manifold_mixup.lab.measures.spectra import effective_rank, singular_values
from manifold_mixup.pairing import draw_lam

__all__ = [
    "ALPHA",
    "Check",
    "Flatness",
    "Head",
    "Relation",
    "at_least",
    "at_most",
    "flatness",
    "labels",
    "measured",
    "mixed_squares",
    "moved_outputs",
    "one_hot",
    "segment_deviations",
]

ALPHA = 2.0  # of λ ~ Beta(α, α), the paper's value for CIFAR; the zeros of the objective do not depend on it
RANK_TOLERANCE = 1e-8  # singular values below this share of the distance between classes count as zero
ROUNDS = 20  # how often every example is drawn for a quantity that draws pairs

Head = Callable[[Tensor], Tensor]
Relation = Literal["<=", ">=", ""]


@dataclass(frozen=True)
class Check:
    """One number of one seed, and what it should be.

    Attributes:
        name: What is measured, such as ``rank``.
        statement: The statement that it tests, or what the number is.
        d: Number of classes.
        dim: Dimension of the representations.
        seed: Seed of the run.
        value: What was found; NaN if it was not finite.
        bound: What it is held against; None where nothing is.
        passed: Whether it is on the right side of the bound; None for what is only measured.
        note: Numbers behind it.
        relation: ``<=`` if the value should be the bound or less, ``>=`` if the bound or more, empty without a bound.
        setting: Representations, training and loss.
    """

    name: str
    statement: str
    d: int
    dim: int
    seed: int
    value: float
    bound: float | None
    passed: bool | None
    note: str = ""
    relation: Relation = ""
    setting: str = ""

    @property
    def excess(self) -> float:
        """How far the value is on the wrong side of its bound, negative if on the right one; of no bound, the value."""
        if math.isnan(self.value):
            return math.inf
        if self.bound is None:
            return self.value
        return self.bound - self.value if self.relation == ">=" else self.value - self.bound


def _bounded(
    relation: Relation,
    name: str,
    statement: str,
    where: tuple[int, int, int],
    value: float,
    bound: float,
    *,
    provided: bool = True,
    note: str = "",
    setting: str = "",
) -> Check:
    """A check that is passed if a number is on the right side of a bound, and something else holds, too.

    Args:
        relation: ``<=`` or ``>=``.
        name: See :class:`Check`.
        statement: See :class:`Check`.
        where: ``d``, ``dim`` and the seed.
        value: The number.
        bound: Its bound.
        provided: What else has to hold, so that nothing passes because there was nothing to see.
        note: See :class:`Check`.
        setting: See :class:`Check`.
    """
    right = value <= bound if relation == "<=" else value >= bound  # NaN is on neither side
    return Check(name, statement, *where, float(value), float(bound), bool(right) and provided, note, relation, setting)


at_most, at_least = partial(_bounded, "<="), partial(_bounded, ">=")


def measured(name: str, statement: str, where: tuple[int, int, int], value: float, *, setting: str) -> Check:
    """A number that nothing is demanded of."""
    return Check(name, statement, *where, float(value), None, None, setting=setting)


def labels(sizes: list[int]) -> Tensor:
    """Classes of as many examples as are given, in order: ``(n,)``."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def one_hot(y: Tensor, d: int) -> Tensor:
    """Targets ``(n, d)`` in float64."""
    return torch.nn.functional.one_hot(y, d).double()


@dataclass(frozen=True)
class Flatness:
    """How flat classes lie, in units of the distance between them.

    The unit is the root mean square distance of the classes' means from their mean. All spreads are root mean squares,
    and of the class where they are largest.

    Attributes:
        spread: Distance of the examples of a class from its mean.
        excess: The part of it outside the dim - d + 1 directions that the corollary allows, the class's own largest.
        rank: Directions that the most extended class uses.
        least_rank: Directions that the least extended class uses.
        effective_rank: See :func:`manifold_mixup.lab.measures.spectra.effective_rank`; a mean over classes.
        absolute: The spread in the representations' own units.
    """

    spread: float
    excess: float
    rank: int
    least_rank: int
    effective_rank: float
    absolute: float


def flatness(states: Tensor, y: Tensor, d: int) -> Flatness:
    """Measure how flat the classes lie.

    Args:
        states: Representations ``(n, dim)``; NaN in all spreads if one is not finite.
        y: Classes ``(n,)``; each of the d has examples.
        d: Number of classes.
    """
    classes = [states[y == c] for c in range(d)]
    means = torch.stack([rows.mean(dim=0) for rows in classes])
    unit = float((means - means.mean(dim=0)).square().sum(dim=1).mean().sqrt())
    spectra = [singular_values(rows, centred=True) / math.sqrt(len(rows)) for rows in classes]
    allowed = max(states.shape[1] - d + 1, 0)
    ranks = [int((values > RANK_TOLERANCE * unit).sum()) for values in spectra]
    absolute = _largest(spectra)
    return Flatness(
        spread=absolute / unit,
        excess=_largest([values[allowed:] for values in spectra]) / unit,
        rank=max(ranks),
        least_rank=min(ranks),
        effective_rank=sum(effective_rank(values) for values in spectra) / d,
        absolute=absolute,
    )


def _largest(spectra: list[Tensor]) -> float:
    """The largest norm; NaN if one is NaN."""
    return float(torch.stack([values.norm() for values in spectra]).max())


@torch.no_grad()
def moved_outputs(head: Head, states: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """How outputs change when a representation is moved by the difference of two others of one class.

    For an affine head W h + b and h' - h'' of one class it is the length of W (h' - h''): zero if and only if that
    difference lies in the null space of W. It is as well defined for any other head.

    Args:
        head: From representations to outputs of the size of targets.
        states: Representations ``(n, dim)``, classes one after the other.
        y: Classes ``(n,)``, sorted.
        generator: Draws the pairs, and the representations that are moved by them.

    Returns:
        Lengths of the changes, ``(ROUNDS * n,)``.
    """
    changes = []
    for _ in range(ROUNDS):
        within = torch.argsort(y + torch.rand(len(y), generator=generator, dtype=torch.float64))
        start = states[torch.randperm(len(y), generator=generator)]
        changes.append((head(start + states[within] - states) - head(start)).norm(dim=1))
    return torch.cat(changes)


@torch.no_grad()
def segment_deviations(
    head: Head, states: Tensor, y: Tensor, targets: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """How outputs on segments between examples of different classes deviate from two straight lines.

    Args:
        head: From representations to outputs of the size of targets.
        states: Representations ``(n, dim)``.
        y: Classes ``(n,)``.
        targets: One-hot ``(n, d)``.
        generator: Draws the segments, and λ uniformly on each.

    Returns:
        Distances of the outputs from the mixed targets, and from the outputs at the segment's ends mixed in the same
        way; the second is zero if the head is affine along the segments, wherever they lead.
    """
    wrong, bent = [], []
    for _ in range(ROUNDS):
        partner = torch.randperm(len(y), generator=generator)
        lam = torch.rand(len(y), 1, generator=generator, dtype=torch.float64)
        across = y != y[partner]
        outputs, ends = head(lam * states + (1 - lam) * states[partner]), head(states)
        wrong.append((outputs - lam * targets - (1 - lam) * targets[partner]).norm(dim=1)[across])
        bent.append((outputs - lam * ends - (1 - lam) * ends[partner]).norm(dim=1)[across])
    return torch.cat(wrong), torch.cat(bent)


@torch.no_grad()
def mixed_squares(
    head: Head, states: Tensor, targets: Tensor, pairs: int, generator: torch.Generator, alpha: float = ALPHA
) -> Tensor:
    """The Manifold Mixup objective by sampling: squared errors on mixtures of independently drawn examples.

    Args:
        head: From representations to outputs of the size of targets.
        states: Representations ``(n, dim)``.
        targets: One-hot ``(n, d)``.
        pairs: How many are drawn.
        generator: Draws them and λ.
        alpha: λ ~ Beta(α, α), one draw for each pair.

    Returns:
        Squared errors, summed over outputs: ``(pairs,)``. Their expectation is the objective.
    """
    i, j = torch.randint(len(states), (2, pairs), generator=generator)
    lam = draw_lam(alpha, generator, pairs).unsqueeze(1)
    outputs = head(lam * states[i] + (1 - lam) * states[j])
    return (outputs - lam * targets[i] - (1 - lam) * targets[j]).square().sum(dim=1)
