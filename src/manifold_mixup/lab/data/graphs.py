"""What all published graphs have in common: their options, the split of their nodes, and what networks read of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from manifold_mixup.lab import streams
from manifold_mixup.lab.data.base import DataInfo, DataSplits, Examples, Graph
from manifold_mixup.lab.data.matrices import CsrMatrix
from manifold_mixup.lab.errors import CorruptedFile, UsageError
from manifold_mixup.lab.options import Options

__all__ = [
    "FeatureScale",
    "GraphOptions",
    "PublishedGraph",
    "RandomSplit",
    "draw_split",
    "feature_tensor",
    "graph_splits",
    "undirected",
]

Indices = npt.NDArray[np.int64]
Split = tuple[Indices, Indices, Indices]
FeatureScale = Literal["row-normalised", "binary", "raw"]
NO_LABEL = -1


class GraphOptions(Options):
    """What the features of a node become."""

    features: FeatureScale = Field(
        default="row-normalised",
        description="'row-normalised' divides each node's features by their sum, 'binary' does so after making "
        "everything above 0 a 1, 'raw' takes them as published; a node without features keeps zeros",
    )


@dataclass(frozen=True)
class PublishedGraph:
    """What the files of a graph hold.

    Attributes:
        features: One row per node.
        pairs: The two ends of every edge as stored, ``(2, m)``: in one direction or both, loops and repeats included.
        labels: The class of each node, ``(nodes,)``; -1 for a node without a label.
    """

    features: CsrMatrix
    pairs: Indices
    labels: Indices

    def check(self, info: DataInfo, path: Path) -> None:
        """Refuse content that cannot be the published one.

        Args:
            info: The set's facts.
            path: Where it comes from, for errors.

        Raises:
            CorruptedFile: The number of nodes or features, an end of an edge or a label is not as published.
        """
        shape, published = self.features.shape, (info.nodes, *info.shape)
        if shape != published:
            raise CorruptedFile(f"{path}: the features have shape {shape}, not {published}")
        if self.labels.shape != (info.nodes,):
            raise CorruptedFile(f"{path}: there are labels for {len(self.labels)} nodes, not for {info.nodes}")
        if self.labels.min() < NO_LABEL or self.labels.max() >= len(info.classes):
            raise CorruptedFile(
                f"{path}: the labels go from {self.labels.min()} to {self.labels.max()}, but there are "
                f"{len(info.classes)} classes, from 0"
            )
        if self.pairs.size and not 0 <= self.pairs.min() <= self.pairs.max() < info.nodes:
            raise CorruptedFile(
                f"{path}: the edges join nodes {self.pairs.min()} to {self.pairs.max()}, but there are {info.nodes}, "
                "from 0"
            )
        if self.features.data.size and self.features.data.min() < 0:
            raise CorruptedFile(f"{path}: a feature is below 0, but they are counts and weights of words")


def undirected(pairs: Indices, nodes: int) -> Indices:
    """Both directions of every edge, each once, sorted by row and column, without loops.

    Args:
        pairs: The ends of edges, ``(2, m)``, in any order and direction.
        nodes: How many nodes there are.
    """
    first, second = pairs[:, pairs[0] != pairs[1]]
    keys = np.unique(np.concatenate([first * nodes + second, second * nodes + first]))
    return np.stack([keys // nodes, keys % nodes])


def feature_tensor(matrix: CsrMatrix, scale: FeatureScale) -> Tensor:
    """The features as a coalesced sparse COO tensor, float32, ``(nodes, features)``; zeros are left out.

    Args:
        matrix: One row per node, nothing below 0.
        scale: As in :class:`GraphOptions`. Sums and quotients are taken in float64.
    """
    rows, columns = matrix.shape
    place, values = matrix.rows * columns + matrix.indices, matrix.data.astype(np.float64)
    if (np.diff(place) <= 0).any():  # not in order, or several values of one place
        order = np.argsort(place, kind="stable")
        place, first = np.unique(place[order], return_index=True)
        values = np.add.reduceat(values[order], first)
    place, values = place[values != 0], values[values != 0]
    row = place // columns
    if scale == "binary":
        values = np.ones_like(values)
    if scale != "raw":
        values = values / np.bincount(row, weights=values, minlength=rows)[row]
    indices = torch.from_numpy(np.stack([row, place % columns]))
    content = torch.from_numpy(values.astype(np.float32))
    return torch.sparse_coo_tensor(indices, content, (rows, columns), check_invariants=False, is_coalesced=True)


@dataclass(frozen=True)
class RandomSplit:
    """How many nodes a random split gives to each part; the names are those of the options that say so.

    Attributes:
        labels_per_class: Training nodes of each class.
        validation_examples: Nodes to validate on, of whatever class; None if ``validation_per_class`` says it.
        validation_per_class: Nodes of each class to validate on.
        test_examples: Nodes to test on, of whatever class; None takes all others with a label.
    """

    labels_per_class: int
    validation_examples: int | None = None
    validation_per_class: int = 0
    test_examples: int | None = None


def draw_split(labels: Indices, classes: tuple[str, ...], sizes: RandomSplit, seed: int) -> Split:
    """Draw training, validation and test nodes among those with a label.

    A given number of test nodes is drawn first, then those to validate on, then those to train on: so neither of the
    first two depends on how many labels there are to train on. Each of the draws has a stream of its own.

    Args:
        labels: The class of each node, -1 for none, ``(nodes,)``.
        classes: The names of the classes.
        sizes: How many.
        seed: The run's seed.

    Returns:
        Numbers of the training, validation and test nodes, without common elements, each in random order.

    Raises:
        UsageError: There are not that many.
    """
    nodes = np.flatnonzero(labels != NO_LABEL)
    wanted = {key: getattr(sizes, key) or 0 for key in ("validation_examples", "test_examples")}
    if sum(wanted.values()) > len(nodes):
        text = " and ".join(f"{key} {number:,}" for key, number in wanted.items() if number)
        raise UsageError(f"{text} are more than the {len(nodes):,} nodes with a label")
    test, rest = _parted(_shuffled(nodes, seed, "data/test"), np.arange(len(nodes)) < wanted["test_examples"])
    rest = _shuffled(rest, seed, "data/validation")
    if sizes.validation_examples is None:
        chosen = _of_each_class(labels, rest, classes, sizes.validation_per_class, "validation_per_class")
    else:
        chosen = np.arange(len(rest)) < sizes.validation_examples
    validation, rest = _parted(rest, chosen)
    rest = _shuffled(rest, seed, "data/train")
    train, rest = _parted(rest, _of_each_class(labels, rest, classes, sizes.labels_per_class, "labels_per_class"))
    if sizes.test_examples is None:
        test = rest
        if not len(test):
            raise UsageError(
                f"labels_per_class {sizes.labels_per_class} and the nodes to validate on take all {len(nodes):,} nodes "
                "with a label: none is left to test on"
            )
    return train, validation, test


def _of_each_class(
    labels: Indices, nodes: Indices, classes: tuple[str, ...], count: int, option: str
) -> npt.NDArray[np.bool_]:
    """Which of ``nodes`` are the first ``count`` of their class."""
    chosen = np.zeros(len(nodes), dtype=bool)
    for label, name in enumerate(classes):
        places = np.flatnonzero(labels[nodes] == label)
        if len(places) < count:
            total = int((labels == label).sum())
            taken = f", of which {total - len(places)} are drawn for other parts already" if total > len(places) else ""
            raise UsageError(f"{option} is {count}, but class {name!r} has {total} nodes with a label{taken}")
        chosen[places[:count]] = True
    return chosen


def _parted(nodes: Indices, chosen: npt.NDArray[np.bool_]) -> tuple[Indices, Indices]:
    return nodes[chosen], nodes[~chosen]


def _shuffled(nodes: Indices, seed: int, stream: str) -> Indices:
    """In an order that depends on the seed and the stream, and on which nodes they are, but not on theirs."""
    return np.random.default_rng(streams.stream_seed(seed, stream)).permutation(np.sort(nodes))


def graph_splits(info: DataInfo, graph: PublishedGraph, split: Split, scale: FeatureScale) -> DataSplits:
    """The splits of one run on a graph.

    Args:
        info: The set's facts.
        graph: What its files hold, checked.
        split: Numbers of the training, validation and test nodes, all of which have labels.
        scale: What the features become.
    """

    def examples(nodes: npt.NDArray[Any]) -> Examples:
        return Examples(torch.from_numpy(nodes), torch.from_numpy(graph.labels[nodes]))

    edges = torch.from_numpy(undirected(graph.pairs, info.nodes))
    return DataSplits(info, *map(examples, split), graph=Graph(feature_tensor(graph.features, scale), edges))
