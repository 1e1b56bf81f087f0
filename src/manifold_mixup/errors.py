"""Every error a user of the core can meet, one class each.

All derive from :class:`ManifoldMixupError`, and from the built-in class that a caller would expect, so that both
``except ManifoldMixupError`` and ``except ValueError`` do what they say.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "AlreadyAttached",
    "BatchMismatch",
    "DataFlowLost",
    "DiscoveryFailed",
    "LayerNotFound",
    "LayerNotReached",
    "ManifoldMixupError",
    "MixedTargetMisuse",
    "MixerRemoved",
    "NotACutPoint",
    "PairingError",
    "RecomputeAmbiguous",
    "RowsExchange",
    "UnsupportedModel",
]


PACKED = (
    "it returns a PackedSequence, whose rows are time steps of all examples and not examples. Mix before the packing "
    "(the embedding; the lengths have to be an input with 'length' in its name), or after it: what a module of its own "
    "computes from the last hidden state or from pad_packed_sequence."
)


class ManifoldMixupError(Exception):
    """Base class of all errors of this package."""


class LayerNotFound(ManifoldMixupError, ValueError):
    """A layer of S names no module of the model."""

    def __init__(self, name: str, names: Iterable[str]) -> None:
        names = ["input", *(n for n in names if n)]
        near = get_close_matches(name, names, n=3, cutoff=0.4)
        if near:
            hint = f"Did you mean {' or '.join(map(repr, near))}?"
        else:
            hint = f"It has {', '.join(map(repr, names[:8]))}{', ...' if len(names) > 8 else ''}."
        super().__init__(f"The model has no module named {name!r}. {hint} See model.named_modules().")
        self.name = name


class LayerNotReached(ManifoldMixupError, RuntimeError):
    """The layer that was drawn did not run exactly once in a training forward, or no forward ran before the loss."""


class NotACutPoint(ManifoldMixupError, ValueError):
    """Something reaches the model's output without passing through this layer, so mixing here mixes only a part."""

    advice = (
        "Mixing there would leave part of the features unmixed under fully mixed labels. Choose a layer that "
        "manifold_mixup.cut_points(model, x) lists, or layers='auto'."
    )

    def __init__(self, name: str, reason: str, bypass: str | None = None) -> None:
        if name == "auto":
            super().__init__(f"layers='auto' finds no layer to mix at: {reason}")
        else:
            super().__init__(f"{name!r} is not a cut point of the model: {reason} {self.advice}")
        self.name = name
        self.reason = reason
        self.bypass = bypass


class RowsExchange(NotACutPoint):
    """Rows read each other behind this layer (nodes of a graph), and the mixed target lacks the others' labels."""

    advice = (
        "The labels of the others would not be in the mixed target. Mix behind that (in a graph network behind the "
        "last message passing, at the readout), or use a method made for graphs, such as GraphMix, which mixes in a "
        "twin that sees features alone. check=False takes your word for it."
    )


class BatchMismatch(ManifoldMixupError, ValueError):
    """The batch sizes of the inputs, the targets and the hidden state disagree."""


class DataFlowLost(ManifoldMixupError, RuntimeError):
    """The path from the inputs to the outputs leaves what PyTorch can see, so no cut can be proven."""


class DiscoveryFailed(ManifoldMixupError, RuntimeError):
    """The forward pass that looks for the cut points raised an error of its own."""


class UnsupportedModel(ManifoldMixupError, TypeError):
    """A kind of model that cannot be mixed safely, with what to use instead."""


class AlreadyAttached(ManifoldMixupError, RuntimeError):
    """Another mixer is attached to this model or to a part of it."""


class MixerRemoved(ManifoldMixupError, RuntimeError):
    """A mixer was used after ``remove()``, or a copy of one was used."""


class PairingError(ManifoldMixupError, ValueError):
    """Partner indices that are no valid pairing of the batch."""


class RecomputeAmbiguous(ManifoldMixupError, RuntimeError):
    """Activation checkpointing recomputes a layer and it cannot be told which of its calls, or which draw, that is."""


class MixedTargetMisuse(ManifoldMixupError, TypeError, AttributeError):
    """A :class:`~manifold_mixup.MixedTarget` was used as if it were a tensor of labels."""
