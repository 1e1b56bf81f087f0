"""What is left of theorem and corollary when the head is not affine: trained networks.

The proofs take an affine head. A deep head can bend, so it need not force the representations to be flat: here the same
quantities are measured, not demanded, on representations that were trained in six ways. What is demanded is of the
controls: plain training and input mixup, which fit all training examples, must leave classes that are far from flat, or
else the numbers would show nothing.

Representations are free parameters, or the bottleneck of a small network that reads Gaussian clouds, one a class. Heads
have two hidden layers. Training is Adam on all examples at once, in float64; mixing draws a permutation each step and λ
for each pair. From cross-entropy the entropy of the mixed target is subtracted: its least value is 0, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from manifold_mixup.lab import streams
from manifold_mixup.lab.theory_checks import (
    ALPHA,
    Check,
    at_least,
    flatness,
    labels,
    measured,
    moved_outputs,
    one_hot,
    segment_deviations,
)
from manifold_mixup.pairing import draw_lam

__all__ = [
    "SETTINGS",
    "SHAPES",
    "Perceptron",
    "Setting",
    "Trained",
    "deep_checks",
    "losses",
    "minimise",
    "train",
]

SHAPES = ((3, 2), (5, 8))  # one with dim = d - 1, one with room for a spread
STEPS, RATE = 600, 0.01
WIDTH = 64
EXAMPLES = 20  # of each class
INPUTS, DISTANCE, NOISE = 10, 3.0, 1.0  # clouds: numbers an example, distance of their centres from 0, deviation
MARGIN = 0.05  # what a control has to exceed; an affine head is held to 1e-9 in the same units
DRAWS = 4000  # mixtures that a loss is measured on after training

Loss = Literal["squared error", "cross-entropy"]
Mode = Literal["plain", "input mixup", "manifold mixup"]
STATEMENTS = {
    "loss": "the loss that was trained, on fresh mixtures; its least value is 0",
    "spread": "spread of a class / distance between classes",
    "excess": "the part of the spread outside dim - d + 1 directions",
    "effective rank": "effective rank of a centred class",
    "moved": "change of outputs by the difference of two examples of a class, root mean square",
    "segments": "distance from the mixed targets on segments between classes, root mean square",
    "bent": "distance from the mixed outputs of the segment's ends, root mean square",
}


class Perceptron:
    """A network of linear layers in float64, drawn from a generator.

    Args:
        sizes: Numbers per example: of the input, of each hidden layer, of the output.
        generator: Draws the weights, uniformly within sqrt(3 / inputs of the layer); biases are 0.
        activation: Between the layers.
    """

    def __init__(
        self, sizes: list[int], generator: torch.Generator, activation: Callable[[Tensor], Tensor] = torch.tanh
    ) -> None:
        self.layers = [
            (
                ((torch.rand(n_out, n_in, generator=generator, dtype=torch.float64) * 2 - 1) * math.sqrt(3 / n_in)),
                torch.zeros(n_out, dtype=torch.float64),
            )
            for n_in, n_out in pairwise(sizes)
        ]
        self.activation = activation
        for parameter in self.parameters():
            parameter.requires_grad_()

    def parameters(self) -> list[Tensor]:
        """Weights and biases of all layers."""
        return [parameter for layer in self.layers for parameter in layer]

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs ``(n, sizes[-1])`` of ``(n, sizes[0])``."""
        *hidden, last = self.layers
        for weight, bias in hidden:
            x = self.activation(F.linear(x, weight, bias))
        return F.linear(x, *last)


@dataclass(frozen=True)
class Setting:
    """One way of training: what the representations are, what is mixed, and the loss."""

    network: bool
    mode: Mode
    loss: Loss

    @property
    def title(self) -> str:
        """``network, input mixup, cross-entropy``."""
        return f"{'network' if self.network else 'free representations'}, {self.mode}, {self.loss}"

    @property
    def control(self) -> bool:
        """Whether it is one of those that must not flatten."""
        return self.mode != "manifold mixup"


MODES: tuple[Mode, ...] = get_args(Mode)
LOSSES: tuple[Loss, ...] = get_args(Loss)
SETTINGS = tuple(
    Setting(network, mode, loss)
    for network in (False, True)
    for loss in LOSSES
    for mode in MODES
    if network or mode != "input mixup"  # free representations have no input
)


@dataclass(frozen=True)
class Trained:
    """What a training left.

    Attributes:
        states: Representations of the training examples, ``(n, dim)``.
        y: Their classes, sorted.
        head: From representations to outputs of the size of targets: with cross-entropy, probabilities.
        loss: What was minimised, on fresh mixtures.
        wrong: Training examples that are misclassified.
    """

    states: Tensor
    y: Tensor
    head: Callable[[Tensor], Tensor]
    loss: float
    wrong: int


def losses(outputs: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    """The loss of every example, 0 if its output is its target.

    Args:
        outputs: ``(n, d)``; logits for cross-entropy.
        targets: ``(n, d)``, mixtures of one-hot rows.
        loss: Squared error, summed over outputs; or cross-entropy minus the entropy of the target, in nats.
    """
    if loss == "squared error":
        return (outputs - targets).square().sum(dim=1)
    floor: Tensor = torch.special.entr(targets).sum(dim=1)
    return -(targets * outputs.log_softmax(dim=1)).sum(dim=1) - floor


def train(setting: Setting, d: int, dim: int, seed: int, steps: int = STEPS) -> Trained:
    """Train representations and a deep head together.

    Networks and clouds, or first representations, and heads are the same for all settings of a seed.

    Args:
        setting: Representations, mixing and loss.
        d: Number of classes, at most 10.
        dim: Dimension of the representations.
        seed: Of everything that is drawn.
        steps: Steps of Adam; the rate falls along half a cosine.
    """
    generator = streams.generator(seed, f"theory/deep/{d}/{dim}")
    y = labels([EXAMPLES] * d)
    targets = one_hot(y, d)
    head = Perceptron([dim, WIDTH, WIDTH, d], generator)
    if setting.network:
        basis = torch.linalg.qr(torch.randn(INPUTS, INPUTS, generator=generator, dtype=torch.float64)).Q
        noise = torch.randn(len(y), INPUTS, generator=generator, dtype=torch.float64)
        x = DISTANCE * basis[:d][y] + NOISE * noise
        encoder = Perceptron([INPUTS, WIDTH, dim], generator)
        encode: Callable[[Tensor], Tensor] = encoder
        parameters = [*head.parameters(), *encoder.parameters()]
    else:
        x = torch.randn(len(y), dim, generator=generator, dtype=torch.float64).requires_grad_()
        encode = _itself
        parameters = [*head.parameters(), x]
    mixing = streams.generator(seed, f"theory/deep/{d}/{dim}/mixing")

    def batch_losses(copies: int = 1) -> Tensor:
        """Losses of all examples, ``copies`` times mixed anew."""
        inputs, wanted = x.repeat(copies, 1), targets.repeat(copies, 1)
        if setting.mode == "plain":
            return losses(head(encode(inputs)), wanted, setting.loss)
        partner = torch.randperm(len(wanted), generator=mixing)
        lam = draw_lam(ALPHA, mixing, len(wanted)).unsqueeze(1)
        wanted = lam * wanted + (1 - lam) * wanted[partner]
        if setting.mode == "input mixup":
            states = encode(lam * inputs + (1 - lam) * inputs[partner])
        else:
            states = encode(inputs)
            states = lam * states + (1 - lam) * states[partner]
        return losses(head(states), wanted, setting.loss)

    minimise(lambda: batch_losses().mean(), parameters, steps)
    with torch.no_grad():
        states = encode(x).detach()
        loss = float(batch_losses(-(-DRAWS // len(y))).mean())
        wrong = int((head(states).argmax(dim=1) != y).sum())

    def outputs(states: Tensor) -> Tensor:
        return head(states) if setting.loss == "squared error" else head(states).softmax(dim=1)

    return Trained(states, y, outputs, loss, wrong)


def _itself(x: Tensor) -> Tensor:
    return x


def minimise(objective: Callable[[], Tensor], parameters: list[Tensor], steps: int) -> None:
    """Adam with a rate that falls from RATE to 0 along half a cosine.

    Args:
        objective: The loss of one step.
        parameters: What it depends on, leaves that require a gradient.
        steps: How many.
    """
    optimizer = torch.optim.Adam(parameters, lr=RATE, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        objective().backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def deep_checks(setting: Setting, d: int, dim: int, seed: int, steps: int = STEPS) -> Iterator[Check]:
    """Train in one way, measure, and demand of a control that it is not flat.

    Args:
        setting: Representations, mixing and loss.
        d: Number of classes.
        dim: Dimension of the representations, at least d - 1.
        seed: Of everything that is drawn.
        steps: See :func:`train`.
    """
    trained = train(setting, d, dim, seed, steps)
    generator = streams.generator(seed, f"theory/deep/{d}/{dim}/measures")
    where = (d, dim, seed)
    states, y, targets = trained.states, trained.y, one_hot(trained.y, d)
    flat = flatness(states, y, d)
    moved = _root_mean_square(moved_outputs(trained.head, states, y, generator))
    wrong, bent = segment_deviations(trained.head, states, y, targets, generator)
    found = {
        "loss": trained.loss,
        "spread": flat.spread,
        "excess": flat.excess,
        "effective rank": flat.effective_rank,
        "moved": moved,
        "segments": _root_mean_square(wrong),
        "bent": _root_mean_square(bent),
    }
    for name, value in found.items():
        yield measured(name, STATEMENTS[name], where, value, setting=f"{setting.title}, deep head")
    if setting.control:
        note = f"{setting.title}: loss {trained.loss:.1e}, {trained.wrong} of {len(y)} misclassified, rank {flat.rank}"
        yield from _control(setting, where, found, trained.wrong == 0, note)


def _control(
    setting: Setting, where: tuple[int, int, int], found: dict[str, float], fitted: bool, note: str
) -> Iterator[Check]:
    """The consequences (c) to (e), which a control has to violate by far, and (b)."""
    d, dim, _ = where
    mode = "plain training" if setting.mode == "plain" else setting.mode
    demands = {"control moved": ("moved", "does not force (e): moving within a class changes outputs")}
    if dim == d - 1:
        demands["control spread"] = ("spread", "does not force (d): a class is no point")
    else:
        demands["control excess"] = ("excess", "does not force (c): spread outside dim - d + 1 directions")
    demands["control segments"] = ("segments", "does not force (b): outputs on segments are not the mixed targets")
    for name, (quantity, statement) in demands.items():
        yield at_least(
            name,
            f"(f) {mode} {statement}",
            where,
            found[quantity],
            MARGIN,
            provided=fitted,
            note=note,
            setting=f"{setting.title}, deep head",
        )


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
