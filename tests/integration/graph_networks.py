"""Small networks on graphs, batches for them, and what tests of them have in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from integration.exactness import order_of, parameter_gradients
from manifold_mixup import ManifoldMixup, cut_points, errors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts some of its classes, which torch has deprecated
    from torch_geometric.nn import GATConv, GCNConv, GINConv, SAGEConv, global_mean_pool

NODES, GRAPHS, CLASSES = 8, 3, 3


class NodeNet(nn.Module):
    """A class for every node."""

    def __init__(self, convolution: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second, self.third = (convolution(a, b) for a, b in ((4, 6), (6, 6), (6, CLASSES)))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = torch.tanh(self.first(x, edge_index))
        return self.third(torch.tanh(self.second(h, edge_index)), edge_index)


class Deeper(NodeNet):
    """Two layers more, node by node, behind the messages."""

    def __init__(self) -> None:
        super().__init__(GCNConv)
        self.hidden, self.head = nn.Linear(CLASSES, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(super().forward(x, edge_index))))


Pooling = Callable[[Tensor, Tensor], Tensor]


class Pool(nn.Module):
    """Node states -> graph states."""

    def __init__(self, how: Pooling) -> None:
        super().__init__()
        self.how = how

    def forward(self, h: Tensor, batch: Tensor) -> Tensor:
        return self.how(h, batch)


class GraphNet(nn.Module):
    """A class for every graph of a batch."""

    def __init__(self, convolution: Callable[[int, int], nn.Module], pool: Pooling = global_mean_pool) -> None:
        super().__init__()
        self.first, self.second = convolution(4, 6), convolution(6, 6)
        self.pool = Pool(pool)
        self.hidden, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(x, edge_index)), edge_index))
        return self.head(torch.tanh(self.hidden(self.pool(h, batch))))


CONVOLUTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "gcn": GCNConv,
    "gat": GATConv,
    "sage": SAGEConv,
    "gin": lambda a, b: GINConv(nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, b))),
}


def ring(chord: bool = True) -> Tensor:
    """Edges of a ring, with or without a chord, both ways."""
    start = torch.cat([torch.arange(NODES), torch.zeros(int(chord)).long()])
    end = torch.cat([(torch.arange(NODES) + 1) % NODES, torch.full((int(chord),), 3)])
    return torch.stack([torch.cat([start, end]), torch.cat([end, start])])


def nodes() -> tuple[Tensor, Tensor]:
    return torch.randn(NODES, 4, dtype=torch.float64), ring()


def graphs() -> tuple[Tensor, Tensor, Tensor]:
    return (*nodes(), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]))


def mixer(model: nn.Module, layer: str, n: int, check: bool = True, **arguments: Any) -> ManifoldMixup:
    return ManifoldMixup(
        model, layers=[layer], check=check, pairing=lambda y, generator: order_of(n), seed=0, **arguments
    )


def assert_same_gradients(model: nn.Module, output: Tensor, twin: Tensor) -> None:
    for mine, reference in zip(parameter_gradients(model, output), parameter_gradients(model, twin), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-8, atol=1e-8)


def names(model: nn.Module, *x: Any) -> list[str]:
    return [point.name for point in cut_points(model, *x)]


def refusal(model: nn.Module, layer: str, x: Any, n: int = NODES) -> errors.RowsExchange:
    mixup = ManifoldMixup(model, layers=[layer])
    with pytest.raises(errors.RowsExchange) as caught:
        mixup(x, torch.arange(n) % CLASSES)
    mixup.remove()
    assert caught.value.name == layer
    return caught.value
