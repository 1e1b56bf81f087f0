"""Mixing through the hooks equals the network run by hand in two halves: output and every gradient, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifold_mixup import ManifoldMixup, MixedTarget
from networks import NETWORKS, Mlp

PAIRINGS = ["random", "halves", "two-batches", "callable"]


def pairing_of(name: str):
    return (lambda y, generator: torch.randint(len(y), (len(y),), generator=generator)) if name == "callable" else name


def by_hand(model: nn.Module, x: Tensor, mixed_at: dict[str, Tensor | float], partner: Tensor, rows_out: int) -> Tensor:
    """Run the pieces one after the other and write the mixing out where it belongs."""
    h = x
    for name, piece in [("input", None), *model.pieces()]:
        h = h if piece is None else piece(h)
        if name in mixed_at:
            lam = mixed_at[name]
            lam = lam.reshape(-1, *[1] * (h.dim() - 1)) if isinstance(lam, Tensor) else lam
            h = lam * h[:rows_out] + (1 - lam) * h[partner]
    return h


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def models(network: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    model = network().double().train()
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("n", [8, 7, 1])
def test_per_batch_equals_two_halves_by_hand(network, pairing, n):
    if n == 1 and network is Mlp:
        pytest.skip("batch norm cannot train on one value per channel")
    if pairing == "two-batches":
        n *= 2
    model, twin = models(network)
    names = ["input", *(name for name, _ in model.pieces() if name)]
    for name in names:
        mixup = ManifoldMixup(model, alpha=1.5, layers=[name], pairing=pairing_of(pairing), seed=3)
        x, y = network.batch(n).double(), torch.randint(3, (n,))
        model.zero_grad(), twin.zero_grad()
        inputs, target = mixup(x, y)
        output = model(inputs)
        F.cross_entropy(output, target).backward()
        layer, lam, partner = mixup.last
        assert layer == name
        assert 0 < lam < 1
        rows = n // 2 if pairing == "two-batches" else n
        expected = by_hand(twin, x, {name: lam}, partner, rows)
        loss = lam * F.cross_entropy(expected, y[:rows]) + (1 - lam) * F.cross_entropy(expected, y[partner])
        loss.backward()
        assert_close(output, expected)
        for mine, reference in zip(gradients(model), gradients(twin), strict=True):
            assert_close(mine, reference)
        for mine, reference in zip(model.buffers(), twin.buffers(), strict=True):
            assert_close(mine.double(), reference.double())
        mixup.remove()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("pairing", ["random", "halves"])
@pytest.mark.parametrize("n", [8, 7])
def test_per_example_equals_the_network_run_by_hand(network, pairing, n):
    model, twin = models(network)
    names = ["input", *(name for name, _ in model.pieces() if name)]
    mixup = ManifoldMixup(model, alpha=1.0, layers=names, per="example", pairing=pairing, seed=5)
    seen = set()
    for _ in range(6):
        x, y = network.batch(n).double(), torch.randint(3, (n,))
        model.zero_grad(), twin.zero_grad()
        inputs, target = mixup(x, y)
        output = model(inputs)
        F.cross_entropy(output, target, reduction="none").mean().backward()
        layers, lam, partner = mixup.last
        seen.update(layers)
        assert torch.equal(partner[partner], torch.arange(n))
        assert sum(layer is None for layer in layers) == n % 2
        weights = {name: torch.where(torch.tensor([layer == name for layer in layers]), lam, 1.0) for name in names}
        expected = by_hand(twin, x, weights, partner, n)
        own, other = (F.cross_entropy(expected, labels, reduction="none") for labels in (y, y[partner]))
        (lam * own + (1 - lam) * other).mean().backward()
        assert_close(output, expected)
        for mine, reference in zip(gradients(model), gradients(twin), strict=True):
            assert_close(mine, reference)
    assert seen - {None} == set(names)


@pytest.mark.parametrize("network", NETWORKS)
def test_lam_zero_gives_the_permuted_batch(network, monkeypatch):
    monkeypatch.setattr("manifold_mixup.mixup.draw_lam", lambda alpha, generator, size=1: torch.zeros(size).double())
    model, twin = models(network)
    for name in ["input", *(name for name, _ in model.pieces() if name)]:
        mixup = ManifoldMixup(model, layers=[name], seed=0)
        x, y = network.batch(8).double(), torch.arange(8)
        output = model(mixup(x, y)[0])
        partner = mixup.last.partner
        assert not torch.equal(partner, torch.arange(8))
        assert_close(output, twin(x[partner]))
        mixup.remove()


class WithDropout(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3))


OFF = [
    {"alpha": 0},
    {"layers": []},
    {"probability": 0.0},
    {"alpha": 0, "per": "example"},
]


def train(model: nn.Module, mixup: ManifoldMixup | None) -> list[Tensor]:
    """Twenty steps with dropout and batch norm; every loss and the final weights."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trace = []
    for _ in range(20):
        x, y = torch.randn(9, 6), torch.randint(3, (9,))
        if mixup is not None:
            x, y = mixup(x, y)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trace.append(loss.detach())
    return [*trace, *(t.detach() for t in model.state_dict().values())]


@pytest.mark.parametrize("off", OFF)
def test_switched_off_equals_the_plain_run_bit_for_bit(off):
    torch.manual_seed(0)
    model = WithDropout()
    twin = copy.deepcopy(model)
    plain = train(twin, None)
    mixed = train(model, ManifoldMixup(model, **off))
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


def test_switched_on_differs_from_the_plain_run():
    torch.manual_seed(0)
    model = WithDropout()
    twin = copy.deepcopy(model)
    plain = train(twin, None)
    mixed = train(model, ManifoldMixup(model, seed=0))
    assert not any(torch.equal(a, b) for a, b in zip(plain[:20], mixed[:20], strict=True))


def test_lam_one_by_draw_is_the_plain_forward(monkeypatch):
    monkeypatch.setattr("manifold_mixup.mixup.draw_lam", lambda alpha, generator, size=1: torch.ones(size).double())
    model, twin = models(Mlp)
    mixup = ManifoldMixup(model, seed=0)
    x, y = Mlp.batch(8).double(), torch.randint(3, (8,))
    inputs, target = mixup(x, y)
    assert isinstance(target, MixedTarget)
    assert torch.equal(model(inputs), twin(x))
    assert torch.equal(F.cross_entropy(twin(x), target), F.cross_entropy(twin(x), y))
    assert mixup.last == (None, 1.0, None)


@pytest.mark.parametrize("alpha", [0, 2.0])
def test_two_batches_return_half_of_the_rows_mixed_or_not(alpha):
    model, twin = models(Mlp)
    mixup = ManifoldMixup(model, alpha=alpha, pairing="two-batches", seed=0)
    x, y = Mlp.batch(8).double(), torch.arange(8) % 3
    inputs, target = mixup(x, y)
    output = model(inputs)
    assert output.shape == (4, 3)
    assert torch.equal(target.y, y[:4])
    if alpha == 0:
        assert torch.equal(output, twin(x[:4]))
    else:
        assert torch.equal(target.y_partner, y[4:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_hidden_dtype_and_mixes_it(dtype):
    model, twin = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)), None
    twin = copy.deepcopy(model)
    mixup = ManifoldMixup(model, layers=["0"], seed=0)
    seen = []
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    inputs, _ = mixup(x, y)
    with torch.autocast("cpu", dtype):
        model(inputs)
        hidden = twin[0](x)
    _, lam, partner = mixup.last
    mixed = seen[-1]
    assert mixed.dtype == hidden.dtype == dtype
    expected = lam * hidden.double() + (1 - lam) * hidden[partner].double()
    torch.testing.assert_close(mixed.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_channels_last_stays_channels_last():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    model = model.to(memory_format=torch.channels_last)
    mixup = ManifoldMixup(model, layers=["input", "0"], seed=0)
    formats: dict[str, set[bool]] = {"input": set(), "0": set()}
    watch = {"input": model[0], "0": model[1]}
    for name, module in watch.items():
        module.register_forward_pre_hook(
            lambda module, args, name=name: formats[name].add(args[0].is_contiguous(memory_format=torch.channels_last))
        )
    for _ in range(8):
        x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
        F.cross_entropy(model(mixup(x, torch.arange(4) % 3)[0]), torch.arange(4) % 3).backward()
    assert formats == {"input": {True}, "0": {True}}
