"""How far the training points of a planar problem are from the decision boundary."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["decision_margin"]

DIRECTIONS = 64
RINGS = 12
REACH = 1.1
POLISHED = 16
HALVINGS = 22
MAX_ROUNDS = 30
GOLDEN = 0.6180339887498949


def decision_margin(classify: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """The smallest distance from a training point to where another class than that point's is predicted.

    A point of another class at distance R bounds the search, so it starts there: all training points are scanned to R
    along 64 rays and 12 rings, every change of label is located by bisection, the nearest ones are followed along the
    boundary, and the scan is repeated within the distance that was found, each time with turned rays, until two scans
    in a row find nothing nearer.

    Accuracy: the distance to a piece of the boundary that the scan hits is right to 1e-4 or 0.01 %, whichever is more.
        Scans become
    finer as the distance shrinks, and a nearer region of another class is certain to be hit if a disc fits into it that
    is 0.15 times the returned distance across; a smaller one can be missed, and the result is then too large. It is
    never too small, but for rounding.

    Args:
        classify: Maps points ``(m, 2)`` (dtype of ``x``, on the CPU) to labels ``(m,)``.
        x: Training points, shape ``(n, 2)``, on the CPU.
        y: Their labels, shape ``(n,)``, at least two different ones.

    Returns:
        The distance in the units of ``x``; 0 if a training point is misclassified.

    Raises:
        ValueError: The shapes do not fit, or there is a single class, so that the boundary may lie anywhere.
    """
    if x.ndim != 2 or x.shape[1] != 2 or y.shape != (len(x),):
        raise ValueError(f"x has to be (n, 2) and y (n,), not {tuple(x.shape)} and {tuple(y.shape)}")
    other = y[:, None] != y[None, :]
    if not other.any():
        raise ValueError("the margin needs training points of at least two classes")
    if bool((classify(x) != y).any()):
        return 0.0
    rays = _Rays(classify, x, y)
    gaps = torch.cdist(x.double(), x.double()).where(other, math.inf)
    origin, target = divmod(int(gaps.argmin()), len(x))
    step = (x[target] - x[origin]).double()
    best = rays.polish(
        torch.tensor([origin]), torch.atan2(step[1], step[0]).reshape(1), gaps[origin, target].reshape(1)
    )
    quiet = 0
    for turn in range(MAX_ROUNDS):
        nearest = rays.scan(best * REACH, turn)
        improved = nearest < best * (1 - 1e-6)
        best = min(best, nearest)
        quiet = 0 if improved else quiet + 1
        if quiet == 2:
            break
    return best


class _Rays:
    """Rays that start at training points: where does the label first differ from the start's own?"""

    def __init__(self, classify: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
        self.classify = classify
        self.x = x
        self.y = y

    def differs(self, origin: Tensor, angle: Tensor, radius: Tensor) -> Tensor:
        """Whether the points at these polar coordinates around training points have another class; broadcasts."""
        step = torch.stack([angle.cos(), angle.sin()], dim=-1) * radius[..., None]
        points = (self.x[origin].double() + step).to(self.x.dtype)
        return self.classify(points.reshape(-1, 2)).reshape(points.shape[:-1]) != self.y[origin]

    def crossing(self, origin: Tensor, angle: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Bisect between ``low``, where the label is the point's own, and ``high``, where it is another one."""
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            outside = self.differs(origin, angle, middle)
            low, high = torch.where(outside, low, middle), torch.where(outside, middle, high)
        return high

    def scan(self, radius: float, turn: int) -> float:
        """Look around every training point up to ``radius`` and return the smallest distance found, or infinity."""
        origins = torch.arange(len(self.x))[:, None, None]
        angles = (torch.arange(DIRECTIONS).double() + GOLDEN * turn) * (2 * math.pi / DIRECTIONS)
        rings = torch.arange(1, RINGS + 1).double() * (radius / RINGS)
        outside = self.differs(origins, angles[None, :, None], rings)
        origin, ray = outside.any(dim=2).nonzero(as_tuple=True)
        if len(origin) == 0:
            return math.inf
        ring = outside[origin, ray].double().argmax(dim=1)  # the first one: argmax returns the first of equal values
        high = rings[ring]
        high = self.crossing(origin, angles[ray], high - radius / RINGS, high)
        nearest = high.argsort()[:POLISHED]
        return self.polish(origin[nearest], angles[ray[nearest]], high[nearest])

    def polish(self, origin: Tensor, angle: Tensor, distance: Tensor) -> float:
        """Turn each ray, by ever smaller angles, to where it meets the boundary soonest; return the least distance."""
        width = 2 * math.pi / DIRECTIONS
        fan = torch.linspace(-1, 1, 17, dtype=torch.float64)
        rows = torch.arange(len(origin))
        while width > 1e-4:
            angles = angle[:, None] + width * fan
            origins, reach = origin[:, None].expand_as(angles), distance[:, None].expand_as(angles)
            outside = self.differs(origins, angles, reach)
            found = torch.full_like(angles, math.inf)
            if outside.any():
                high = reach[outside]
                found[outside] = self.crossing(origins[outside], angles[outside], torch.zeros_like(high), high)
            best = found.argmin(dim=1)
            better = found[rows, best] < distance
            angle = torch.where(better, angles[rows, best], angle)
            distance = torch.where(better, found[rows, best], distance)
            width *= 0.35
        return float(distance.min())
