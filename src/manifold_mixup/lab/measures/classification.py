"""Error, likelihood and calibration of a classifier, all from its logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifold_mixup.lab.errors import LabError, MissingExtra
from manifold_mixup.lab.measures.base import Measure, Metric, Subject
from manifold_mixup.lab.measures.inference import predicted_labels, predicted_logits
from manifold_mixup.lab.options import NoOptions

__all__ = [
    "BINS",
    "MEASURES",
    "TOP",
    "TRAIN_EXAMPLES",
    "accuracy",
    "brier_score",
    "calibration_error",
    "checked_labels",
    "evaluate",
    "label_ranks",
    "reliability",
]

BINS = 15
TOP = 5
TRAIN_EXAMPLES = 10_000
BELOW_ONE = 1 - 2**-24  # the largest float32 below 1


def evaluate(
    model: nn.Module, x: Tensor, y: Tensor, *, prefix: str = "test", batch_size: int = 1000
) -> dict[str, float]:
    """Measure a classifier on labelled examples, in evaluation mode; the mode of every module is put back afterwards.

    ``{prefix}_error``
        Share of wrong predictions, in percent. Of classes with equal logits the first one is predicted.
    ``{prefix}_nll``
        Mean cross-entropy of the softmax, in nats.
    ``{prefix}_ece``
        Expected calibration error in percent: :func:`calibration_error`.

    A network that diverged is a result, not a crash: an example whose softmax is not a number (a NaN or plus infinity
    among its logits) counts as wrong, and one such example makes NLL and ECE NaN. Minus infinity is a class that is
    ruled out; the NLL is infinite if it was the true one.

    Args:
        model: Maps inputs to logits of shape ``(rows, classes)``, at least two classes.
        x: Inputs, one example per row.
        y: Class indices of shape ``(len(x),)``.
        prefix: First part of the names of the results.
        batch_size: Rows per forward pass.

    Returns:
        The three measures.

    Raises:
        ValueError: There are no examples, ``x`` and ``y`` do not fit, a label is no class of the network, or the
            network's outputs are no logits.
    """
    _check_rows(len(x), y)
    logits = predicted_logits(model, x, batch_size)
    y = checked_labels(logits, y)
    return {
        f"{prefix}_error": _error(logits, y),
        f"{prefix}_nll": F.cross_entropy(logits, y).item(),
        f"{prefix}_ece": 100 * calibration_error(logits, y),
    }


def checked_labels(logits: Tensor, y: Tensor) -> Tensor:
    """Labels as int64 on the CPU.

    Args:
        logits: ``(n, classes)``.
        y: Class indices of any whole type, ``(n,)``.

    Raises:
        ValueError: They do not fit the logits, or one is no class of the network.
    """
    _check_rows(len(logits), y)
    y = y.long().cpu()
    classes = logits.shape[1]
    if not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(
            f"labels run from {int(y.min())} to {int(y.max())}, but the network tells {classes} classes apart"
        )
    return y


def _check_rows(rows: int, y: Tensor) -> None:
    if y.ndim != 1 or rows != len(y) or y.is_floating_point():
        found = f"{tuple(y.shape)} of {y.dtype}"
        raise ValueError(f"y has to hold one class index per row of x, shape ({rows},) of whole numbers, not {found}")


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Share of right predictions, in percent; an example without probabilities counts as wrong.

    Args:
        logits: ``(n, classes)``.
        y: Class indices, ``(n,)``.
    """
    return 100 * (predicted_labels(logits) == y).double().mean().item()


def _error(logits: Tensor, y: Tensor) -> float:
    return 100 * (predicted_labels(logits) != y).double().mean().item()


def label_ranks(logits: Tensor, y: Tensor) -> Tensor:
    """How many classes come before the true one, by falling logits and, among equal ones, by class index.

    An example is in the top k if its rank is below k, and predicted right if it is 0: ties are decided as by
    :func:`accuracy`. An example whose softmax is not a number ranks last, behind all classes.

    Args:
        logits: ``(n, classes)``.
        y: Class indices, ``(n,)``.

    Returns:
        int64, ``(n,)``.
    """
    own = logits.gather(1, y[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < y[:, None]
    ranks = ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
    return ranks.masked_fill(logits.softmax(dim=1).isnan().any(dim=1), logits.shape[1])


def brier_score(logits: Tensor, y: Tensor) -> float:
    """Mean over examples of the sum over classes of (probability - 1 or 0)², 1 for the true class: from 0 to 2.

    Brier's own form (1950, equation 2). For two classes it is twice the form that looks at one of them only. NaN if a
    softmax is not a number.

    Args:
        logits: ``(n, classes)``.
        y: Class indices, ``(n,)``.
    """
    probabilities = logits.softmax(dim=1)
    return (probabilities - F.one_hot(y, logits.shape[1])).square().sum(dim=1).mean().item()


def calibration_error(logits: Tensor, y: Tensor) -> float:
    """The mean distance between confidence and accuracy over 15 bins of equal width, weighted by their counts.

    Confidence is the top probability (Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3).
    Computed by torchmetrics' ``multiclass_calibration_error`` with ``norm="l1"``, for two classes as for more. NaN if a
    softmax is not a number.

    Args:
        logits: ``(n, classes)``.
        y: Class indices, ``(n,)``.

    Returns:
        From 0 to 1.
    """
    probabilities = logits.softmax(dim=1)
    if probabilities.isnan().any():
        return math.nan
    try:
        from torchmetrics.functional.classification import multiclass_calibration_error
    except ModuleNotFoundError as error:
        raise MissingExtra("torchmetrics", "lab") from error
    except Exception as error:  # torchmetrics imports torchvision if there is one, and a mismatched one raises anything
        raise LabError(
            f"torchmetrics cannot be imported ({error}); if torchvision is named, reinstall torch and torchvision from "
            "one index, or uninstall torchvision: the lab does without it"
        ) from error
    # Handing over probabilities matters: torchmetrics takes logits that all lie in [0, 1] for probabilities.
    probabilities = probabilities.clamp(0, 1)
    if not (probabilities.amax(dim=1) > BELOW_ONE).all():  # else one bin has them all, whichever it is
        probabilities = _below_one(probabilities)
    return float(multiclass_calibration_error(probabilities, y, num_classes=logits.shape[1], n_bins=BINS, norm="l1"))


def _below_one(confidence: Tensor) -> Tensor:
    """Confidences of 1 go to the last of the 15 bins; torchmetrics, which rounds to float32, has a 16th for them."""
    return confidence.clamp(max=BELOW_ONE)


def reliability(logits: Tensor, y: Tensor) -> Tensor:
    """What a reliability diagram draws: the bins of :func:`calibration_error`, which is their weighted mean gap.

    The bins are the same to the last example; torchmetrics adds up in float32, so the two agree to its rounding.

    Args:
        logits: ``(n, classes)``.
        y: Class indices, ``(n,)``.

    Returns:
        ``(15, 3)`` in float64, by rising confidence: number of examples, sum of their confidences, how many are
        predicted right. Examples whose softmax is not a number are in no bin.
    """
    probabilities = logits.double().softmax(dim=1)
    known = ~probabilities.isnan().any(dim=1)
    confidence, predicted = probabilities[known].max(dim=1)
    edges = torch.linspace(0, 1, BINS + 1)  # float32, as torchmetrics has them: an example at an edge must not move
    bins = torch.bucketize(_below_one(confidence).float(), edges, right=True) - 1
    columns = [torch.ones_like(confidence), confidence, (predicted == y[known]).double()]
    return torch.zeros(BINS, 3, dtype=torch.float64).index_add_(0, bins, torch.stack(columns, dim=1))


def compute(subject: Subject, options: NoOptions) -> dict[str, float]:
    """All numbers for every split that has examples; the training split by its first 10,000 examples."""
    found: dict[str, float] = {}
    for part in ("test", "validation", "train"):
        examples = subject.parts.get(part)
        if examples is None or len(examples) == 0:
            continue
        rows = TRAIN_EXAMPLES if part == "train" else len(examples)
        logits = subject.logits(part) if len(examples) <= rows else subject.predict(examples.x[:rows])
        y = checked_labels(logits, examples.y[:rows])
        found |= {
            f"{part}_error": _error(logits, y),
            f"{part}_nll": F.cross_entropy(logits, y).item(),
            f"{part}_ece": 100 * calibration_error(logits, y),
            f"{part}_brier": brier_score(logits, y),
        }
        if logits.shape[1] > TOP:
            found[f"{part}_top5_error"] = 100 * (label_ranks(logits, y) >= TOP).double().mean().item()
    return found


NUMBERS = {
    "error": Metric("error", "%", 2, "share of wrong predictions"),
    "nll": Metric("NLL", "nats", 3, "mean cross-entropy: how improbable the network thought the true classes"),
    "ece": Metric("ECE", "%", 2, "expected calibration error: mean gap between confidence and accuracy, 15 bins"),
    "brier": Metric(
        "Brier score", "", 4, "mean squared distance of the probabilities from the true class, summed over classes: 0-2"
    ),
    "top5_error": Metric("top-5 error", "%", 2, "share of examples whose true class is not among the five most likely"),
}
SPLITS = {"test": "test", "validation": "validation", "train": "training"}

MEASURES: tuple[Measure, ...] = (
    Measure(
        name="classification",
        title="error, top-5 error, NLL, Brier score and calibration error of every split",
        source="Brier 1950; Guo et al. 2017, equation 3",
        options=NoOptions,
        compute=compute,
        metrics={
            f"{part}_{kind}": Metric(f"{words} {number.title}", number.unit, number.digits, number.meaning)
            for part, words in SPLITS.items()
            for kind, number in NUMBERS.items()
        },
        always=True,
    ),
)
