"""Ways of running a network, alone and together: each gives what the network run by hand in two halves gives.

The reference has no mixer, no hook and no checkpoint: the pieces of the network run one after the other, and the mixing
is written out between them. Compiled and distributed runs have files of their own.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

from manifold_mixup import ManifoldMixup
from networks import Mlp, PreActResNet, Transformer

BF16 = torch.bfloat16


class Blocks(nn.Module):
    """Four blocks, run by ``self.way``."""

    def __init__(self, way: Callable[[Blocks, Tensor], Tensor]) -> None:
        super().__init__()
        self.way = way
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0 * self.head.weight.sum().to(x.dtype)  # reentrant checkpointing wants an input with a gradient
        return self.head(self.way(self, x))

    def pieces(self) -> list[tuple[str | None, Callable[[Tensor], Tensor]]]:
        return [*((f"blocks.{i}", block) for i, block in enumerate(self.blocks)), (None, self.head)]


def one_by_one(model: Blocks, x: Tensor, **arguments: Any) -> Tensor:
    for block in model.blocks:
        x = checkpoint(block, x, **arguments)
    return x


def keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> Any:
    kept = operation in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
    policy = torch.utils.checkpoint.CheckpointPolicy
    return policy.MUST_SAVE if kept else policy.PREFER_RECOMPUTE


WAYS: dict[str, Callable[[Blocks, Tensor], Tensor]] = {
    "plainly": lambda model, x: model.blocks(x),
    "checkpointed": partial(one_by_one, use_reentrant=False),
    "checkpointed to the end": partial(one_by_one, use_reentrant=False, early_stop=False),
    "checkpointed, reentrant": partial(one_by_one, use_reentrant=True),
    "checkpointed selectively": partial(
        one_by_one,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(keep_products),
    ),
    "checkpointed in segments": lambda model, x: checkpoint_sequential(model.blocks, 2, x, use_reentrant=False),
    "checkpointed twice": lambda model, x: checkpoint(
        lambda h: one_by_one(model, h, use_reentrant=False), x, use_reentrant=False
    ),
}


def by_hand(model: nn.Module, x: Tensor, layer: Any, lam: Any, partner: Tensor) -> Tensor:
    """The pieces one after the other; half precision is mixed in float32 and rounded once."""
    for name, piece in [("input", None), *model.pieces()]:
        x = x if piece is None else piece(x)
        if isinstance(layer, list):
            here = torch.tensor([drawn == name for drawn in layer])
            own = torch.where(here, lam, 1.0).view(-1, *[1] * (x.dim() - 1))
            wide = torch.promote_types(x.dtype, torch.float32)
            x = torch.addcmul((1 - own).to(wide) * x[partner].to(wide), own.to(wide), x.to(wide)).to(x.dtype)
        elif layer == name:
            x = torch.lerp(x[partner], x, lam)
    return x


def loss_by_hand(output: Tensor, y: Tensor, lam: Any, partner: Tensor) -> Tensor:
    own, other = (F.cross_entropy(output, labels, reduction="none") for labels in (y, y[partner]))
    return (lam * own + (1 - lam) * other).mean()


def assert_equal_gradients(model: nn.Module, twin: nn.Module, **tolerance: float) -> None:
    for mine, reference in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, **tolerance)


# ------------------------------------------------------------------ checkpointing, accumulation, autocast, together


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("per", ["batch", "example"])
@pytest.mark.parametrize("autocast", [False, True])
def test_accumulated_gradients_equal_the_sum_by_hand(way, per, autocast):
    model = Blocks(WAYS[way])
    model = model if autocast else model.double()
    twin = copy.deepcopy(model)
    mixup = ManifoldMixup(model, layers=["input", "blocks.0", "blocks.1", "blocks.3"], per=per, seed=1)
    seen: set[Any] = set()
    for _ in range(4):
        model.zero_grad(), twin.zero_grad()
        losses = []
        for _ in range(3):  # micro-batches; all forwards before all backwards, so that draws lie between them
            x, y = torch.randn(8, 6, dtype=next(model.parameters()).dtype), torch.randint(3, (8,))
            inputs, target = mixup(x, y)
            with torch.autocast("cpu", BF16, enabled=autocast):
                losses.append(F.cross_entropy(model(inputs).to(x.dtype), target, reduction="none").mean())
                expected = by_hand(twin, x, *mixup.last).to(x.dtype)
            loss_by_hand(expected, y, *mixup.last[1:]).backward()
            seen.update(mixup.last.layer if per == "example" else [mixup.last.layer])
        sum(losses).backward()
        # A bfloat16 has 8 bits, and the order of sums is not the same.
        tolerance = 3e-2 if autocast else 1e-10
        assert_equal_gradients(model, twin, rtol=tolerance, atol=tolerance)
    assert len(seen) == 4


@pytest.mark.parametrize("network", [Mlp, PreActResNet, Transformer])
@pytest.mark.parametrize("per", ["batch", "example"])
def test_autocast_is_the_two_halves_under_autocast_to_the_bit_and_near_float32(network, per):
    model = network()
    twin, full = copy.deepcopy(model), copy.deepcopy(model)
    layers = ["input", *(name for name, _ in model.pieces() if name)]
    mixup = ManifoldMixup(model, layers=layers, per=per, seed=0)
    mixup.discover(network.batch(8))
    dtypes: dict[str, set[torch.dtype]] = {name: set() for name in layers[1:]}
    for name, found in dtypes.items():
        for net in (model, twin):  # in the model after the mixer's hook, so that this sees what was mixed
            net.get_submodule(name).register_forward_hook(lambda _, __, output, found=found: found.add(output.dtype))
    seen: set[Any] = set()
    for _ in range(12):
        x, y = network.batch(8), torch.randint(3, (8,))
        inputs, target = mixup(x, y)
        with torch.autocast("cpu", BF16):
            output, expected = model(inputs), by_hand(twin, x, *mixup.last)
        assert output.dtype == BF16
        assert torch.equal(output, expected)
        loss = F.cross_entropy(output.float(), target, reduction="none").mean()
        exact = loss_by_hand(by_hand(full, x, *mixup.last), y, *mixup.last[1:])
        torch.testing.assert_close(loss, exact, rtol=2e-2, atol=2e-2, check_dtype=False)
        seen.update(mixup.last.layer if per == "example" else [mixup.last.layer])
    assert seen == set(layers)
    assert all(len(found) == 1 for found in dtypes.values())
    assert {BF16} in dtypes.values()


def test_float16_with_a_gradient_scaler():
    """Scaled gradients, unscaled again, are float32's; a skipped step skips no draw."""
    model = Mlp()
    twin = copy.deepcopy(model)
    mixup = ManifoldMixup(model, layers=["input", "first", "second"], seed=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, twin)]
    scales = []
    for step in range(10):
        x, y = Mlp.batch(8), torch.randint(3, (8,))
        inputs, target = mixup(x, y)
        with torch.autocast("cpu", torch.float16):
            output = model(inputs)
        loss = F.cross_entropy(output.float(), target)
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(loss * (float("inf") if step == 5 else 1.0)).backward()
        scaler.unscale_(optimizers[0])
        loss_by_hand(by_hand(twin, x, *mixup.last), y, *mixup.last[1:]).backward()
        if step != 5:
            assert_equal_gradients(model, twin, rtol=2e-2, atol=2e-2)
            optimizers[1].step()
        scaler.step(optimizers[0])
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales[4] == 2 * scales[5]
    for mine, reference in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=2e-2, atol=2e-2)


# ------------------------------------------------------------------ memory formats, derivatives, functional calls


@pytest.mark.parametrize("per", ["batch", "example"])
@pytest.mark.parametrize("pairing", ["random", "halves"])
def test_channels_last_equals_contiguous(per, pairing):
    model = PreActResNet().double()
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    arguments = {"layers": ["input", "stem", "layer1", "layer2"], "per": per, "pairing": pairing, "seed": 0}
    mixers = [ManifoldMixup(m, **arguments) for m in (model, last)]
    seen: set[Any] = set()
    for _ in range(10):
        x, y = PreActResNet.batch(8).double(), torch.randint(3, (8,))
        for net, mixup, batch in zip((model, last), mixers, (x, x.to(memory_format=torch.channels_last)), strict=True):
            inputs, target = mixup(batch, y)
            net.zero_grad()
            F.cross_entropy(net(inputs), target, reduction="none").mean().backward()
        seen.update(mixup.last.layer if per == "example" else [mixup.last.layer])
        assert_equal_gradients(model, last, rtol=1e-10, atol=1e-10)
    assert len(seen) == 4


def test_a_gradient_penalty_differentiates_the_mixing_twice():
    model = Blocks(WAYS["plainly"]).double()
    twin = copy.deepcopy(model)
    mixup = ManifoldMixup(model, layers=["blocks.1"], seed=0)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))
    inputs, target = mixup(x, y)
    for run, loss in (
        (model, lambda out: F.cross_entropy(out, target)),
        (lambda t: by_hand(twin, t, *mixup.last), lambda out: loss_by_hand(out, y, *mixup.last[1:])),
    ):
        leaf = inputs.clone().requires_grad_()
        value = loss(run(leaf))
        (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
        (value + slope.square().sum()).backward()
        assert leaf.grad is not None
    assert_equal_gradients(model, twin, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("around", ["functional_call", "save_on_cpu", "anomaly"])
def test_what_torch_puts_around_a_forward_changes_nothing(around):
    model = Blocks(WAYS["plainly"]).double()
    twin = copy.deepcopy(model)
    mixup = ManifoldMixup(model, layers=["input", "blocks.1", "blocks.2"], seed=0)
    context: Any = {"save_on_cpu": torch.autograd.graph.save_on_cpu, "anomaly": _anomaly}.get(
        around, contextlib.nullcontext
    )
    for _ in range(6):
        x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))
        inputs, target = mixup(x, y)
        model.zero_grad(), twin.zero_grad()
        with context():
            if around == "functional_call":
                output = torch.func.functional_call(model, dict(model.named_parameters()), (inputs,))
            else:
                output = model(inputs)
            F.cross_entropy(output, target).backward()
        loss_by_hand(by_hand(twin, x, *mixup.last), y, *mixup.last[1:]).backward()
        assert_equal_gradients(model, twin, rtol=1e-10, atol=1e-10)


def _anomaly() -> Any:
    return torch.autograd.set_detect_anomaly(True)
