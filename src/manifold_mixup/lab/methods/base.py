"""The one face that all methods show to the lab."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import PlainValidator
from torch import Tensor, nn

from manifold_mixup.lab.errors import nearest
from manifold_mixup.lab.options import Options

__all__ = ["Batch", "BatchTransform", "Criterion", "Forward", "LayerNames", "Method", "StepMethod", "unknown_layers"]

Criterion = Callable[[Tensor, Any], Tensor]
"""From the network's output and a target (class indices or a ``MixedTarget``) to the loss of the recipe, a scalar."""

BatchTransform = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""From a training batch ``(x, y)`` to what the network reads and what the loss is given."""

Forward = Callable[[Tensor], Any]
"""The network as the loop calls it: wrapped for devices and precision, perhaps compiled, in training mode."""

OptionsT = TypeVar("OptionsT", bound=Options)


@dataclass(frozen=True)
class Batch:
    """What one step of the training is given.

    Attributes:
        x: Labelled examples, as the network reads them, ``(n, ...)``.
        y: Their class indices, int64, ``(n,)``.
        unlabelled: Other examples, ``(m, ...)``; None where the task has none.
        step: How many steps are finished, from 0.
        steps: How many there will be.
    """

    x: Tensor
    y: Tensor
    unlabelled: Tensor | None
    step: int
    steps: int


class Method(Generic[OptionsT]):
    """A way to train. The base class is plain training; a method overrides what it changes.

    A run calls ``model_options`` and ``train_options``, builds the network and the optimiser from them, calls
    ``attach`` once, sends every training batch through the transform it returned, and calls ``detach`` before anything
    is measured. Whatever is random in a method comes from a generator of its own, seeded in ``attach`` and part of
    ``state_dict``.

    Args:
        options: The method's own settings.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    Options: ClassVar[type[Options]]
    tasks: ClassVar[tuple[str, ...]] = ("classification", "semi_supervised")
    """Names of the tasks in which it can be used."""

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    def model_options(self) -> dict[str, Any]:
        """Options of the network that the method sets."""
        return {}

    def train_options(self) -> dict[str, Any]:
        """Settings of the training that the method sets."""
        return {}

    def problems(self, modules: Collection[str], hidden: Sequence[str]) -> list[str]:
        """What does not fit the network, one sentence each.

        Args:
            modules: Names of all modules of the network.
            hidden: Names of those whose outputs are the hidden states.
        """
        return []

    def attach(self, model: nn.Module, hidden: Sequence[str], seed: int) -> BatchTransform:
        """Prepare the network for training.

        Args:
            model: The network, in place.
            hidden: Names of the modules whose outputs are the hidden states.
            seed: Seed of the method's own generator.

        Returns:
            The transform of training batches.
        """
        return lambda x, y: (x, y)

    def companion(self) -> nn.Module | None:
        """A module of the method's own that is trained beside the network, asked for once, after ``attach``.

        The loop moves it to the network's device, gives its parameters to the optimiser and keeps it in checkpoints.
        """
        return None

    def loss(self, criterion: Criterion, output: Any, target: Any) -> Tensor:
        """The loss of one batch: what the network returned for the batch that the transform gave, and its target."""
        return criterion(output, target)

    def teacher(self) -> nn.Module | None:
        """The network that is measured in place of the trained one, asked for once, after ``attach``; None: that one.

        It has the trained network's structure, and lies on its device. Its weights belong to ``state_dict``.
        """
        return None

    def after_step(self) -> None:
        """Whatever follows an update of the weights, such as moving a teacher's."""

    def logged(self) -> dict[str, float]:
        """Numbers for the next line of the run's log, by name: means over the steps since the last call."""
        return {}

    def detach(self) -> None:
        """Leave no trace on the network."""

    def state_dict(self) -> dict[str, Any]:
        """All that is random or discovered, as tensors and plain values, so that a resumed run draws the same."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""

    def facts(self) -> dict[str, Any]:
        """What a record should say about the finished run, such as the layers that were found."""
        return {}


class StepMethod(Method[OptionsT]):
    """A method that computes the loss of a whole step itself, since one forward of one batch cannot express it.

    It may call the network several times, or look at unlabelled examples. It trains on one device only.
    """

    @abstractmethod
    def step(self, forward: Forward, criterion: Criterion, batch: Batch) -> Tensor:
        """The loss of one step, a scalar, under the autocast of the run.

        Args:
            forward: The network.
            criterion: The loss of the recipe.
            batch: What the step is given.
        """


def _layer_names(value: Any) -> str | list[str]:
    """``"auto"``, ``"all"`` and lists pass; any other string is split at ``+``, the form of the command line."""
    if isinstance(value, str):
        return value if value in ("auto", "all") else value.split("+")
    if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value):
        return list(value)
    raise ValueError("should be a keyword or a list of layer names, such as ['input', 'hidden.1'] or input+hidden.1")


LayerNames = Annotated[str | list[str], PlainValidator(_layer_names)]
"""A keyword, or names of modules as a list or joined by ``+``."""


def unknown_layers(
    layers: str | list[str], modules: Collection[str], *, keyword: str, extra: Sequence[str] = ()
) -> list[str]:
    """What is wrong with a choice of layers.

    Args:
        layers: The choice.
        modules: Names of all modules of the network.
        keyword: The one keyword that is allowed in place of names.
        extra: Names that are allowed beside the modules'.
    """
    if isinstance(layers, str):
        return [] if layers == keyword else [f"options.layers: {layers!r} is no choice here, {keyword!r} is"]
    known = {name for name in modules if name} | set(extra)
    # "name#2" is the second call of a module in one forward
    missing = [name for name in layers if name.split("#")[0] not in known]
    return [f"options.layers: the model has no module named {name!r}: {nearest(name, known)}" for name in missing]
