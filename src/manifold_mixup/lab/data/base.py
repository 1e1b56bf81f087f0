"""What a data set is to the lab: its facts, and three splits of which the third is sealed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from manifold_mixup.lab.errors import TestDataTaken
from manifold_mixup.lab.options import Options

__all__ = ["DataInfo", "DataSplits", "Dataset", "Examples"]


@dataclass(frozen=True)
class DataInfo:
    """The facts about a data set that hold without loading it.

    Attributes:
        name: The name in recipes.
        title: One line for people.
        shape: Shape of one example, without the batch dimension.
        classes: Names of the classes, in the order of the labels.
        features: Names of the numbers that make up one example, or one description of them all.
        source: Where the data come from.
        terms: Under which licence or terms.
    """

    name: str
    title: str
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    features: tuple[str, ...]
    source: str
    terms: str


@dataclass(frozen=True)
class Examples:
    """One split.

    Attributes:
        x: float32, ``(n, *shape)``.
        y: int64 class indices, ``(n,)``.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


class DataSplits:
    """The splits of one run. Training and validation lie open; the test split is handed out once.

    The training loop is given ``train`` and ``validation``, never this object, so nothing in it can reach the test
    data.
    """

    def __init__(self, info: DataInfo, train: Examples, validation: Examples, test: Examples) -> None:
        self.info = info
        self.train = train
        self.validation = validation
        self.__test: Examples | None = test

    def hand_out_test(self) -> Examples:
        """The test split; only the first call gets it.

        Raises:
            TestDataTaken: At the second call: whatever asks again would be choosing something on test data.
        """
        if self.__test is None:
            raise TestDataTaken(f"the test split of {self.info.name!r} was already handed out in this run")
        test, self.__test = self.__test, None
        return test


@dataclass(frozen=True)
class Dataset:
    """A registry entry.

    Attributes:
        info: The facts.
        options: What a recipe can set under ``data.options``.
        load: From options and a run's seed to its splits.
        measures: Name of the data set's own measures in ``lab.measures``, or None.
    """

    info: DataInfo
    options: type[Options]
    load: Callable[[Any, int], DataSplits]
    measures: str | None = None
