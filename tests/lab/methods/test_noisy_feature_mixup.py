"""Noise on mixed states against the formula, with the numbers drawn a second time by hand."""

import pytest
import torch
from torch import nn

from lab.small import SPIRAL, equal, one_run, train
from manifold_mixup.lab.methods import make_method
from manifold_mixup.lab.models import build_model
from manifold_mixup.lab.streams import generator

SEED = 3


class Keep:
    """What modules return or are given, after all other hooks."""

    def __init__(self):
        self.values = {}

    def output(self, name):
        return lambda module, args, output: self.values.setdefault(name, []).append(output.detach().clone())

    def input(self, module, args):
        self.values.setdefault("input", []).append(args[0].detach().clone())


def states(model, method, x, y, names, batches):
    """The states after ``names`` and what the stem is given, batch by batch, and the layers drawn."""
    transform = method.attach(model, [], SEED)
    drawn, result = [], []
    for _ in range(batches):
        inputs, target = transform(x, y)
        keep = Keep()
        first = next(m for m in model.modules() if not list(m.children()))
        handles = [model.get_submodule(n).register_forward_hook(keep.output(n)) for n in names]
        handles.append(first.register_forward_pre_hook(keep.input))
        model(inputs)
        for handle in handles:
            handle.remove()
        drawn.append(method._mixup.last.layer)
        result.append(keep.values)
        assert len(target) == len(keep.values[names[-1]][0])
    method.detach()
    return drawn, result


def network():
    torch.manual_seed(0)
    return build_model("preact_resnet8", {"width": 4}, (2, 8, 8), 3)


X, Y = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3
LAYERS = ["input", "stage1", "stage2"]


def strengths(draws):
    gamma = torch._standard_gamma(torch.tensor([[2.0, 5.0], [2.0, 5.0]]), generator=draws)
    return (gamma[:, 0] / gamma.sum(1)).tolist()


def by_hand(h, b, noise, additive=0.4, multiplicative=0.2):
    """(1 + s_m b U) h + s_a b' N, number by number in the order in which they are drawn."""
    u = 2 * torch.rand(h.shape, generator=noise) - 1
    n = torch.randn(h.shape, generator=noise)
    return (1 + multiplicative * b[0] * u) * h + additive * b[1] * n


@pytest.mark.parametrize("pairing", ["random", "halves", "two-batches"])
def test_the_drawn_layer_gets_the_noise_once_after_the_mixing_and_no_other_layer_does(pairing):
    options = {"alpha": 1.0, "layers": LAYERS, "pairing": pairing}
    inner = LAYERS[1:]
    clean_drawn, clean = states(network(), make_method("manifold_mixup", options), X, Y, inner, 12)
    drawn, noisy = states(network(), make_method("noisy_feature_mixup", options), X, Y, inner, 12)
    assert drawn == clean_drawn
    assert set(drawn) == set(LAYERS)
    draws, noise = generator(SEED, "strengths"), generator(SEED, "noise")
    for layer, before, after in zip(drawn, clean, noisy, strict=True):
        b = strengths(draws)
        assert all(len(after[name]) == 1 for name in LAYERS)
        for name in LAYERS[: LAYERS.index(layer)]:
            assert torch.equal(before[name][0], after[name][0])
        expected = by_hand(before[layer][0], b, noise)
        assert torch.allclose(after[layer][0], expected, atol=1e-6)
        assert not torch.allclose(after[layer][0], before[layer][0], atol=1e-3)


def test_batches_that_are_not_mixed_get_no_noise():
    model = network()
    method = make_method("noisy_feature_mixup", {"layers": LAYERS, "probability": 0.5})
    transform = method.attach(model, [], SEED)
    unmixed = 0
    for _ in range(12):
        inputs, target = transform(X, Y)
        clean = network()(X)
        assert torch.equal(model(inputs), clean) == (not target.mixed)
        unmixed += not target.mixed
    assert 0 < unmixed < 12


def test_evaluation_gets_no_noise_whatever_was_drawn():
    model = network()
    method = make_method("noisy_feature_mixup", {"layers": LAYERS})
    transform = method.attach(model, [], SEED)
    drawn = set()
    for _ in range(12):
        transform(X, Y)
        drawn.add(method._mixup.last.layer)
        assert torch.equal(model.eval()(X), network().eval()(X))
        model.train()
    assert drawn == set(LAYERS)


def test_without_noise_it_is_manifold_mixup_bit_for_bit(tmp_path):
    options = {"alpha": 1.0, "layers": ["input", "bottleneck"]}
    none = {**options, "additive": 0.0, "multiplicative": 0.0}
    methods = [("manifold_mixup", options), ("noisy_feature_mixup", none)]
    runs = [one_run(SPIRAL, methods=[{"name": name, "options": o}]) for name, o in methods]
    plain, noisy = (train(run, tmp_path / run.config.method.name)[0] for run in runs)
    assert equal(plain, noisy)


@pytest.mark.parametrize("options", [{"additive": 0.0}, {"multiplicative": 0.0}])
def test_each_kind_of_noise_alone(options):
    layers = {"alpha": 1.0, "layers": ["stage1"]}
    _, clean = states(network(), make_method("manifold_mixup", layers), X, Y, ["stage1"], 3)
    method = make_method("noisy_feature_mixup", {**layers, **options})
    _, noisy = states(network(), method, X, Y, ["stage1"], 3)
    draws, noise = generator(SEED, "strengths"), generator(SEED, "noise")
    for before, after in zip(clean, noisy, strict=True):
        b, h = strengths(draws), before["stage1"][0]
        if "additive" in options:
            expected = (1 + 0.2 * b[0] * (2 * torch.rand(h.shape, generator=noise) - 1)) * h
        else:
            expected = h + 0.4 * b[1] * torch.randn(h.shape, generator=noise)
        assert torch.allclose(after["stage1"][0], expected, atol=1e-6)


def test_strengths_follow_beta_2_5():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    method = make_method("noisy_feature_mixup", {"layers": ["0"]})
    transform = method.attach(model, [], SEED)
    x, y = torch.zeros(2, 2), torch.arange(2)
    seen = []
    for _ in range(2000):
        transform(x, y)
        seen.append(method._noise.factors)
    factors = torch.stack(seen).double()
    assert factors.shape == (2000, 2)
    assert torch.allclose(factors.mean(0), torch.tensor(2 / 7).double(), atol=5 * 0.16 / 2000**0.5)
    assert torch.allclose(factors.var(0), torch.tensor(10 / (49 * 8)).double(), rtol=0.2)
    assert abs(torch.corrcoef(factors.T)[0, 1].item()) < 0.12


class Twice(nn.Module):
    """Calls one layer two times."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(torch.relu(self.layer(x))))


@pytest.mark.parametrize("call", ["layer", "layer#2"])
def test_of_a_layer_called_twice_the_named_call_gets_the_noise(call):
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    layers = {"alpha": 1.0, "layers": [call]}
    outputs = []
    for name in ("manifold_mixup", "noisy_feature_mixup"):
        torch.manual_seed(0)
        outputs.append(states(Twice(), make_method(name, layers), x, y, ["layer"], 2)[1])
    draws, noise = generator(SEED, "strengths"), generator(SEED, "noise")
    for before, after in zip(*outputs, strict=True):
        k = int(call == "layer#2")
        expected = by_hand(before["layer"][k], strengths(draws), noise)
        assert torch.allclose(after["layer"][k], expected, atol=1e-6)
        assert torch.equal(before["layer"][0], after["layer"][0]) == bool(k)


def test_half_precision_stays_half_precision():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).bfloat16()
    transform = make_method("noisy_feature_mixup", {"layers": ["input", "0"]}).attach(model, [], SEED)
    for _ in range(4):
        inputs, _ = transform(torch.randn(6, 4).bfloat16(), torch.arange(6) % 3)
        assert model(inputs).dtype == torch.bfloat16


def test_facts_name_the_layers():
    method = make_method("noisy_feature_mixup", {"layers": "stage1"})
    method.attach(network(), [], SEED)(X, Y)
    assert method.facts()["layers"] == ["stage1"]
    problems = make_method("noisy_feature_mixup", {"layers": ["stage9"]}).problems(["stage1"], [])
    assert problems == ["options.layers: the model has no module named 'stage9': did you mean 'stage1'?"]
