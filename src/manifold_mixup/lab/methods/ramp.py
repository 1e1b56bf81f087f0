"""How the weight of a loss on unlabelled examples grows, from almost nothing to all of it."""

from __future__ import annotations

import math

__all__ = ["ramp"]


def ramp(step: float, start: float, length: float) -> float:
    """The first half of a bell: exp(-5 (1 - t)²), t being the share of the ramp that is done, from 0 to 1.

    Laine and Aila 2017 (arXiv 1610.02242) grow the weight of unlabelled examples like this. It is exp(-5), 0.0067, at
    the start and before it, and 1 from the end on.

    Args:
        step: Where the training is.
        start: Where the ramp begins, in the same unit.
        length: How long it takes, in the same unit; 0 goes to 1 at once.

    Returns:
        A factor in [exp(-5), 1].
    """
    done = float(step >= start) if length == 0 else min(max((step - start) / length, 0.0), 1.0)
    return math.exp(-5 * (1 - done) ** 2)
