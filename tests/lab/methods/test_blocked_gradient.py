"""What the loss of a blocked batch trains, against networks that are run, mixed and cut by hand."""

import copy
import itertools
import pickle
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_pre_hooks

from lab.small import SPIRAL, equal, one_run, train, train_images
from manifold_mixup.lab.config import TrainConfig
from manifold_mixup.lab.errors import Interrupted, UsageError
from manifold_mixup.lab.methods import make_method
from manifold_mixup.lab.models import build_model
from manifold_mixup.lab.optim import make_optimizer
from manifold_mixup.lab.training import Hooks

SEED = 3
LAYERS = ["input", "0", "1"]
N = 8


def batch(n=N, features=5):
    x = torch.randn(n, features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.arange(n) % 3


def network():
    """Three blocks; batch norm joins the rows."""
    torch.manual_seed(0)
    block = [nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh()) for _ in range(2)]
    return nn.Sequential(*block, nn.Linear(5, 3)).double()


def attached(model, layers=None, **options):
    method = make_method("blocked_gradient", {"layers": layers or LAYERS, **options})
    return method, method.attach(model, [], SEED)


def step(model, method, transform, x, y, run=None):
    """The gradients of one batch by parameter, and what was drawn for it."""
    model.zero_grad()
    inputs, target = transform(x, y)
    method.loss(mean_cross_entropy, (run or model)(inputs), target).backward()
    return {name: p.grad for name, p in model.named_parameters()}, method._mixup.last


def mean_cross_entropy(output, target):
    return F.cross_entropy(output, target, reduction="none").mean()


def by_hand(model, x, y, layer, lam, partner, pairing):
    """The same in two halves of the network, the first one without gradients."""
    rows = slice(0, len(partner))

    def mix(h):
        other = h[len(partner) :] if pairing == "two-batches" else h[partner]
        return lam * h[rows] + (1 - lam) * other

    own, other = y[rows], y[partner]
    h = mix(x) if layer == "input" else x
    for name, module in model.named_children():
        h = module(h)
        if name == layer:
            h = mix(h).detach()
    (lam * F.cross_entropy(h, own) + (1 - lam) * F.cross_entropy(h, other)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def is_before(name, layer):
    """Whether a parameter belongs to the part that is blocked."""
    return layer != "input" and int(name[0]) <= int(layer)


@pytest.mark.parametrize("pairing", ["random", "halves", "two-batches"])
def test_gradients_are_those_of_two_halves_with_the_first_one_cut_off(pairing):
    x, y = batch()
    model = network()
    method, transform = attached(model, pairing=pairing)
    seen = set()
    for _ in range(12):
        twin = network()
        grads, draw = step(model, method, transform, x, y)
        expected = by_hand(twin, x, y, *draw, pairing)
        for name, grad in grads.items():
            assert (grad is None) == (expected[name] is None) == is_before(name, draw.layer), (name, draw.layer)
            assert grad is None or torch.allclose(grad, expected[name], rtol=0, atol=1e-10)
        seen.add(draw.layer)
    assert seen == set(LAYERS)


def test_the_forward_is_that_of_manifold_mixup():
    x, y = batch()
    outputs = []
    for name in ("manifold_mixup", "blocked_gradient"):
        model = network()
        method = make_method(name, {"layers": LAYERS, "per": "example"})
        transform = method.attach(model, [], SEED)
        outputs.append([model(transform(x, y)[0]).detach() for _ in range(6)])
        method.detach()
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("rows", [8, 7])
def test_with_a_layer_for_every_pair_only_its_rows_are_cut(rows):
    x, y = batch(rows)
    model = network()
    method, transform = attached(model, per="example")
    seen = set()
    for _ in range(6):
        twin = network()
        grads, draw = step(model, method, transform, x, y)
        lam, partner = draw.lam[:, None], draw.partner
        h = x
        for name in [*LAYERS, "2"]:
            h = h if name == "input" else twin.get_submodule(name)(h)
            here = torch.tensor([[layer == name] for layer in draw.layer])
            mixed = torch.where(here, lam * h + (1 - lam) * h[partner], h)
            h = (
                mixed
                if name == "input"
                else torch.stack([row.detach() if cut else row for row, cut in zip(mixed, here, strict=True)])
            )
        losses = [F.cross_entropy(h, labels, reduction="none") for labels in (y, y[partner])]
        (draw.lam * losses[0] + (1 - draw.lam) * losses[1]).mean().backward()
        for name, p in twin.named_parameters():
            assert torch.allclose(grads[name], p.grad, rtol=0, atol=1e-10), name
        seen.update(draw.layer)
    assert seen == {*LAYERS, None} if rows % 2 else set(LAYERS)


def test_where_all_pairs_share_a_layer_the_first_half_has_no_gradient_at_all():
    model = network()
    method, transform = attached(model, ["0"], per="example")
    grads, draw = step(model, method, transform, *batch())
    assert set(draw.layer) == {"0"}
    assert {name for name, grad in grads.items() if grad is None} == {n for n in grads if n.startswith("0.")}


@pytest.mark.parametrize("per", ["batch", "example"])
def test_at_the_input_it_is_input_mixup_bit_for_bit(per, tmp_path):
    options = {"alpha": 0.7, "per": per}
    methods = [("input_mixup", options), ("blocked_gradient", {**options, "layers": ["input"]})]
    runs = [one_run(SPIRAL, methods=[{"name": name, "options": o}]) for name, o in methods]
    inputs, blocked = (train(run, tmp_path / run.config.method.name)[0] for run in runs)
    assert equal(inputs, blocked)


@pytest.mark.parametrize("options", [{"probability": 0.5}, {"alpha": 0.0}])
def test_a_batch_that_is_not_mixed_is_not_blocked(options):
    x, y = batch()
    model = network()
    method, transform = attached(model, ["1"], **options)
    counts = {None: 0, "1": 0}
    for _ in range(12):
        grads, draw = step(model, method, transform, x, y)
        assert all((grad is None) == is_before(name, draw.layer or "input") for name, grad in grads.items())
        counts[draw.layer] += 1
        if draw.layer is None:
            twin = network()
            F.cross_entropy(twin(x), y).backward()
            assert all(torch.allclose(p.grad, grads[n], rtol=0, atol=1e-12) for n, p in twin.named_parameters())
    assert counts[None] > 0
    assert (counts["1"] > 0) == ("probability" in options)


def test_an_optimiser_leaves_alone_what_is_blocked_momentum_and_decay_included():
    x, y = batch()
    model = network()
    method, transform = attached(model, ["input", "0"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    moved = {}
    for _ in range(8):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        _, draw = step(model, method, transform, x, y)
        optimizer.step()
        still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
        moved.setdefault(draw.layer, []).append(still)
    blocked = {name for name in before if name.startswith("0.")}
    assert all(still == blocked for still in moved["0"])
    assert all(not still & {"0.0.weight", "2.weight"} for still in moved["input"])


def sgd_by_hand(model, grads, momenta, nesterov):
    """One step of SGD: rate 0.1, momentum 0.9, weight decay 0.1; what has no gradient is left as it is."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if grads[name] is not None:
                g = grads[name] + 0.1 * p
                momenta[name] = 0.9 * momenta[name] + g if name in momenta else g
                p -= 0.1 * (g + 0.9 * momenta[name] if nesterov else momenta[name])


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_labs_fused_optimiser_steps_right_where_first_gradients_come_one_after_the_other(nesterov):
    x, y = batch()
    settings = TrainConfig(optimizer="sgd", lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.1)
    model, twin, momenta, drawn = network(), network(), {}, []
    method, transform = attached(model, ["1", "0", "input"])
    optimizer = make_optimizer(model.parameters(), settings)
    assert optimizer.param_groups[0]["fused"]
    for _ in range(9):
        twin.load_state_dict(model.state_dict())
        grads, draw = step(model, method, transform, x, y)
        sgd_by_hand(twin, grads, momenta, nesterov)
        optimizer.step()
        drawn.append(draw.layer)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=0, atol=1e-12), name
    method.detach()
    assert drawn[0] == "1"
    assert set(drawn) == {"1", "0", "input"}


def test_a_run_stopped_while_some_layers_have_no_momentum_yet_ends_with_the_same_bits(tmp_path):
    straight, _ = train_images(tmp_path / "straight", method="blocked_gradient")
    momenta = []
    for _ in range(5):
        stops = [False, True]  # one step at a time
        with pytest.raises(Interrupted):
            train_images(tmp_path / "broken", Hooks(stop=partial(stops.pop, 0)), method="blocked_gradient")
        (saved,) = (tmp_path / "broken" / "checkpoint").glob("tensors-*.safetensors")
        momenta.append(sum("momentum_buffer" in name for name in load_file(saved)))
    assert momenta == sorted(momenta)
    assert momenta[0] < momenta[2] < momenta[4]
    resumed, _ = train_images(tmp_path / "broken", method="blocked_gradient")
    assert equal(resumed, straight)


def test_optimisers_of_other_networks_and_after_detach_begin_as_torch_does():
    x, y = batch()
    other, model = network(), network()
    hooks = len(_global_optimizer_pre_hooks)
    method, _ = attached(model)
    for module in (other, model):
        if module is model:
            method.detach()
        # torch does not damp the first gradient, and would if there were a momentum already
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.5, dampening=0.5)
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        assert all(torch.equal(optimizer.state[p]["momentum_buffer"], p.grad) for p in module.parameters())
    assert len(_global_optimizer_pre_hooks) == hooks


class Twice(nn.Module):
    """Calls one layer two times, and has one before and one behind."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        return self.head(self.layer(torch.relu(self.layer(self.stem(x)))))


@pytest.mark.parametrize(("call", "trained"), [("layer", {"layer", "head"}), ("layer#2", {"head"})])
def test_of_a_layer_called_twice_the_named_call_is_blocked(call, trained):
    torch.manual_seed(0)
    model = Twice()
    method, transform = attached(model, [call])
    for _ in range(3):
        grads, _ = step(model, method, transform, *batch())
        assert {name.split(".")[0] for name, grad in grads.items() if grad is not None} == trained


class Several(nn.Module):
    """A stem that returns two states of every example, a bias that is no example's, and whole numbers."""

    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bias = nn.Linear(5, 4), nn.Linear(5, 4), nn.Parameter(torch.ones(1, 4))

        def forward(self, x):
            return self.a(x), {"b": self.b(x), "bias": self.bias * 2, "order": torch.arange(4)}

    def __init__(self):
        super().__init__()
        self.stem, self.head = self.Stem(), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        a, more = self.stem(x)
        return self.head((a + more["b"] * more["bias"])[:, more["order"]])


def test_all_that_a_layer_returns_is_blocked():
    torch.manual_seed(0)
    model = Several()
    method, transform = attached(model, ["stem"])
    grads, draw = step(model, method, transform, *batch())
    assert draw.layer == "stem"
    assert {name for name, grad in grads.items() if grad is not None} == {"head.weight", "head.bias"}


def test_with_rows_of_their_own_layers_what_has_no_rows_passes():
    torch.manual_seed(0)
    model = Several()
    method, transform = attached(model, ["stem"], per="example")
    grads, _ = step(model, method, transform, *batch(7))  # one row is left alone, and passes
    assert all(grad is not None for grad in grads.values())
    assert grads["stem.bias"].abs().sum() > 0


@pytest.mark.parametrize("restored", [False, True])
def test_layers_that_are_found_on_the_first_batch_are_blocked_from_it_on(restored):
    x, y = batch()
    for seed in range(6):
        model = network()
        method = make_method("blocked_gradient", {"layers": "auto"})
        transform = method.attach(model, [], seed)
        if restored:
            state = method.state_dict()
            step(model, method, transform, x, y)
            state["layers"] = method.state_dict()["layers"]
            method.detach()
            method = make_method("blocked_gradient", {"layers": "auto"})
            transform = method.attach(model, [], seed=99)
            method.load_state_dict(state)
        grads, draw = step(model, method, transform, x, y)
        assert len(method._mixup.layers) == 3
        assert {n for n, grad in grads.items() if grad is None} == before_the_cut(model, draw.layer)
        method.detach()


def before_the_cut(model, layer):
    """Parameters of the modules that run before ``layer`` ends, which are registered in the order in which they run."""
    names = [name for name, _ in model.named_parameters()]
    if layer == "input":
        return set()
    order = [name for name, module in model.named_modules() if not list(module.children())]
    inside = max(i for i, name in enumerate(order) if name == layer or name.startswith(f"{layer}."))
    return {name for name in names if order.index(name.rpartition(".")[0]) <= inside}


def test_evaluation_passes_gradients_whatever_was_drawn():
    x, y = batch()
    model = network()
    _, transform = attached(model, ["1"])
    for drawn_in_training in (True, False):
        model.train(drawn_in_training)
        transform(x, y)
        model.eval()
        inputs = x.clone().requires_grad_()
        model.zero_grad()
        F.cross_entropy(model(inputs), y).backward()
        assert inputs.grad.abs().min() > 0
        assert all(p.grad is not None for p in model.parameters())
    model.train()  # the draw of the last training batch is not in force any more
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_layer_in_evaluation_within_a_network_in_training_is_blocked():
    x, y = batch()
    model = network()
    method, transform = attached(model, ["1"])
    model[1].eval()  # frozen statistics
    grads, draw = step(model, method, transform, x, y)
    assert draw.layer == "1"
    assert {name for name, grad in grads.items() if grad is not None} == {"2.weight", "2.bias"}


def test_outside_a_forward_of_the_model_its_layers_are_not_blocked():
    x, y = batch()
    model = network()
    _, transform = attached(model, ["0"])
    model(transform(x, y)[0])
    assert model[0](x).requires_grad
    transform(x, y)
    with pytest.raises(RuntimeError, match="shapes"):
        model(x[:, :2])
    assert model[0](x).requires_grad


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_the_network_are_neither_mixed_nor_blocked(copied):
    x, y = batch()
    model = network()
    method, transform = attached(model, ["1"])
    inputs, _ = transform(x, y)
    twin = copied(model)
    assert torch.equal(twin(inputs), network()(x))
    F.cross_entropy(twin(inputs), y).backward()
    assert all(p.grad is not None for p in twin.parameters())
    grads, _ = step(model, method, transform, x, y)  # the copy has not touched the original
    assert {name for name, grad in grads.items() if grad is not None} == {"2.weight", "2.bias"}


def test_after_detach_all_layers_have_gradients_and_no_hook_is_left():
    x, y = batch()
    model = network()
    method, transform = attached(model, ["1"])
    model(transform(x, y)[0])
    method.detach()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    assert not model._forward_hooks_always_called
    F.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_where_nothing_is_left_to_train_it_says_so():
    model = network()
    method, transform = attached(model, ["2"])
    with pytest.raises(UsageError, match=r"options.layers: no parameter is trained behind '2'.*leave it out"):
        step(model, method, transform, *batch())
    frozen = network()
    frozen[2].requires_grad_(False)
    method, transform = attached(frozen, ["1"])
    with pytest.raises(UsageError, match="no parameter is trained behind '1'"):
        step(frozen, method, transform, *batch())


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    method = make_method("blocked_gradient", {"layers": LAYERS})
    with pytest.raises(UsageError, match="'blocked_gradient' leaves parameters without a gradient.*use one"):
        method.attach(network(), [], SEED)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    model = network()
    method.attach(model, [], SEED)
    assert model._forward_pre_hooks


# The compiler makes an object of every autograd function that it traces, and looks at the grad of what is no leaf.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("per", ["batch", "example"])
def test_a_compiled_network_is_blocked_like_one_that_is_not_in_one_graph_for_each_layer(per):
    torch._dynamo.reset()
    x, y = batch()
    results, graphs = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for compiled in (False, True):
        model = network()
        method, transform = attached(model, per=per)
        run = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        results.append([step(model, method, transform, x, y, run) for _ in range(12)])
    torch._dynamo.reset()
    drawn = [draw.layer for _, draw in results[0]]
    assert {*drawn} == set(LAYERS) if per == "batch" else {*itertools.chain(*drawn)} == set(LAYERS)
    assert per == "example" or len(graphs) == len(LAYERS)
    for (plain, _), (traced, _) in zip(*results, strict=True):
        for name, grad in plain.items():
            assert (grad is None) == (traced[name] is None)
            assert grad is None or torch.allclose(grad, traced[name], rtol=0, atol=1e-12)


def test_it_has_the_options_of_manifold_mixup_and_says_where_it_mixed():
    plain, blocked = (make_method(name, {}) for name in ("manifold_mixup", "blocked_gradient"))
    assert blocked.options == plain.options
    model = build_model("preact_resnet8", {"width": 4}, (2, 8, 8), 3)
    method = make_method("blocked_gradient", {"layers": "stage1"})
    method.attach(model, [], SEED)(torch.randn(6, 2, 8, 8), torch.arange(6) % 3)
    assert method.facts()["layers"] == ["stage1"]
    problems = make_method("blocked_gradient", {"layers": ["stage9"]}).problems(["stage1"], [])
    assert problems == ["options.layers: the model has no module named 'stage9': did you mean 'stage1'?"]
