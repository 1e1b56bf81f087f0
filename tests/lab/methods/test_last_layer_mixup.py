"""Mixing what the head returns against mixing, by hand, what it is given."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from manifold_mixup.errors import NotACutPoint
from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.methods import make_method
from manifold_mixup.lab.models import build_model

NETWORKS = [
    ("mlp", {"width": 8, "depth": 2}, (1, 4, 4)),
    ("spiral_net", {"width": 8}, (2,)),
    ("preact_resnet8", {"width": 4}, (1, 8, 8)),
    ("preact_resnet18", {"width": 0.0625, "final_norm": True}, (3, 8, 8)),
    ("wrn_28_2", {"width": 0.125}, (3, 8, 8)),
]


def twin(model, x, lam, partner, head="head"):
    """The same network with λ·h + (1 - λ)·h' in place of what its head is given."""
    model = copy.deepcopy(model)

    def mix(module, args):
        h = args[0]
        weight = torch.as_tensor(lam, dtype=h.dtype).view(-1, 1)
        return weight * h + (1 - weight) * h[partner]

    model.get_submodule(head).register_forward_pre_hook(mix)
    return model, model(x)


@pytest.mark.parametrize(("name", "options", "shape"), NETWORKS, ids=[n[0] for n in NETWORKS])
@pytest.mark.parametrize("per", ["batch", "example"])
def test_the_output_and_every_gradient_are_those_of_mixed_features(name, options, shape, per):
    model = build_model(name, options, shape, 3).double()
    original = copy.deepcopy(model)
    x, y = torch.randn(7, *shape, dtype=torch.float64), torch.arange(7) % 3
    method = make_method("last_layer_mixup", {"per": per})
    inputs, target = method.attach(model, [], seed=2)(x, y)
    loss = F.cross_entropy(model(inputs), target, reduction="none").mean()
    loss.backward()
    draw = method._mixup.last
    other, output = twin(original, x, draw.lam, draw.partner)
    log_p, lam = output.log_softmax(1), torch.as_tensor(draw.lam, dtype=torch.float64).expand(7)
    rows = torch.arange(7)
    expected = -(lam * log_p[rows, y] + (1 - lam) * log_p[rows, y[draw.partner]]).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = [(n, p.grad, q.grad) for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True)]
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for _, a, b in gradients)
    assert any(a.abs().max() > 1e-4 for _, a, _ in gradients)
    assert method.facts()["layers"] == ["head"]


def test_it_is_mixed_at_all():
    model = build_model("mlp", {"width": 8, "depth": 2}, (4,), 3)
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    clean = model(x)
    method = make_method("last_layer_mixup", {})
    mixed = model(method.attach(model, [], seed=0)(x, y)[0])
    assert (mixed - clean).abs().max() > 0.01
    draw = method._mixup.last
    assert torch.allclose(mixed, draw.lam * clean + (1 - draw.lam) * clean[draw.partner], atol=1e-6)


def test_other_layers_can_be_named():
    model = build_model("mlp", {"width": 8, "depth": 2}, (4,), 3)
    method = make_method("last_layer_mixup", {"layers": "hidden.2"})
    method.attach(model, [], seed=0)(torch.randn(6, 4), torch.arange(6) % 3)
    assert method.facts()["layers"] == ["hidden.2"]
    assert make_method("last_layer_mixup", {"layers": ["hidden.9"]}).problems(["hidden.1"], []) == [
        "options.layers: the model has no module named 'hidden.9': did you mean 'hidden.1'?"
    ]


class Features(nn.Module):
    """A network whose last linear layer is followed by a convolution."""

    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(4, 6), nn.Conv1d(1, 1, 4)

    def forward(self, x):
        return self.head(F.relu(self.linear(x)).unsqueeze(1)).squeeze(1)


def test_a_last_linear_layer_that_is_not_the_head_is_refused():
    transform = make_method("last_layer_mixup", {}).attach(Features(), [], seed=0)
    with pytest.raises(UsageError, match="last linear layer 'linear' is not its head"):
        transform(torch.randn(6, 4), torch.arange(6) % 3)


def test_a_network_without_a_linear_layer_is_refused():
    with pytest.raises(UsageError, match="say with options.layers which module returns the logits"):
        make_method("last_layer_mixup", {}).attach(nn.Sequential(nn.Conv1d(1, 2, 1)), [], seed=0)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.one(x) + self.two(x)


def test_one_of_two_heads_is_no_cut_point_and_the_error_says_why():
    transform = make_method("last_layer_mixup", {}).attach(TwoHeads(), [], seed=0)
    with pytest.raises(NotACutPoint, match="two"):
        transform(torch.randn(6, 4), torch.arange(6) % 3)
