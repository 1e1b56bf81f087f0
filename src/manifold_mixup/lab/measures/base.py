"""What a measure is to the lab, and what it is given."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from manifold_mixup.lab.data.base import DataInfo, Examples
from manifold_mixup.lab.measures.inference import predicted_logits
from manifold_mixup.lab.options import Options

__all__ = ["Measure", "Metric", "Subject"]

T = TypeVar("T")


@dataclass(frozen=True)
class Metric:
    r"""How one number is shown.

    Attributes:
        title: Its name in a table; ``\1`` stands for the first group of the pattern it is registered under.
        unit: ``"%"``, ``"nats"``, or "" for a plain number.
        digits: Decimals.
        meaning: One sentence for people who have not met it.
    """

    title: str
    unit: str
    digits: int
    meaning: str


@dataclass
class Subject:
    """A trained network and the data that it is measured on.

    Attributes:
        model: Maps what the network reads (normalised images) to logits ``(n, classes)``; in evaluation mode.
        info: The facts about the data.
        parts: Examples as they are stored, by split: ``"train"``, ``"validation"`` (may be missing), ``"test"``.
        hidden: Names of the modules whose outputs are the hidden states, first to last.
        seed: The seed of whatever a measure draws.
        batch_size: Rows per forward pass.
    """

    model: nn.Module
    info: DataInfo
    parts: Mapping[str, Examples]
    hidden: Sequence[str] = ()
    seed: int = 0
    batch_size: int = 500
    _logits: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the network's parameters are."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def prepare(self, x: Tensor) -> Tensor:
        """From stored examples to what the network reads.

        Args:
            x: uint8 images, images from 0 to 1 in floating point, or examples that are read as they are.
        """
        return x if self.info.pixels is None else self.info.pixels.normalise(x)

    def predict(self, x: Tensor) -> Tensor:
        """Logits of stored examples, batch by batch: ``(len(x), classes)``, float64, on the CPU, without gradients."""
        return predicted_logits(self.model, x, self.batch_size, self.prepare)

    def logits(self, part: str) -> Tensor:
        """The same for a whole split, computed once."""
        if part not in self._logits:
            self._logits[part] = self.predict(self.parts[part].x)
        return self._logits[part]

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """What ``compute`` returns, computed at the first call with this name: for numbers and arrays of one origin."""
        if name not in self._kept:
            self._kept[name] = compute()
        found: T = self._kept[name]
        return found

    def on(self, parts: Mapping[str, Examples]) -> Subject:
        """The same network, measured on other examples."""
        return replace(self, parts=parts, _logits={}, _kept={})


@dataclass(frozen=True)
class Measure:
    """A registry entry.

    Attributes:
        name: The name in ``--measures``.
        title: One line for people.
        source: Where it is defined.
        options: What ``--measures name:key=value`` can set.
        compute: From a subject and options to numbers by name. The network is left as it was. A value that is not
            finite is a result: a network that diverged is measured, not refused.
        metrics: Regular expressions that match whole names of ``compute``'s numbers, and how those are shown.
        needs: What must be there: ``"images"`` (uint8 with ``pixels``, or floating point from 0 to 1 that networks read
            as it is), ``"validation"``, ``"train"``, ``"hidden"``.
        always: Whether every run's record holds it.
        arrays: From a subject and options to what the report draws of this measure; ``evaluate`` keeps it beside the
            run's last weights. None if the numbers are all there is.
    """

    name: str
    title: str
    source: str
    options: type[Options]
    compute: Callable[[Subject, Any], dict[str, float]]
    metrics: Mapping[str, Metric]
    needs: tuple[str, ...] = ()
    always: bool = False
    arrays: Callable[[Subject, Any], dict[str, Tensor]] | None = None

    def describe(self, name: str) -> Metric | None:
        """How a number of this measure is shown, or None if it is no number of this measure."""
        for pattern, metric in self.metrics.items():
            if match := re.fullmatch(pattern, name):
                return replace(metric, title=match.expand(metric.title))
        return None
