"""Masks: which inputs are, how two of them are united, which cuts they allow, and which they forbid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from manifold_mixup import ManifoldMixup, cut_points, errors
from manifold_mixup.masks import Rule, find_masks, kept, unite
from networks import Net

N, T, D = 4, 6, 8
LENGTHS = torch.tensor([6, 2, 4, 3])
KEEP = torch.arange(T) < LENGTHS[:, None]
PARTNER = torch.tensor([1, 2, 3, 0])


class Attention(nn.Module):
    """One layer of attention that is given ``mask`` (True: attended to) as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(h).chunk(3, -1)
        scores = (q @ k.mT).masked_fill(~mask[:, None, :], -torch.inf)
        return h + self.out(scores.softmax(-1) @ v)


class Pool(nn.Module):
    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def network(forward) -> Net:
    parts = {"embed": nn.Linear(D, D), "a": Attention(), "b": Attention(), "pool": Pool(), "head": nn.Linear(D, 3)}
    return Net(forward, **parts).double()


def by_argument(m, x, mask):
    return m.head(m.pool(m.b(m.a(m.embed(x), mask), mask), mask))


def in_its_own_code(m, x, mask):
    h = m.b(m.a(m.embed(x), mask), mask)
    return m.head((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def from_lengths(m, x, lengths):
    mask = torch.arange(x.shape[1]) < lengths[:, None]
    return m.head(m.pool(m.b(m.a(m.embed(x), mask), mask), mask))


def by_hand(m, x: Tensor, keep: Tensor, layer: str, lam: float, partner: Tensor) -> Tensor:
    """Both halves of the network, step by step."""
    union = keep | keep[partner]

    def mix(h: Tensor) -> Tensor:
        h = h * keep[..., None]
        return lam * h + (1 - lam) * h[partner]

    if layer == "input":
        return m.head(m.pool(m.b(m.a(m.embed(mix(x)), union), union), union))
    h = m.embed(x)
    if layer == "embed":
        return m.head(m.pool(m.b(m.a(mix(h), union), union), union))
    h = m.a(h, keep)
    if layer == "a":
        return m.head(m.pool(m.b(mix(h), union), union))
    return m.head(m.pool(mix(m.b(h, keep)), union))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, T, D, dtype=torch.float64)


@pytest.fixture
def fixed_lam(monkeypatch):
    def fix(lam: float) -> None:
        monkeypatch.setattr(
            "manifold_mixup.mixup.draw_lam",
            lambda alpha, generator, size=1: torch.full((size,), lam, dtype=torch.float64),
        )

    return fix


def mixed(model: nn.Module, layers: list[str], **inputs: Tensor) -> tuple[Tensor, ManifoldMixup]:
    mixup = ManifoldMixup(model, layers=layers, pairing=lambda y, g: PARTNER, seed=0)
    mixup(inputs, torch.zeros(N, dtype=torch.long))
    return model(**inputs), mixup


@pytest.mark.parametrize("layer", ["input", "embed", "a", "b"])
@pytest.mark.parametrize("forward", [by_argument, in_its_own_code])
def test_rows_attend_to_the_union_behind_the_layer_and_to_their_own_before(layer, forward, x, fixed_lam):
    model = network(forward)
    fixed_lam(0.3)
    out, _ = mixed(model, [layer], x=x, mask=KEEP)
    torch.testing.assert_close(out, by_hand(model, x, KEEP, layer, 0.3, PARTNER), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", ["input", "embed", "a", "b"])
def test_lengths_are_a_mask_of_first_positions(layer, x, fixed_lam):
    model = network(from_lengths)
    fixed_lam(0.3)
    out, _ = mixed(model, [layer], x=x, lengths=LENGTHS)
    torch.testing.assert_close(out, by_hand(model, x, KEEP, layer, 0.3, PARTNER), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("forward", [by_argument, in_its_own_code])
def test_a_part_of_weight_zero_is_not_attended_to(forward, x, fixed_lam):
    model = network(forward)
    fixed_lam(0.0)
    for layer in ("input", "embed", "a", "b"):
        out, mixup = mixed(model, [layer], x=x, mask=KEEP)
        mixup.remove()
        torch.testing.assert_close(out, model(x[PARTNER], KEEP[PARTNER]), rtol=1e-12, atol=1e-12)


def test_every_pair_at_its_own_layer_sees_its_own_masks(x):
    model = network(in_its_own_code)
    mixup = ManifoldMixup(model, layers=["input", "embed", "a", "b"], per="example", seed=3)
    for _ in range(4):
        mixup({"x": x, "mask": KEEP}, torch.zeros(N, dtype=torch.long))
        out, draw = model(x=x, mask=KEEP), mixup.last
        for i in range(N):
            alone = by_hand(model, x, KEEP, draw.layer[i], float(draw.lam[i]), draw.partner)
            torch.testing.assert_close(out[i], alone[i], rtol=1e-12, atol=1e-12)


def test_two_batches_become_one_under_the_union_of_their_masks(x, fixed_lam):
    model = network(in_its_own_code)
    fixed_lam(0.3)
    for layer in ("input", "embed", "a", "b"):
        mixup = ManifoldMixup(model, layers=[layer], pairing="two-batches")
        mixup({"x": x, "mask": KEEP}, torch.zeros(N, dtype=torch.long))
        out = model(x=x, mask=KEEP)
        mixup.remove()
        expected = by_hand(model, x, KEEP, layer, 0.3, torch.tensor([2, 3, 0, 1]))[:2]
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_cut_points_say_whether_masks_reach_past_them(x):
    found = {p.name: p.masks for p in cut_points(network(by_argument), x=x, mask=KEEP)}
    assert found == {"input": True, "embed": True, "a": True, "b": True, "pool": False, "head": False}


def test_the_callers_masks_are_not_written_to(x, fixed_lam):
    fixed_lam(0.3)
    mask = KEEP.clone()
    mixed(network(in_its_own_code), ["a"], x=x, mask=mask)
    assert torch.equal(mask, KEEP)


def read_before_and_after(m, x, mask):
    h = m.a(m.embed(x) * mask[..., None], mask)
    return m.head((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def computed_before_and_used_after(m, x, mask):
    weight = mask / mask.sum(1, keepdim=True)
    return m.head((m.a(m.embed(x), mask) * weight[..., None]).sum(1))


@pytest.mark.parametrize("forward", [read_before_and_after, computed_before_and_used_after])
def test_a_mask_in_code_that_no_hook_can_reach_forbids_the_cut_and_the_error_says_what_to_do(forward, x):
    model = network(forward)
    assert "a" not in {p.name for p in cut_points(model, x=x, mask=KEEP)}
    with pytest.raises(errors.NotACutPoint, match="the input 'mask' reaches .*pooling module"):
        mixed(model, ["a"], x=x, mask=KEEP)


def test_integers_that_are_no_mask_forbid_the_cut(x):
    model = Net(lambda m, x, order: m.head(m.embed(x).sum(1)[order]), embed=nn.Linear(D, D), head=nn.Linear(D, 3))
    with pytest.raises(errors.NotACutPoint, match="the input 'order' reaches .*integers cannot be interpolated"):
        mixed(model.double(), ["embed"], x=x, order=torch.arange(2).repeat(2))


def test_token_ids_that_are_read_again_behind_the_layer_forbid_the_cut():
    embed = nn.Embedding(9, D, padding_idx=0)
    model = Net(lambda m, ids: m.head((m.a(m.embed(ids)) + m.again(ids)).sum(1)), embed=embed)
    model.a, model.again, model.head = nn.Linear(D, D), nn.Embedding(9, D), nn.Linear(D, 3)
    with pytest.raises(errors.NotACutPoint, match="the input 'ids' reaches 'again'"):
        ManifoldMixup(model, layers=["a"])({"ids": torch.randint(1, 9, (N, T))}, torch.zeros(N))


def test_a_mask_that_discovery_did_not_see_is_refused(x):
    model = network(lambda m, x, mask=None: by_argument(m, x, torch.ones(x.shape[:2]).bool() if mask is None else mask))
    mixup = ManifoldMixup(model, layers=["a"])
    mixup({"x": x}, torch.zeros(N, dtype=torch.long))
    with pytest.raises(errors.NotACutPoint, match=r"given 'mask', which it was not given when .*discover\(\*\*x\)"):
        model(x=x, mask=KEEP)


def test_names_tell_what_a_mask_means():
    model = Net(lambda m, x, mask, key_padding_mask, lengths, weight: x)
    model.forward = lambda x, mask, key_padding_mask, lengths, weight: x
    inputs = (torch.randn(N, T), KEEP.long(), ~KEEP, LENGTHS, torch.rand(N, T))
    assert find_masks(model, inputs, {}, N) == {(0, 1): True, (0, 2): False, (0, 3): True}
    nested = {"batch": {"attention_mask": KEEP, "features": KEEP, "per_graph_mask": KEEP[:2]}}
    assert find_masks(model, (), nested, N) == {(1, "batch", "attention_mask"): True}


@pytest.mark.parametrize(
    ("encode", "rule"),
    [
        (lambda keep: keep, Rule()),
        (lambda keep: ~keep, Rule(high=False)),
        (lambda keep: keep.long(), Rule()),
        (lambda keep: (~keep).float(), Rule(high=False)),
        (lambda keep: torch.zeros(N, T).masked_fill(~keep, -torch.inf), Rule(bound=-1.0)),
        (lambda keep: torch.where(keep, 5, 0), Rule(pad=0.0)),
    ],
)
def test_the_union_in_every_encoding(encode, rule):
    own, other = encode(KEEP), encode(KEEP[PARTNER])
    both = KEEP | KEEP[PARTNER]
    assert torch.equal(unite(own, other, 0.3, rule), encode(both))
    assert torch.equal(unite(own, other, 0.0, rule), other)
    rows = torch.tensor([0.0, 1.0, 0.5, 1.0])
    expected = torch.stack([other[0], own[1], encode(both)[2], own[3]])
    assert torch.equal(unite(own, other, rows, rule), expected)
    assert torch.equal(kept(own, rule, T), KEEP)


def test_a_larger_mask_tells_the_padding_by_what_nobody_attends_to():
    causal = KEEP[:, None, None, :] & torch.ones(T, T, dtype=torch.bool).tril()
    assert torch.equal(kept(causal, Rule(), T), KEEP)
    assert torch.equal(kept(LENGTHS, Rule(), T), KEEP)


def test_what_is_padding_in_both_parts_stays_as_it_is_and_keeps_its_gradient(x, fixed_lam):
    """Zeros there have no variance: a layer norm behind them multiplies gradients by 1 / sqrt(eps)."""
    norm = nn.LayerNorm(D, eps=1e-12).double()
    model = Net(
        lambda m, x, mask: m.norm(m.b(m.embed(x), mask)), embed=nn.Linear(D, D), b=Attention(), norm=norm
    ).double()
    seen = []
    model.b.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    fixed_lam(0.3)
    out, mixup = mixed(model, ["embed"], x=x, mask=KEEP)
    neither = ~(KEEP | KEEP[PARTNER])
    assert neither.any()
    assert torch.equal(seen[-1][neither], model.embed(x)[neither])
    only = KEEP & ~KEEP[PARTNER]
    torch.testing.assert_close(seen[-1][only], 0.3 * model.embed(x)[only])
    (gradient,) = torch.autograd.grad(out.square().sum() + out.sum(), [model.embed.weight])
    mixup.remove()
    (plain,) = torch.autograd.grad(model(x, KEEP).square().sum() + model(x, KEEP).sum(), [model.embed.weight])
    assert gradient.norm() < 100 * plain.norm() + 100


def test_lengths_that_discovery_did_not_see_are_refused(x):
    model = network(
        lambda m, x, lengths=None: from_lengths(m, x, torch.full((len(x),), T) if lengths is None else lengths)
    )
    mixup = ManifoldMixup(model, layers=["a"])
    mixup({"x": x}, torch.zeros(N, dtype=torch.long))
    with pytest.raises(errors.NotACutPoint, match="given 'lengths', which it was not given"):
        model(x=x, lengths=LENGTHS)
