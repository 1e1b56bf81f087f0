"""What methods share that mix a labelled and an unlabelled batch in one step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.methods.base import (
    Batch,
    BatchTransform,
    Criterion,
    Forward,
    LayerNames,
    StepMethod,
    unknown_layers,
)
from manifold_mixup.lab.methods.mixing_log import MixingLog
from manifold_mixup.lab.methods.ramp import ramp
from manifold_mixup.lab.methods.tally import Tally
from manifold_mixup.lab.options import Options
from manifold_mixup.mixup import ManifoldMixup
from manifold_mixup.target import MixedTarget

__all__ = ["UnlabelledMixing", "UnlabelledMixingOptions", "single"]


class UnlabelledMixingOptions(Options):
    """The two mixings, and how much the unlabelled examples count."""

    alpha: float = Field(
        default=1.0, ge=0, description="labelled examples are mixed with weights from Beta(alpha, alpha); 0: unmixed"
    )
    alpha_unlabelled: float = Field(default=1.0, ge=0, description="the same for unlabelled examples")
    weight: float = Field(
        default=1.0, ge=0, description="weight of the unlabelled examples' loss at its highest; 0 leaves them out"
    )
    ramp: float = Field(
        default=0.4, ge=0, le=1, description="share of all updates over which that weight grows from 0.7 % of itself"
    )
    layers: LayerNames = Field(default="auto", description="where to mix: 'auto', or names of modules and 'input'")


SettingsT = TypeVar("SettingsT", bound=UnlabelledMixingOptions)


class UnlabelledMixing(StepMethod[SettingsT], ABC):
    """Mixup of the labelled batch, and of the unlabelled one with targets that a network gives to its examples.

    The loss of a step is the recipe's on the mixed labelled batch, plus ``weight`` times a ramp times the distance
    between what the network says about the mixed unlabelled batch and its targets, mixed with the same λ and partners.
    A subclass says where the targets come from and what the distance is.

    One mixer serves both batches. With ``weight=0`` no unlabelled batch is looked at, and a step is one of Manifold
    Mixup with the same ``alpha`` and ``layers``, bit for bit.
    """

    tasks = ("semi_supervised",)

    _mixup: ManifoldMixup | None = None
    _resumed: list[str] | None = None  # S as a checkpoint named it

    @abstractmethod
    def targets(self, forward: Forward, unlabelled: Tensor) -> Tensor:
        """What unmixed examples should be, without gradients, ``(m, classes)``; called while the mixer is paused."""

    @abstractmethod
    def distance(self, output: Tensor, target: Tensor) -> Tensor:
        """How far the network is from the mixed targets: a scalar, of two tensors ``(m, classes)``."""

    def problems(self, modules: Collection[str], hidden: Sequence[str]) -> list[str]:
        """Layers that the network does not have."""
        return unknown_layers(self.options.layers, modules, keyword="auto", extra=["input"])

    def attach(self, model: nn.Module, hidden: Sequence[str], seed: int) -> BatchTransform:
        """Attach the mixer; the transform leaves batches as they are, since a step mixes them itself."""
        self._labelled, self._unlabelled = MixingLog("batches"), MixingLog("batches")
        self._tally = Tally("labelled_loss", "unlabelled_loss")
        self._mixup = ManifoldMixup(model, self.options.alpha, self.options.layers, seed=seed)
        return super().attach(model, hidden, seed)

    def step(self, forward: Forward, criterion: Criterion, batch: Batch) -> Tensor:
        """The loss of one step.

        Raises:
            UsageError: The batch has no unlabelled examples.
        """
        options, u = self.options, batch.unlabelled
        if u is None:
            raise UsageError(
                f"method {self.name!r} learns from unlabelled examples beside the labelled ones, and this batch has "
                "none: train it in the task 'semi_supervised'"
            )
        x, target = self._mix(batch.x, batch.y, options.alpha, self._labelled)
        loss = criterion(forward(x), target)
        self._tally.add("labelled_loss", loss)
        if options.weight == 0:
            return loss
        assert self._mixup is not None
        with torch.no_grad(), self._mixup.paused():
            guessed = self.targets(forward, u)
        u, guess = self._mix(u, guessed, options.alpha_unlabelled, self._unlabelled)
        output = forward(u)  # before the mixed targets may be read
        weight = options.weight * ramp(batch.step, 0, options.ramp * batch.steps)
        distance = self.distance(single(output), guess.soft())
        self._tally.add("unlabelled_loss", distance)
        self._tally.set("unlabelled_weight", weight)
        return loss + weight * distance

    def _mix(self, x: Tensor, y: Tensor, alpha: float, log: MixingLog) -> tuple[Tensor, MixedTarget]:
        """Mix a batch with weights from Beta(alpha, alpha), and count what was drawn."""
        mixup = self._mixup
        assert mixup is not None
        mixup.alpha = alpha
        before = mixup.last
        mixed = mixup(x, y)
        draw, layers = mixup.last, mixup.layers
        if draw is not None and draw is not before:
            log.know(layers or [])
            log.note(draw, len(y), certain=bool(layers) and alpha > 0)
        return mixed

    def logged(self) -> dict[str, float]:
        """The two parts of the loss, that of the unlabelled examples before its weight, and the weight it had last."""
        return {} if self._mixup is None else self._tally.read()

    def detach(self) -> None:
        """Take the mixer's hooks off the network."""
        if self._mixup is not None:
            self._mixup.remove()

    def state_dict(self) -> dict[str, Any]:
        """The mixer's generator and the layers it found, what it drew so far, and what is to be logged."""
        if self._mixup is None:
            return {}
        logs = {"labelled": self._labelled.state_dict(), "unlabelled": self._unlabelled.state_dict()}
        return {"mixer": self._mixup.state_dict(), **logs, "tally": self._tally.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        if self._mixup is not None:
            self._mixup.load_state_dict(state["mixer"])
            self._labelled.load_state_dict(state["labelled"])
            self._unlabelled.load_state_dict(state["unlabelled"])
            self._tally.load_state_dict(state["tally"])
            self._resumed = state["mixer"]["layers"]

    def facts(self) -> dict[str, Any]:
        """The layers that were mixed, and how often each and with which λ, for labelled and unlabelled batches."""
        if self._mixup is None:
            return {}
        layers = self._mixup.layers
        if layers is None:
            layers = self._resumed  # the checkpoint was of the last step: no batch has come since
        if layers is None:
            return {}
        return {
            "layers": list(layers),
            "mixing": self._labelled.facts(self.options.alpha),
            "mixing_unlabelled": self._unlabelled.facts(self.options.alpha_unlabelled),
        }


def single(logits: Tensor) -> Tensor:
    """Logits in single precision or better: a softmax in bfloat16 is 1 well before it should be."""
    return logits if logits.dtype == torch.float64 else logits.float()
