"""Time and memory of `interpolate` against its floor and against the naive expression, side by side.

    python benchmarks/interpolation.py [--rounds 15] [--threads 2]

Forward and backward of one activation, in one process, the contenders taking turns in every round:

* floor: one `torch.lerp(h, other, λ)` of the same size, `other` lying there ready (no pairing, two gradients less work
  than mixing can have: it is what a single pass over the activation costs);
* naive: `lam * h + (1 - lam) * h[perm]`, what most code does;
* random, halves: `manifold_mixup.interpolate` with those pairings.

Every figure is a ratio to the floor of the same round: median [quartiles] over the rounds. `naive / random` is how many
times faster than the naive expression we are.

The table is made twice, each time in a process of its own: as the C library comes, which gives every tensor above 32 MB
fresh pages from the kernel (most of the time of the fp32 rows is then page faults), and with memory that
is used again (MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ raised, as any caching allocator would have it).

Memory is what one operation, or one training step of a small convolutional network that mixes the given activation,
has allocated at its peak beyond the tensors that exist before, in units of the activation.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import peak_bytes
from torch import Tensor, nn

from manifold_mixup import ManifoldMixup
from manifold_mixup.interpolation import interpolate
from manifold_mixup.pairing import Partner, draw_partner

SHAPES = {"128x64x32x32": (128, 64, 32, 32), "64x197x768": (64, 197, 768)}
LAM = 0.37


def forward_backward(operation: Callable[[], Tensor], h: Tensor, grad: Tensor) -> None:
    h.grad = None
    operation().backward(grad)


def contenders(h: Tensor) -> dict[str, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    n = h.shape[0]
    random, halves = draw_partner("random", n, generator), draw_partner("halves", n, generator)
    perm = random.indices
    # The floor's second operand needs a gradient as well, as the partner's rows do.
    other = h.detach()[perm].contiguous(memory_format=memory_format(h)).requires_grad_()

    def floor() -> Tensor:
        other.grad = None
        return torch.lerp(h, other, LAM)

    def ours(partner: Partner) -> Callable[[], Tensor]:
        return lambda: interpolate(h, partner, LAM)

    return {
        "floor": floor,
        "naive": lambda: LAM * h + (1 - LAM) * h[perm],
        "random": ours(random),
        "halves": ours(halves),
    }


def memory_format(h: Tensor) -> torch.memory_format:
    channels_last = h.dim() == 4 and h.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def seconds(operation: Callable[[], Tensor], h: Tensor, grad: Tensor) -> float:
    start = time.perf_counter()
    forward_backward(operation, h, grad)
    return time.perf_counter() - start


def peak(operation: Callable[[], object], unit: Tensor) -> float:
    """Largest sum of live allocations while the operation runs, in sizes of ``unit``."""
    return peak_bytes(operation) / (unit.numel() * unit.element_size())


def step_memory() -> None:
    """Peak of a training step: plain, mixed by us at the hidden layer, and the naive expression at the same place."""
    shape = SHAPES["128x64x32x32"]

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 64, 3, padding=1)
            self.act = nn.ReLU()
            self.body = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
            self.head = nn.Linear(64, 10)
            self.perm: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.stem(x))
            if self.perm is not None:
                h = LAM * h + (1 - LAM) * h[self.perm]
            return self.head(self.body(h).mean((2, 3)))

    torch.manual_seed(0)
    model, unit = Network(), torch.empty(shape)
    x, y = torch.randn(shape[0], 3, *shape[2:]), torch.randint(10, (shape[0],))

    def step(mixup: ManifoldMixup | None) -> Callable[[], None]:
        inputs, target = mixup(x, y) if mixup else (x, y)

        def run() -> None:
            model.zero_grad()
            F.cross_entropy(model(inputs), target).backward()

        run()
        return run

    plain = peak(step(None), unit)
    model.perm = torch.randperm(shape[0])
    naive = peak(step(None), unit)
    model.perm = None
    ours = peak(step(ManifoldMixup(model, layers=["act"], seed=0)), unit)
    print(
        f"peak memory of a training step, in activations of {'x'.join(map(str, shape))} float32: plain {plain:.2f}, "
        f"ours {ours:.2f} (+{ours - plain:.2f}), naive {naive:.2f} (+{naive - plain:.2f})"
    )


def measure(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, rounds: int) -> dict[str, str]:
    torch.manual_seed(0)
    h, grad = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    if channels_last:
        h, grad = h.to(memory_format=torch.channels_last), grad.to(memory_format=torch.channels_last)
    h.requires_grad_()
    operations = contenders(h)
    for operation in operations.values():
        forward_backward(operation, h, grad)
    times: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(rounds):
        for name, operation in operations.items():
            times[name].append(seconds(operation, h, grad))

    def ratio(a: str, b: str) -> str:
        low, middle, high = statistics.quantiles((x / y for x, y in zip(times[a], times[b], strict=True)), n=4)
        return f"{middle:6.2f} [{low:.2f}, {high:.2f}]"

    return {
        "floor ms": f"{statistics.median(times['floor']) * 1e3:.1f}",
        "halves": ratio("halves", "floor"),
        "random": ratio("random", "floor"),
        "naive": ratio("naive", "floor"),
        "naive / random": ratio("naive", "random"),
        "memory f, n, r": ", ".join(
            f"{peak(lambda k=k: forward_backward(operations[k], h, grad), h):.1f}" for k in ("floor", "naive", "random")
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        print("Memory as the C library gives it:")
        table(arguments)
        print("\nMemory that is used again:", flush=True)
        reuse = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
        subprocess.run([sys.executable, *sys.argv], env={**os.environ, **reuse}, check=True)
        step_memory()
    else:
        table(arguments)


def table(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.rounds} rounds")
    header = False
    for label, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            for channels_last in (False, True) if len(shape) == 4 else (False,):
                row = measure(shape, dtype, channels_last, arguments.rounds)
                name = f"{label} {str(dtype).removeprefix('torch.')}{' channels-last' if channels_last else ''}"
                if not header:
                    print(f"{'':36}" + "".join(f"{column:>20}" for column in row))
                    header = True
                print(f"{name:36}" + "".join(f"{value:>20}" for value in row.values()), flush=True)


if __name__ == "__main__":
    main()
