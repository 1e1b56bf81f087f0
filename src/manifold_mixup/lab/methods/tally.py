"""Numbers of a method's steps, such as the parts of its loss, for the log of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["Tally"]


class Tally:
    """Collects what steps compute, until the log asks for it.

    Sums stay on the device that computes them, so that no step waits for a number.

    Args:
        names: Of the numbers that are read as means, in the order in which they are read.
    """

    def __init__(self, *names: str) -> None:
        self._names = names
        self._begin()

    def _begin(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._latest: dict[str, float] = {}

    def add(self, name: str, value: Tensor) -> None:
        """A number that is read as its mean over the steps that had it: a scalar, whose gradient is not kept."""
        value = value.detach().float()
        if name in self._sums:
            value = self._sums[name].to(value.device) + value  # a checkpoint leaves its tensors on the CPU
        self._sums[name] = value
        self._counts[name] = self._counts.get(name, 0) + 1

    def set(self, name: str, value: float) -> None:
        """A number that is read as it was last."""
        self._latest[name] = value

    def read(self) -> dict[str, float]:
        """The means, then the others, without what no step has had since the last reading."""
        means = {name: self._sums[name].item() / self._counts[name] for name in self._names if name in self._sums}
        found = {**means, **self._latest}
        self._begin()
        return found

    def state_dict(self) -> dict[str, Any]:
        """What came since the last reading."""
        return {"sums": dict(self._sums), "counts": dict(self._counts), "latest": dict(self._latest)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._sums, self._counts, self._latest = (dict(state[name]) for name in ("sums", "counts", "latest"))
