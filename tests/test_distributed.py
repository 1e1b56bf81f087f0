"""Two gloo processes: each rank draws its own, gradients are averaged by DDP and FSDP, parameters stay identical."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from manifold_mixup import ManifoldMixup
from networks import Transformer

LAYERS = ["input", "blocks.0", "blocks.1"]
STEPS = 4


def network() -> nn.Module:
    torch.manual_seed(0)
    return Transformer().double()


def data(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(100 * rank + step)
    return Transformer.batch(6).double(), torch.randint(3, (6,))


def train(model: nn.Module, mixup: ManifoldMixup, rank: int, steps: int = STEPS) -> list[tuple]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    draws = []
    for step in range(steps):
        x, y = mixup(*data(rank, step))
        draws.append((mixup.last.layer, mixup.last.lam))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return draws


def work(rank: int, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    model = network()
    if kind == "ddp":
        run: nn.Module = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        run = fully_shard(model, mesh=mesh)
    draws = train(run, ManifoldMixup(run, layers=LAYERS, seed=7), rank)
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in run.parameters()]
    torch.save({"draws": draws, "parameters": [p.detach().clone() for p in full]}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def by_hand() -> list[torch.Tensor]:
    """One process in place of two: the same draws, gradients averaged over the ranks."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mixers = []
    for rank in (0, 1):
        mixup = ManifoldMixup(model, layers=LAYERS, seed=7 + 0x9E3779B97F4A7C15 * rank)
        mixup.discover(data(0, 0)[0])
        mixers.append(mixup)
        if rank == 0:
            states = [mixup.state_dict()]
            mixup.remove()
    states.append(mixers[1].state_dict())
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in (0, 1):
            mixers[1].load_state_dict(states[rank])
            x, y = mixers[1](*data(rank, step))
            (F.cross_entropy(model(x), y) / 2).backward()
            states[rank] = mixers[1].state_dict()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_draw_differently_and_train_one_network(kind: str, tmp_path: Path):
    mp.spawn(work, (kind, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert ranks[0]["draws"] != ranks[1]["draws"]
    for a, b in zip(ranks[0]["parameters"], ranks[1]["parameters"], strict=True):
        assert torch.equal(a, b)
    for mine, reference in zip(ranks[0]["parameters"], by_hand(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)
