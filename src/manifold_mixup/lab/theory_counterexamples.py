"""Two counterexamples: what the theorem's proofs give for an affine head is not so for other heads.

Four classes in a plane, with dim = d - 2, and a deep head that is trained; and random representations, not flat at all,
with a head that is made by hand. Both have a loss of (nearly) 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_mixup.lab import streams
from manifold_mixup.lab.theory_affine import ZERO, least_loss
from manifold_mixup.lab.theory_checks import ALPHA, Check, at_most, flatness, labels, mixed_squares, one_hot
from manifold_mixup.lab.theory_deep import EXAMPLES, STEPS, WIDTH, Perceptron, losses, minimise
from manifold_mixup.pairing import draw_lam

__all__ = ["SHAPES", "SegmentHead", "plane_checks", "segment_checks"]

SHAPES = ((2, 3), (5, 2), (5, 3))
NEAR_ZERO = 0.01  # of the least loss of any affine head
BATCH = 64
DRAWS = 4000  # mixtures that the trained head is measured on


def plane_checks(seed: int, steps: int = STEPS) -> Iterator[Check]:
    """Four classes in a plane, one inside the triangle of the others: no two of their segments cross.

    An affine head cannot, since dim = 2 is d - 2. A head of three affine pieces can, one for each of the triangles.

    Args:
        seed: Of the head and of what is drawn.
        steps: Steps of Adam, each on BATCH fresh pairs.
    """
    generator = streams.generator(seed, "theory/plane")
    angles = torch.arange(3, dtype=torch.float64) * (2 * math.pi / 3)
    corners = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)
    states = torch.cat([corners, torch.zeros(1, 2, dtype=torch.float64)])
    targets = torch.eye(4, dtype=torch.float64)
    head = Perceptron([2, WIDTH, WIDTH, 4], generator, torch.relu)

    def objective() -> Tensor:
        i, j = torch.randint(4, (2, BATCH), generator=generator)
        lam = draw_lam(ALPHA, generator, BATCH).unsqueeze(1)
        wanted = lam * targets[i] + (1 - lam) * targets[j]
        return losses(head(lam * states[i] + (1 - lam) * states[j]), wanted, "squared error").mean()

    minimise(objective, head.parameters(), steps)
    least = least_loss(targets, 2)
    loss = float(mixed_squares(head, states, targets, DRAWS, generator).mean())
    yield at_most(
        "four classes in a plane",
        "a deep head needs no dim >= d - 1: its loss, over the least one of any affine head",
        (4, 2, seed),
        loss / least,
        NEAR_ZERO,
        note=f"loss {loss:.1e}, affine heads at least {least:.3f}",
        setting="four points, manifold mixup, squared error, deep head",
    )


@dataclass(frozen=True)
class SegmentHead:
    """The head that finds the segment a representation lies on and answers with that point's mixed target.

    Args:
        states: Representations of the examples ``(n, dim)``; all pairs of them are segments.
        targets: Their targets ``(n, d)``.
    """

    states: Tensor
    targets: Tensor

    def __call__(self, points: Tensor) -> Tensor:
        """Mixed targets ``(m, d)`` of the nearest points on segments, for points ``(m, dim)``."""
        i, j = torch.triu_indices(len(self.states), len(self.states), offset=1)
        start, way = self.states[i], self.states[j] - self.states[i]
        answers = []
        for first in range(0, len(points), 64):  # every point with every segment: 64 · 4950 · dim numbers at a time
            offset = points[first : first + 64].unsqueeze(1) - start
            place = ((offset * way).sum(dim=-1) / way.square().sum(dim=-1)).clamp(0, 1)
            nearest = (offset - place.unsqueeze(-1) * way).square().sum(dim=-1).argmin(dim=1)
            at = place.gather(1, nearest.unsqueeze(1))
            answers.append((1 - at) * self.targets[i[nearest]] + at * self.targets[j[nearest]])
        return torch.cat(answers)


def segment_checks(d: int, dim: int, seed: int) -> Iterator[Check]:
    """Random representations and a head that is made, not trained: zero loss, and nothing flat.

    In space, segments between points in general position do not meet. In the plane they cross, but λ is continuous, so
    that a mixture falls on a crossing with probability 0.

    Args:
        d: Number of classes.
        dim: Dimension of the representations, at least 2.
        seed: Of the representations and of what is drawn.
    """
    generator = streams.generator(seed, f"theory/segments/{d}/{dim}")
    y = labels([EXAMPLES] * d)
    targets = one_hot(y, d)
    states = torch.randn(len(y), dim, generator=generator, dtype=torch.float64)
    squares = mixed_squares(SegmentHead(states, targets), states, targets, 400, generator)
    flat, allowed = flatness(states, y, d), max(dim - d + 1, 0)
    yield at_most(
        "any head",
        "with an arbitrary head the loss is 0 for random representations: neither dim >= d - 1 nor flatness is needed",
        (d, dim, seed),
        float(squares.max()),
        ZERO,
        provided=flat.least_rank > allowed,
        note=f"every class uses {flat.least_rank} directions, the corollary would allow {allowed}",
        setting="random representations, head that looks segments up",
    )
