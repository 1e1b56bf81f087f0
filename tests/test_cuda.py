"""On a GPU: what the CPU computes, without waiting for the device, in every precision, compiled and captured."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifold_mixup import ManifoldMixup
from manifold_mixup.interpolation import Plan, apply_traced
from manifold_mixup.pairing import draw_lam, draw_partner
from networks import NETWORKS, Mlp, PreActResNet, Transformer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # As in test_compile.py.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

CUDA = torch.device("cuda")
WAYS: dict[str, dict[str, Any]] = {
    "batch": {},
    "example": {"per": "example"},
    "halves": {"pairing": "halves"},
    "two batches": {"pairing": "two-batches"},
    "with repetition": {"pairing": lambda y, generator: torch.randint(len(y), (len(y),), generator=generator)},
}


@pytest.fixture(autouse=True)
def _without_tf32(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layers_of(model: nn.Module) -> list[str]:
    return ["input", *(name for name, _ in model.pieces() if name)]


def batch(network: type[nn.Module]) -> tuple[Tensor, Tensor]:
    return network.batch(8), torch.randint(3, (8,))


def loss_and_gradients(model: nn.Module, x: Any, y: Any) -> list[Tensor]:
    model.zero_grad()
    loss = F.cross_entropy(model(x).float(), y, reduction="none").mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_device=False, check_dtype=False)


# ------------------------------------------------------------------ the numbers of the CPU


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gpu_computes_what_the_cpu_does(network, way, dtype):
    here = network().to(dtype)
    there = copy.deepcopy(here).to(CUDA)
    mixers = [ManifoldMixup(m, layers=layers_of(m), seed=0, **WAYS[way]) for m in (here, there)]
    for _ in range(8):
        x, y = batch(network)
        expected = loss_and_gradients(here, *mixers[0](x.to(dtype), y))
        found = loss_and_gradients(there, *mixers[1](x.to(CUDA, dtype), y.to(CUDA)))
        assert mixers[0].last.layer == mixers[1].last.layer
        assert_close(found, expected, 1e-5 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("way", ["batch", "example", "halves"])
def test_a_step_never_waits_for_the_device(way):
    model = PreActResNet().to(CUDA)
    mixup = ManifoldMixup(model, layers=layers_of(model), seed=0, **WAYS[way])
    x, y = (t.to(CUDA) for t in batch(PreActResNet))
    loss_and_gradients(model, *mixup(x, y))  # discovery, and what libraries do the first time
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")  # whatever waits raises
    try:
        losses = [loss_and_gradients(model, *mixup(x, y))[0] for _ in range(6)]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize("per", ["batch", "example"])
def test_channels_last_equals_contiguous(per):
    model = PreActResNet().to(CUDA)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    mixers = [ManifoldMixup(m, layers=layers_of(m), per=per, seed=0) for m in (model, last)]
    formats: set[bool] = set()
    last.layer1.register_forward_pre_hook(
        lambda module, args: formats.add(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    for _ in range(8):
        x, y = (t.to(CUDA) for t in batch(PreActResNet))
        expected = loss_and_gradients(model, *mixers[0](x, y))
        found = loss_and_gradients(last, *mixers[1](x.to(memory_format=torch.channels_last), y))
        assert_close(found, expected, 1e-3)
    assert formats == {True}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("network", [Mlp, PreActResNet, Transformer])
def test_autocast_with_a_gradient_scaler_stays_near_float32(network, dtype):
    model = network().to(CUDA)
    twin = copy.deepcopy(model)
    mixers = [ManifoldMixup(m, layers=layers_of(m), seed=0) for m in (model, twin)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=dtype == torch.float16)
    for _ in range(8):
        x, y = (t.to(CUDA) for t in batch(network))
        expected = loss_and_gradients(twin, *mixers[1](x, y))
        inputs, target = mixers[0](x, y)
        with torch.autocast("cuda", dtype):
            loss = F.cross_entropy(model(inputs).float(), target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert_close([loss.detach(), *(p.grad for p in model.parameters())], expected, 5e-2)
        scaler.step(optimizer)
        scaler.update()


# ------------------------------------------------------------------ compiled, and captured


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("network", [Mlp, PreActResNet, Transformer])
@pytest.mark.parametrize("way", ["batch", "example"])
def test_compiled_equals_eager_and_recompiles_nothing(mode, network, way):
    model = network().to(CUDA)
    twin = copy.deepcopy(model)
    mixers = [ManifoldMixup(m, layers=layers_of(m), seed=0, **WAYS[way]) for m in (model, twin)]
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    seen: set[str | None] = set()

    def step() -> None:
        x, y = (t.to(CUDA) for t in batch(network))
        torch.compiler.cudagraph_mark_step_begin()
        assert_close(loss_and_gradients(compiled, *mixers[0](x, y)), loss_and_gradients(twin, *mixers[1](x, y)), 1e-3)
        drawn = mixers[0].last.layer
        seen.update(drawn if isinstance(drawn, list) else [drawn])

    for _ in range(60):
        step()
        if seen == set(layers_of(model)):
            break
    assert seen == set(layers_of(model))
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(50):
            step()


def test_the_traced_operation_reads_its_draw_from_static_tensors_when_a_whole_step_is_captured():
    """What a captured step needs: λ, partners and labels in tensors that stay where they are and are copied into."""
    n, generator = 8, torch.Generator().manual_seed(0)
    first, rest = nn.Linear(6, 12).to(CUDA), nn.Sequential(nn.ReLU(), nn.Linear(12, 3)).to(CUDA)
    parameters = [*first.parameters(), *rest.parameters()]
    x, y, partner_y = torch.zeros(n, 6, device=CUDA), *(torch.zeros(n, dtype=torch.long, device=CUDA) for _ in range(2))
    index, inverse = (torch.arange(n, device=CUDA) for _ in range(2))
    lam = torch.ones((), dtype=torch.float64, device=CUDA)

    def step() -> Tensor:
        for p in parameters:
            p.grad = None
        output = rest(apply_traced(first(x), "permutation", index, inverse, lam))
        loss = lam * F.cross_entropy(output, y) + (1 - lam) * F.cross_entropy(output, partner_y)
        loss.backward()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(6):
        new_x, new_y = torch.randn(n, 6, device=CUDA), torch.randint(3, (n,), device=CUDA)
        partner, weight = draw_partner("random", n, generator), float(draw_lam(2.0, generator))
        order = partner.indices.to(CUDA)
        for static, value in ((x, new_x), (y, new_y), (partner_y, new_y[order]), (index, order)):
            static.copy_(value)
        inverse.copy_(torch.argsort(order))
        lam.fill_(weight)
        graph.replay()
        found = [captured.clone(), *(p.grad.clone() for p in parameters)]
        output = rest(Plan.mix(partner, weight).run(first(new_x)))
        expected = weight * F.cross_entropy(output, new_y) + (1 - weight) * F.cross_entropy(output, new_y[order])
        assert_close(found[:1], [expected.detach()], 1e-5)
        h = first(new_x)
        output = rest(weight * h + (1 - weight) * h[order])
        loss = weight * F.cross_entropy(output, new_y) + (1 - weight) * F.cross_entropy(output, new_y[order])
        assert_close(found[1:], list(torch.autograd.grad(loss, parameters)), 1e-4)


# ------------------------------------------------------------------ two GPUs


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.slow
def test_two_gpus_train_what_one_process_trains_by_hand(tmp_path):
    from test_distributed import OTHER, SEEDED, check, in_two_processes

    runs = {**SEEDED, **OTHER}
    ranks = in_two_processes(runs, tmp_path, "cuda")
    for name, run in runs.items():
        check(run, [rank[name] for rank in ranks])
