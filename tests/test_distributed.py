"""Two gloo processes: each rank draws its own, gradients are averaged by DDP and FSDP, parameters stay identical.

All runs share one pair of processes. What every rank drew is written down, and the same training is then done in one
process, with the mixing written out between the pieces of the network: no mixer takes part in the reference.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manifold_mixup import ManifoldMixup
from networks import Transformer

LAYERS = ["input", "blocks.0", "blocks.1"]
STEPS, RANKS, ROWS = 5, 2, 6
SEEDS = range(10)


class Checkpointed(Transformer):
    """Every block is recomputed in backward."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False)
        return self.head(h.mean(1))


@dataclass(frozen=True)
class Run:
    """One training by all ranks together."""

    wrap: str = "ddp"
    seed: int = 7
    network: type[Transformer] = Transformer
    per: str = "batch"
    micro: int = 1  # batches for one step of the optimizer
    compiled: str = ""  # backend
    buckets_mb: float = 25.0  # DDP's; the compiler splits the graph where a bucket ends


SEEDED = {f"seed {seed}": Run(seed=seed) for seed in SEEDS}
OTHER = {
    "ddp, per example": Run(per="example"),
    "ddp, accumulated": Run(micro=2),
    "ddp, checkpointed": Run(network=Checkpointed),
    "fsdp2": Run("fsdp2"),
    "fsdp2, per example": Run("fsdp2", per="example"),
    "fsdp2, checkpointed": Run("fsdp2", network=Checkpointed),
}
COMPILED = {
    "ddp, aot_eager": Run(compiled="aot_eager"),
    "ddp, inductor": Run(compiled="inductor"),
    "ddp, many buckets": Run(compiled="aot_eager", buckets_mb=0.001),
    "ddp, checkpointed": Run(compiled="aot_eager", network=Checkpointed),
    "ddp of a compiled model": Run("ddp of compiled", compiled="aot_eager"),
}


def network(run: Run) -> nn.Module:
    torch.manual_seed(0)
    return run.network().double()


def data(rank: int, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + batch)
    x = torch.randn(ROWS, 4, 5, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (ROWS,), generator=generator)


# ------------------------------------------------------------------ what the two processes do


def wrapped(model: nn.Module, run: Run, device: str) -> nn.Module:
    if run.wrap == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device, (RANKS,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if run.wrap == "ddp of compiled":
        return nn.parallel.DistributedDataParallel(torch.compile(model, backend=run.compiled))
    ddp = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=run.buckets_mb)
    return torch.compile(ddp, backend=run.compiled) if run.compiled else ddp


def train(run: Run, rank: int, device: str) -> dict[str, Any]:
    torch._dynamo.reset()
    dist._DEFAULT_FIRST_BUCKET_BYTES = int(min(1.0, run.buckets_mb) * 2**20)  # the compiler's idea of the first bucket
    model = wrapped(network(run).to(device), run, device)
    mixup = ManifoldMixup(model, layers=LAYERS, per=run.per, seed=run.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    draws, graded = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(run.micro):
            x, y = mixup(*(t.to(device) for t in data(rank, step * run.micro + micro)))
            draws.append(tuple(mixup.last))
            last = micro == run.micro - 1
            with nullcontext() if last else model.no_sync():
                F.cross_entropy(model(x), y, reduction="none").mean().backward()
        graded.append(
            [name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())]
        )
        optimizer.step()
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return {"draws": draws, "graded": graded, "parameters": [p.detach().cpu().clone() for p in full]}


def work(rank: int, runs: dict[str, Run], folder: str, device: str) -> None:
    code = 1
    try:
        torch.set_num_threads(1)
        if device == "cuda":
            torch.cuda.set_device(rank)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
        torch.save({name: train(run, rank, device) for name, run in runs.items()}, f"{folder}/rank{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Gloo's threads outlive the process group. Where one of them frees a tensor while the interpreter shuts down,
        # the whole process is aborted, though its work is done. So there is no shutting down.
        os._exit(code)


def in_two_processes(runs: dict[str, Run], folder: Path, device: str = "cpu") -> list[dict[str, dict[str, Any]]]:
    mp.spawn(work, (runs, str(folder), device), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


# ------------------------------------------------------------------ the same in one process


def mixed(h: Tensor, name: str, draw: tuple) -> Tensor:
    layer, lam, partner = draw
    if isinstance(layer, list):
        here = torch.tensor([drawn == name for drawn in layer])
        weight = torch.where(here, lam, 1.0).view(-1, *[1] * (h.dim() - 1))
    elif layer == name:
        weight = lam
    else:
        return h
    return weight * h + (1 - weight) * h[partner]


def loss_by_hand(model: nn.Module, x: Tensor, y: Tensor, draw: tuple) -> Tensor:
    h = mixed(x, "input", draw)
    for name, piece in model.pieces():
        h = piece(h)
        h = h if name is None else mixed(h, name, draw)
    _, lam, partner = draw
    own, other = (F.cross_entropy(h, labels, reduction="none") for labels in (y, y[partner]))
    return (lam * own + (1 - lam) * other).mean()


def by_hand(run: Run, draws: list[list[tuple]]) -> list[Tensor]:
    """One process in place of two: the draws of every rank, gradients averaged over the ranks."""
    model = network(replace(run, network=Transformer))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(RANKS):
            for batch in range(step * run.micro, (step + 1) * run.micro):
                (loss_by_hand(model, *data(rank, batch), draws[rank][batch]) / RANKS).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def check(run: Run, ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert all(torch.equal(a, b) for a, b in zip(first["parameters"], second["parameters"], strict=True))
    for mine, reference in zip(first["parameters"], by_hand(run, [r["draws"] for r in ranks]), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------ tests


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Callable[[str], tuple[Run, list[dict[str, Any]]]]:
    runs = {**SEEDED, **OTHER}
    ranks = in_two_processes(runs, tmp_path_factory.mktemp("ranks"))
    return lambda name: (runs[name], [rank[name] for rank in ranks])


@pytest.mark.parametrize("name", [*SEEDED, *OTHER])
def test_two_processes_train_what_one_process_trains_by_hand(results, name):
    check(*results(name))


def test_the_ranks_draw_differently_whatever_the_seed(results):
    sequences = []
    for name in SEEDED:
        _, ranks = results(name)
        layers, lams = ([[draw[i] for draw in rank["draws"]] for rank in ranks] for i in (0, 1))
        assert not set(lams[0]) & set(lams[1])
        sequences += [(layers[0], layers[1])]
        assert all(len(set(one)) == len(one) for one in lams)
    # Two ranks agree by chance on all of five layers out of three in one seed of 243.
    assert all(a != b for a, b in sequences)


def test_every_parameter_gets_a_gradient_on_every_rank_though_their_layers_differ(results):
    differ = 0
    for name in SEEDED:
        _, ranks = results(name)
        names = [parameter for parameter, _ in network(Run()).named_parameters()]
        for rank in ranks:
            assert all([n.removeprefix("module.") for n in step] == names for step in rank["graded"])
        differ += sum(a[0] != b[0] for a, b in zip(*(rank["draws"] for rank in ranks), strict=True))
    assert differ > 10


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_by_two_processes(tmp_path):
    ranks = in_two_processes(COMPILED, tmp_path)
    for name, run in COMPILED.items():
        check(run, [rank[name] for rank in ranks])
