"""The one face that all tasks show to the lab: what is learned, from which examples."""

from __future__ import annotations

from typing import ClassVar, Generic, TypeVar

from pydantic import Field
from torch import nn

from manifold_mixup.lab.config import Component, TrainConfig
from manifold_mixup.lab.data import DataInfo, DataSplits, Places, load_data
from manifold_mixup.lab.models import ModelEntry
from manifold_mixup.lab.options import Options
from manifold_mixup.lab.selection import Choice

__all__ = ["ChoiceOptions", "Task"]

OptionsT = TypeVar("OptionsT", bound=Options)


class ChoiceOptions(Options):
    """Where few labels make accuracy coarse and sources choose by it: how the best weights are chosen."""

    choose: Choice = Field(
        default="validation_error", description="what the best weights have the least of, on the validation split"
    )


class Task(Generic[OptionsT]):
    """What is learned. The base class is supervised: every training example has its label.

    A run asks for ``splits``, builds the network and calls ``place`` on it; before that, ``problems`` have been asked
    for.

    Args:
        options: The task's own settings.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    Options: ClassVar[type[Options]]

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    @property
    def choose(self) -> Choice:
        """Which weights are the best ones on the validation split."""
        return self.options.choose if isinstance(self.options, ChoiceOptions) else "validation_nll"

    def problems(self, data: Component, info: DataInfo, model: ModelEntry, train: TrainConfig | None) -> list[str]:
        """What does not fit the task, one sentence each.

        Args:
            data: The data set and its options.
            info: Its facts, as these options make them.
            model: The network.
            train: The training; None where it has mistakes of its own.
        """
        if info.nodes:
            return [f"data: {info.name!r} is one graph; set task.name to 'node_classification'"]
        return [f"model: {model.name!r} reads nodes of a graph, and data {info.name!r} are none"] if model.graph else []

    def splits(self, data: Component, seed: int, places: Places | None) -> DataSplits:
        """The splits of one run.

        Args:
            data: The data set and its options.
            seed: Seed of the run.
            places: Where data lie.

        Raises:
            LabError: The data cannot be had, or do not have what the task needs.
        """
        return load_data(data.name, data.options, seed, places)

    def place(self, model: nn.Module, splits: DataSplits) -> None:
        """Give the network what it reads beside its input; nothing, for most."""
