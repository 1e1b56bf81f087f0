"""Interpolation Consistency Training (Verma et al. 2019, arXiv 1903.03825): mixed predictions of a mean teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from manifold_mixup.lab.methods.base import BatchTransform, Forward, LayerNames
from manifold_mixup.lab.methods.unlabelled import UnlabelledMixing, UnlabelledMixingOptions, single

__all__ = ["ICT", "ICTOptions"]


class ICTOptions(UnlabelledMixingOptions):
    """The authors' settings for CIFAR-10 with 4,000 labels."""

    weight: float = Field(
        default=100.0, ge=0, description="weight of the unlabelled examples' loss at its highest; 0 leaves them out"
    )
    ramp: float = Field(
        default=0.25, ge=0, le=1, description="share of all updates over which that weight grows from 0.7 % of itself"
    )
    layers: LayerNames = Field(
        default_factory=lambda: ["input"], description="where to mix: 'auto', or names of modules and 'input'"
    )
    decay: float = Field(
        default=0.999, ge=0, le=1, description="share of the teacher's weights that an update keeps; 1: plain average"
    )
    mix: Literal["probabilities", "logits"] = Field(
        default="probabilities", description="what is mixed of the teacher: its predictions, or their logits as in code"
    )
    teacher_mode: Literal["eval", "train"] = Field(
        default="eval", description="mode of the teacher when it gives targets; train: batch statistics, dropout"
    )


class ICT(UnlabelledMixing[ICTOptions]):
    """The targets of unlabelled examples come from a teacher, a moving average of the network, which is never mixed.

    After update t, counted from 1, the teacher is d·teacher + (1 - d)·network with d = min(1 - 1/(t + 1), ``decay``):
    the plain average of all weights so far, until that is longer than ``decay`` allows. In ``eval`` mode the running
    statistics are averaged likewise; in ``train`` mode the teacher keeps its own, of the unmixed examples that it sees.
    """

    name = "ict"
    title = "Interpolation Consistency Training with a mean teacher"
    source = "Verma et al. 2019, arXiv 1903.03825"
    Options = ICTOptions

    _teacher: nn.Module | None = None

    def attach(self, model: nn.Module, hidden: Sequence[str], seed: int) -> BatchTransform:
        """Copy the network before the mixer puts its hooks on it, and attach the mixer."""
        self._model, self._updates = model, 0
        self._teacher = copy.deepcopy(model).requires_grad_(False).train(self.options.teacher_mode == "train")
        return super().attach(model, hidden, seed)

    def teacher(self) -> nn.Module | None:
        """The average, which is what is measured."""
        return self._teacher

    def targets(self, forward: Forward, unlabelled: Tensor) -> Tensor:
        """What the teacher says."""
        assert self._teacher is not None
        logits = single(self._teacher(unlabelled))
        return logits.softmax(dim=1) if self.options.mix == "probabilities" else logits

    def distance(self, output: Tensor, target: Tensor) -> Tensor:
        """The squared error of the predictions, averaged over examples and classes."""
        if self.options.mix == "logits":
            target = target.softmax(dim=1)
        return F.mse_loss(output.softmax(dim=1), target)

    def after_step(self) -> None:
        """Move the teacher towards the network."""
        teacher, model = self._teacher, self._model
        assert teacher is not None
        self._updates += 1
        average = get_ema_multi_avg_fn(min(1 - 1 / (self._updates + 1), self.options.decay))  # type: ignore[no-untyped-call]
        pairs: list[tuple[Tensor, Tensor]] = list(zip(teacher.parameters(), model.parameters(), strict=True))
        if self.options.teacher_mode == "eval":
            for own, other in zip(teacher.buffers(), model.buffers(), strict=True):
                if own.is_floating_point():
                    pairs.append((own, other))
                else:
                    own.copy_(other)  # a count of batches has no average
        average([own for own, _ in pairs], [other for _, other in pairs], None)

    def state_dict(self) -> dict[str, Any]:
        """The state of the mixer, and the teacher."""
        if self._teacher is None:
            return {}
        return {**super().state_dict(), "teacher": dict(self._teacher.state_dict()), "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        if self._teacher is not None:
            super().load_state_dict(state)
            self._teacher.load_state_dict(state["teacher"])
            self._updates = state["updates"]
