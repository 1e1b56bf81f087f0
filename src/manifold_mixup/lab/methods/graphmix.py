"""GraphMix (Verma et al. 2021, arXiv 1909.11715): a graph network trained together with its fully connected twin."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.methods.base import Batch, BatchTransform, Criterion, Forward, StepMethod
from manifold_mixup.lab.methods.mixing_log import MixingLog
from manifold_mixup.lab.methods.ramp import ramp
from manifold_mixup.lab.methods.tally import Tally
from manifold_mixup.lab.methods.unlabelled import single
from manifold_mixup.lab.options import Options
from manifold_mixup.lab.streams import generator, stream_seed
from manifold_mixup.mixup import ManifoldMixup

__all__ = ["GraphMix", "GraphMixOptions", "sharpened"]

LAYER = "activation.1"  # of the twin, whose modules are named as the network's


class GraphMixOptions(Options):
    """The authors' settings for Cora and Citeseer."""

    alpha: float = Field(
        default=1.0, ge=0, description="nodes are mixed with weights from Beta(alpha, alpha); 0: unmixed"
    )
    gamma: float = Field(
        default=10.0, ge=0, description="weight of the unlabelled nodes' loss at its highest; 0 makes no pseudo-labels"
    )
    predictions: int = Field(default=10, ge=1, description="forwards that are averaged into pseudo-labels")
    temperature: float = Field(
        default=0.1, ge=1e-3, description="sharpens pseudo-labels p to p^(1/temperature), normalised; 1 leaves them"
    )
    ramp_start: int = Field(
        default=500, ge=0, description="steps for which gamma is at 0.7 % of itself, before it grows"
    )
    ramp_steps: int = Field(default=500, ge=0, description="steps over which it grows")
    loss: Literal["bce-softmax", "cross-entropy"] = Field(
        default="bce-softmax",
        description="of the fully connected twin; bce-softmax is about as many times smaller as there are classes",
    )
    coin: Literal["either", "both"] = Field(
        default="either", description="either: a step trains the network or its twin; both: the sum of the two losses"
    )
    features_share: float = Field(
        default=0.5, ge=0, le=1, description="share of the steps that train the twin, with coin 'either'"
    )


class GraphMix(StepMethod[GraphMixOptions]):
    """Toss a coin: train the network on the graph, or its twin without edges on mixed hidden states.

    A step on the graph has the recipe's loss on the labelled nodes. A step of the twin, which has the same weights,
    mixes the states after the first activation: of the labelled nodes among themselves, and of unlabelled ones among
    themselves, with λ and partners of their own. Unlabelled nodes have pseudo-labels, the sharpened mean of several
    predictions of the graph network with its dropout on. Nodes are mixed before any aggregation that could spread one
    node's label to another's neighbours, and what is measured is the graph network alone.

    Unlabelled nodes are drawn with replacement. One that comes twice is two rows: nothing is written back by number.
    """

    name = "graphmix"
    title = "GraphMix: hidden mixing in a fully connected twin, with pseudo-labels"
    source = "Verma et al. 2021, arXiv 1909.11715"
    Options = GraphMixOptions
    tasks = ("node_classification",)

    _mixup: ManifoldMixup | None = None

    def problems(self, modules: Collection[str], hidden: Sequence[str]) -> list[str]:
        """A network without the layer where the twin is mixed."""
        if LAYER in modules:
            return []
        return [f"method {self.name!r} mixes after the first activation of 'gcn' or 'gat': take one of depth 2 or more"]

    def attach(self, model: nn.Module, hidden: Sequence[str], seed: int) -> BatchTransform:
        """Make the twin and attach a mixer to it; the network itself is left alone.

        Raises:
            UsageError: The network reads no graph, or has no hidden layer.
        """
        from manifold_mixup.lab.models.graph_nets import GraphNet

        if not isinstance(model, GraphNet):
            raise UsageError(
                f"method {self.name!r} trains networks on a graph, 'gcn' and 'gat', not a {type(model).__name__}"
            )
        for problem in self.problems([name for name, _ in model.named_modules()], hidden):
            raise UsageError(problem)
        self._twin = model.features_only()
        self._loss = _loss(self.options.loss)
        self._coin = generator(seed, "coin")
        self._log = MixingLog("batches")
        self._log.know([LAYER])
        self._tally = Tally("graph_loss", "labelled_loss", "unlabelled_loss")
        self._mixup = ManifoldMixup(self._twin, self.options.alpha, [LAYER], seed=stream_seed(seed, "mixing"))
        return super().attach(model, hidden, seed)

    def step(self, forward: Forward, criterion: Criterion, batch: Batch) -> Tensor:
        """The loss of one step.

        Raises:
            UsageError: The batch has no labelled nodes, or no unlabelled ones though ``gamma`` is above 0.
        """
        options = self.options
        self._check(batch)
        if options.coin == "both":
            return self._graph_loss(forward, criterion, batch) + self._features_loss(forward, batch)
        if float(torch.rand((), generator=self._coin)) < options.features_share:
            return self._features_loss(forward, batch)
        return self._graph_loss(forward, criterion, batch)

    def _check(self, batch: Batch) -> None:
        u = batch.unlabelled
        if not len(batch.x):
            raise UsageError(f"method {self.name!r} needs labelled nodes in every step, and this batch has none")
        if self.options.gamma > 0 and (u is None or not len(u)):
            raise UsageError(
                f"method {self.name!r} learns from unlabelled nodes beside the labelled ones, and this batch has none: "
                "train it in the task 'node_classification', or with gamma=0"
            )

    def _graph_loss(self, forward: Forward, criterion: Criterion, batch: Batch) -> Tensor:
        """The recipe's loss of the network on the labelled nodes."""
        loss = criterion(forward(batch.x), batch.y)
        self._tally.add("graph_loss", loss)
        return loss

    def _features_loss(self, forward: Forward, batch: Batch) -> Tensor:
        """The loss of the twin on labelled nodes, and on unlabelled ones if they count."""
        options, u = self.options, batch.unlabelled
        if options.gamma == 0:
            return self._mixed_loss("labelled_loss", batch.x, batch.y)
        assert u is not None
        guessed = self._pseudo_labels(forward, u)
        weight = options.gamma * ramp(batch.step, options.ramp_start, options.ramp_steps)
        self._tally.set("unlabelled_weight", weight)
        labelled = self._mixed_loss("labelled_loss", batch.x, batch.y)
        return labelled + weight * self._mixed_loss("unlabelled_loss", u, guessed)

    def _pseudo_labels(self, forward: Forward, nodes: Tensor) -> Tensor:
        """The sharpened mean of what the network on the graph predicts, each time with another dropout mask."""
        with torch.no_grad():
            logs = [single(forward(nodes)).log_softmax(dim=1) for _ in range(self.options.predictions)]
            return sharpened(torch.stack(logs), self.options.temperature)

    def _mixed_loss(self, name: str, nodes: Tensor, y: Tensor) -> Tensor:
        """The twin's loss on nodes of one kind, mixed with each other; ``name`` is what the log calls it."""
        assert self._mixup is not None
        self._twin.train()
        nodes, target = self._mixup(nodes, y)
        draw = self._mixup.last
        assert draw is not None
        self._log.note(draw, len(nodes), certain=self.options.alpha > 0)
        loss = self._loss(self._twin(nodes), target)
        self._tally.add(name, loss)
        return loss

    def logged(self) -> dict[str, float]:
        """The parts of the loss, that of the unlabelled nodes before its weight, and the weight it had last.

        Those that a step had since the last call: a step on the graph has one, a step of the twin the others.
        """
        return {} if self._mixup is None else self._tally.read()

    def detach(self) -> None:
        """Take the mixer's hooks off the twin."""
        if self._mixup is not None:
            self._mixup.remove()

    def state_dict(self) -> dict[str, Any]:
        """The state of the coin and of the mixer, what it drew so far, and what is to be logged."""
        if self._mixup is None:
            return {}
        return {
            "coin": self._coin.get_state(),
            "mixer": self._mixup.state_dict(),
            "mixing": self._log.state_dict(),
            "tally": self._tally.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        if self._mixup is not None:
            self._coin.set_state(state["coin"])
            self._mixup.load_state_dict(state["mixer"])
            self._log.load_state_dict(state["mixing"])
            self._tally.load_state_dict(state["tally"])

    def facts(self) -> dict[str, Any]:
        """Where the twin was mixed, how often and with which λ, labelled and unlabelled batches counted alike."""
        if self._mixup is None:
            return {}
        return {"layers": [LAYER], "mixing": self._log.facts(self.options.alpha)}


def sharpened(logs: Tensor, temperature: float) -> Tensor:
    """The mean p of several predictions, as p^(1/T) / sum of p^(1/T).

    All of it is done with logarithms: for T = 0.1 the tenth power of a probability of 1e-4 is no float32 number.

    Args:
        logs: Logarithms of probabilities, ``(predictions, n, classes)``.
        temperature: T, above 0.

    Returns:
        Probabilities, ``(n, classes)``.
    """
    # the logarithm of the sum: that of their number shifts all classes alike
    return (logs.logsumexp(dim=0) / temperature).softmax(dim=1)


def _loss(name: str) -> Callable[[Tensor, Any], Tensor]:
    """The loss of the twin, of logits and mixed targets."""
    # Here, because it imports this package.
    from manifold_mixup.lab.criterion import bce_softmax, cross_entropy

    return bce_softmax if name == "bce-softmax" else cross_entropy
