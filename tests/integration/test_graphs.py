"""Graph networks: rows are nodes, and they see each other through the edges.

Mixing the states of nodes after layer k leaves the graph alone: what follows aggregates over the original edges. So the
output for λ = 0 is not the output of the permuted nodes, unless the graph is relabelled as well; the two halves of the
network run by hand are the reference throughout.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from integration.exactness import (
    LAM,
    assert_equal,
    by_hand,
    call,
    check,
    differ,
    mixture,
    order_of,
    parameter_gradients,
    prepared,
    rows_of,
    set_lam,
)
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


class MeanPool(nn.Module):
    """Node states -> graph states."""

    def forward(self, h: Tensor, batch: Tensor) -> Tensor:
        return global_mean_pool(h, batch)


class GraphNet(nn.Module):
    """A class for every graph of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GCNConv(4, 6), GCNConv(6, 6)
        self.pool = MeanPool()
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


def mixer(model: nn.Module, layer: str, n: int, check: bool = False) -> ManifoldMixup:
    return ManifoldMixup(model, layers=[layer], check=check, pairing=lambda y, generator: order_of(n), seed=0)


# ---------------------------------------------------------------- nodes


@pytest.mark.parametrize("proven", [True, False])
@pytest.mark.parametrize("layer", ["input", "first", "second"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_states_of_nodes_are_mixed_and_aggregation_goes_on_over_the_same_graph(name, layer, proven, monkeypatch):
    set_lam(monkeypatch, LAM)
    model, x, partner = prepared(NodeNet(CONVOLUTIONS[name])), nodes(), order_of(NODES)
    mixup = mixer(model, layer, NODES, proven)
    inputs, _ = mixup(x, torch.arange(NODES) % CLASSES)
    output = call(model, inputs)
    mixup.remove()
    twin = by_hand(model, x, layer, mixture(LAM, partner), NODES)
    assert_equal(output, twin)
    assert differ(output, call(model, x))
    for mine, reference in zip(parameter_gradients(model, output), parameter_gradients(model, twin), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("chord", [False, True])
def test_lam_zero_is_the_permuted_output_only_where_the_graph_looks_the_same_from_there(chord, monkeypatch):
    """On a ring, turning all nodes changes no edge. With a chord it does, and node states meet other neighbours."""
    set_lam(monkeypatch, 0.0)
    model, x, edges = prepared(NodeNet(GCNConv)), nodes()[0], ring(chord)
    plain = model(x, edges)
    mixup = mixer(model, "first", NODES)
    mixup((x, edges), torch.arange(NODES))
    assert differ(model(x, edges), plain[order_of(NODES)]) == chord


def test_only_training_nodes_are_paired_where_the_pairing_says_so(monkeypatch):
    """Labels of other nodes must not leak into the loss through partners."""
    set_lam(monkeypatch, LAM)
    model, (x, edges), y = prepared(NodeNet(GCNConv)), nodes(), torch.arange(NODES) % CLASSES
    known = torch.tensor([0, 2, 3, 5, 6])

    def pairing(labels: Tensor, generator: torch.Generator) -> Tensor:
        partner = torch.arange(NODES)
        partner[known] = known[torch.randperm(len(known), generator=generator)]
        return partner

    mixup = ManifoldMixup(model, layers=["first"], check=False, pairing=pairing, seed=1)
    inputs, target = mixup((x, edges), y)
    partner = mixup.last.partner
    assert set(partner[known].tolist()) == set(known.tolist())
    assert not torch.equal(partner, torch.arange(NODES))
    output = model(*inputs)
    loss = F.cross_entropy(output[known], target[known])
    mixup.remove()
    reference = by_hand(model, (x, edges), "first", mixture(LAM, partner), NODES)[known]
    expected = LAM * F.cross_entropy(reference, y[known])
    expected += (1 - LAM) * F.cross_entropy(reference, y[partner][known])
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_layers_are_found_on_the_whole_graph(name):
    """Two nodes cannot be cut out of a graph: the edges name the others."""
    model = NodeNet(CONVOLUTIONS[name]).double()
    assert {"input", "first", "second", "third"} <= {p.name for p in cut_points(model, *nodes())}
    layers = ManifoldMixup(model, seed=0).discover(*nodes())
    assert [layer.split(".")[0] for layer in layers] == ["input", "first", "second"]


class Jumping(NodeNet):
    """Reads the states of the first layer again at the end (a jumping-knowledge network)."""

    def __init__(self) -> None:
        super().__init__(GCNConv)
        self.head = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        first = torch.tanh(self.first(x, edge_index))
        last = self.third(torch.tanh(self.second(first, edge_index)), edge_index)
        return self.head(torch.cat([first, last], 1))


def test_a_layer_that_is_read_again_at_the_end_goes_past_the_others():
    model = Jumping().double()
    names = {p.name for p in cut_points(model, *nodes())}
    assert {"input", "first", "head"} <= names
    assert not {"second", "third"} & names
    with pytest.raises(errors.NotACutPoint, match="reaches the model's own forward"):
        ManifoldMixup(model, layers=["second"])(nodes(), torch.arange(NODES))


class ByHand(nn.Module):
    """Aggregates along edges without any layer that shows that its rows are nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.second(torch.zeros_like(h).index_add(0, edge_index[1], h[edge_index[0]]))


def test_a_graph_that_does_not_look_like_one_fails_with_what_to_do():
    with pytest.raises(errors.DiscoveryFailed, match=r"layers=\[\.\.\.\], check=False"):
        cut_points(ByHand().double(), *nodes())


def test_the_name_of_a_layer_is_checked_all_the_same():
    with pytest.raises(errors.LayerNotFound, match="first"):
        ManifoldMixup(NodeNet(GCNConv), layers=["frist"], check=False)


# ---------------------------------------------------------------- graphs


def test_states_of_graphs_are_mixed_after_the_pooling(monkeypatch):
    """One row per graph from there on. The inputs have one per node, so the rows are given by the labels."""
    set_lam(monkeypatch, LAM)
    model, x, y, partner = prepared(GraphNet()), graphs(), torch.arange(GRAPHS), order_of(GRAPHS)
    for layer in ("pool", "hidden"):
        mixup = mixer(model, layer, GRAPHS)
        _, target = mixup(y, y)
        output = model(*x)
        loss = F.cross_entropy(output, target)
        mixup.remove()
        twin = by_hand(model, x, layer, mixture(LAM, partner), GRAPHS)
        assert_equal(output, twin)
        expected = LAM * F.cross_entropy(twin, y) + (1 - LAM) * F.cross_entropy(twin, y[partner])
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)


def test_lam_zero_after_the_pooling_is_the_batch_of_graphs_in_another_order(monkeypatch):
    set_lam(monkeypatch, 0.0)
    model, x, y = prepared(GraphNet()), graphs(), torch.arange(GRAPHS)
    plain = model(*x)
    mixup = mixer(model, "pool", GRAPHS)
    mixup(y, y)
    assert_equal(model(*x), plain[order_of(GRAPHS)])


def test_a_layer_before_the_pooling_has_other_rows_and_is_refused():
    model, x, y = prepared(GraphNet()), graphs(), torch.arange(GRAPHS)
    mixup = mixer(model, "first", GRAPHS)
    mixup(y, y)
    with pytest.raises(errors.BatchMismatch, match=rf"'first'.*no floating tensor with the batch's {GRAPHS} rows"):
        model(*x)


def test_nodes_as_x_and_one_label_per_graph_do_not_fit():
    model = prepared(GraphNet())
    with pytest.raises(errors.BatchMismatch, match=rf"x has {NODES} rows.*{GRAPHS}"):
        mixer(model, "pool", GRAPHS)(graphs(), torch.arange(GRAPHS))


# ---------------------------------------------------------------- dense graphs: rows are graphs, nothing is special


class DenseGraphNet(nn.Module):
    """Node features (n, nodes, features) and adjacency (n, nodes, nodes), both one row per graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = torch.tanh(self.first(adjacency @ x))
        return self.head(torch.tanh(self.second(adjacency @ h)).mean(1))


def test_dense_adjacencies_are_inputs_and_go_past_the_layers(monkeypatch):
    model = prepared(DenseGraphNet())
    x = (torch.randn(5, NODES, 4).double(), torch.rand(5, NODES, NODES).double())
    assert {p.name for p in cut_points(model, *x)} == {"input", "second", "head"}
    assert call(model, rows_of(x, order_of(5), 5)).shape == (5, CLASSES)
    check(model, x, 5, monkeypatch)
    with pytest.raises(errors.NotACutPoint, match="input 1"):
        ManifoldMixup(model, layers=["first"])(x, torch.arange(5))
