"""What the benchmarks share: steps of several variants taking turns, peak memory, records.

Every variant has modules and hooks of its own, but all share one set of weights, statistics and optimizer state (two
copies of the same weights differ by a few percent in speed, by where they lie in memory), and one batch. In a round
each of them takes one turn (``burst`` steps), in an order that is shuffled anew for every round. A ratio is a variant's
time over plain training's in the same round, so that what slows the machine for seconds slows both.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import platform
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler, used for its memory events, is talkative

import ratios
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workloads import CLASSES, NETWORKS, Network

from manifold_mixup import __version__

MODES = ("eager-bf16", "eager-fp32", "compile-bf16", "compile-fp32")
FEWEST, MOST = 7, 60  # rounds, where --rounds does not say it

Batch = Tensor | Mapping[str, Tensor]
Prepare = Callable[[Batch, Tensor], tuple[Batch, Any]]


def unprepared(x: Batch, y: Tensor) -> tuple[Batch, Any]:
    """Plain training: the batch as it comes."""
    return x, y


@dataclass
class Variant:
    """One way to train: ``prepare`` is what is called on a batch before the model, ``criterion`` the loss."""

    name: str
    model: nn.Module
    prepare: Prepare = unprepared
    criterion: Callable[[Tensor, Any], Tensor] = F.cross_entropy
    layers: tuple[str, ...] = ()  # what it may mix
    drawn: Callable[[], str | None] = lambda: None  # the layer that the last batch was mixed at
    before_rounds: Callable[[int], None] = lambda steps: None  # told how many steps will be timed
    optimizer: torch.optim.Optimizer | None = None
    run: Callable[..., Any] | None = None  # the model, or its compiled form


class Case:
    """One cell of the table: a network in a mode on a device, with its batch."""

    def __init__(self, network: Network, mode: str, device: torch.device, *, quick: bool = False) -> None:
        self.network, self.mode, self.device, self.quick = network, mode, device, quick
        torch.manual_seed(0)
        self.model = network.build(quick).to(device).train()
        self.x: Any = on_each(lambda t: t.to(device), network.batch(quick))
        if network.channels_last:
            self.model, self.x = (t.to(memory_format=torch.channels_last) for t in (self.model, self.x))
        self.y = torch.randint(CLASSES, (len(next(leaves(self.x))),), device=device)
        self.optimizer = network.optimizer(self.model.parameters())

    @property
    def compiled(self) -> bool:
        return self.mode.startswith("compile")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mode.endswith("bf16"))

    def copy(self) -> nn.Module:
        shared = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        return copy.deepcopy(self.model, shared)

    def finish(self, variant: Variant) -> None:
        """Give the variant its optimizer and, in compiled modes, the compiled model."""
        variant.optimizer = self.optimizer
        variant.run = torch.compile(variant.model) if self.compiled else variant.model

    def step(self, variant: Variant, x: Batch) -> None:
        """One training step of the variant; ``x`` may be overwritten."""
        assert variant.run is not None
        assert variant.optimizer is not None
        x, target = variant.prepare(x, self.y)
        with self.autocast():
            output = variant.run(**x) if isinstance(x, Mapping) else variant.run(x)
            loss = variant.criterion(getattr(output, "logits", output), target)
        loss.backward()
        variant.optimizer.step()
        variant.optimizer.zero_grad()

    def fresh(self) -> Batch:
        """The batch as a loader would hand it over: some transforms write into it."""
        return on_each(torch.clone, self.x)


def on_each(function: Callable[[Tensor], Tensor], x: Batch) -> Any:
    return {key: function(value) for key, value in x.items()} if isinstance(x, Mapping) else function(x)


def leaves(x: Batch) -> Iterator[Tensor]:
    return iter(x.values()) if isinstance(x, Mapping) else iter([x])


# ---------------------------------------------------------------- time


def seconds(case: Case, steps: Sequence[Callable[[], None]]) -> float:
    """Mean time of the steps, which run one after the other; on a GPU between two of its events."""
    if case.device.type != "cuda":
        start = time.perf_counter()
        for step in steps:
            step()
        return (time.perf_counter() - start) / len(steps)
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start_event.record()
    for step in steps:
        step()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1e3 / len(steps)


def warm_up(case: Case, variants: Iterable[Variant]) -> None:
    """Two steps at every layer that a variant may mix, so that nothing is compiled or allocated for good later."""
    for variant in variants:
        unseen = dict.fromkeys(variant.layers or ("",), 2)
        for _ in range(100 * len(unseen)):
            case.step(variant, case.fresh())
            name = variant.drawn() or ""
            unseen[name] = unseen.get(name, 0) - 1
            if max(unseen.values()) <= 0:
                break
        else:
            raise RuntimeError(f"{variant.name}: never drawn: {[name for name, left in unseen.items() if left > 0]}.")


def take_turns(case: Case, variants: Sequence[Variant], rounds: int | None, budget: float, burst: int) -> Any:
    """Seconds a step, one per round, for every variant by name.

    Without ``rounds`` there are as many as fit into ``budget`` seconds, between 7 and 60. In compiled modes it is an
    error if anything is compiled while the clock runs.
    """
    warm_up(case, variants)
    gc.collect()
    gc.freeze()  # what is there stays; collections while the clock runs look at what the steps leave behind
    stance = torch.compiler.set_stance("fail_on_recompile") if case.compiled else contextlib.nullcontext()
    order, shuffle = list(variants), random.Random(0)
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for variant in variants:
        variant.before_rounds(MOST * burst if rounds is None else rounds * burst)
    with stance:
        start = time.perf_counter()
        while not _enough(len(times[order[0].name]), rounds, time.perf_counter() - start, budget):
            shuffle.shuffle(order)
            for variant in order:
                steps = [_step(case, variant) for _ in range(burst)]
                times[variant.name].append(seconds(case, steps))
    gc.unfreeze()
    return times


def _step(case: Case, variant: Variant) -> Callable[[], None]:
    x = case.fresh()
    return lambda: case.step(variant, x)


def _enough(done: int, rounds: int | None, spent: float, budget: float) -> bool:
    return done >= rounds if rounds is not None else done >= MOST or (done >= FEWEST and spent > budget)


# ---------------------------------------------------------------- memory


def peak_bytes(operation: Callable[[], object], device: torch.device | None = None) -> int:
    """What ``operation`` has allocated at its peak beyond the tensors that exist before it."""
    if device is not None and device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        operation()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The CPU's allocator keeps no account; the profiler sees every allocation, also those of compiled kernels.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        operation()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def step_memory(case: Case, variants: Sequence[Variant]) -> dict[str, dict[str, int]]:
    """Peak of a step of each variant in bytes, by the layer that was mixed ("" where none was)."""
    found: dict[str, dict[str, int]] = {}
    for variant in variants:
        peaks: dict[str, int] = {}
        wanted = set(variant.layers or ("",))
        while not wanted <= set(peaks):  # the warm-up has shown that every layer is drawn
            x = case.fresh()
            peak = peak_bytes(lambda v=variant, x=x: case.step(v, x), case.device)
            peaks[variant.drawn() or ""] = peak
        found[variant.name] = peaks
    return found


def activation_bytes(case: Case, layers: Iterable[str]) -> dict[str, int]:
    """Bytes of the activation at every layer ("input" is the batch), in a training forward of this mode."""
    model, sizes = case.copy(), {}

    def hook(name: str) -> Callable[..., None]:
        def measure(_: nn.Module, args: Any, output: Any) -> None:
            h = output[0] if isinstance(output, tuple) else output
            sizes[name] = h.numel() * h.element_size()

        return measure

    for name in layers:
        if name == "input":
            sizes[name] = case.x.numel() * case.x.element_size()
        else:
            model.get_submodule(name).register_forward_hook(hook(name))
    with case.autocast(), torch.no_grad():
        model(**case.x) if isinstance(case.x, Mapping) else model(case.x)
    return sizes


# ---------------------------------------------------------------- the scripts


def arguments(description: str, networks: Sequence[str]) -> argparse.Namespace:
    """The command line that the scripts share, checked."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=networks, default=networks, metavar="NAME")
    parser.add_argument("--modes", nargs="+", choices=MODES, metavar="MODE", help=f"of {', '.join(MODES)}")
    parser.add_argument("--rounds", type=int, help=f"default: {FEWEST} to {MOST}, as many as fit into --seconds")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="per table (default: 20), where aimed at 4 times it"
    )
    parser.add_argument("--burst", type=int, help="steps a turn (default: 1; on a GPU 5)")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="tiny networks and 2 rounds, to try the script")
    parser.add_argument("--record", type=Path, help="append a line per cell to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.burst = options.burst or (5 if options.device.type == "cuda" else 1)
    options.rounds = options.rounds or (2 if options.quick else None)
    if options.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    # All variants are models of one class. Their graphs count towards one limit, and those with hooks must not be given
    # the graph of one without, which PyTorch does to save the time of looking.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    return options


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The cells asked for. By default the large networks are not compiled, for that takes minutes."""
    for name in options.networks:
        network = NETWORKS[name]
        for mode in options.modes or MODES[: 3 if network.compiled else 2]:
            yield Case(network, mode, options.device, quick=options.quick)


def measure(benchmark: str, case: Case, variants: Sequence[Variant], options: argparse.Namespace) -> dict[str, Any]:
    """Measure one cell, print it, append it to the records if so asked; the variants' layers are those of ours."""
    for variant in variants:
        case.finish(variant)
    layers = next(variant.layers for variant in variants if variant.name == ratios.OURS)
    budget = options.seconds * (4 if ratios.aimed_at(case.network.name, case.mode) else 1)
    times = take_turns(case, variants, options.rounds, budget, options.burst)
    entry = {
        "benchmark": benchmark,
        "network": case.network.name,
        "mode": case.mode,
        "device": case.device.type,
        "batch": list(next(leaves(case.x)).shape),
        "parameters": sum(p.numel() for p in case.model.parameters()),
        "layers": layers,
        "seconds": {name: [round(t, 7) for t in values] for name, values in times.items()},
        "peaks": step_memory(case, [variant for variant in variants if variant.name != ratios.CONTROL]),
        "activations": activation_bytes(case, layers),
        "burst": options.burst,
        "quick": case.quick,
        "machine": machine(case.device),
        "versions": {"torch": torch.__version__, "manifold-mixup": __version__, "python": platform.python_version()},
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    print("\n".join(("", ratios.title(entry), ratios.machine(entry), ratios.table(entry), *ratios.verdicts(entry))))
    sys.stdout.flush()
    if case.compiled:
        torch.compiler.reset()  # the next cell's models do not look through this one's graphs
    if options.record:
        with options.record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    return entry


def machine(device: torch.device) -> dict[str, Any]:
    """Where it was measured."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "load": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
