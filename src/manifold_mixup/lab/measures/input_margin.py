"""How little an input has to change before the prediction does, for any data and any number of classes.

``input_margin``
    A first-order estimate of the distance to the decision boundary: the least (f_y - f_j) / |grad (f_y - f_j)| over the
    other classes j, where f are the logits and y is the true class (the first step of DeepFool, Moosavi-Dezfooli et al.
    2016, equation 8). Exact for a linear classifier, else neither a bound from above nor from below.
``line_margin``
    An upper bound that was reached: how far along the line to the nearest example of another class the prediction
    changes.
``logit_margin``
    The logit of the true class minus the largest other one; below 0 if the example is misclassified.

All are means over examples. Distances are Euclidean, in the units of stored examples, where white is 1 for images; both
are 0 for an example that is misclassified.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from manifold_mixup.lab import streams
from manifold_mixup.lab.data.base import Examples
from manifold_mixup.lab.measures.base import Measure, Metric, Subject
from manifold_mixup.lab.measures.hidden import Split, split_of
from manifold_mixup.lab.measures.inference import evaluation_mode, predicted_labels
from manifold_mixup.lab.options import Options

__all__ = ["MEASURES", "InputMarginOptions", "first_order_margins", "line_margins", "logit_margins"]

GRADIENT_BATCH = 100  # examples whose graph is kept at a time
BLOCK = 1000  # examples that distances are taken to at a time
HALVINGS = 24


class InputMarginOptions(Options):
    """Which examples, and how many other classes."""

    split: Split = Field(default="test", description="which examples: test, validation or train")
    examples: int = Field(default=500, ge=1, description="examples, drawn, or as many as there are")
    rivals: int = Field(
        default=9, ge=1, description="input_margin: the other classes that are tried, those of the largest logits"
    )


def logit_margins(logits: Tensor, y: Tensor) -> Tensor:
    """The logit of the true class minus the largest of the others, ``(n,)``.

    Args:
        logits: ``(n, classes)``.
        y: True classes, ``(n,)``.
    """
    own = y[:, None]
    return (logits.gather(1, own) - logits.scatter(1, own, -math.inf).amax(dim=1, keepdim=True)).squeeze(1)


def first_order_margins(subject: Subject, x: Tensor, y: Tensor, rivals: int = 9) -> Tensor:
    """Distance from each example to the decision boundary of the network linearised there.

    Args:
        subject: The network.
        x: Examples in floating point, images from 0 to 1, ``(n, *shape)``.
        y: Their true classes, ``(n,)``.
        rivals: How many other classes are tried, those of the largest logits; one backward pass each.

    Returns:
        ``(n,)`` float64, on the CPU: 0 where another class has the logit of the true one or more, infinite where the
        logits do not change with the input or rule all other classes out, NaN where they are no numbers.
    """
    size = min(subject.batch_size, GRADIENT_BATCH)
    found = [torch.zeros(0, dtype=torch.float64)]
    with evaluation_mode(subject.model), torch.enable_grad():
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            found.append(_linearised(subject, x[rows], y[rows], rivals))
    return torch.cat(found)


def _linearised(subject: Subject, x: Tensor, y: Tensor, rivals: int) -> Tensor:
    x = x.detach().to(subject.device).requires_grad_()
    own = y.to(subject.device)[:, None]
    logits = subject.model(subject.prepare(x.clone()))  # a network may change its input in place
    others = torch.arange(logits.shape[1] - 1, device=own.device).expand(len(x), -1)
    others = others + (others >= own)  # every class but the true one
    largest = logits.detach().gather(1, others).topk(min(rivals, others.shape[1]), dim=1).indices
    nearest = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    for other in torch.split(others.gather(1, largest), 1, dim=1):
        gap = (logits.gather(1, own) - logits.gather(1, other)).squeeze(1)
        slope = torch.zeros_like(nearest)
        if gap.requires_grad:
            (gradient,) = torch.autograd.grad(gap.sum(), x, retain_graph=True, allow_unused=True)
            slope = slope if gradient is None else gradient.flatten(1).double().norm(dim=1)
        height = gap.detach().double().clamp(min=0)
        distance = torch.where((height == 0) | (height == math.inf), height, height / slope)
        nearest = torch.where(distance.isnan(), distance, torch.minimum(nearest, distance))
    return nearest.cpu()


def line_margins(subject: Subject, x: Tensor, y: Tensor, ends: Tensor, end_y: Tensor, end_labels: Tensor) -> Tensor:
    """How far along the line to the nearest example of another class the prediction changes.

    The nearest one is sought among those of another class that are also predicted as one, so that the prediction does
    change. The change is located by bisection, to 2**-24 of the line; where there are several, it is one of them.

    Args:
        subject: The network.
        x: Examples that are predicted right, in floating point, images from 0 to 1, ``(n, *shape)``.
        y: Their classes, ``(n,)``.
        ends: The examples that lines lead to, as stored, ``(m, *shape)``.
        end_y: Their true classes, ``(m,)``.
        end_labels: Their predicted classes, ``(m,)``.

    Returns:
        ``(n,)`` float64: infinite where there is no such example.
    """
    nearest = torch.full((len(x),), math.inf, dtype=torch.float64)
    place = torch.zeros(len(x), dtype=torch.long)
    points = x.flatten(1).double()
    for start in range(0, len(ends), BLOCK):
        rows = slice(start, start + BLOCK)
        distances = torch.cdist(points, _units(ends[rows]).flatten(1).double())
        same = (end_y[rows] == y[:, None]) | (end_labels[rows] == y[:, None])
        least, index = distances.masked_fill(same, math.inf).min(dim=1)
        place = torch.where(least < nearest, index + start, place)
        nearest = torch.minimum(nearest, least)
    there = nearest.isfinite()
    if not there.any():
        return nearest
    origin, step, own = x[there], _units(ends[place[there]]) - x[there], y[there]
    low, high = torch.zeros(len(own)), torch.ones(len(own))
    shape = (-1, *[1] * (x.ndim - 1))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        changed = predicted_labels(subject.predict(origin + middle.to(x.dtype).view(shape) * step)) != own
        low, high = torch.where(changed, low, middle), torch.where(changed, middle, high)
    nearest[there] = high.double() * step.flatten(1).double().norm(dim=1)
    return nearest


def _units(x: Tensor) -> Tensor:
    """Stored examples in floating point, images from 0 to 1."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def compute(subject: Subject, options: InputMarginOptions) -> dict[str, float]:
    """The three means; all NaN if a prediction is no number."""
    examples = split_of(subject, options.split)
    drawn = examples
    if options.examples < len(examples):
        generator = streams.generator(subject.seed, f"measures/input_margin/{options.split}")
        rows = torch.randperm(len(examples), generator=generator)[: options.examples]
        drawn = Examples(examples.x[rows], examples.y[rows])
    x, y = _units(drawn.x), drawn.y
    logits = subject.predict(x)
    labels = predicted_labels(logits)
    if bool((labels < 0).any()):
        return dict.fromkeys(("input_margin", "line_margin", "logit_margin"), math.nan)
    right = labels == y
    x, y = x[right], y[right]
    estimates = first_order_margins(subject, x, y, options.rivals)
    lines = line_margins(subject, x, y, examples.x, examples.y, predicted_labels(subject.logits(options.split)))
    return {
        "input_margin": float(estimates.sum()) / len(drawn),
        "line_margin": float(lines.sum()) / len(drawn),
        "logit_margin": float(logit_margins(logits, drawn.y).mean()),
    }


MEASURES: tuple[Measure, ...] = (
    Measure(
        name="input_margin",
        title="distance to the decision boundary: first-order estimate, along lines between classes, and of logits",
        source="Moosavi-Dezfooli et al. 2016, equation 8; lines and logits are the lab's own",
        options=InputMarginOptions,
        compute=compute,
        metrics={
            "input_margin": Metric(
                "input margin", "", 4, "mean estimate of the least change of an input that changes the prediction"
            ),
            "line_margin": Metric(
                "line margin",
                "",
                4,
                "mean distance, towards the nearest example of another class, to another prediction",
            ),
            "logit_margin": Metric("logit margin", "", 3, "mean logit of the true class minus the largest other one"),
        },
    ),
)
