"""Manifold Mixup of labelled and unlabelled examples (Verma et al. 2018, the ICLR 2019 submission)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from manifold_mixup.lab.measures.inference import evaluation_mode
from manifold_mixup.lab.methods.base import BatchTransform, Forward
from manifold_mixup.lab.methods.unlabelled import UnlabelledMixing, UnlabelledMixingOptions, single

__all__ = ["Consistency", "ConsistencyOptions", "fixed_statistics"]


class ConsistencyOptions(UnlabelledMixingOptions):
    """The authors' two mixings; of targets and weight, which ran away in small networks, a tamer form.

    The authors' own are ``targets="logits"``, weight 1 for CIFAR-10 with 4,000 labels and 2 for SVHN with 1,000.
    """

    alpha: float = Field(
        default=0.1, ge=0, description="labelled examples are mixed with weights from Beta(alpha, alpha); 0: unmixed"
    )
    alpha_unlabelled: float = Field(default=2.0, ge=0, description="the same for unlabelled examples")
    weight: float = Field(
        default=10.0, ge=0, description="weight of the unlabelled examples' loss at its highest; 0 leaves them out"
    )
    targets: Literal["logits", "probabilities"] = Field(
        default="probabilities",
        description="what is mixed as the target and compared by its mean squared error; logits as in the first code",
    )
    target_mode: Literal["train", "eval"] = Field(
        default="train", description="mode of the network when it gives targets; train: batch statistics, dropout"
    )


class Consistency(UnlabelledMixing[ConsistencyOptions]):
    """The targets of unlabelled examples are what the network itself says about them, unmixed, in this very step.

    The pass that gives them leaves the running statistics of batch norm where they are: they move once for the labelled
    and once for the unlabelled batch, both mixed.
    """

    name = "consistency"
    title = "Manifold Mixup of labelled and unlabelled examples"
    source = "Verma et al. 2018, ICLR 2019 submission of arXiv 1806.05236"
    Options = ConsistencyOptions

    def attach(self, model: nn.Module, hidden: Sequence[str], seed: int) -> BatchTransform:
        """Attach the mixer."""
        self._model = model
        return super().attach(model, hidden, seed)

    def targets(self, forward: Forward, unlabelled: Tensor) -> Tensor:
        """What the network says."""
        mode = evaluation_mode if self.options.target_mode == "eval" else fixed_statistics
        with mode(self._model):
            return self._read(single(forward(unlabelled)))

    def distance(self, output: Tensor, target: Tensor) -> Tensor:
        """The squared error, averaged over examples and classes."""
        return F.mse_loss(self._read(output), target)

    def _read(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=1) if self.options.targets == "probabilities" else logits


@contextmanager
def fixed_statistics(model: nn.Module) -> Iterator[None]:
    """Training forwards inside this block normalise by their batches, and no running statistics remember them."""
    norms: list[Any] = [m for m in model.modules() if m.training and getattr(m, "track_running_stats", False)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
