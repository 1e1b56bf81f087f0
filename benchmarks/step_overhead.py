"""What mixing adds to a training step, in time and in peak memory, beside plain training and the naive way.

    python benchmarks/step_overhead.py [--networks ...] [--modes ...] [--record docs/results/overhead.jsonl] [--quick]

A step is forward, loss, backward, optimizer (SGD or AdamW, fused) and zero_grad. The variants take turns, step by step:

* plain, and a second copy of it, whose ratio shows what the measurement itself is off by;
* ours: `ManifoldMixup(model)`, S discovered before the clock starts; the same with `pairing="halves"`; and, in mode
  eager-bf16, every layer of S alone;
* naive: `lam * h + (1 - lam) * h[perm]` in the model's forward, as in the authors' code, and λ times the cross-entropy
  of y plus 1 - λ times that of y[perm]; over S it mixes at the same layers as ours in the same rounds. In compiled
  modes its λ is a tensor, or it would compile anew at every step. Attention masks it leaves as they are.

Ratios are to plain of the same round: median [quartiles] and the 95 % interval of the median. Extra peak memory is
that of a step, beyond plain's, in MB and in activations of the layer mixed. On the CPU it is counted with PyTorch's
profiler. On a GPU a turn is several steps between two events; float32 may use TF32 there. All variants have the same
flags.
Exits with 1 where a target is missed: see `ratios.py`. Needs timm and transformers (extras `vision`, `text`) and SciPy.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import harness
import numpy as np
import ratios
import torch
import torch.nn.functional as F
from harness import Batch, Case, Variant
from torch import Tensor, nn
from workloads import NETWORKS

from manifold_mixup import ManifoldMixup

ALPHA, SEED = 2.0, 0


def ours(case: Case, name: str, layers: Any = "auto", **options: Any) -> tuple[Variant, ManifoldMixup]:
    """ManifoldMixup as a user would write it; S is known before the clock starts."""
    model = case.copy()
    mixup = ManifoldMixup(model, ALPHA, layers, seed=SEED, **options)
    found = mixup.discover(**case.x) if isinstance(case.x, dict) else mixup.discover(case.x)
    variant = Variant(name, model, mixup, layers=tuple(found), drawn=lambda: mixup.last.layer if mixup.last else None)
    return variant, mixup


class Naive:
    """The mixing expression at given layers of a model, one of them at a time, with autograd's own backward."""

    def __init__(self, case: Case, layers: Iterable[str]) -> None:
        self.model, self.device, self.tensors = case.copy(), case.device, case.compiled
        self.layer: str | None = None
        self.coming: Iterator[str] = itertools.cycle(layers)
        self.random = np.random.default_rng(SEED)
        self.lam: float | Tensor = 1.0
        self.perm = torch.arange(len(case.y), device=case.device)
        for name in layers:
            if name == "input":
                self.model.register_forward_pre_hook(lambda _, args: (self.at("input", args[0]), *args[1:]))
            else:
                self.model.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, h: Any) -> Any:
            return (self.at(name, h[0]), *h[1:]) if isinstance(h, tuple) else self.at(name, h)

        return hook

    def at(self, name: str, h: Tensor) -> Tensor:
        return self.lam * h + (1 - self.lam) * h[self.perm] if self.layer == name else h

    def prepare(self, x: Batch, y: Tensor) -> tuple[Batch, tuple[Tensor, Tensor]]:
        self.layer = next(self.coming)
        lam = float(self.random.beta(ALPHA, ALPHA))
        self.lam = torch.tensor(lam, device=self.device) if self.tensors else lam
        self.perm = torch.randperm(len(y), device=self.device)
        return x, (y, y[self.perm])

    def criterion(self, logits: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        return self.lam * F.cross_entropy(logits, target[0]) + (1 - self.lam) * F.cross_entropy(logits, target[1])


def naive(case: Case, name: str, layers: tuple[str, ...], follows: ManifoldMixup | None = None) -> Variant:
    """The naive way at ``layers``; while the clock runs, at those that the mixer ``follows`` is going to draw."""
    mixing = Naive(case, layers)

    def look_ahead(steps: int) -> None:
        if follows is not None:
            mixing.coming = itertools.chain(upcoming(follows, case, steps), mixing.coming)

    return Variant(
        name, mixing.model, mixing.prepare, mixing.criterion, layers, lambda: mixing.layer, before_rounds=look_ahead
    )


def upcoming(mixup: ManifoldMixup, case: Case, steps: int) -> list[str]:
    """The layers of the mixer's next draws, which it will draw again."""
    state, names = mixup.state_dict(), []
    for _ in range(steps):
        mixup(case.x, case.y)
        assert mixup.last is not None
        assert isinstance(mixup.last.layer, str)
        names.append(mixup.last.layer)
    mixup.load_state_dict(state)
    return names


def variants(case: Case) -> list[Variant]:
    """All that is compared; the single layers in one mode only, for they take as long as all the rest."""
    over_s, mixup = ours(case, ratios.OURS)
    found = [
        Variant(ratios.PLAIN, case.copy()),
        Variant(ratios.CONTROL, case.copy()),
        over_s,
        ours(case, "ours, halves", pairing="halves")[0],
        naive(case, ratios.NAIVE, over_s.layers, follows=mixup),
    ]
    for layer in over_s.layers if case.mode == "eager-bf16" else ():
        found += [ours(case, f"ours, {layer}", [layer])[0], naive(case, f"naive, {layer}", (layer,))]
    return found


def main() -> int:
    arguments = harness.arguments(__doc__, list(NETWORKS))
    missed = 0
    for case in harness.cases(arguments):
        entry = harness.measure("step_overhead", case, variants(case), arguments)
        missed += sum(not met for met, _ in ratios.targets(entry))
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
