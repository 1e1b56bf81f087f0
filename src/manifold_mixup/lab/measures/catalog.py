"""What each measure is called, its unit, and how it is read. Tables and pages take their words from here."""

from __future__ import annotations

from manifold_mixup.lab.measures.base import Metric
from manifold_mixup.lab.measures.registry import MEASURES

__all__ = ["MAIN", "OWN", "Metric", "describe"]


_OWN = {
    "train_accuracy": Metric("training accuracy", "%", 1, "share of the training points that are predicted right"),
    "test_accuracy": Metric("test accuracy", "%", 1, "share of fresh points that are predicted right"),
    "low_confidence_share": Metric(
        "low confidence", "%", 1, "share of the square [-15, 15]² where the larger probability is below 0.9"
    ),
    "within_between_ratio": Metric(
        "within / between", "", 3, "scatter within the classes over scatter between them, at the bottleneck"
    ),
    "margin": Metric(
        "margin",
        "",
        3,
        "smallest distance from a training point to the decision boundary, in input units; 0 if one is misclassified",
    ),
}

MAIN = ("test_error", "test_nll", "test_ece")
OWN = tuple(_OWN)


def describe(name: str) -> Metric:
    """The words for a measure; one that is not known is called by its own name."""
    if name in _OWN:
        return _OWN[name]
    for measure in MEASURES.values():
        if (metric := measure.describe(name)) is not None:
            return metric
    return Metric(name, "", 3, "")
