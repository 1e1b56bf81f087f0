"""GraphMix, step by step against a hand-written one with dense matrices, and the controls that leave parts out."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from lab.test_graph_nets import NODES, PAIRS, adjacency, dense_gcn, dropped, features, graph, masks, network
from manifold_mixup import ManifoldMixup
from manifold_mixup.lab import storage
from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.methods import make_method
from manifold_mixup.lab.methods.base import Batch
from manifold_mixup.lab.methods.graphmix import GraphMix, sharpened
from manifold_mixup.lab.models import build_model
from manifold_mixup.lab.streams import stream_seed

CLASSES = 3
X = torch.tensor([0, 3, 4, 8])
Y = torch.tensor([0, 1, 2, 1])
U = torch.tensor([1, 5, 5, 7])  # one of them twice
SEED = 11


def criterion(output, target):
    return F.cross_entropy(output, target, reduction="none").mean()


def batch(step=700, x=X, y=Y, u=U):
    return Batch(x, y, u, step, 2000)


def attached(net, seed=SEED, **options):
    method = make_method("graphmix", options)
    method.attach(net, [], seed)
    return method


class Draws:
    """λ and partners of every batch that a mixer draws for, from a mixer of a network that has nothing else to it."""

    def __init__(self, alpha):
        self.model = nn.Sequential(nn.Identity())
        self.mixup = ManifoldMixup(self.model, alpha, ["0"], seed=stream_seed(SEED, "mixing"), check=False)

    def __call__(self, n):
        self.mixup(torch.zeros(n, 1), torch.zeros(n))
        self.model(torch.zeros(n, 1))
        last = self.mixup.last
        return last.lam, torch.arange(n) if last.partner is None else last.partner


def by_hand(net, options, step=700, y=Y):
    """The loss of a step without edges, with dense matrices in double precision; every draw in the method's order."""
    x, a = features().float().double(), adjacency(PAIRS, NODES)
    p, q = net.input_dropout.p, net.hidden_dropout.p
    classes = net.conv["2"].lin.weight.shape[0]
    draw, gamma = Draws(options.get("alpha", 1.0)), options.get("gamma", 10.0)

    def states(h):
        return masks(h.shape, q) if q else 1

    def predict():
        z = dropped(x, p)
        return dense_gcn(net, a, z, lambda h: h * states(h))[U].softmax(1)

    def loss(nodes, targets):
        lam, partner = draw(len(nodes))
        h = (dropped(x[nodes], p) @ net.conv["1"].lin.weight.t()).relu()
        h = lam * h + (1 - lam) * h[partner]
        t = lam * targets + (1 - lam) * targets[partner]
        p_out = ((h * states(h)) @ net.conv["2"].lin.weight.t()).softmax(1)
        if options.get("loss") == "cross-entropy":
            return -(t * p_out.log()).sum(1).mean()
        return -(t * p_out.log() + (1 - t) * (1 - p_out).log()).mean()

    guessed = None
    if gamma:
        with torch.no_grad():
            mean = sum(predict() for _ in range(options.get("predictions", 10))) / options.get("predictions", 10)
            power = mean ** (1 / options.get("temperature", 0.1))
            guessed = power / power.sum(1, keepdim=True)
    total = loss(X, F.one_hot(y, classes).double())
    if gamma:
        total = total + gamma * math.exp(-5 * (1 - min(max((step - 500) / 500, 0), 1)) ** 2) * loss(U, guessed)
    return total


def assert_same_step(net, mine, reference):
    torch.testing.assert_close(mine, reference, rtol=1e-8, atol=1e-10)
    one, other = (torch.autograd.grad(loss, list(net.parameters())) for loss in (mine, reference))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert all(g.any() for g in one)


CASES = [
    {},
    {"loss": "cross-entropy"},
    {"alpha": 0.0},
    {"gamma": 0.0},
    {"alpha": 0.0, "gamma": 0.0, "loss": "cross-entropy"},
    {"predictions": 3, "temperature": 0.5, "alpha": 2.0, "gamma": 1.0},
]


@pytest.mark.parametrize("hidden_dropout", [0.0, 0.3])
@pytest.mark.parametrize("options", CASES)
def test_a_step_without_edges_is_the_hand_written_one(options, hidden_dropout):
    net = network("gcn", graph(), hidden_dropout=hidden_dropout).train()
    method = attached(net, features_share=1.0, **options)
    torch.manual_seed(4)
    mine = method.step(net, criterion, batch())
    torch.manual_seed(4)
    assert_same_step(net, mine, by_hand(net, options))


def test_labelled_and_unlabelled_nodes_have_weights_and_partners_of_their_own():
    draw = Draws(1.0)
    (first, _), (second, _) = draw(4), draw(4)
    assert first != second


def test_a_step_on_the_graph_is_the_recipes_loss_on_the_labelled_nodes():
    net = network("gcn", graph()).train()
    method = attached(net, features_share=0.0)
    torch.manual_seed(4)
    mine = method.step(net, criterion, batch())
    torch.manual_seed(4)
    output = dense_gcn(net, adjacency(PAIRS, NODES), dropped(features().float().double(), 0.5))[X]
    assert_same_step(net, mine, F.cross_entropy(output, Y))
    doubled = method.step(net, lambda output, target: 2 * criterion(output, target), batch())
    torch.manual_seed(4)
    net(X)
    torch.testing.assert_close(doubled, 2 * criterion(net(X), Y))


def test_without_a_coin_a_step_has_both_losses():
    net = network("gcn", graph()).train()
    torch.manual_seed(4)
    mine = attached(net, coin="both").step(net, criterion, batch())
    torch.manual_seed(4)
    output = dense_gcn(net, adjacency(PAIRS, NODES), dropped(features().float().double(), 0.5))[X]
    assert_same_step(net, mine, F.cross_entropy(output, Y) + by_hand(net, {}))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_coin_has_the_stated_share(share):
    net = network("gcn", graph()).train()
    method = attached(net, features_share=share, gamma=0.0)
    for _ in range(600):
        method.step(net, criterion, batch())
    seen = sum(method.facts()["mixing"]["layers"].values()) / 600
    assert abs(seen - share) <= (0.0 if share in (0.0, 1.0) else 0.08)  # standard error 0.02 at most


@pytest.mark.parametrize("step", [0, 499, 500, 750, 999, 1000, 1999])
def test_gamma_grows_as_stated(step):
    net = network("gcn", graph(), input_dropout=0.0).train()
    without = attached(net, features_share=1.0, alpha=0.0, gamma=0.0).step(net, criterion, batch(step))
    parts = []
    for gamma in (1.0, 10.0):
        method = attached(net, features_share=1.0, alpha=0.0, gamma=gamma)
        parts.append((method.step(net, criterion, batch(step)) - without).item())
    full = attached(net, features_share=1.0, alpha=0.0, gamma=1.0, ramp_start=0, ramp_steps=0)
    whole = (full.step(net, criterion, batch(step)) - without).item()
    expected = math.exp(-5 * (1 - min(max((step - 500) / 500, 0), 1)) ** 2)
    assert parts == pytest.approx([expected * whole, 10 * expected * whole], rel=1e-9)


def test_without_pseudo_labels_the_network_is_not_asked():
    net = network("gcn", graph()).train()
    asked = []

    def forward(nodes):
        asked.append(nodes)
        return net(nodes)

    attached(net, features_share=1.0, gamma=0.0).step(forward, criterion, batch(u=None))
    assert asked == []
    attached(net, features_share=1.0, predictions=4).step(forward, criterion, batch())
    assert [nodes.tolist() for nodes in asked] == [U.tolist()] * 4


# ------------------------------------------------------------------ pseudo-labels


def test_sharpening_is_exact_where_powers_are_no_numbers():
    torch.manual_seed(0)
    logits = 12 * torch.randn(10, 200, 6)
    logits[:, :50] *= 10  # some probabilities are zero in single precision
    mean = logits.double().softmax(2).mean(0)
    for temperature in (0.1, 0.5, 1.0):
        logs = mean.log() / temperature
        expected = (logs - logs.logsumexp(1, keepdim=True)).exp()
        found = sharpened(logits.log_softmax(2), temperature)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)
    low = torch.tensor([[[1e-5, 2e-5, 1 - 3e-5]]]).log()
    assert sharpened(low, 1.0)[0].tolist() == pytest.approx([1e-5, 2e-5, 1 - 3e-5], rel=1e-4)


def test_sharpening_certain_and_undecided_predictions():
    certain = torch.tensor([[[0.0, -1000.0, -2000.0]]])
    assert sharpened(certain, 0.1).tolist() == [[1, 0, 0]]
    assert sharpened(torch.zeros(2, 1, 4).log_softmax(2), 0.001).tolist() == [[0.25] * 4]


# ------------------------------------------------------------------ odd batches


def trained(net, method, steps=16, **changes):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = method.step(net, criterion, batch(step=60 * step, **changes))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["gcn", "gat"])
def test_a_class_without_labelled_nodes_does_no_harm(kind):
    net = network(kind, graph()).train()
    method = attached(net, gamma=1.0)
    losses = trained(net, method, steps=80, x=X[:2], y=Y[:2])
    assert all(map(math.isfinite, losses))
    net.eval()
    output = net(torch.arange(NODES))
    assert output.shape == (NODES, CLASSES)
    assert output.isfinite().all()
    assert output[X[:2]].argmax(1).tolist() == Y[:2].tolist()


@pytest.mark.parametrize("loss", ["bce-softmax", "cross-entropy"])
def test_with_a_single_class_there_is_nothing_to_learn(loss):
    """The task refuses such data; the method itself has a loss of zero."""
    torch.manual_seed(0)
    net = build_model("gcn", {"hidden": 4}, (7,), 1).train()
    net.place(graph())
    for step in range(6):
        value = attached(net, seed=step, loss=loss).step(net, criterion, batch(y=torch.zeros(4, dtype=torch.int64)))
        assert value.item() == 0


def test_one_labelled_and_one_unlabelled_node_are_enough():
    net = network("gcn", graph()).train()
    losses = trained(net, attached(net), x=X[:1], y=Y[:1], u=U[:1])
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("coin", ["either", "both"])
def test_batches_without_nodes_are_refused(coin):
    net = network("gcn", graph()).train()
    method = attached(net, coin=coin)
    with pytest.raises(UsageError, match="'graphmix' needs labelled nodes in every step"):
        method.step(net, criterion, batch(x=X[:0], y=Y[:0]))
    for u in (None, U[:0]):
        with pytest.raises(UsageError, match=r"'graphmix' learns from unlabelled nodes .* 'node_classification'"):
            method.step(net, criterion, batch(u=u))
        assert attached(net, coin=coin, gamma=0.0).step(net, criterion, batch(u=u)).isfinite()


# ------------------------------------------------------------------ as a method of the lab


def test_it_is_for_networks_on_a_graph_with_a_hidden_layer():
    with pytest.raises(UsageError, match="'graphmix' trains networks on a graph, 'gcn' and 'gat', not a Linear"):
        attached(nn.Linear(2, 2))
    flat = network("gcn", graph(), depth=1)
    with pytest.raises(UsageError, match="take one of depth 2 or more"):
        attached(flat)
    method = make_method("graphmix", {})
    assert method.problems(dict(flat.named_modules()), []) != []
    assert method.problems(dict(network("gat").named_modules()), []) == []
    assert GraphMix.tasks == ("node_classification",)


def test_the_network_itself_is_never_mixed_and_keeps_no_trace():
    net = network("gcn", graph())
    before, names = net(X), list(net.state_dict())
    method = attached(net)
    trained_twin = method.step(net.train(), criterion, batch())
    assert trained_twin.isfinite()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()) == 0
    net.eval()
    assert torch.equal(net(X), before)
    assert list(net.state_dict()) == names
    method.detach()
    assert make_method("graphmix", {}).detach() is None  # of one that was never attached


def test_only_dropout_reads_or_advances_the_global_generator():
    seen = []
    for seed in (1, 2):
        net = network("gcn", graph(), input_dropout=0.0).train()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        method = attached(net)
        seen.append([method.step(net, criterion, batch()).item() for _ in range(8)])
        assert torch.equal(torch.get_rng_state(), state)
    assert seen[0] == seen[1]
    net = network("gcn", graph(), input_dropout=0.0).train()
    method = attached(net, seed=SEED + 1)
    assert [method.step(net, criterion, batch()).item() for _ in range(8)] != seen[0]


@pytest.mark.parametrize("done", [0, 1, 5])
def test_state_goes_on_where_it_was(done):
    net = network("gcn", graph()).train()
    method = attached(net)
    for _ in range(done):
        method.step(net, criterion, batch())
    tensors = {}
    packed = storage.pack(method.state_dict(), tensors)  # what a checkpoint does
    torch.manual_seed(3)
    expected, facts = [method.step(net, criterion, batch()).item() for _ in range(8)], method.facts()
    other = attached(net, seed=5)
    other.load_state_dict(storage.unpack(packed, tensors))
    torch.manual_seed(3)
    assert [other.step(net, criterion, batch()).item() for _ in range(8)] == expected
    assert other.facts() == facts
    assert len(set(expected)) == 8


def test_the_record_says_where_and_how_often_it_mixed():
    net = network("gcn", graph()).train()
    assert make_method("graphmix", {}).facts() == {}
    assert make_method("graphmix", {}).state_dict() == {}
    method = attached(net, features_share=1.0)
    for _ in range(5):
        method.step(net, criterion, batch())
    facts = method.facts()
    assert facts["layers"] == ["activation.1"]
    assert facts["mixing"] | {"lam": sum(facts["mixing"]["lam"])} == {
        "unit": "batches",
        "layers": {"activation.1": 10},  # labelled and unlabelled ones
        "unmixed": 0,
        "lam": 10,
        "alpha": 1.0,
    }
    method = attached(net, features_share=1.0, alpha=0.0)
    method.step(net, criterion, batch())
    facts = method.facts()["mixing"]
    assert (facts["layers"], facts["unmixed"], sum(facts["lam"])) == ({"activation.1": 0}, 2, 0)


CHANGES = {
    "alpha": 0.3,
    "gamma": 1.0,
    "predictions": 3,
    "temperature": 0.5,
    "ramp_start": 100,
    "ramp_steps": 100,
    "loss": "cross-entropy",
    "coin": "both",
    "features_share": 0.9,
}


@pytest.mark.parametrize("key", GraphMix.Options.model_fields)
def test_every_option_has_an_effect(key):
    def weights(options):
        net = network("gcn", graph()).train()
        torch.manual_seed(0)
        trained(net, attached(net, **options))
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    assert torch.equal(weights({}), weights({}))
    assert not torch.equal(weights({}), weights({key: CHANGES[key]}))


def test_defaults_are_the_papers_for_cora():
    assert make_method("graphmix", {}).options.model_dump() == {
        "alpha": 1.0,
        "gamma": 10.0,
        "predictions": 10,
        "temperature": 0.1,
        "ramp_start": 500,
        "ramp_steps": 500,
        "loss": "bce-softmax",
        "coin": "either",
        "features_share": 0.5,
    }
    for wrong in ({"temperature": 0.0}, {"predictions": 0}, {"features_share": 1.5}, {"gamma": -1.0}):
        with pytest.raises(ValidationError):
            make_method("graphmix", wrong)
