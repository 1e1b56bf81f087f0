"""What a mixing method drew: how often each layer was mixed, and how λ was distributed.

The methods with the core's mixer keep a log, and so does CutMix. AdaMixUp keeps none: its λ come out of a network,
carry gradients, follow no distribution that could stand beside them, and would have to be waited for on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from manifold_mixup.mixup import Draw

__all__ = ["BINS", "MixingLog"]

BINS = 50


class MixingLog:
    """Counts of the draws of one training run, in the process that keeps it. Everything it reads is on the CPU.

    λ is counted as it was drawn, so that its histogram can stand against the density of Beta(α, α). The mixer does not
    tell the λ of a batch that is left unmixed, except that a λ of exactly 1 leaves it unmixed: such λ (as good as none
    for α from 0.2 on) are counted where nothing else leaves batches unmixed, and are missing where ``probability``
    is below 1.

    Args:
        unit: What is counted: batches, where a batch has one draw, or examples.
    """

    def __init__(self, unit: Literal["batches", "examples"]) -> None:
        self.unit = unit
        self.layers: dict[str, int] = {}
        self.unmixed = 0
        self.lam = [0] * BINS

    def know(self, layers: Iterable[str]) -> None:
        """Name layers that may be mixed, in the order in which they are shown."""
        for name in layers:
            self.layers.setdefault(name, 0)

    def note(self, draw: Draw, rows: int, *, certain: bool) -> None:
        """Count a draw of the mixer.

        Args:
            draw: What ``ManifoldMixup.last`` says.
            rows: Examples of the batch.
            certain: Whether nothing but a λ of 1 can have left the batch unmixed.
        """
        if isinstance(draw.layer, list):
            assert isinstance(draw.lam, Tensor)
            assert draw.partner is not None
            # in a batch of odd size one example is left alone: its λ of 1 was not drawn
            self.note_rows(draw.layer, draw.lam[draw.partner != torch.arange(len(draw.partner))])
        elif draw.layer is not None:
            assert isinstance(draw.lam, float)
            self.note_batch(draw.layer, draw.lam)
        elif self.unit == "batches":
            self.unmixed += 1
            self.lam[-1] += certain
        else:
            self.unmixed += rows
            self.lam[-1] += (rows - rows % 2) * certain

    def note_batch(self, layer: str, lam: float) -> None:
        """Count a batch with one λ, in [0, 1]."""
        self.layers[layer] = self.layers.get(layer, 0) + 1
        self.lam[min(int(lam * BINS), BINS - 1)] += 1

    def note_rows(self, layers: Sequence[str | None], lam: Tensor) -> None:
        """Count a batch whose examples have draws of their own.

        Args:
            layers: Where each example was mixed; None where it was not.
            lam: The λ that were drawn, in [0, 1], float64 on the CPU, ``(m,)``.
        """
        for name, count in Counter(layers).items():
            if name is None:
                self.unmixed += count
            else:
                self.layers[name] = self.layers.get(name, 0) + count
        counts = torch.bincount((lam * BINS).long().clamp(max=BINS - 1), minlength=BINS).tolist()
        self.lam = [old + new for old, new in zip(self.lam, counts, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """All counts, as plain values."""
        return {"layers": dict(self.layers), "unmixed": self.unmixed, "lam": list(self.lam)}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from saved counts; None, from a checkpoint that has no log, leaves it as it is."""
        if state is not None:
            self.layers, self.unmixed, self.lam = dict(state["layers"]), state["unmixed"], list(state["lam"])

    def facts(self, alpha: float) -> dict[str, Any]:
        """What a record says: the unit, counts by layer, those not mixed, λ in 50 equal bins of [0, 1], and α.

        With several processes the record holds the counts of the first one, which mixed its own share of each batch.
        """
        return {"unit": self.unit, **self.state_dict(), "alpha": alpha}
