"""Rows that read each other: which layers are refused for it, against the Jacobian of the rest of the network."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifold_mixup import ManifoldMixup, cut_points
from manifold_mixup.errors import NotACutPoint, RowsExchange
from manifold_mixup.rows import first_without
from networks import NETWORKS, Net

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")

N, WIDTH = 6, 4
DENSE = torch.rand(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64).round()
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 0, 4, 5, 3, 3]])


def messages(h: Tensor) -> Tensor:
    return torch.zeros_like(h).index_add(0, EDGES[1], h[EDGES[0]])


def scattered(h: Tensor) -> Tensor:
    index = EDGES[1].unsqueeze(1).expand(-1, h.shape[1])
    return torch.zeros_like(h).scatter_reduce(0, index, h.index_select(0, EDGES[0]), "amax", include_self=False)


def attention(h: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(h[None], h[None], h[None])[0]


def along(h: Tensor) -> Tensor:
    return F.conv1d(h.t()[None], torch.ones(WIDTH, 1, 3).to(h), padding=1, groups=WIDTH)[0].t()


EXCHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "dense adjacency": lambda h: DENSE @ h,
    "sparse adjacency": lambda h: torch.sparse.mm(DENSE.to_sparse(), h),
    "compressed adjacency": lambda h: DENSE.to_sparse_csr() @ h,
    "messages": messages,
    "scattered": scattered,
    "attention": attention,
    "attention by hand": lambda h: (h @ h.t()).softmax(1) @ h,
    "mean": lambda h: h - h.mean(0),
    "norm": lambda h: h / h.norm(dim=0),
    "running sum": lambda h: h.cumsum(0),
    "convolution": along,
    "order": lambda h: h.roll(1, 0),
}
ROW_BY_ROW: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda h: h @ torch.ones(WIDTH, WIDTH).to(h),
    "softmax": lambda h: h.softmax(1),
    "own place": lambda h: h[torch.arange(len(h))],
    "two predictions": lambda h: torch.stack([h, h.tanh()]).mean(0),
    "layer norm": lambda h: F.layer_norm(h, (WIDTH,)),
    "columns": lambda h: h[:, torch.tensor([1, 0, 3, 2])],
    "gathered": lambda h: h.gather(1, h.argsort(1)),
}


class Chain(nn.Module):
    """Two steps, and layers row by row before, between and behind them. ``gate`` scales what a step adds."""

    def __init__(self, step: Callable[[Tensor], Tensor], gate: float = 1.0, other: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH).double() for _ in range(4))
        self.step, self.gate, self.other = step, gate, other or step

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        h = torch.tanh(self.b(h + self.gate * self.step(h)))
        h = torch.tanh(self.c(h + self.gate * self.other(h)))
        return self.d(h)


def batch() -> Tensor:
    return torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def names(model: nn.Module, *x: Tensor) -> list[str]:
    return [point.name for point in cut_points(model, *x)]


def mixes_rows(model: nn.Module, layer: str, x: Tensor) -> bool:
    """Whether a row of the output has a derivative with respect to another row of the state."""

    def rest(state: Tensor) -> Tensor:
        if layer == "input":
            return model(state)
        handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: state)
        try:
            return model(x)
        finally:
            handle.remove()

    jacobian = torch.autograd.functional.jacobian(rest, torch.randn_like(x))  # (row, feature, row, feature)
    between = jacobian.abs().amax((1, 3))
    return bool((between - between.diag().diag()).max() > 1e-9)


@pytest.mark.parametrize("name", [*EXCHANGES, *ROW_BY_ROW])
def test_what_is_refused_is_what_has_derivatives_between_rows(name):
    step = {**EXCHANGES, **ROW_BY_ROW}[name]
    for other in (step, torch.tanh):
        model, x = Chain(step, other=other), batch()
        expected = [layer for layer in ("input", "a", "b", "c", "d") if not mixes_rows(model, layer, x)]
        assert names(model, x) == expected
        assert ("input" in expected) == (name in ROW_BY_ROW)


@pytest.mark.parametrize("name", EXCHANGES)
def test_a_branch_that_is_silent_at_the_start_is_refused_as_well(name):
    model, x = Chain(EXCHANGES[name], gate=0.0), batch()
    assert not mixes_rows(model, "a", x), "trying would be fooled here"
    assert names(model, x) == ["c", "d"]
    with pytest.raises(RowsExchange, match="'a' is not a cut point.*behind it, in the model's own forward") as caught:
        ManifoldMixup(model, layers=["a"])(x, torch.arange(N))
    assert isinstance(caught.value, NotACutPoint)
    assert caught.value.name == "a"


def test_the_first_and_the_last_module_that_does_so_are_named():
    step = Net(lambda m, h: messages(h))
    model = Net(
        lambda m, x: m.d(m.last(m.c(m.again(m.b(m.step(m.a(x))))))),
        **{k: nn.Linear(WIDTH, WIDTH) for k in "abcd"},
        step=step,
        again=Net(lambda m, h: messages(h)),
        last=Net(lambda m, h: DENSE.float() @ h),
    )
    x = batch().float()
    assert names(model, x) == ["last", "d"]
    for layer, doers in {
        "input": r"'step' \(index\) and last in 'last' \(mm\)",
        "b": r"'again' \(index\) and last in 'last' \(mm\)",
    }.items():
        with pytest.raises(RowsExchange, match=f"its {N} rows are nodes that exchange messages behind it, in {doers}"):
            ManifoldMixup(model, layers=[layer])(x, torch.arange(N))
    with pytest.raises(RowsExchange, match=r"its rows read each other behind it, in 'last' \(mm\)"):
        ManifoldMixup(model, layers=["c"])(x, torch.arange(N))


def test_a_dense_adjacency_that_is_an_input_is_refused_for_the_same_reason():
    model = Net(lambda m, x, adjacency: m.b(adjacency @ m.a(x)), a=nn.Linear(WIDTH, 5), b=nn.Linear(5, 2)).double()
    assert names(model, batch(), DENSE) == ["b"]
    for layers in (["a"], ["input"], "auto"):
        with pytest.raises(RowsExchange, match=r"rows read each other behind it, in the model's own forward \(mm\)"):
            ManifoldMixup(model, layers=layers)((batch(), DENSE), torch.arange(N))


def test_what_is_left_behind_the_last_exchange_is_chosen():
    mixup = ManifoldMixup(Chain(messages))
    mixup(batch(), torch.arange(N))
    assert mixup.layers == ["c"]


@pytest.mark.parametrize("keeps", [True, False])
def test_statistics_of_a_batch_norm_are_no_exchange(keeps):
    norm = nn.BatchNorm1d(WIDTH, track_running_stats=keeps).double()
    model = Chain(torch.tanh).train()
    model.b = nn.Sequential(model.b, norm)
    assert names(model, batch()) == ["input", "a", "b.0", "b.1", "b", "c", "d"]
    after = Chain(messages, other=norm)
    assert names(after, batch()) == ["b", "c", "d"]


def test_a_probe_leaves_no_trace():
    model = Chain(attention, other=nn.BatchNorm1d(WIDTH).double()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert names(model, batch()) == ["b", "c", "d"]
    assert model.training
    assert model.other.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_refuses_nan_is_judged_by_its_operators():
    def strict(h: Tensor) -> Tensor:
        if not bool(h.isfinite().all()):
            raise ValueError("not finite")
        return torch.tanh(h)

    assert names(Chain(lambda h: DENSE @ h, other=strict), batch()) == ["b", "c", "d"]  # found on the whole batch
    assert "input" in names(Chain(lambda h: torch.stack([h, h], 1).cumsum(0)[:, 0] * 0, other=strict), batch())


def refuse_to_probe(*args: Any) -> None:
    raise AssertionError("an ordinary network is probed")


@pytest.mark.parametrize("network", NETWORKS)
def test_ordinary_networks_are_not_probed(network, monkeypatch):
    monkeypatch.setattr("manifold_mixup.cutpoints.probe", refuse_to_probe)
    assert names(network(), network.batch(4))


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_what_goes_row_by_row_is_not_probed(name, monkeypatch):
    monkeypatch.setattr("manifold_mixup.cutpoints.probe", refuse_to_probe)
    assert names(Chain(ROW_BY_ROW[name]), batch()) == ["input", "a", "b", "c", "d"]


def test_the_last_place_is_found_by_halving_and_all_that_is_accepted_has_been_shown():
    for size, boundary, reach in itertools.product(range(7), range(8), (0, 1, 9)):
        keys = [str(i) for i in range(size)]
        asked: list[str] = []

        def shows(key: str, boundary: int = boundary, reach: int = reach, asked: list[str] = asked) -> set[str] | None:
            asked.append(key)
            return {str(int(key) + i) for i in range(1, reach + 1)} if int(key) >= boundary else None

        found = first_without(keys, shows)
        assert found == set(keys[boundary:])
        shown = {str(i) for key in asked if int(key) >= boundary for i in range(int(key), int(key) + reach + 1)}
        assert found <= shown
        assert len(asked) == len(set(asked))
        if reach == 9:
            assert len(asked) <= 4
