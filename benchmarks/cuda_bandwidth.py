"""How much of a GPU's memory bandwidth the mixing operation uses, as a share of a copy on the device.

    python benchmarks/cuda_bandwidth.py [--rounds 50]

A copy reads and writes one activation. Mixing has to read it twice (each row for itself and for its partner) and to
write it once, so the least it can take is 1.5 times a copy. `share` is that least time over the time measured: 100 % is
mixing at the bandwidth of a copy. `backward` is the derivative alone, the same map with the inverse pairing.

* eager: `manifold_mixup.interpolate`, with every pairing, and with one λ per row;
* compiled: what a compiled model runs, one kernel; naive: `λ·h + (1 - λ)·h[index]`, eager, with autograd's backward.

Times are medians over the rounds, by the events of the device, in one process, taking turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from manifold_mixup import interpolate
from manifold_mixup.interpolation import apply_traced
from manifold_mixup.pairing import draw_partner

SHAPES = {"256x64x56x56": (256, 64, 56, 56), "256x197x768": (256, 197, 768), "512x512": (512, 512)}
LAM = 0.37

# The compiler makes an object of every autograd function that it traces; torch warns of that.
warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)


def forms(h: Tensor) -> dict[str, Callable[[], Tensor]]:
    rows, generator = h.shape[0], torch.Generator().manual_seed(0)
    random = draw_partner("random", rows, generator)
    halves = draw_partner("halves", rows, generator)
    index, inverse = (partner.indices.to(h.device) for partner in (random, random.turned))
    lam = torch.tensor(LAM, dtype=torch.float64, device=h.device)
    each = torch.rand(rows, dtype=torch.float64)
    compiled = torch.compile(apply_traced, fullgraph=True)
    return {
        "eager, random": lambda: interpolate(h, random, LAM),
        "eager, halves": lambda: interpolate(h, halves, LAM),
        "eager, random, one λ per row": lambda: interpolate(h, random, each),
        "compiled, random": lambda: compiled(h, "permutation", index, inverse, lam),
        "naive, random": lambda: LAM * h + (1 - LAM) * h[index],
    }


def milliseconds(operation: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    operation()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(label: str, h: Tensor, rounds: int) -> None:
    target, grad = torch.empty_like(h), torch.randn_like(h)
    operations = forms(h)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ("copy", *operations)}
    for turn in range(rounds + 5):  # the first turns compile and fill the allocator's cache
        found = {"copy": (milliseconds(lambda: target.copy_(h.detach())),) * 2}
        for name, operation in operations.items():
            h.grad, outputs = None, []
            forward = milliseconds(lambda operation=operation, outputs=outputs: outputs.append(operation()))
            found[name] = (forward, milliseconds(lambda outputs=outputs: torch.autograd.grad(outputs, h, grad)))
        if turn >= 5:
            for name, pair in found.items():
                times[name].append(pair)
    medians = {name: [statistics.median(t) for t in zip(*pairs, strict=True)] for name, pairs in times.items()}
    copy = medians.pop("copy")[0]
    gigabytes = 2 * h.numel() * h.element_size() / copy / 1e6
    print(f"\n{label}: copy {copy:.3f} ms, {gigabytes:.0f} GB/s")
    print(f"{'':30}{'forward':>10}{'share':>8}{'backward':>10}{'share':>8}")
    for name, pair in medians.items():
        print(f"{name:30}" + "".join(f"{t:>7.3f} ms{1.5 * copy / t:>8.0%}" for t in pair), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a GPU that torch can use; benchmarks/interpolation.py measures on the CPU.")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, {options.rounds} rounds")
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            for channels_last in (False, True) if len(shape) == 4 else (False,):
                torch._dynamo.reset()
                h = torch.randn(shape, dtype=dtype, device="cuda")
                h = h.to(memory_format=torch.channels_last) if channels_last else h
                label = f"{name} {str(dtype).removeprefix('torch.')}{' channels-last' if channels_last else ''}"
                measure(label, h.requires_grad_(), options.rounds)


if __name__ == "__main__":
    main()
