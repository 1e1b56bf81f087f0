"""How a run and whoever started it talk to each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from manifold_mixup.lab import loggers

__all__ = ["Hooks"]


@dataclass(frozen=True)
class Hooks:
    """How a run talks to whoever started it. Nothing here has an influence on the numbers.

    Attributes:
        stop: Asked before every step; True makes the run leave a checkpoint and end with ``Interrupted``.
        progress: Told the number of finished steps.
        sizes: Told the number of all steps and the examples of a step, once they are known.
        checkpoint_seconds: Longest time between two checkpoints; where writing one takes long it may become a minute.
        checkpoint_steps: Steps between two checkpoints, in addition, or None.
        loggers: Are given the log, too.
    """

    stop: Callable[[], bool] = lambda: False
    progress: Callable[[int], None] = lambda step: None
    sizes: Callable[[int, int], None] = lambda steps, batch: None
    checkpoint_seconds: float = 15.0
    checkpoint_steps: int | None = None
    loggers: Sequence[loggers.Logger] = ()
