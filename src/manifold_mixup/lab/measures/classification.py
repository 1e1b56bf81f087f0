"""Error, likelihood and calibration of a classifier."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from manifold_mixup.lab.errors import LabError, MissingExtra
from manifold_mixup.lab.measures.inference import predicted_labels, predicted_logits

__all__ = ["BINS", "evaluate"]

BINS = 15


def evaluate(
    model: nn.Module, x: Tensor, y: Tensor, *, prefix: str = "test", batch_size: int = 1000
) -> dict[str, float]:
    """Measure a classifier on labelled examples, in evaluation mode; the mode of every module is put back afterwards.

    ``{prefix}_error``
        Share of wrong predictions, in percent.
    ``{prefix}_nll``
        Mean cross-entropy of the softmax, in nats.
    ``{prefix}_ece``
        Expected calibration error in percent: the mean distance between confidence and accuracy over 15 bins of equal
        width of the top probability, weighted by their counts (Guo et al. 2017, "On Calibration of Modern Neural
        Networks", equation 3; computed by torchmetrics' ``multiclass_calibration_error`` with ``norm="l1"``, for two
        classes as for more).

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
    if y.ndim != 1 or len(x) != len(y) or y.is_floating_point():
        found = f"{tuple(y.shape)} of {y.dtype}"
        raise ValueError(f"y has to hold one class index per row of x, shape ({len(x)},) of whole numbers, not {found}")
    logits = predicted_logits(model, x, batch_size)
    y = y.long().cpu()
    classes = logits.shape[1]
    if not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(
            f"labels run from {int(y.min())} to {int(y.max())}, but the network tells {classes} classes apart"
        )
    return {
        f"{prefix}_error": 100 * (predicted_labels(logits) != y).double().mean().item(),
        f"{prefix}_nll": F.cross_entropy(logits, y).item(),
        f"{prefix}_ece": 100 * _calibration_error(logits, y),
    }


def _calibration_error(logits: Tensor, y: Tensor) -> float:
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
    return float(multiclass_calibration_error(probabilities, y, num_classes=logits.shape[1], n_bins=BINS, norm="l1"))
