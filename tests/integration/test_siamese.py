"""One trunk for two inputs: its second call is a site of its own, and neither call alone is a cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from integration.exactness import (
    LAM,
    assert_equal,
    call,
    check,
    check_layers,
    differ,
    mixture,
    order_of,
    prepared,
    put_back,
    recorded,
    set_lam,
)
from manifold_mixup import ManifoldMixup, cut_points, errors

N = 5


class Siamese(nn.Module):
    """Two images, one trunk, one distance."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.compare = nn.Linear(8, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.tanh(self.compare((self.trunk(a) - self.trunk(b)).abs()))).squeeze(1)


class Embeddings(Siamese):
    """For a contrastive loss outside: both embeddings come out."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.trunk(a), self.trunk(b)


class Stacked(Siamese):
    """One call of the trunk for both: pairs in dimension 1, folded into the batch inside."""

    def forward(self, pairs: Tensor) -> Tensor:
        h = self.trunk(pairs)
        return self.head(torch.tanh(self.compare((h[:, 0] - h[:, 1]).abs()))).squeeze(1)


def pairs() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 6, dtype=torch.float64), torch.randn(N, 6, dtype=torch.float64)


def test_cut_points_are_both_inputs_together_and_what_follows_the_comparison(monkeypatch):
    model = prepared(Siamese())
    names = {p.name for p in cut_points(model, *pairs())}
    assert names == {"input", "compare", "head"}
    check_layers(model, pairs(), N, ["input", "compare"], monkeypatch)
    check(model, pairs(), N, monkeypatch, rejected=40)


@pytest.mark.parametrize(
    ("layer", "passing"),
    [("trunk", "input 1"), ("trunk#2", "trunk"), ("trunk.1", "input 1"), ("trunk.1#2", "trunk")],
)
def test_one_call_of_the_trunk_is_bypassed_by_the_other_tower(layer, passing):
    with pytest.raises(errors.NotACutPoint) as caught:
        ManifoldMixup(Siamese().double(), layers=[layer])(pairs(), torch.zeros(N))
    assert str(caught.value).startswith(f"{layer!r} is not a cut point of the model: ")
    assert passing in str(caught.value).partition("model: ")[2].partition("reaches")[0]


def test_a_third_call_does_not_exist():
    with pytest.raises(errors.LayerNotReached, match="'trunk' is called 2 times only"):
        ManifoldMixup(Siamese().double(), layers=["trunk#3"])(pairs(), torch.zeros(N))


def test_the_input_is_both_inputs_mixed_with_the_same_partners_and_the_same_lam(monkeypatch):
    set_lam(monkeypatch, LAM)
    model, (a, b) = prepared(Siamese()), pairs()
    mixup = ManifoldMixup(model, layers=["input"], pairing=lambda y, generator: order_of(N), seed=0)
    inputs, _ = mixup((a, b), torch.zeros(N))
    assert inputs == (a, b)
    mixed = model(a, b)
    mixup.remove()
    mix = mixture(LAM, order_of(N))
    assert_equal(mixed, model(mix(a), mix(b)), 1e-12)
    assert differ(mixed, model(mix(a), b))


def test_inputs_by_name(monkeypatch):
    set_lam(monkeypatch, LAM)
    model, (a, b) = prepared(Siamese()), pairs()
    mixup = ManifoldMixup(model, layers=["input"], pairing=lambda y, generator: order_of(N), seed=0)
    inputs, _ = mixup({"b": b, "a": a}, torch.zeros(N))
    mixed = model(**inputs)
    mixup.remove()
    mix = mixture(LAM, order_of(N))
    assert_equal(mixed, model(mix(a), mix(b)), 1e-12)


def test_two_embeddings_as_outputs_leave_the_input_alone():
    model = prepared(Embeddings())
    assert [p.name for p in cut_points(model, *pairs())] == ["input"]
    assert ManifoldMixup(model, seed=0).discover(*pairs()) == ["input"]
    for layer in ("trunk", "trunk#2"):
        with pytest.raises(errors.NotACutPoint, match="without passing through it"):
            ManifoldMixup(model, layers=[layer])(pairs(), torch.zeros(N))


def test_one_swapped_tower_is_not_the_swapped_pair():
    """What would happen without the refusal."""
    model, x, partner = prepared(Siamese()), pairs(), order_of(N)
    states, plain = recorded(model, x)
    swapped = put_back(model, x, "trunk#2", states["trunk#2"][partner])
    assert differ(swapped, plain)
    assert differ(swapped, plain[partner])


def test_pairs_in_one_tensor_can_be_mixed_inside_the_trunk(monkeypatch):
    """The way to mix both towers at one place: one call for both."""
    model, x = prepared(Stacked()), torch.stack(pairs(), 1)
    names = {p.name for p in cut_points(model, x)}
    assert {"input", "trunk", "trunk.0", "trunk.2", "compare", "head"} <= names
    check(model, x, N, monkeypatch, rejected=40)
    check_layers(model, x, N, ["trunk.1", "trunk"], monkeypatch)
    assert_equal(call(model, x), prepared(Siamese())(x[:, 0], x[:, 1]), 1e-12)
