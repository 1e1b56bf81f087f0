"""Graph networks with a class for every graph: behind the readout rows are examples, before it nodes of several.

The rows that are mixed are those of the targets. The two halves of the network run by hand are the reference.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from integration.exactness import (
    LAM,
    assert_equal,
    by_hand,
    call,
    mixture,
    order_of,
    prepared,
    set_lam,
)
from integration.graph_networks import (
    CLASSES,
    CONVOLUTIONS,
    GRAPHS,
    NODES,
    Deeper,
    GraphNet,
    Pooling,
    assert_same_gradients,
    graphs,
    mixer,
    names,
    nodes,
    refusal,
    ring,
)
from manifold_mixup import ManifoldMixup, errors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts some of its classes, which torch has deprecated
    from torch_geometric.data import Batch, Data
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import GCNConv, global_add_pool, global_max_pool, global_mean_pool, models


def assert_mixes_exactly(model: nn.Module, x: Any, layer: str, n: int, lam: float, **arguments: Any) -> None:
    """Output, loss and gradients are those of the two halves of the network, run by hand."""
    y, partner = torch.arange(n) % CLASSES, order_of(n)
    mixup = mixer(model, layer, n, **arguments)
    inputs, target = mixup(x, y)
    output = call(model, inputs)
    loss = F.cross_entropy(output, target)
    mixup.remove()
    twin = by_hand(model, x, layer, mixture(lam, partner), n)
    assert_equal(output, twin)
    expected = lam * F.cross_entropy(twin, y) + (1 - lam) * F.cross_entropy(twin, y[partner])
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    assert_same_gradients(model, output, twin)


POOLINGS: dict[str, Pooling] = {"mean": global_mean_pool, "add": global_add_pool, "max": global_max_pool}


@pytest.mark.parametrize("lam", [0.0, LAM, 1.0])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_states_of_graphs_are_mixed_behind_the_pooling(name, lam, monkeypatch):
    """One row per graph from there on, as many as there are targets."""
    set_lam(monkeypatch, lam)
    model, x = prepared(GraphNet(CONVOLUTIONS[name])), graphs()
    assert names(model, *x) == ["pool", "hidden", "head"]
    plain = model(*x)
    for layer in ("pool", "hidden"):
        assert_mixes_exactly(model, x, layer, GRAPHS, lam)
    if lam == 0.0:  # the batch of graphs in another order
        mixup = mixer(model, "pool", GRAPHS)
        mixup(x, torch.arange(GRAPHS))
        assert_equal(model(*x), plain[order_of(GRAPHS)])


class Readout(nn.Module):
    """A network of PyTorch Geometric, pooled by a function, and its own MLP."""

    def __init__(self, body: nn.Module, pool: Pooling) -> None:
        super().__init__()
        self.body, self.pool, self.head = body, pool, models.MLP([6, 6, CLASSES], norm=None)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.head(self.pool(self.body(x, edge_index), batch))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", ["GCN", "GAT", "GIN", "GraphSAGE"])
def test_networks_of_the_library_pooled_by_a_function(kind, pooling, monkeypatch):
    set_lam(monkeypatch, LAM)
    model, x = prepared(Readout(getattr(models, kind)(4, 6, 2, 6), POOLINGS[pooling])), graphs()
    mixup = ManifoldMixup(model, seed=0)
    mixup(x, torch.arange(GRAPHS))
    assert mixup.layers == ["head.lins.0"]
    mixup.remove()
    assert_mixes_exactly(model, x, "head.lins.0", GRAPHS, LAM)


def test_the_automatic_layers_are_the_readout_and_the_head_as_a_network_of_its_own():
    mixup = ManifoldMixup(GraphNet(GCNConv).double())
    mixup(graphs(), torch.arange(GRAPHS))
    assert mixup.layers == ["pool", "hidden"]


def test_with_a_draw_for_every_pair(monkeypatch):
    model, x, y = prepared(GraphNet(GCNConv)), graphs(), torch.arange(GRAPHS)
    mixup = ManifoldMixup(model, layers=["pool"], per="example", seed=3)
    _, target = mixup(x, y)
    lam, partner = mixup.last.lam.unsqueeze(1), mixup.last.partner
    output = model(*x)
    loss = F.cross_entropy(output, target, reduction="none").mean()
    mixup.remove()
    twin = by_hand(model, x, "pool", lambda h: lam * h + (1 - lam) * h[partner], GRAPHS)
    assert_equal(output, twin)
    losses = torch.stack([F.cross_entropy(twin, labels, reduction="none") for labels in (y, y[partner])])
    torch.testing.assert_close(loss, (lam[:, 0] * losses[0] + (1 - lam[:, 0]) * losses[1]).mean())


@pytest.mark.parametrize(
    ("members", "edges"),
    [
        ([0, 0, 0, 0, 0, 0, 0, 0], True),  # one graph
        ([0, 0, 0, 1, 1, 2, 2, 2], False),  # no edges
        ([0, 1, 2, 3, 4, 5, 6, 7], True),  # as many graphs as nodes
        ([0], False),  # one graph with one node
    ],
)
def test_batches_at_the_edge(members, edges, monkeypatch):
    set_lam(monkeypatch, LAM)
    model = prepared(GraphNet(GCNConv))
    edge_index = ring() if edges else torch.empty(2, 0, dtype=torch.long)
    x = (torch.randn(len(members), 4).double(), edge_index, torch.tensor(members))
    n = members[-1] + 1
    assert names(model, *x) == ["pool", "hidden", "head"]
    assert_mixes_exactly(model, x, "pool", n, LAM)
    assert "messages" in str(refusal(model, "first", x, n)) or "joined" in str(refusal(model, "first", x, n))


def data_set(sizes: list[int]) -> list[Data]:
    return [
        Data(edge_index=torch.randint(n, (2, 2 * n)), y=torch.tensor([n % CLASSES]), x=torch.randn(n, 4).double())
        for n in sizes
    ]


class OnData(nn.Module):
    """Takes a batch as the library makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = GraphNet(GCNConv)

    def forward(self, data: Batch) -> Tensor:
        return self.net(data.x, data.edge_index, data.batch)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("first", [[3, 1, 4, 2], [1, 1, 1, 1]])
def test_a_loader_whose_batches_have_other_numbers_of_nodes(first, whole, monkeypatch):
    """S is found on the first batch, and a batch may come as tensors or as it is."""
    set_lam(monkeypatch, LAM)
    model, n = prepared(OnData()), 4
    net = model.net
    net.training = not whole
    mixup = mixer(model if whole else net, "net.pool" if whole else "pool", n)
    for batch in DataLoader(data_set([*first, 5, 2, 2, 6, 1, 1, 1, 1]), batch_size=n):
        x = (batch.x, batch.edge_index, batch.batch)
        inputs, target = mixup(batch if whole else x, batch.y)
        assert inputs is batch or inputs == x
        output = model(batch) if whole else net(*inputs)
        with mixup.paused():
            twin = by_hand(net, x, "pool", mixture(LAM, order_of(n)), n)
        assert_equal(output, twin)
        assert F.cross_entropy(output, target).isfinite()
    assert mixup.layers == ["net.pool" if whole else "pool"]


def test_a_graph_as_it_is_with_targets_for_its_nodes(monkeypatch):
    class Nodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Deeper()

        def forward(self, data: Data) -> Tensor:
            return self.net(data.x, data.edge_index)

    set_lam(monkeypatch, LAM)
    model, (x, edges) = prepared(Nodes()), nodes()
    data = Data(edge_index=edges, y=torch.arange(NODES) % CLASSES, x=x)
    assert names(model, data)[-2:] == ["net.head", "net"][-2:]
    mixup = mixer(model, "net.hidden", NODES)
    inputs, _ = mixup(data, data.y)
    output = model(inputs)
    mixup.remove()
    assert_equal(output, by_hand(model.net, (x, edges), "hidden", mixture(LAM, order_of(NODES)), NODES))
    assert "input" not in names(model, data)


def test_rows_of_the_targets_may_still_be_said_alone(monkeypatch):
    set_lam(monkeypatch, LAM)
    model, x, y = prepared(GraphNet(GCNConv)), graphs(), torch.arange(GRAPHS)
    mixup = mixer(model, "pool", GRAPHS, check=False)
    mixup(y, y)
    output = model(*x)
    mixup.remove()
    assert_equal(output, by_hand(model, x, "pool", mixture(LAM, order_of(GRAPHS)), GRAPHS))


def test_evaluation_takes_targets_of_graphs():
    model = GraphNet(GCNConv).double().eval()
    _, target = ManifoldMixup(model)(graphs(), torch.arange(GRAPHS))
    assert not target.mixed


def test_a_layer_before_the_pooling_is_refused_and_the_rows_named():
    model, x, y = prepared(GraphNet(GCNConv)), graphs(), torch.arange(GRAPHS)
    for layer in ("input", "first", "second"):
        message = str(refusal(model, layer, x, GRAPHS))
        assert f"its {NODES} rows are joined into the {GRAPHS} of the output by 'pool' (scatter_add_)" in message
    mixup = mixer(model, "first", GRAPHS, check=False)
    mixup(y, y)
    with pytest.raises(errors.BatchMismatch, match=rf"'first'.*no floating tensor with the batch's {GRAPHS} rows"):
        model(*x)


@pytest.mark.parametrize("n", [GRAPHS + 1, NODES])
def test_targets_that_are_those_of_no_output_do_not_fit(n):
    with pytest.raises(errors.BatchMismatch, match=rf"x has {NODES} rows .* returns {GRAPHS}, .* targets have {n}\."):
        ManifoldMixup(GraphNet(GCNConv).double())(graphs(), torch.arange(n))


def test_two_batches_have_no_halves_of_graphs():
    with pytest.raises(errors.BatchMismatch, match=f"halves of x, but its {NODES} rows are not those of the 3 targets"):
        ManifoldMixup(GraphNet(GCNConv).double(), pairing="two-batches")(graphs(), torch.arange(GRAPHS))


class WithGlobals(GraphNet):
    """What is known of every graph joins behind the pooling."""

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, known: Tensor) -> Tensor:
        pooled = self.pool(torch.tanh(self.first(x, edge_index)), batch)
        return self.head(torch.tanh(self.hidden(pooled + known)))


def test_an_input_with_a_row_for_every_graph_goes_past_the_pooling():
    model, x = WithGlobals(GCNConv).double(), (*graphs(), torch.randn(GRAPHS, 6).double())
    assert names(model, *x) == ["hidden", "head"]
    with pytest.raises(errors.NotACutPoint, match="the input 'input 3' reaches"):
        ManifoldMixup(model, layers=["pool"])(x, torch.arange(GRAPHS))


class Sets(nn.Module):
    """Sums over sets by hand, without a layer that shows that its rows are members of sets."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.hidden(h.new_zeros(int(batch.max()) + 1, 6).index_add(0, batch, h))))


def test_sets_without_a_layer_of_the_library(monkeypatch):
    set_lam(monkeypatch, LAM)
    model, (x, _, batch) = prepared(Sets()), graphs()
    assert_mixes_exactly(model, (x, batch), "hidden", GRAPHS, LAM)
    assert "joined into the 3 of the output by the model's own forward (index_add)" in str(
        refusal(model, "first", (x, batch), GRAPHS)
    )
    with pytest.raises(errors.BatchMismatch, match=rf"x has {NODES} rows, but the targets have shape \(4,\)"):
        ManifoldMixup(model)((x, batch), torch.arange(4))


class OneGraph(nn.Module):
    """A sequence of feature matrices on one graph: rows are examples, and nodes are in dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GCNConv(4, 6, node_dim=1), GCNConv(6, 6, node_dim=1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(x, edge_index)), edge_index))
        return self.head(h.mean(1))


def test_examples_that_share_one_graph_are_mixed_anywhere(monkeypatch):
    set_lam(monkeypatch, LAM)
    model, x = prepared(OneGraph()), (torch.randn(5, NODES, 4).double(), ring())
    assert {"input", "first", "second", "head"} <= set(names(model, *x))
    for layer in ("input", "first", "second"):
        assert_mixes_exactly(model, x, layer, 5, LAM)
