"""What a data set is to the lab: its facts, and three splits of which the third is sealed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifold_mixup.lab.errors import TestDataTaken
from manifold_mixup.lab.options import Options

__all__ = [
    "DataInfo",
    "DataSplits",
    "Dataset",
    "Examples",
    "Graph",
    "Pixels",
    "Places",
    "Report",
    "Unlabelled",
    "default_cache",
]


@dataclass(frozen=True)
class Pixels:
    """How uint8 images become what a network reads, and how training varies them.

    Attributes:
        mean: Mean of each channel, in units where white is 1.
        sd: Standard deviation of each channel in the same units; all above 0.
        crop_padding: Training crops images of the same size out of ones padded with this many black pixels on every
            side; 0 crops nothing.
        flip: Whether training mirrors every second image, at random, left to right.
    """

    mean: tuple[float, ...]
    sd: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False

    def normalise(self, images: Tensor) -> Tensor:
        """Subtract the mean of each channel and divide by its standard deviation.

        Args:
            images: ``(n, channels, height, width)``, uint8 from 0 to 255, or floating point from 0 to 1.

        Returns:
            Floating point of the same shape and memory format: float32 for uint8, else the dtype that came in.
        """
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        dtype = torch.float32 if images.dtype == torch.uint8 else images.dtype
        mean = torch.tensor(self.mean, dtype=dtype, device=images.device)[:, None, None] * scale
        sd = torch.tensor(self.sd, dtype=dtype, device=images.device)[:, None, None] * scale
        return (images.to(dtype) - mean) / sd


@dataclass(frozen=True)
class DataInfo:
    """The facts about a data set.

    Attributes:
        name: The name in recipes.
        title: One line for people.
        shape: Shape of one example, without the batch dimension; empty where only the data themselves can say.
        classes: Names of the classes, in the order of the labels; empty where only the data themselves can say.
        features: Names of the numbers that make up one example, or one description of them all.
        source: Where the data come from.
        terms: Under which licence or terms.
        sizes: Examples published for training and for the test, or None where that depends.
        pixels: For uint8 images: how they are normalised and varied; None for examples that are read as they are.
        fingerprint: Identifies the content that was loaded, where it is not fixed by name and options alone.
        unit_range: Whether the examples are floating-point images from 0 to 1, ``(channels, height, width)``, that
            networks read as they are.
        nodes: Where the examples are nodes of one graph: how many it has; ``shape`` is then the number of features of a
            node, and a split's ``x`` holds numbers of nodes. 0 for examples that stand for themselves.
    """

    name: str
    title: str
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    features: tuple[str, ...]
    source: str
    terms: str
    sizes: tuple[int, int] | None = None
    pixels: Pixels | None = None
    fingerprint: str = ""
    unit_range: bool = False
    nodes: int = 0

    @property
    def images(self) -> bool:
        """Whether the examples are images whose black and white are known."""
        return self.pixels is not None or self.unit_range


@dataclass(frozen=True)
class Examples:
    """One split.

    Attributes:
        x: ``(n, *shape)``: uint8 images if the data set has ``pixels``, else float32 that networks read as it is; with
            ``unit_range`` those are images from 0 to 1. Where the examples are nodes of a graph, their numbers, int64,
            ``(n,)``.
        y: int64 class indices, ``(n,)``.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Graph:
    """One undirected graph: what networks read of it. Labels are the splits' affair.

    Attributes:
        features: One row per node, float32, ``(nodes, features)``, a coalesced sparse COO tensor.
        edges: int64, ``(2, m)``: both directions of every edge, each once, sorted by row and column; no loops.
    """

    features: Tensor
    edges: Tensor

    @property
    def nodes(self) -> int:
        """How many nodes it has; some may have no edge."""
        return self.features.shape[0]


@dataclass(frozen=True)
class Unlabelled:
    """Examples without labels that training may look at. None of them is a test example, unless a graph holds both.

    Attributes:
        x: As in :class:`Examples`.
        batch_size: How many of them a step is given.
        replacement: Whether a step draws from all of them, some perhaps twice; otherwise every pass sees each once.
    """

    x: Tensor
    batch_size: int
    replacement: bool = False


def default_cache() -> Path:
    """Where downloads and decoded images are kept: ``$MANIFOLD_MIXUP_CACHE``, or the user's own cache folder."""
    chosen = os.environ.get("MANIFOLD_MIXUP_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manifold-mixup"


@dataclass(frozen=True)
class Places:
    """Where data lie. Nothing here has an influence on the numbers.

    Attributes:
        data_dir: A folder that holds published files, in their published layout or beside each other; read only.
        cache: Where downloads and decoded images are kept.
    """

    data_dir: Path | None = None
    cache: Path = field(default_factory=default_cache)


Report = Callable[[str, int, int], None]
"""Is told how far something that takes a while has come: ``report("cifar-10-python.tar.gz", done, total)``; total 0
is unknown. Bytes for downloads, images for decoding."""


class DataSplits:
    """The splits of one run. Training and validation lie open; the test split is handed out once.

    The training loop is given ``train`` and ``validation``, never this object, so nothing in it can reach the test
    data. ``validation`` may be empty, if nothing was set aside.

    Attributes:
        graph: The graph whose nodes the examples are, or None.
        unlabelled: What training may look at beside ``train``, or None.
    """

    def __init__(
        self,
        info: DataInfo,
        train: Examples,
        validation: Examples,
        test: Examples,
        *,
        graph: Graph | None = None,
        unlabelled: Unlabelled | None = None,
    ) -> None:
        self.info = info
        self.train = train
        self.validation = validation
        self.graph = graph
        self.unlabelled = unlabelled
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
        info: The facts that hold whatever the options and without reading anything.
        options: What a recipe can set under ``data.options``.
        load: From options, a run's seed and the places to its splits. What ``prepare`` left is used, anything missing
            is brought silently.
        describe: From options and places to the facts with shape, classes and pixels as these options make them,
            without loading more than it must; None if the options change none of them.
        test: From options and places to the examples that ``evaluate --data`` measures on and their facts, in the
            order in which they are stored; None takes the test split of ``load``.
        prepare: Bring, check and unpack or decode what ``load`` will read, with progress; idempotent. None if there is
            nothing to bring.
        present: Whether all files are at hand, without reading them; None if there are none.
        positional: The option that ``name:VALUE`` on the command line sets, as in ``folder:PATH``; or None.
        measures: Name of the data set's own measures in ``lab.measures``, or None.
    """

    info: DataInfo
    options: type[Options]
    load: Callable[[Any, int, Places], DataSplits]
    describe: Callable[[Any, Places], DataInfo] | None = None
    test: Callable[[Any, Places], tuple[DataInfo, Examples]] | None = None
    prepare: Callable[[Any, Places, Report], None] | None = None
    present: Callable[[Places], bool] | None = None
    positional: str | None = None
    measures: str | None = None
