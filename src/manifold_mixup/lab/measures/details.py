"""What the report draws of a classifier on test data: reliability, confusions, and its most confident mistakes.

All of it comes from logits that the subject has computed already. The arrays, for a safetensors file:

* ``reliability``: ``(15, 3)`` float64, for each bin of the top probability the number of examples, the sum of their
  confidences and how many are right: the bins of the calibration error;
* ``reliability_scaled`` and ``temperature`` (no dimension, float64): the same after temperature scaling on the
  validation split; absent if there is none, or if no temperature is the best;
* ``confusion``: ``(classes, classes)`` int64, rows are the true class and columns the predicted one; absent for more
  than 200 classes;
* ``confusion_lost``: no dimension, int64: examples whose softmax is not a number, which have no prediction. They are in
  no bin, no cell, and among no mistakes;
* ``mistakes_index``, ``mistakes_true``, ``mistakes_predicted``: ``(m,)`` int64, and ``mistakes_confidence``: ``(m,)``
  float64: the up to 12 most confident wrong predictions, most confident first, then by index in the test split;
* ``mistakes_image``: ``(m, channels, height, width)`` uint8, at most 64 pixels a side, if the examples are images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from manifold_mixup.lab.measures.base import Subject
from manifold_mixup.lab.measures.calibration import fit_temperature
from manifold_mixup.lab.measures.classification import checked_labels, reliability
from manifold_mixup.lab.measures.inference import predicted_labels

__all__ = ["CLASSES", "MISTAKES", "SIDE", "confusion", "details", "mistakes", "thumbnails"]

CLASSES = 200  # a larger table is no longer read
MISTAKES = 12
SIDE = 64  # pixels
WHITE = 255


def details(subject: Subject) -> dict[str, Tensor]:
    """The arrays named at the top of this module; none if there are no test examples.

    A network that diverged has arrays as well: those of the predictions that it makes.
    """
    test = subject.parts.get("test")
    if test is None or len(test) == 0:
        return {}
    logits = subject.logits("test")
    y = checked_labels(logits, test.y)
    found = {"reliability": reliability(logits, y), **_scaled(subject, logits, y)}
    predicted = predicted_labels(logits)
    if logits.shape[1] <= CLASSES:
        found["confusion"] = confusion(predicted, y, logits.shape[1])
    found["confusion_lost"] = (predicted < 0).sum()
    return {**found, **mistakes(logits, y, test.x)}


def _scaled(subject: Subject, logits: Tensor, y: Tensor) -> dict[str, Tensor]:
    validation = subject.parts.get("validation")
    if validation is None or len(validation) == 0:
        return {}
    own = subject.logits("validation")
    temperature = fit_temperature(own, checked_labels(own, validation.y))
    if math.isnan(temperature):
        return {}
    return {
        "reliability_scaled": reliability(logits / temperature, y),
        "temperature": torch.tensor(temperature, dtype=torch.float64),
    }


def confusion(predicted: Tensor, y: Tensor, classes: int) -> Tensor:
    """How often each class was taken for each.

    Args:
        predicted: Classes, ``(n,)``; an example of a negative one is left out.
        y: True classes, ``(n,)``.
        classes: How many there are.

    Returns:
        ``(classes, classes)`` int64: rows true, columns predicted.
    """
    known = predicted >= 0
    cells = y[known] * classes + predicted[known]
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


def mistakes(logits: Tensor, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The most confident wrong predictions: the arrays ``mistakes_`` of this module.

    Args:
        logits: ``(n, classes)``.
        y: True classes, ``(n,)``.
        x: The examples as they are stored, ``(n, ...)``.
    """
    predicted = predicted_labels(logits)
    wrong = ((predicted >= 0) & (predicted != y)).nonzero()[:, 0]
    confidence = logits[wrong].double().softmax(dim=1).amax(dim=1)
    order = confidence.argsort(descending=True, stable=True)[:MISTAKES]
    index = wrong[order]
    found = {
        "mistakes_index": index,
        "mistakes_true": y[index],
        "mistakes_predicted": predicted[index],
        "mistakes_confidence": confidence[order],
    }
    return {**found, "mistakes_image": thumbnails(x[index])} if _images(x) else found


def _images(x: Tensor) -> bool:
    """Whether examples are images that can be shown: grey or coloured, as bytes or from 0 to 1."""
    if x.ndim != 4 or x.shape[1] not in (1, 3) or x.numel() == 0:
        return False
    if x.dtype == torch.uint8:
        return True
    return x.is_floating_point() and bool(((x >= 0) & (x <= 1)).all())


def thumbnails(x: Tensor) -> Tensor:
    """Images of at most 64 pixels a side, made smaller by averaging over areas, with their proportions kept.

    Args:
        x: ``(m, channels, height, width)``: uint8, or floating point from 0 to 1.

    Returns:
        uint8 on the CPU; images that are small enough keep their size.
    """
    white = 1 if x.dtype == torch.uint8 else WHITE
    pixels = x.cpu().double() * white
    longest = max(x.shape[2:])
    if longest > SIDE:
        height, width = (max(1, round(side * SIDE / longest)) for side in x.shape[2:])
        pixels = F.adaptive_avg_pool2d(pixels, (height, width))
    return pixels.round().to(torch.uint8)
