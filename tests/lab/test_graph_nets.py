"""Networks on a graph, against dense matrices, PyTorch Geometric's own layers, and themselves without edges."""

import copy
import math
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from manifold_mixup import ManifoldMixup, cut_points
from manifold_mixup.lab.data.base import Graph
from manifold_mixup.lab.errors import MissingExtra, UsageError
from manifold_mixup.lab.models import build_model, get_model
from manifold_mixup.lab.models.graph_nets import GAT, GCN
from manifold_mixup.lab.models.sparse import Dropout, SparseMatrix, product

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts some of its classes, which torch has deprecated
    from torch_geometric.nn import GATConv, GCNConv

NODES, FEATURES, CLASSES = 9, 7, 3
PAIRS = [(0, 1), (0, 2), (1, 2), (2, 3), (3, 4), (4, 5), (0, 6), (5, 6)]  # nodes 7 and 8 have no edge
SMALL = {"gcn": {"hidden": 5}, "gat": {"hidden": 4, "heads": 3}}
KINDS = sorted(SMALL)


def features(nodes=NODES, seed=0):
    """Two thirds zeros; node 1 has no feature at all."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(nodes, FEATURES, generator=generator, dtype=torch.float64)
    x[torch.rand(nodes, FEATURES, generator=generator) < 2 / 3] = 0
    x[1:2] = 0
    return x


def graph(pairs=PAIRS, nodes=NODES, x=None):
    both = sorted({*pairs, *((b, a) for a, b in pairs)})
    edges = torch.tensor(both).t().reshape(2, -1).long()
    return Graph((features(nodes) if x is None else x).float().to_sparse().coalesce(), edges)


def network(kind, placed=None, *, seed=0, **options):
    """In double precision and evaluation mode, unless a test says otherwise."""
    torch.manual_seed(seed)
    net = build_model(kind, {**SMALL[kind], **options}, (FEATURES,), CLASSES)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()  # they begin at zero, where nothing could be seen
    net = net.double().eval()
    if placed is not None:
        net.place(placed)
    return net


def adjacency(pairs, nodes):
    """D^-1/2 (E + I) D^-1/2, entry by entry."""
    a = torch.eye(nodes, dtype=torch.float64)
    for i, j in pairs:
        a[i, j] = a[j, i] = 1
    degree = a.sum(1)
    return torch.stack(
        [torch.stack([a[i, j] / (degree[i] * degree[j]).sqrt() for j in range(nodes)]) for i in range(nodes)]
    )


def dense_gcn(net, a, x, hidden=lambda h: h):
    """The network with full matrices; ``hidden`` changes the states after every activation."""
    layers = list(net.conv.values())
    for i, layer in enumerate(layers):
        x = a @ x @ layer.lin.weight.t()
        x = x if layer.bias is None else x + layer.bias
        x = hidden(x.relu()) if i < len(layers) - 1 else x
    return x


def dense_gat(net, pairs, x):
    """The network node by node and head by head."""
    near = {i: {i} for i in range(len(x))}
    for i, j in pairs:
        near[i].add(j)
        near[j].add(i)
    layers = list(net.conv.values())
    for k, layer in enumerate(layers):
        z = (x @ layer.lin.weight.t()).view(len(x), layer.heads, -1)
        rows = []
        for i in range(len(x)):
            heads = []
            for h in range(layer.heads):
                at = sorted(near[i])
                score = torch.stack(
                    [(z[j, h] * layer.att_src[0, h]).sum() + (z[i, h] * layer.att_dst[0, h]).sum() for j in at]
                )
                heads.append((F.leaky_relu(score, 0.2).softmax(0)[:, None] * z[at, h]).sum(0))
            rows.append(torch.cat(heads))
        x = torch.stack(rows)
        x = x if layer.bias is None else x + layer.bias
        x = F.elu(x) if k < len(layers) - 1 else x
    return x


def assert_same_with_gradients(net, mine, reference, tolerance=1e-6):
    """Equal values, and equal gradients of a loss that weighs every logit differently."""
    torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance)
    weights = torch.arange(1.0, mine.numel() + 1, dtype=mine.dtype).view(mine.shape).sin()
    parameters = list(net.parameters())
    one, other = (torch.autograd.grad((y * weights).sum(), parameters, allow_unused=True) for y in (mine, reference))
    for name, a, b in zip([name for name, _ in net.named_parameters()], one, other, strict=True):
        a, b = (torch.zeros(()) if g is None or not g.any() else g for g in (a, b))
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance, check_dtype=False, msg=lambda m, name=name: f"{name}: {m}"
        )


ALL = torch.arange(NODES)


# ------------------------------------------------------------------ against references


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gcn_is_the_product_of_full_matrices(depth, bias):
    net = network("gcn", graph(), depth=depth, bias=bias)
    expected = dense_gcn(net, adjacency(PAIRS, NODES), features().float().double())
    assert_same_with_gradients(net, net(ALL), expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gat_weighs_neighbours_head_by_head(depth, bias):
    net = network("gat", graph(), depth=depth, bias=bias)
    assert_same_with_gradients(net, net(ALL), dense_gat(net, PAIRS, features().float().double()))


def test_gcn_is_what_the_librarys_layers_compute_from_dense_features_and_a_list_of_edges():
    net = network("gcn", graph(), bias=True)
    plain = [GCNConv(FEATURES, 5).double(), GCNConv(5, CLASSES).double()]
    for layer, own in zip(plain, net.conv.values(), strict=True):
        assert isinstance(own, GCNConv)
        layer.lin.weight, layer.bias = own.lin.weight, own.bias
    x, edges = features().float().double(), graph().edges
    assert_same_with_gradients(net, net(ALL), plain[1](plain[0](x, edges).relu(), edges))


def test_gat_is_what_the_librarys_layers_compute_from_dense_features_and_a_list_of_edges():
    net = network("gat", graph(), bias=True)
    plain = [GATConv(FEATURES, 4, heads=3).double(), GATConv(12, CLASSES).double()]
    for layer, own in zip(plain, net.conv.values(), strict=True):
        assert isinstance(own, GATConv)
        layer.lin.weight, layer.bias, layer.att_src, layer.att_dst = own.lin.weight, own.bias, own.att_src, own.att_dst
    x, edges = features().float().double(), graph().edges
    assert_same_with_gradients(net, net(ALL), plain[1](F.elu(plain[0](x, edges)), edges))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sparse_product_and_its_gradient_are_those_of_the_full_matrix(dtype):
    x, dense = features().to(dtype), torch.randn(FEATURES, 4, dtype=dtype, requires_grad=True)
    matrix = SparseMatrix(x.to_sparse().coalesce())
    torch.testing.assert_close(matrix(dense), x @ dense)
    weights = torch.randn(NODES, 4, dtype=dtype)
    (matrix(dense).t() * weights.t()).sum().backward()  # a gradient that is not contiguous
    torch.testing.assert_close(dense.grad, x.t() @ weights)
    other = torch.rand_like(matrix.values)
    replaced = x.clone()
    replaced[x != 0] = other
    (matrix(dense, other) * weights).sum().backward()
    torch.testing.assert_close(dense.grad, x.t() @ weights + replaced.t() @ weights)


def test_a_symmetric_product_needs_no_second_layout():
    a = adjacency(PAIRS, NODES)
    matrix, x = SparseMatrix(a.to_sparse().coalesce()), torch.randn(NODES, 2, dtype=torch.float64, requires_grad=True)
    result = product(x, (matrix.start, matrix.index, matrix.values), (matrix.start, matrix.index))
    torch.testing.assert_close(result, a @ x)
    weights = torch.randn(NODES, 2, dtype=torch.float64)
    (result * weights).sum().backward()
    torch.testing.assert_close(x.grad, a @ weights)


# ------------------------------------------------------------------ the fully connected twin


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_is_the_network_on_a_graph_without_edges(kind, depth, bias):
    net = network(kind, graph(), depth=depth, bias=bias)
    twin = net.features_only().eval()
    nodes = torch.tensor([4, 0, 1, 4, 8])
    output = twin(nodes)
    net.place(graph(pairs=[]))
    assert_same_with_gradients(net, output, net(nodes))


@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_has_the_networks_weights_and_is_no_part_of_it(kind):
    net = network(kind, bias=True)
    before = list(net.state_dict())
    twin = net.features_only()
    assert list(net.state_dict()) == before
    assert {id(p) for p in twin.parameters()} <= {id(p) for p in net.parameters()}
    assert not set(twin.modules()) & {m for name, m in net.named_modules() if not name.endswith("lin")}
    net.place(graph())  # after the twin was made
    twin.eval()
    old = twin(ALL)
    with torch.no_grad():
        net.conv["2"].lin.weight.mul_(2)
        net.conv["2"].bias.mul_(2)
    torch.testing.assert_close(twin(ALL), 2 * old)
    net.float()
    assert twin(ALL).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_can_be_mixed_after_every_activation(kind):
    net = network(kind, graph(), depth=3)
    twin, nodes = net.features_only(), torch.tensor([3, 0, 5, 2])
    found = {point.name for point in cut_points(twin, nodes)}
    assert {"activation.1", "activation.2"} <= found
    assert "input" not in found
    for p in (twin.input_dropout, twin.hidden_dropout):
        p.p = 0.0
    mixup = ManifoldMixup(twin, alpha=1.0, layers=["activation.1"], seed=0)
    mixup(nodes, nodes)
    lam, partner = mixup.last.lam, mixup.last.partner
    mixed = twin(nodes)
    mixup.remove()
    h = twin.activation["1"](twin.conv["1"].lin.rows(nodes, lambda x: x))
    h = lam * h + (1 - lam) * h[partner]
    expected = twin.conv["3"](twin.activation["2"](twin.conv["2"](h)))
    torch.testing.assert_close(mixed, expected)


def test_rows_of_the_twin_do_not_see_each_other():
    net = network("gcn", graph())
    twin = net.features_only().eval()
    together = twin(torch.tensor([2, 5, 2]))
    for row, node in enumerate((2, 5, 2)):
        torch.testing.assert_close(together[row], twin(torch.tensor([node]))[0])


# ------------------------------------------------------------------ dropout


def masks(shape, p):
    """The factors that dropout draws: four numbers of 16 bits from each one of 64."""
    size = math.prod(shape)
    words = torch.empty((size + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    numbers = torch.stack([(words >> shift) % 2**16 for shift in (0, 16, 32, 48)], dim=1).flatten()[:size]
    numbers = torch.where(numbers < 2**15, numbers, numbers - 2**16) + 2**15  # signed ones, from 0 on
    rate = round(p * 2**16) / 2**16
    return (numbers / 2**16 >= rate).double().view(shape) / (1 - rate)


def dropped(x, p):
    """Dropout of the numbers that are not zero, row by row."""
    keep = torch.zeros_like(x)
    keep[x != 0] = masks(((x != 0).sum(),), p)
    return x * keep


def test_dropout_keeps_the_stated_share_and_the_mean():
    torch.manual_seed(0)
    for p in (0.1, 0.5, 0.8):
        kept = Dropout(p)(torch.ones(100_001))
        assert abs((kept != 0).double().mean().item() - (1 - p)) < 0.01  # standard error below 0.0016
        rate = round(p * 2**16) / 2**16
        assert kept.unique().tolist() == pytest.approx([0, 1 / (1 - rate)])
        assert abs(rate - p) < 1e-5
        other = Dropout(p)(torch.ones(100_001))
        both = ((kept != 0) & (other != 0)).double().mean().item()
        assert abs(both - (1 - p) ** 2) < 0.01
        near = ((kept[1:] != 0) & (kept[:-1] != 0)).double().mean().item()  # parts of one word
        assert abs(near - (1 - p) ** 2) < 0.01


def test_a_rate_next_to_one_stays_finite():
    assert Dropout(1 - 1e-9)(torch.ones(1000)).isfinite().all()


def test_dropout_is_silent_in_evaluation_and_at_rate_zero():
    x = torch.rand(5)
    state = torch.get_rng_state()
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_dropping_entries_is_dropout_of_the_dense_features():
    net = network("gcn", graph(), input_dropout=0.4, hidden_dropout=0.3).train()
    torch.manual_seed(5)
    output = net(ALL)
    torch.manual_seed(5)
    x = features().float().double()
    rest, states = dropped(x, 0.4), masks((NODES, 5), 0.3)
    expected = dense_gcn(net, adjacency(PAIRS, NODES), rest, lambda h: h * states)
    assert_same_with_gradients(net, output, expected)
    assert (rest[x != 0] == 0).any()


def test_a_node_named_twice_has_two_masks_in_the_twin():
    net = network("gcn", graph(), input_dropout=0.5, hidden_dropout=0.5)
    busy = int((features() != 0).sum(1).argmax())
    twin, nodes = net.features_only().train(), torch.tensor([busy, busy, 3, busy])
    torch.manual_seed(2)
    output = twin(nodes)
    torch.manual_seed(2)
    x = features().float().double()[nodes]
    rest, states = dropped(x, 0.5), masks((4, 5), 0.5)
    expected = dense_gcn(net, torch.eye(4, dtype=x.dtype), rest, lambda h: h * states)
    assert_same_with_gradients(net, output, expected)
    assert not torch.equal(rest[0], rest[1])


# ------------------------------------------------------------------ odd graphs


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_without_edges_keeps_its_loop(kind):
    net = network(kind, graph())
    alone = torch.tensor([7, 8])
    torch.testing.assert_close(net(alone), net.features_only().eval()(alone))
    assert net(alone).abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [1, 4])
def test_a_graph_may_have_no_edges_or_a_single_node(kind, nodes):
    net = network(kind, graph(pairs=[], nodes=nodes))
    output = net(torch.arange(nodes))
    assert output.shape == (nodes, CLASSES)
    assert_same_with_gradients(net, output, net.features_only().eval()(torch.arange(nodes)))


@pytest.mark.parametrize("kind", KINDS)
def test_nodes_may_come_in_any_order_several_times_or_not_at_all(kind):
    net = network(kind, graph())
    nodes = torch.tensor([6, 6, 0, 6])
    assert_same_with_gradients(net, net(nodes), torch.stack([net(ALL)[i] for i in nodes.tolist()]))
    assert net(nodes[:0]).shape == (0, CLASSES)
    assert net.features_only()(nodes[:0]).shape == (0, CLASSES)


@pytest.mark.parametrize("kind", KINDS)
def test_features_may_all_be_zero(kind):
    net = network(kind, graph(x=torch.zeros(NODES, FEATURES)))
    assert torch.equal(net(ALL), torch.zeros(NODES, CLASSES, dtype=torch.float64))


# ------------------------------------------------------------------ state, copies, devices


def test_the_graph_is_no_part_of_the_state():
    assert list(network("gcn", graph(), depth=3).state_dict()) == [f"conv.{i}.lin.weight" for i in (1, 2, 3)]
    gat = network("gat", graph(), bias=True).state_dict()
    assert {name.partition(".")[2].partition(".")[2] for name in gat} == {"att_src", "att_dst", "bias", "lin.weight"}
    for kind in KINDS:
        net, other = network(kind, graph(), seed=1), network(kind, graph(), seed=2)
        other.load_state_dict(net.state_dict())
        assert torch.equal(net(ALL), other(ALL))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_has_weights_and_graph_of_its_own(kind):
    net = network(kind, graph())
    before, other = net(ALL), copy.deepcopy(net)
    assert torch.equal(other(ALL), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.place(graph(pairs=[]))
    assert torch.equal(net(ALL), before)
    twin = copy.deepcopy(net.features_only()).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert twin(ALL).any()


@pytest.mark.parametrize("kind", KINDS)
def test_another_graph_takes_the_place_of_the_first(kind):
    net = network(kind, graph())
    line = [(i, i + 1) for i in range(5)]
    net.place(graph(line, nodes=6))
    assert torch.equal(net(torch.arange(6)), network(kind, graph(line, nodes=6))(torch.arange(6)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_moves_with_the_network(kind):
    net = network(kind, graph())
    assert all(buffer.is_floating_point() or buffer.dtype == torch.int64 for buffer in net.buffers())
    net.to("meta")
    assert {tensor.device.type for tensor in [*net.buffers(), *net.parameters()]} == {"meta"}


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind):
    net = network(kind, graph()).float()
    twin = net.features_only().eval()
    plain = net(ALL), twin(ALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = net(ALL), twin(ALL)
    for a, b in zip(plain, mixed, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------ options and errors


@pytest.mark.parametrize("kind", KINDS)
def test_networks_are_built_without_memory_and_come_with_what_the_registry_says(kind):
    with torch.device("meta"):
        net = build_model(kind, {}, (FEATURES,), CLASSES)
    assert {p.device.type for p in net.parameters()} == {"meta"}
    assert {"conv.1", "conv.2", "activation.1"} <= dict(net.named_modules()).keys()
    entry = get_model(kind)
    assert entry.graph
    assert entry.hidden(entry.options()) == []


def test_defaults_are_graphmixs_and_the_papers():
    gcn, gat = (build_model(kind, {}, (FEATURES,), CLASSES) for kind in ("gcn", "gat"))
    assert isinstance(gcn, GCN)
    assert isinstance(gat, GAT)
    assert [tuple(p.shape) for p in gcn.parameters()] == [(16, FEATURES), (CLASSES, 16)]
    assert (gcn.input_dropout.p, gcn.hidden_dropout.p) == (0.5, 0.0)
    assert [(layer.heads, layer.out_channels) for layer in gat.conv.values()] == [(8, 8), (1, CLASSES)]
    assert (type(gcn.activation["1"]), type(gat.activation["1"])) == (nn.ReLU, nn.ELU)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_drawn_from_the_global_generator(kind):
    one, same, other = (dict(network(kind, seed=seed).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_first_weights_have_the_stated_bounds():
    for init, bounds in (("glorot", [(6 / 540) ** 0.5, (6 / 43) ** 0.5]), ("uniform", [1 / 40**0.5, 1 / 3**0.5])):
        net = build_model("gcn", {"hidden": 40, "init": init}, (500,), 3)
        for bound, parameter in zip(bounds, net.parameters(), strict=True):
            assert 0.9 * bound < parameter.abs().max() <= bound


CHANGES = {
    "hidden": 3,
    "heads": 2,
    "depth": 3,
    "input_dropout": 0.1,
    "hidden_dropout": 0.9,
    "bias": True,
    "init": "uniform",
}


@pytest.mark.parametrize(
    ("kind", "key"), [(kind, key) for kind in KINDS for key in get_model(kind).options.model_fields]
)
def test_every_option_has_an_effect(kind, key):
    def trained(options):
        torch.manual_seed(3)
        net = build_model(kind, {**SMALL[kind], **options}, (FEATURES,), CLASSES)
        net.place(graph())
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(net(ALL), ALL % CLASSES).backward()
            optimizer.step()
        return net.eval()(ALL)

    assert torch.equal(trained({}), trained({}))
    assert not torch.equal(trained({}), trained({key: CHANGES[key]}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_without_its_graph_says_so(kind):
    net = network(kind)
    for call in (net, net.features_only()):
        with pytest.raises(UsageError, match=r"given the graph before it is called: model\.place\(graph\)"):
            call(ALL)


def test_a_graph_that_does_not_fit_is_refused():
    net = network("gcn")
    with pytest.raises(UsageError, match="reads 7 features of a node, but the graph's have 4"):
        net.place(Graph(torch.rand(3, 4).to_sparse(), torch.zeros(2, 0, dtype=torch.int64)))
    with pytest.raises(UsageError, match="need edges in both directions"):
        net.place(Graph(features().float().to_sparse(), torch.tensor([[0, 1, 2], [1, 0, 3]])))
    with pytest.raises(UsageError, match=r"'gat' reads rows of features, not examples of shape \(3, 8, 8\)"):
        build_model("gat", {}, (3, 8, 8), CLASSES)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_library_the_error_names_the_extra(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    with pytest.raises(MissingExtra, match=r"'torch_geometric': pip install 'manifold-mixup\[graph\]'"):
        build_model(kind, {}, (FEATURES,), CLASSES)


def test_nothing_warns_in_a_process_where_warnings_are_errors():
    script = """
import torch
from manifold_mixup.lab.data.base import Graph
from manifold_mixup.lab.models import build_model
graph = Graph(torch.eye(4).to_sparse(), torch.tensor([[0, 1], [1, 0]]))
with torch.device("meta"):
    build_model("gcn", {}, (4,), 2)
for name in ("gcn", "gat"):
    net = build_model(name, {}, (4,), 2)
    net.place(graph)
    net(torch.arange(4)).sum().backward()
    net.features_only()(torch.arange(4)).sum().backward()
    print(sum(p.grad.isfinite().all() for p in net.parameters()).item())
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("2\n6\n", "")
