"""Images per second of the lab's training loop, beside a loop in the style of the authors' code.

    python benchmarks/training.py [--method manifold_mixup none] [--compile] [--width 1.0] [--device cuda]
                                  [--data-dir DIR] [--record docs/results/training_speed.jsonl] [--json] [--quick]

PreActResNet18 on CIFAR-10's images, 100 a batch, cropped and flipped, SGD with Nesterov momentum and weight decay 1e-4,
binary cross-entropy of the softmax; Manifold Mixup with S = {input, stage1, stage2} and α = 2, or plain training. Both
start from the same weights and have the same number of threads.

* ours: `fit`, the loop of every run of the lab, in bf16-mixed precision; the images lie on the device as uint8 and are
  varied there. No validation and no checkpoint falls into the time. With --compile there is a second table, in which
  the network is compiled; nothing may be compiled anew while the clock runs.
* authors' style: see `authors_style.py`, written from the description of their code. Its workers load while it trains.

They take turns of --steps steps, in one process and one thread: the twin's turns happen in the hook that `fit` calls
after every step, so that the one rests wholly while the other one works, and they share one pool of threads. A round is
a turn of each; the order changes from round to round (twin, ours, ours, twin, ...). A turn starts with --lead steps off
the clock: on the CPU one, in which the workers, faster than the training there, fetch as far ahead as they may; on a
GPU as many as they fetch ahead. From there on they load one batch for each that is trained on. What they have fetched
when the clock stops is thrown away before it is our turn: nobody gets a batch for nothing (were the workers the slower
ones, the first few would be a gift to the twin), and the workers then wait for work. Starting the worker processes is
not in the time. A GPU is waited for at either end of a turn.

"Times as fast" is the twin's time over ours of the same round: median [quartiles] and the 95 % interval of the median.
The operations are those of the network's forward and backward, counted by PyTorch (2 for a multiplication with its
addition); what else happens in a step only takes time. The peak is that of `torch.mm` on large squares, the best of
several sizes and repetitions, with the same threads in the same run; on a GPU fp32 may use TF32 there, as PyTorch lets
the twin's convolutions do. Without --data-dir the images are random bytes: the speed does not depend on what they show.
With --device cuda the twin pins memory and has cuDNN look for the best algorithms, as such scripts do.

Exits with 1 where ours is less than 2.5 times as fast on the CPU, or 5 times on a GPU. Needs the extra `lab`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import harness
import rates
import ratios
import torch
from authors_style import AHEAD, Twin
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from manifold_mixup import __version__
from manifold_mixup.lab.config import TrainConfig
from manifold_mixup.lab.data import Examples, Pixels, Places, load_data
from manifold_mixup.lab.devices import Devices, make_fabric
from manifold_mixup.lab.methods import make_method
from manifold_mixup.lab.models import build_model, hidden_layers
from manifold_mixup.lab.training import Hooks, fit

NETWORK, SHAPE, CLASSES = "preact_resnet18", (3, 32, 32), 10
ALPHA, LAYERS, SEED = 2.0, ["input", "stage1", "stage2"], 0
RATE = 0.01  # of learning; small enough for labels that are noise
MEAN, SD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)  # of CIFAR-10 in the authors' code, of 255
WARM_UP = {False: 3, True: 24}  # steps of ours; where it is compiled, so many that no layer of S is left out
SIDES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}
NEVER = 10**9


# ---------------------------------------------------------------- the machine and the work


def peak(dtype: torch.dtype, device: torch.device, *, quick: bool = False) -> float:
    """Floating-point operations per second of the fastest square matrix product found."""
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    best = 0.0
    for side in (128,) if quick else SIDES[device.type]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.mm(a, b)
        for _ in range(2 if quick else 10):
            best = max(best, 2 * side**3 / seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device))
    torch.backends.cuda.matmul.allow_tf32 = tf32
    return best


def seconds(operation: Callable[[], object], device: torch.device) -> float:
    """The time of one call; on a GPU between two of its events."""
    if device.type != "cuda":
        start = time.perf_counter()
        operation()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    operation()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def flops_per_image(model: nn.Module, batch: int) -> int:
    """Operations of forward and backward; counted on the meta device, where nothing is computed."""
    model = copy.deepcopy(model).to("meta").train()
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.empty(batch, *SHAPE, device="meta")).sum().backward()
    return counter.get_total_flops() // batch


def images(options: argparse.Namespace) -> tuple[Examples, Pixels, str]:
    """What is trained on, and what it is called."""
    if options.data_dir is not None:
        chosen = {"validation_examples": 0, "crop_padding": options.padding, "flip": True}
        splits = load_data("cifar10", chosen, SEED, Places(data_dir=options.data_dir))
        assert splits.info.pixels is not None
        return splits.train, splits.info.pixels, "CIFAR-10"
    random, count = torch.Generator().manual_seed(SEED), 8 * options.batch if options.quick else 50_000
    x = torch.randint(256, (count, *SHAPE), generator=random, dtype=torch.uint8)
    y = torch.randint(CLASSES, (count,), generator=random)
    mean, sd = (tuple(value / 255 for value in values) for values in (MEAN, SD))
    return Examples(x, y), Pixels(mean, sd, options.padding, flip=True), "random bytes"


# ---------------------------------------------------------------- turns


class Turns:
    """The hook of ours that stops the clock at the end of a turn and lets the twin have its own.

    Args:
        twin: From steps off the clock and steps on it to the twin's mean seconds of a step.
        rounds: Turns of each.
        warm_up: Steps of ours before its first turn.
        lead: Steps of a turn that are not timed.
        steps: Steps of a turn that are timed.
        wait: Waits for the device.
        warm: Called once, when the warm-up of both is over.
    """

    def __init__(
        self,
        twin: Callable[[int, int], float],
        *,
        rounds: int,
        warm_up: int,
        lead: int,
        steps: int,
        wait: Callable[[], None] = lambda: None,
        warm: Callable[[], None] = lambda: None,
    ) -> None:
        self.twin, self.warm_up, self.lead, self.steps, self.wait, self.warm = twin, warm_up, lead, steps, wait, warm
        pairs = [(rates.TWIN, rates.OURS), (rates.OURS, rates.TWIN)]
        self.order = [name for k in range(rounds) for name in pairs[k % 2]]  # what is still to come
        self.total = warm_up + rounds * (lead + steps) + 1  # the last step is followed by what ends a run
        self.times: dict[str, list[float]] = {rates.OURS: [], rates.TWIN: []}
        self.start = math.nan

    def progress(self, step: int) -> None:
        """``Hooks.progress``: ``step`` steps are finished."""
        turn, place = divmod(step - self.warm_up, self.lead + self.steps)
        if turn < 0 or not self.order:
            return
        if place == 0:
            self.wait()
            now = time.perf_counter()
            if turn > 0:
                self.times[self.order.pop(0)].append((now - self.start) / self.steps)
            else:
                self.twin(0, self.lead + 1)
                self.warm()
            while self.order[:1] == [rates.TWIN]:
                self.times[self.order.pop(0)].append(self.twin(self.lead, self.steps))
        if place == self.lead:
            self.wait()
            self.start = time.perf_counter()


def settings(options: argparse.Namespace, steps: int, *, compiled: bool) -> TrainConfig:
    """How ours trains, as a recipe would say it."""
    return TrainConfig(
        steps=steps,
        batch_size=options.batch,
        loss="bce-softmax",
        optimizer="sgd",
        lr=RATE,
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-4,
        eval_every=NEVER,
        precision="bf16-mixed",
        compile=compiled,
        threads=options.threads,
    )


def train(options: argparse.Namespace, model: nn.Module, method: str, compiled: bool) -> tuple[Turns, int, str]:
    """Run the lab's loop with the twin's turns in it; also the number of images, and what they are."""
    device, mixed = torch.device(options.device), method != "none"
    examples, pixels, data = images(options)
    twin = Twin(
        copy.deepcopy(model),
        examples,
        pixels,
        classes=CLASSES,
        device=device,
        batch=options.batch,
        steps=options.lead + options.steps,
        workers=options.workers,
        alpha=ALPHA if mixed else None,
        lr=RATE,
        seed=SEED,
    )
    turns = Turns(
        twin.turn,
        rounds=options.rounds,
        warm_up=WARM_UP[compiled],
        lead=options.lead,
        steps=options.steps,
        wait=torch.cuda.synchronize if device.type == "cuda" else lambda: None,
        warm=(lambda: torch.compiler.set_stance("fail_on_recompile")) if compiled else lambda: None,
    )
    config = settings(options, turns.total, compiled=compiled)
    with tempfile.TemporaryDirectory() as folder:
        fit(
            model,
            make_method(method, {"alpha": ALPHA, "layers": LAYERS} if mixed else {}),
            examples,
            Examples(examples.x[:0], examples.y[:0]),
            config,
            hidden=hidden_layers(NETWORK, {"width": options.width}),
            seed=SEED,
            folder=Path(folder),
            config_hash="",
            hooks=Hooks(progress=turns.progress, checkpoint_seconds=math.inf),
            pixels=pixels,
            fabric=make_fabric(Devices(device.type), config.precision),
        )
    twin.close()
    if compiled:
        torch.compiler.set_stance("default")
        torch.compiler.reset()
    return turns, len(examples), data


def measure(options: argparse.Namespace, method: str, compiled: bool, peaks: dict[str, float]) -> dict[str, Any]:
    """One table's record."""
    torch.manual_seed(SEED)
    model = build_model(NETWORK, {"width": options.width}, SHAPE, CLASSES)
    flops, parameters = flops_per_image(model, options.batch), sum(p.numel() for p in model.parameters())
    turns, count, data = train(options, model, method, compiled)
    return {
        "benchmark": "training",
        "method": method,
        "layers": LAYERS if method != "none" else [],
        "alpha": ALPHA if method != "none" else None,
        "compiled": compiled,
        "network": NETWORK,
        "width": options.width,
        "parameters": parameters,
        "device": options.device,
        "batch": [options.batch, *SHAPE],
        "images": count,
        "data": data,
        "padding": options.padding,
        "workers": options.workers,
        "lead": options.lead,
        "steps": options.steps,
        "precisions": {rates.OURS: "bf16", rates.TWIN: "fp32"},
        "seconds": {name: [round(t, 7) for t in values] for name, values in turns.times.items()},
        "flops_per_image": flops,
        "peaks": peaks,
        "quick": options.quick,
        "machine": harness.machine(torch.device(options.device)),
        "versions": {"torch": torch.__version__, "manifold-mixup": __version__, "python": platform.python_version()},
        "command": shlex.join(["python", *("DIR" if a == str(options.data_dir) else a for a in sys.argv)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


# ---------------------------------------------------------------- the script


def arguments() -> argparse.Namespace:
    """The command line, checked and with what it leaves open filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=("manifold_mixup", "none"), default=["manifold_mixup"])
    parser.add_argument("--compile", action="store_true", help="a second table, with ours compiled")
    parser.add_argument("--width", type=float, help="factor on the network's 64 channels (default: 1)")
    parser.add_argument("--batch", type=int, help="images a step (default: 100)")
    parser.add_argument("--padding", type=int, default=4, help="black pixels around what is cropped (default: 4)")
    parser.add_argument("--workers", type=int, default=2, help="processes that load for the twin (default: 2)")
    parser.add_argument("--rounds", type=int, help="turns of each (default: 8)")
    parser.add_argument("--steps", type=int, help="timed steps of a turn (default: 10; on a GPU 50)")
    parser.add_argument("--lead", type=int, help="steps of a turn before them (default: 1; on a GPU 2 per worker)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both (default: all cores)")
    parser.add_argument("--data-dir", type=Path, help="where the published files of CIFAR-10 lie")
    parser.add_argument("--json", action="store_true", help="one JSON object per table, and nothing else on stdout")
    parser.add_argument("--record", type=Path, help="append a line per table to this file")
    parser.add_argument("--quick", action="store_true", help="a tiny network and 2 rounds, to try the script")
    options = parser.parse_args()
    on_gpu, quick = options.device == "cuda", options.quick
    options.width = options.width or (1 / 16 if quick else 1.0)
    options.batch = options.batch or (10 if quick else 100)
    options.rounds = options.rounds or (2 if quick else 8)
    options.steps = options.steps or (2 if quick else 50 if on_gpu else 10)
    if options.lead is None:
        options.lead = max(1, options.workers * AHEAD) if on_gpu else 1
    torch.set_num_threads(options.threads)
    return options


def main() -> int:
    options = arguments()
    device = torch.device(options.device)
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    peaks = {name: peak(dtype, device, quick=options.quick) for name, dtype in dtypes.items()}
    missed = 0
    for method in options.method:
        for compiled in (False, True)[: 1 + options.compile]:
            entry = measure(options, method, compiled, peaks)
            head = (rates.title(entry), ratios.machine(entry), rates.conditions(entry))
            text = "\n".join(("", *head, rates.table(entry), *rates.verdicts(entry)))
            print(json.dumps(entry | rates.summary(entry), ensure_ascii=False) if options.json else text, flush=True)
            if options.record:
                with options.record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            missed += sum(not met for met, _ in rates.targets(entry))
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
