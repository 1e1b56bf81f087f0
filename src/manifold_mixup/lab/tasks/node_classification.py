"""Node classification on one graph: some nodes have labels, all of them are seen.

The transductive setting of Yang et al. 2016 (arXiv 1603.08861): features and edges of all nodes, those of the test
split included, are there in training; their labels are not.
"""

from __future__ import annotations

import torch
from torch import nn

from manifold_mixup.lab.config import Component, TrainConfig
from manifold_mixup.lab.data import DataInfo, DataSplits, Places, Unlabelled
from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.models import ModelEntry
from manifold_mixup.lab.tasks.base import ChoiceOptions, Task

__all__ = ["NodeClassification"]


class NodeClassification(Task[ChoiceOptions]):
    """Examples are nodes of one graph, of which the network sees all."""

    name = "node_classification"
    title = "classification of the nodes of one graph"
    Options = ChoiceOptions

    def problems(self, data: Component, info: DataInfo, model: ModelEntry, train: TrainConfig | None) -> list[str]:
        """Data without a graph, and networks and batches for such data."""
        problems = []
        if not info.nodes:
            problems.append(f"data: {info.name!r} is no graph; take one such as 'cora'")
        if not model.graph:
            problems.append(f"model: {model.name!r} reads no graph; take one that does, such as 'gcn'")
        if train is not None and train.compile:
            problems.append("train.compile: networks on a graph are not compiled")
        return problems

    def splits(self, data: Component, seed: int, places: Places | None) -> DataSplits:
        """The splits, and all nodes but the labelled ones as the pool, drawn from with replacement.

        Raises:
            UsageError: The nodes have fewer than two classes, or all of them have labels.
        """
        splits = super().splits(data, seed, places)
        if len(splits.info.classes) < 2:
            raise UsageError(f"data {data.name!r} have one class only: there is nothing to tell apart")
        labelled = torch.zeros(splits.info.nodes, dtype=torch.bool)
        labelled[splits.train.x] = True
        others = (~labelled).nonzero().flatten()
        if not len(others):
            raise UsageError(f"all {splits.info.nodes} nodes of data {data.name!r} are labelled training nodes")
        splits.unlabelled = Unlabelled(others, len(splits.train), replacement=True)
        return splits

    def place(self, model: nn.Module, splits: DataSplits) -> None:
        """Give the network the graph."""
        from manifold_mixup.lab.models.graph_nets import GraphNet

        assert isinstance(model, GraphNet)
        assert splits.graph is not None
        model.place(splits.graph)
