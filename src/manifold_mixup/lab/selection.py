"""The weights that did best on the validation split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor

__all__ = ["Best", "Choice", "score"]

Choice = Literal["validation_nll", "validation_error"]
"""What the best weights have the least of. Of equal NLLs the first counts; of equal errors, which are frequent, the
last one does: the longer training is worth more."""


def score(train: Mapping[str, Any]) -> str:
    """What a record's best weights had the least of, in people's words; NLL in those from before there was a choice.

    Args:
        train: ``Record.train``.
    """
    return "error" if train.get("best_by") == "validation_error" else "NLL"


class Best:
    """Keeps a copy of the best weights so far.

    Args:
        by: What they have the least of.

    Attributes:
        found: Step, error in percent and NLL in nats of the best weights; empty until something was measured.
        weights: Those weights.
    """

    def __init__(self, by: Choice) -> None:
        self.by = by
        self.found: dict[str, Any] = {}
        self.weights: dict[str, Tensor] = {}

    def consider(self, step: int, error: float, nll: float, weights: Callable[[], dict[str, Tensor]]) -> None:
        """Keep the weights if they are better than all before.

        Args:
            step: When they were measured.
            error: On the validation split, in percent.
            nll: Likewise, in nats.
            weights: Makes a copy of them.
        """
        if self.found and not self._better(error, nll):
            return
        self.found = {"step": step, "validation_error": error, "validation_nll": nll}
        self.weights = weights()

    def _better(self, error: float, nll: float) -> bool:
        if self.by == "validation_error":
            return bool(error <= self.found["validation_error"])
        return bool(nll < self.found["validation_nll"])

    def facts(self) -> dict[str, Any]:
        """What a record says."""
        return {"best_step": self.found["step"], "best_by": self.by} if self.found else {}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"best": self.found, "best_weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.found, self.weights = state["best"], state["best_weights"]
