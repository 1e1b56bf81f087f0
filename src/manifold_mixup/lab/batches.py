"""Random batches of a training split, and where in them a run is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manifold_mixup.lab import streams
from manifold_mixup.lab.errors import UsageError

__all__ = ["Batches"]


class Batches:
    """Shuffled batches without end; every pass over the data has a new order, an incomplete last batch is left out.

    Args:
        examples: Number of training examples.
        size: Examples per batch; 0 takes all.
        seed: Seed of the run.
        stream: Follows the name of the stream of random numbers.
        replacement: Draw every batch from all examples, some perhaps twice, instead of pass by pass.
    """

    def __init__(self, examples: int, size: int, seed: int, *, stream: str = "", replacement: bool = False) -> None:
        if size > examples and not replacement:
            raise UsageError(
                f"train.batch_size {size} is more than the {examples} training examples; 0 takes all of them"
            )
        self.examples, self.size = examples, size or examples
        self._generator = streams.generator(seed, f"batches{stream}")
        self._replacement = replacement
        self._order = self._pass()
        self._next = 0

    def draw(self) -> Tensor:
        """The next batch: indices of shape ``(size,)``."""
        if self._next + self.size > len(self._order):
            self._order = self._pass()
            self._next = 0
        rows = self._order[self._next : self._next + self.size]
        self._next += self.size
        return rows

    def _pass(self) -> Tensor:
        """The rows of the batches that come next: a whole pass, or a single batch with replacement."""
        if self._replacement:
            return torch.randint(self.examples, (self.size,), generator=self._generator)
        return torch.randperm(self.examples, generator=self._generator)

    def state_dict(self) -> dict[str, Any]:
        """The generator, the order of the current pass and the place in it."""
        return {"generator": self._generator.get_state(), "order": self._order, "next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._generator.set_state(state["generator"])
        self._order, self._next = state["order"], state["next"]
