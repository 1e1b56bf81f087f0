"""What the pictures of the paper's spiral show, as numbers, and the arrays that the pictures are drawn from.

The measures:

``train_accuracy``, ``test_accuracy``
    Percent of right predictions; the test points are fresh points of the spiral.
``low_confidence_share``
    Percent of the square [-15, 15]² where the larger of the two probabilities is below 0.9, on the centres of 400 x
    400 cells.
``within_between_ratio``
    Within-class over between-class scatter of the bottleneck's outputs for the training points:
    :func:`within_between_ratio`.
``margin``
    Smallest distance, in input units, from a training point to where the network predicts another class than that
    point's, and 0 if a training point is misclassified:
    :func:`~manifold_mixup.lab.measures.margin.decision_margin`.

The pictures are arrays for a safetensors file:

==================== ================ =====================================================================
``surface``          (200, 200) f16   probability of class 1, averaged over 2 x 2 cells; rows go up in x2
``extent``           (4,) f32         the surface's left, right, bottom and top edge
``train_x``          (n, 2) f32       training points
``train_y``          (n,) i64         their classes
``train_hidden``     (n, 2) f32       outputs of the bottleneck for them
``uniform_hidden``   (2000, 2) f32    outputs of the bottleneck for inputs drawn uniformly from the square
``uniform_top``      (2000,) f32      the larger of the two probabilities for those inputs
==================== ================ =====================================================================
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from manifold_mixup.lab import streams
from manifold_mixup.lab.measures.inference import evaluation_mode, predicted_labels, predicted_logits
from manifold_mixup.lab.measures.margin import decision_margin

__all__ = ["BOTTLENECK", "CONFIDENCE", "HALF_WIDTH", "spiral_measures", "within_between_ratio"]

BOTTLENECK = "bottleneck"
HALF_WIDTH = 15.0  # the paper's axes run from -15 to 15
CELLS = 400
POOL = 2
CONFIDENCE = 0.9
UNIFORM = 2000
BATCH = 4000


def spiral_measures(
    model: nn.Module, train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, seed: int
) -> tuple[dict[str, float], dict[str, npt.NDArray[np.generic]]]:
    """Measure a two-class network on the plane, and collect what its pictures need.

    Everything is measured in evaluation mode on unmixed inputs, and the mode of every module is put back. What is
    measured, and which arrays the pictures are, is said at the top of this module.

    A prediction that is not a number (a network that diverged) counts as wrong; shares and ratios it enters are NaN.

    Args:
        model: Maps points ``(n, 2)`` to two logits each; its submodule ``bottleneck`` runs once per forward pass and
            returns the hidden state ``(n, 2)``. It may be wrapped, as long as one module's name ends in ``bottleneck``.
        train_x: Training points, shape ``(n, 2)``.
        train_y: Their classes, 0 or 1, shape ``(n,)``; both classes occur.
        test_x: Test points, shape ``(m, 2)``.
        test_y: Their classes.
        seed: The run's seed, from which the uniform inputs are drawn.

    Returns:
        The measures and the pictures.

    Raises:
        ValueError: The shapes do not fit, a class is missing, or the network has no such bottleneck.
    """
    train_x, train_y, test_x, test_y = (t.detach().cpu() for t in (train_x, train_y, test_x, test_y))
    if sorted(set(train_y.tolist())) != [0, 1] or train_x.ndim != 2 or train_x.shape[1] != 2:
        raise ValueError("the spiral's measures need training points in the plane, of the two classes 0 and 1")
    logits, train_hidden = _with_hidden(model, train_x)
    uniform = (2 * torch.rand(UNIFORM, 2, generator=streams.generator(seed, "measures/uniform")) - 1) * HALF_WIDTH
    uniform_logits, uniform_hidden = _with_hidden(model, uniform.to(train_x.dtype))
    grid = predicted_logits(model, _cell_centres().to(train_x.dtype), BATCH).softmax(dim=1)
    metrics = {
        "train_accuracy": _accuracy(logits, train_y),
        "test_accuracy": _accuracy(predicted_logits(model, test_x, BATCH), test_y),
        "low_confidence_share": _low_confidence_share(grid),
        "within_between_ratio": within_between_ratio(train_hidden, train_y),
        "margin": decision_margin(
            lambda points: predicted_labels(predicted_logits(model, points, BATCH)), train_x, train_y
        ),
    }
    pictures = {
        **_surface(grid),
        "train_x": train_x.float().numpy(),
        "train_y": train_y.long().numpy(),
        "train_hidden": train_hidden.numpy(),
        "uniform_hidden": uniform_hidden.numpy(),
        "uniform_top": uniform_logits.softmax(dim=1).amax(dim=1).float().numpy(),
    }
    return metrics, pictures


def within_between_ratio(hidden: Tensor, labels: Tensor) -> float:
    """How spread out the classes are, compared with the distance between them.

    The trace of the within-class scatter Σ_c Σ_{i in c} |h_i - m_c|², over the trace of the between-class scatter Σ_c
    n_c |m_c - m|², where m_c is the mean of class c, n_c its size and m the mean of all: the inverse of a classical
    criterion of class separability (Fukunaga 1990, "Introduction to Statistical Pattern Recognition", section 10.2). It
    does not change when the hidden states are shifted, turned or scaled, so it can be compared across networks.

    Args:
        hidden: Hidden states, shape ``(n, features)``.
        labels: Classes, shape ``(n,)``.

    Returns:
        The ratio; infinite if all class means coincide, NaN if all hidden states do or one of them is not finite.

    Raises:
        ValueError: There are fewer than two classes, or the shapes do not fit.
    """
    classes = sorted(set(labels.tolist()))
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1] or len(classes) < 2:
        found = f"{tuple(hidden.shape)} of {len(classes)}"
        raise ValueError(f"hidden states (n, features) of at least two classes are needed, not {found}")
    hidden = hidden.double()
    if not hidden.isfinite().all():
        return math.nan
    centre = hidden.mean(dim=0)
    within = between = 0.0
    for label in classes:
        rows = hidden[labels == label]
        mean = rows.mean(dim=0)
        within += float((rows - mean).square().sum())
        between += len(rows) * float((mean - centre).square().sum())
    if between == 0:
        return math.nan if within == 0 else math.inf
    return within / between


def _cell_centres() -> Tensor:
    """The centres of the square's cells, row by row from the bottom left, shape ``(CELLS * CELLS, 2)``, float64."""
    axis = ((torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS * 2 - 1) * HALF_WIDTH
    x2, x1 = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x1.reshape(-1), x2.reshape(-1)], dim=1)


def _surface(probabilities: Tensor) -> dict[str, npt.NDArray[np.generic]]:
    side = CELLS // POOL
    surface = probabilities[:, 1].reshape(side, POOL, side, POOL).mean(dim=(1, 3))
    edges = [-HALF_WIDTH, HALF_WIDTH, -HALF_WIDTH, HALF_WIDTH]
    return {"surface": surface.numpy().astype(np.float16), "extent": np.asarray(edges, dtype=np.float32)}


def _low_confidence_share(probabilities: Tensor) -> float:
    top = probabilities.amax(dim=1)
    return math.nan if top.isnan().any() else 100 * (top < CONFIDENCE).double().mean().item()


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * (predicted_labels(logits) == labels).double().mean().item()


def _with_hidden(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the bottleneck's outputs for ``x``, in one forward pass."""
    named = [module for name, module in model.named_modules() if name.split(".")[-1] == BOTTLENECK]
    if len(named) != 1:
        raise ValueError(f"the network needs exactly one submodule named {BOTTLENECK!r}, not {len(named)}")
    seen: list[Tensor] = []
    handle = named[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        with evaluation_mode(model):
            logits = predicted_logits(model, x, batch_size=len(x))
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].shape != (len(x), 2):
        shapes = [tuple(hidden.shape) for hidden in seen]
        raise ValueError(
            f"{BOTTLENECK!r} has to run once and return ({len(x)}, 2) hidden states; its outputs had shapes {shapes}"
        )
    return logits, seen[0].detach().float().cpu()
