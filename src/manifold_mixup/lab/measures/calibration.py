"""Temperature scaling: how well calibrated a network is once the scale of its logits is chosen on validation data.

Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2: the logits are divided by one number T above
0, that with the least validation NLL. Predictions do not change. T above 1 means that the network was too sure.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from manifold_mixup.lab.measures.base import Measure, Metric, Subject
from manifold_mixup.lab.measures.classification import brier_score, calibration_error, checked_labels
from manifold_mixup.lab.measures.hidden import split_of
from manifold_mixup.lab.options import NoOptions

__all__ = ["BOUND", "MEASURES", "fit_temperature"]

BOUND = 100.0


def fit_temperature(logits: Tensor, y: Tensor) -> float:
    """The temperature from 1/100 to 100 with the least NLL.

    The NLL is convex in 1 / T, so its slope has at most one change of sign, which is bracketed on log T. Where it has
    none, the least NLL is at a bound: at 1/100 if every example is predicted right, at 100 if the logits say less than
    nothing about the classes.

    Args:
        logits: ``(n, classes)``, at least one row.
        y: Class indices, ``(n,)``.

    Returns:
        The temperature; 1 if the NLL does not depend on it, NaN if no temperature makes the NLL a finite number: a
        softmax is not a number, or a true class was ruled out by a logit of minus infinity.
    """
    from scipy.optimize import brentq

    logits = logits.double()
    own = logits.gather(1, y[:, None])
    if not (logits.softmax(dim=1).isfinite().all() and own.isfinite().all()):
        return math.nan
    gaps = logits - own  # what is said of each class beside the true one; minus infinity is ruled out

    def slope(log_temperature: float) -> float:
        """Derivative of the NLL by 1 / T: the mean of the probabilities times the gaps."""
        weights = (gaps * math.exp(-log_temperature)).softmax(dim=1)
        return float((weights * gaps.masked_fill(weights == 0, 0)).sum(dim=1).mean())

    low, high = -math.log(BOUND), math.log(BOUND)
    at_low, at_high = slope(low), slope(high)
    if at_low == at_high == 0:
        return 1.0
    if at_low <= 0:
        return 1 / BOUND
    if at_high >= 0:
        return BOUND
    return math.exp(brentq(slope, low, high, xtol=1e-10))


def compute(subject: Subject, options: NoOptions) -> dict[str, float]:
    """The temperature, and what it makes of the test split's NLL, calibration error and Brier score."""
    validation, test = split_of(subject, "validation"), split_of(subject, "test")
    logits = subject.logits("validation")
    temperature = fit_temperature(logits, checked_labels(logits, validation.y))
    logits = subject.logits("test") / temperature
    y = checked_labels(logits, test.y)
    return {
        "temperature": temperature,
        "test_nll_scaled": F.cross_entropy(logits, y).item(),
        "test_ece_scaled": 100 * calibration_error(logits, y),
        "test_brier_scaled": brier_score(logits, y),
    }


SCALED = "after the logits were divided by the temperature"

MEASURES: tuple[Measure, ...] = (
    Measure(
        name="calibration",
        title="temperature scaling on the validation split, and what it makes of NLL, calibration and Brier score",
        source="Guo et al. 2017, section 4.2",
        options=NoOptions,
        compute=compute,
        metrics={
            "temperature": Metric(
                "temperature", "", 3, "what logits are divided by for the least validation NLL; above 1: too sure"
            ),
            "test_nll_scaled": Metric("scaled test NLL", "nats", 3, f"mean cross-entropy {SCALED}"),
            "test_ece_scaled": Metric("scaled test ECE", "%", 2, f"expected calibration error, 15 bins, {SCALED}"),
            "test_brier_scaled": Metric("scaled test Brier score", "", 4, f"Brier score, 0-2, {SCALED}"),
        },
        needs=("validation",),
        always=True,
    ),
)
