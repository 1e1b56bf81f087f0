"""An ordinary Accelerate loop needs no adapter: it equals the loop without Accelerate, and resumes to the same bits."""

from __future__ import annotations

import os
import runpy
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from manifold_mixup import ManifoldMixup
from networks import Mlp

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, set_seed

ROOT = Path(__file__).parents[2]
LAYERS = ["input", "first", "second"]


@pytest.fixture(autouse=True)
def _own_state():
    """Accelerate keeps its settings in singletons."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def network() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(48, 6, generator=generator), torch.randint(3, (48,), generator=generator))


def by_hand(model: nn.Module, *, accumulate: int, autocast: bool = False) -> list[tuple[object, object]]:
    mixup = ManifoldMixup(model, alpha=1.0, layers=LAYERS, seed=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    draws = []
    for i, batch in enumerate(list(DataLoader(dataset(), batch_size=8)) * 2):
        x, y = mixup(*batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(x)
        (F.cross_entropy(logits.float(), y) / accumulate).backward()
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
        draws.append((mixup.last.layer, mixup.last.lam))
    mixup.remove()
    return draws


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("before", [True, False])
def test_attached_before_or_after_prepare_it_equals_the_plain_loop(before, precision):
    ours, theirs = network(), network()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    mixup = ManifoldMixup(ours, alpha=1.0, layers=LAYERS, seed=5) if before else None
    model, optimizer, loader = accelerator.prepare(ours, optimizer, DataLoader(dataset(), batch_size=8))
    mixup = mixup or ManifoldMixup(model, alpha=1.0, layers=LAYERS, seed=5)
    draws = []
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                x, y = mixup(*batch)
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
            draws.append((mixup.last.layer, mixup.last.lam))
    assert draws == by_hand(theirs, accumulate=2, autocast=precision == "bf16")
    assert {layer for layer, _ in draws} == set(LAYERS)
    assert same(ours, theirs)


EPOCHS, SAVED, STEPS = 3, 8, 6  # saved in the second epoch, after two of its six batches


def train(folder: Path, *, stop: int = EPOCHS * STEPS, resume: bool = False):
    """Shuffled epochs; the state is saved after step 8."""
    set_seed(0)
    configuration = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=3)
    accelerator = Accelerator(cpu=True, dataloader_config=configuration)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(dataset(), batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    mixup = ManifoldMixup(model, alpha=1.0, layers=LAYERS, seed=5)
    accelerator.register_for_checkpointing(mixup)
    step, draws = 0, {}
    if resume:
        accelerator.load_state(folder)
        step = SAVED
    for epoch in range(step // STEPS, EPOCHS):
        loader.set_epoch(epoch)
        rest = accelerator.skip_first_batches(loader, step % STEPS)
        for batch in rest:
            if step == stop:
                return model, draws
            x, y = mixup(*batch)
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            step += 1
            draws[step] = (mixup.last.layer, mixup.last.lam, batch[0].sum().item())
            if step == SAVED and not resume:
                accelerator.save_state(folder)
    return model, draws


def test_save_state_in_mid_epoch_and_load_state_give_the_same_draws_and_weights(tmp_path):
    full, draws = train(tmp_path / "full")
    train(tmp_path / "part", stop=SAVED + 2)
    again, rest = train(tmp_path / "part", resume=True)
    assert rest == {step: draw for step, draw in draws.items() if step > SAVED}
    assert len(draws) == EPOCHS * STEPS
    assert same(full, again)


def rank(number: int, port: int, folder: str) -> None:
    """One of two processes: train, save in the middle, and go on from there once more."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    accelerator = Accelerator(cpu=True)
    results = {}
    for name, first in (("full", 0), ("resumed", 3)):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        mixup = ManifoldMixup(model, alpha=1.0, layers=LAYERS, seed=5)

        def save(models, weights, folder, mixup=mixup):
            torch.save(mixup.state_dict(), f"{folder}/mixup_{accelerator.process_index}.pt")

        def load(models, folder, mixup=mixup):
            mixup.load_state_dict(torch.load(f"{folder}/mixup_{accelerator.process_index}.pt"))

        hooks = accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)
        if first:
            accelerator.load_state(folder)
        draws = []
        for step in range(first, 6):
            if step == 3 and not first:
                accelerator.save_state(folder)
            x, y = mixup(*(t[8 * step : 8 * step + 8] for t in dataset().tensors))
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            draws.append((mixup.last.layer, mixup.last.lam))
        results[name] = {"draws": draws, "weights": accelerator.unwrap_model(model).state_dict()}
        mixup.remove()
        accelerator.free_memory()
        for hook in hooks:
            hook.remove()
    torch.save(results, f"{folder}/rank{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_draw_differently_and_resume(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(rank, args=(port, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"rank{number}.pt") for number in (0, 1))
    assert not set(one["full"]["draws"]) & set(two["full"]["draws"])
    for result in (one, two):
        assert result["resumed"]["draws"] == result["full"]["draws"][3:]
    # Means and variances of batch norm are each rank's own; DDP hands out those of rank 0 before every forward.
    for name, weight in one["full"]["weights"].items():
        assert torch.equal(weight, one["resumed"]["weights"][name])
        assert torch.equal(weight, two["full"]["weights"][name]) or "running" in name


def test_the_example_learns_and_goes_on(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(ROOT / "examples" / "accelerate_loop.py"))["main"]
    accuracy = main(["--epochs", "4"])
    assert accuracy > 0.85
    assert f"validation accuracy after 4 epochs: {accuracy:.3f}" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    state = tmp_path / "state"
    main(["--epochs", "2", "--checkpoint", str(state)])
    weights = (state / "model.safetensors").read_bytes()
    assert main(["--epochs", "4", "--checkpoint", str(state)]) == accuracy
    resumed = (state / "model.safetensors").read_bytes()
    assert resumed != weights
    main(["--epochs", "4", "--checkpoint", str(tmp_path / "whole")])
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == resumed
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "--checkpoint" in capsys.readouterr().out
