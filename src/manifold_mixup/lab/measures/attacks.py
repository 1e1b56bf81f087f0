r"""Accuracy on test images that were changed to mislead the network: white-box attacks within a small box.

Both attacks know the network and the true class, and raise the loss of the true class. No pixel changes by more than
ε. The paper's Table 7 does not state its ε; sizes and units are therefore part of every name.

``fgsm_E_accuracy``
    The fast gradient sign method (Goodfellow et al. 2015): one step of ε = E/255 along the sign of the gradient, where
    white is 1, cut to valid pixels.
``fgsm_normalised_E_accuracy``
    The same with ε = E in normalised units, that is E standard deviations of the channel, not cut: the form that is
    left of the authors' code, with E from 0.01 to 0.1. On CIFAR-10 0.03 is about 1.9/255.
``pgdN_E_accuracy``
    Projected gradient descent (Madry et al. 2018): from a random start in the box, N steps along the sign of the
    gradient, each cut to the box of half-width ε = E/255 and to valid pixels. What counts is where it ends; with
    several restarts the network has to be right at the end of each.

A network in evaluation mode is attacked. A pixel whose gradient is 0 or no number does not change. With the
cross-entropy it is the log-odds against the true class that are raised: their gradient has the same direction, but does
not vanish where the network is so sure that its probability rounds to 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PlainValidator
from torch import Tensor

from manifold_mixup.lab import streams
from manifold_mixup.lab.criterion import bce_softmax
from manifold_mixup.lab.measures.base import Measure, Metric, Subject
from manifold_mixup.lab.measures.inference import evaluation_mode, predicted_labels
from manifold_mixup.lab.measures.settings import NUMBER, FirstOptions, Numbers, first_of_test, written

__all__ = ["MEASURES", "FgsmOptions", "Loss", "PgdOptions", "fgsm", "loss_gradient", "pgd"]

WHITE = 255
GRADIENT_BATCH = 100  # examples whose graph is kept at a time

Loss = Literal["cross-entropy", "bce-softmax"]


def _steps(value: Any) -> list[int]:
    """One count of steps, a list of them, or ``7+20``, the form of the command line."""
    if isinstance(value, str):
        value = [int(part) if part.strip().isdecimal() else part for part in value.split("+")]
    counts = list(value) if isinstance(value, (list, tuple)) else [value]
    if not counts or not all(type(count) is int and count > 0 for count in counts):
        raise ValueError("should be one or more whole numbers above 0, such as [7, 20] or 7+20")
    return sorted(set(counts))


class AttackOptions(FirstOptions):
    """What both attacks have in common."""

    loss: Loss = Field(
        default="cross-entropy", description="what is raised: cross-entropy, or bce-softmax, the authors'"
    )


class FgsmOptions(AttackOptions):
    """How far the one step goes."""

    epsilon: Numbers = Field(default=[1, 2, 4, 8], description="sizes in 255ths of white, joined by +, or none")
    normalised: Numbers = Field(default=[0.03], description="sizes in normalised units, joined by +, or none")


class PgdOptions(AttackOptions):
    """How the box is searched; the defaults are Madry et al.'s for CIFAR-10."""

    epsilon: Numbers = Field(default=[8], description="sizes of the box in 255ths of white, joined by +")
    step: float = Field(default=2.0, gt=0, description="length of a step in 255ths of white")
    steps: Annotated[list[int], PlainValidator(_steps)] = Field(
        default=[7, 20], description="after how many steps the network is measured, joined by +"
    )
    restarts: int = Field(default=1, ge=1, description="random starts; the network has to be right after each")
    seed: int = Field(default=0, ge=0, description="of the random starts, the same for all networks")


def loss_gradient(subject: Subject, x: Tensor, y: Tensor, loss: Loss = "cross-entropy") -> Tensor:
    """The gradient of each example's loss with respect to its pixels, up to a positive factor for each example.

    The network runs in evaluation mode. Gradients of its parameters are neither computed nor touched.

    Args:
        subject: The network.
        x: Images from 0 to 1 in floating point, ``(n, channels, height, width)``, on the network's device.
        y: True classes, ``(n,)``, on the same device.
        loss: Which loss.

    Returns:
        Of the shape and dtype of ``x``, without a graph: for the cross-entropy its gradient divided by the probability
        that the network leaves to the other classes; 0 where the output does not depend on the input.
    """
    with evaluation_mode(subject.model), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        logits = subject.model(subject.prepare(x)).double()
        # sums, not means: the gradient of one example must not depend on how many are in its batch
        if loss == "cross-entropy":
            own = y[:, None]
            value = (logits.scatter(1, own, -math.inf).logsumexp(dim=1) - logits.gather(1, own).squeeze(1)).sum()
        else:
            value = bce_softmax(logits, y) * len(x)
        if not value.requires_grad:
            return torch.zeros_like(x, requires_grad=False)
        (gradient,) = torch.autograd.grad(value, x, allow_unused=True, materialize_grads=True)
    return gradient


def fgsm(x: Tensor, gradient: Tensor, epsilon: Tensor | float, *, clamp: bool = True) -> Tensor:
    """One step along the sign of the gradient.

    Args:
        x: Images from 0 to 1.
        gradient: From :func:`loss_gradient`; one gradient serves all sizes.
        epsilon: How far, in the units of ``x``: one number, or ``(channels, 1, 1)``.
        clamp: Whether the result is cut to 0 to 1.
    """
    moved: Tensor = x + epsilon * gradient.sign()
    return moved.clamp(0, 1) if clamp else moved


def pgd(
    subject: Subject,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step: float,
    steps: int,
    start: Tensor | None = None,
    loss: Loss = "cross-entropy",
) -> Iterator[Tensor]:
    """The images after each step of projected gradient descent.

    Args:
        subject: The network.
        x: Images from 0 to 1 in floating point, on the network's device.
        y: True classes.
        epsilon: Half-width of the box around each image, in the units of ``x``.
        step: Length of a step.
        steps: How many.
        start: Where in the box to start, from -1 to 1 for each pixel; None starts at ``x``.
        loss: Which loss is raised.
    """
    low, high = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    at = x if start is None else (x + epsilon * start).clamp(0, 1)
    for _ in range(steps):
        at = (at + step * loss_gradient(subject, at, y, loss).sign()).clamp(low, high)
        yield at


def compute_fgsm(subject: Subject, options: FgsmOptions) -> dict[str, float]:
    """Accuracy at every size."""
    sizes: list[tuple[str, Tensor | float, bool]]
    sizes = [(f"fgsm_{written(size)}_accuracy", size / WHITE, True) for size in options.epsilon]
    pixels = subject.info.pixels  # None: images that are read as they are, whose unit is white
    sd = torch.tensor((1.0,) if pixels is None else pixels.sd, device=subject.device)[:, None, None]
    for size in options.normalised:
        sizes.append((f"fgsm_normalised_{written(size)}_accuracy", size * sd, False))
    right = dict.fromkeys((name for name, _, _ in sizes), 0)
    total = 0
    for x, y in _batches(subject, options):
        gradient = loss_gradient(subject, x, y, options.loss)
        for name, epsilon, clamp in sizes:
            right[name] += int(_right(subject, fgsm(x, gradient, epsilon, clamp=clamp), y).sum())
        total += len(x)
    return {name: 100 * count / total for name, count in right.items()}


def compute_pgd(subject: Subject, options: PgdOptions) -> dict[str, float]:
    """Accuracy for every size of the box after every number of steps; the longest attack passes through the others."""
    found: dict[str, float] = {}
    for epsilon in options.epsilon:
        generators = [streams.generator(options.seed, f"measures/pgd/{i}") for i in range(options.restarts)]
        right = dict.fromkeys(options.steps, 0)
        total = 0
        for x, y in _batches(subject, options):
            survived = {steps: torch.ones(len(x), dtype=torch.bool) for steps in options.steps}
            for generator in generators:
                start = (2 * torch.rand(x.shape, generator=generator) - 1).to(x.device)
                path = pgd(
                    subject,
                    x,
                    y,
                    epsilon=epsilon / WHITE,
                    step=options.step / WHITE,
                    steps=max(options.steps),
                    start=start,
                    loss=options.loss,
                )
                for steps, at in enumerate(path, 1):
                    if steps in survived:
                        survived[steps] &= _right(subject, at, y)
            for steps in right:
                right[steps] += int(survived[steps].sum())
            total += len(x)
        found |= {f"pgd{steps}_{written(epsilon)}_accuracy": 100 * count / total for steps, count in right.items()}
    return found


def _batches(subject: Subject, options: AttackOptions) -> Iterator[tuple[Tensor, Tensor]]:
    """Test images from 0 to 1 and their classes, on the network's device."""
    test = first_of_test(subject, options)
    size = min(subject.batch_size, GRADIENT_BATCH)
    for start in range(0, len(test), size):
        rows = slice(start, start + size)
        x = test.x[rows].to(subject.device)
        yield x.float() / WHITE if x.dtype == torch.uint8 else x, test.y[rows].to(subject.device)


def _right(subject: Subject, x: Tensor, y: Tensor) -> Tensor:
    """Which predictions are right, ``(n,)``, on the CPU; one without probabilities is not."""
    return predicted_labels(subject.predict(x)) == y.cpu()


MEANING = "share of test images that are still predicted right after"

MEASURES: tuple[Measure, ...] = (
    Measure(
        name="fgsm",
        title="accuracy under the fast gradient sign method, a white-box attack of one step",
        source="Goodfellow et al. 2015; Verma et al. 2019, Table 7, states no size",
        options=FgsmOptions,
        compute=compute_fgsm,
        metrics={
            rf"fgsm_{NUMBER}_accuracy": Metric(
                r"accuracy, FGSM \1/255", "%", 2, f"{MEANING} one misleading step; in 255ths of white"
            ),
            rf"fgsm_normalised_{NUMBER}_accuracy": Metric(
                r"accuracy, FGSM \1 normalised",
                "%",
                2,
                f"{MEANING} one misleading step; in standard deviations of each channel, beyond valid pixels too",
            ),
        },
        needs=("images",),
    ),
    Measure(
        name="pgd",
        title="accuracy under projected gradient descent, a white-box attack of several steps",
        source="Madry et al. 2018",
        options=PgdOptions,
        compute=compute_pgd,
        metrics={
            rf"pgd(\d+)_{NUMBER}_accuracy": Metric(
                r"accuracy, PGD-\1 \2/255", "%", 2, f"{MEANING} several misleading steps"
            ),
        },
        needs=("images",),
    ),
)
