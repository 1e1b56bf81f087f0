"""Graph networks with a class for every node: rows are nodes, which see each other through the edges.

Mixing the states of nodes after layer k leaves the graph alone: what follows aggregates over the original edges. So the
output for λ = 0 is not the output of the permuted nodes, unless the graph is relabelled as well, and is refused unless
it is asked for. The two halves of the network run by hand are the reference.
"""

from __future__ import annotations

import warnings

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
    prepared,
    rows_of,
    set_lam,
)
from integration.graph_networks import (
    CLASSES,
    CONVOLUTIONS,
    NODES,
    Deeper,
    NodeNet,
    assert_same_gradients,
    mixer,
    names,
    nodes,
    refusal,
    ring,
)
from manifold_mixup import ManifoldMixup, cut_points, errors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts some of its classes, which torch has deprecated
    from torch_geometric.nn import GCNConv, SAGEConv


# ---------------------------------------------------------------- nodes, taken at one's word


@pytest.mark.parametrize("layer", ["input", "first", "second"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_without_the_check_states_of_nodes_are_mixed_and_aggregation_goes_on(name, layer, monkeypatch):
    set_lam(monkeypatch, LAM)
    model, x, partner = prepared(NodeNet(CONVOLUTIONS[name])), nodes(), order_of(NODES)
    mixup = mixer(model, layer, NODES, check=False)
    inputs, _ = mixup(x, torch.arange(NODES) % CLASSES)
    output = call(model, inputs)
    mixup.remove()
    twin = by_hand(model, x, layer, mixture(LAM, partner), NODES)
    assert_equal(output, twin)
    assert differ(output, call(model, x))
    assert_same_gradients(model, output, twin)


@pytest.mark.parametrize("chord", [False, True])
def test_lam_zero_is_the_permuted_output_only_where_the_graph_looks_the_same_from_there(chord, monkeypatch):
    """On a ring, turning all nodes changes no edge. With a chord it does, and node states meet other neighbours."""
    set_lam(monkeypatch, 0.0)
    model, x, edges = prepared(NodeNet(GCNConv)), nodes()[0], ring(chord)
    plain = model(x, edges)
    mixup = mixer(model, "first", NODES, check=False)
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


def test_the_name_of_a_layer_is_checked_all_the_same():
    with pytest.raises(errors.LayerNotFound, match="first"):
        ManifoldMixup(NodeNet(GCNConv), layers=["frist"], check=False)


# ---------------------------------------------------------------- nodes, checked


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_layers_before_the_last_message_passing_are_refused_for_what_follows(name):
    model, x = NodeNet(CONVOLUTIONS[name]).double(), nodes()
    assert {point.split(".")[0] for point in names(model, *x)} == {"third"}
    for layer, start in (("input", "first"), ("first", "second"), ("second", "third")):
        message = str(refusal(model, layer, x))
        assert f"its {NODES} rows are nodes that exchange messages behind it, in '{start}' (index_select" in message
        assert "labels of the others would not be in the mixed target" in message
        assert "readout" in message
        assert "GraphMix" in message
        assert "check=False" in message
    assert refusal(model, "first", x).reason.endswith("and last in 'third' (scatter_add_).")


def test_nothing_is_chosen_where_nothing_but_the_output_is_left():
    with pytest.raises(errors.RowsExchange, match="'third', behind which there is nothing left to learn.*GraphMix"):
        ManifoldMixup(NodeNet(GCNConv).double())(nodes(), torch.arange(NODES))


def test_the_data_flow_tells_where_no_value_would():
    """No edges in this batch, and weights that are zero: the messages of the next one go all the same way."""
    model = NodeNet(lambda a, b: SAGEConv(a, b, bias=False)).double()
    nn.init.zeros_(model.third.lin_l.weight)
    for edges in (ring(), torch.empty(2, 0, dtype=torch.long)):
        assert "'third' (index_select" in str(refusal(model, "second", (nodes()[0], edges)))
    alone = (torch.randn(1, 4).double(), torch.zeros(2, 1, dtype=torch.long))
    assert "its 1 rows are nodes" in str(refusal(model, "second", alone, 1))


@pytest.mark.parametrize("layer", ["third", "hidden"])
def test_behind_the_last_message_passing_states_of_nodes_are_mixed(layer, monkeypatch):
    set_lam(monkeypatch, LAM)
    model, x, partner = prepared(Deeper()), nodes(), order_of(NODES)
    assert names(model, *x) == ["third.aggr_module", "third", "hidden", "head"]
    assert ManifoldMixup(Deeper().double()).discover(*x) == ["third", "hidden"]
    mixup = mixer(model, layer, NODES)
    mixup(x, torch.arange(NODES) % CLASSES)
    output = model(*x)
    mixup.remove()
    twin = by_hand(model, x, layer, mixture(LAM, partner), NODES)
    assert_equal(output, twin)
    assert_same_gradients(model, output, twin)


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
    assert names(model, *nodes()) == ["head"]
    with pytest.raises(errors.NotACutPoint, match="reaches the model's own forward") as caught:
        ManifoldMixup(model, layers=["third"])(nodes(), torch.arange(NODES))
    assert not isinstance(caught.value, errors.RowsExchange)


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
