"""The loss of a recipe, on class indices and on mixed targets alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manifold_mixup.lab.config import TrainConfig
from manifold_mixup.lab.methods.base import Criterion
from manifold_mixup.target import MixedTarget

__all__ = ["bce_softmax", "make_criterion"]


def make_criterion(settings: TrainConfig) -> Criterion:
    """The loss that ``loss`` and ``label_smoothing`` ask for."""
    smoothing = settings.label_smoothing
    if settings.loss == "bce-softmax":
        return lambda output, target: bce_softmax(output, target, smoothing)
    return lambda output, target: cross_entropy(output, target, smoothing)


def cross_entropy(output: Tensor, target: Tensor | MixedTarget, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits, in nats; a mixed target weighs the losses of its two labels, example by example.

    Args:
        output: Logits, ``(n, classes)``.
        target: Class indices ``(n,)``, or two of them mixed.
        smoothing: Share of each target that is spread over all classes (Szegedy et al. 2016, section 7).
    """
    # a weight per example needs a loss per example
    return F.cross_entropy(output, target, reduction="none", label_smoothing=smoothing).mean()  # type: ignore[arg-type]


def bce_softmax(output: Tensor, target: Tensor | MixedTarget, smoothing: float = 0.0) -> Tensor:
    """Binary cross-entropy of the softmax outputs, averaged over examples and classes: the loss of the authors' code.

    With p = softmax(output) and t the target's distribution it is the mean over i and c of -t log p - (1 - t) log(1 -
    p), both logarithms cut off at -100 as in ``torch.nn.BCELoss``. Computed in float32 or better: a softmax in bfloat16
    is 1 well before it should be.

    Args:
        output: Logits, ``(n, classes)``.
        target: Class indices ``(n,)``, or two of them mixed, whose one-hot rows are then mixed.
        smoothing: Share of each target that is spread over all classes.
    """
    classes = output.shape[1]
    soft: Any
    soft = target.soft(classes) if isinstance(target, MixedTarget) else F.one_hot(target, classes)
    with torch.autocast(output.device.type, enabled=False):
        logits = output if output.dtype == torch.float64 else output.float()
        t = soft.to(logits.dtype) * (1 - smoothing) + smoothing / classes
        return F.binary_cross_entropy(logits.softmax(dim=1), t)
