"""What a training step costs with other libraries' mixup, beside ours and plain training.

    python benchmarks/peers.py [--networks ...] [--modes ...] [--record docs/results/overhead.jsonl] [--quick]

The variants take turns, step by step; ratios and memory are as in `step_overhead.py`, which says how they are made.

* ours: `ManifoldMixup(model)`, which mixes the input or a hidden layer; "ours, input" does what the peers do;
* timm: `timm.data.Mixup`, mixes the input in place, pairs example i with n - 1 - i, soft targets, no label smoothing;
* torchvision: `transforms.v2.MixUp`, mixes the input with its neighbour in the batch, soft targets;
* kornia: `RandomMixUpV2`, mixes the input, one λ per example; the loss is the one that its documentation gives.

All peers mix inputs only: none of them can do what "ours" does. They need images, so there is no text here. A peer that
is not installed is left out, and the script says so. Exits with 1 where a target is missed: see `ratios.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import harness
import ratios
import torch.nn.functional as F
from harness import Case, Prepare, Variant
from step_overhead import ALPHA, ours
from torch import Tensor
from workloads import CLASSES

from support import define_torchvision_operators

Loss = Callable[[Tensor, Any], Tensor]


def timm() -> tuple[Prepare, Loss]:
    from timm.data import Mixup

    return Mixup(mixup_alpha=ALPHA, label_smoothing=0.0, num_classes=CLASSES), F.cross_entropy


def torchvision() -> tuple[Prepare, Loss]:
    from torchvision.transforms import v2

    return v2.MixUp(alpha=ALPHA, num_classes=CLASSES), F.cross_entropy


def kornia() -> tuple[Prepare, Loss]:
    from kornia.augmentation import RandomMixUpV2

    mix = RandomMixUpV2(data_keys=["input", "class"])

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        y, partner, lam = target[:, 0].long(), target[:, 1].long(), target[:, 2]
        own, other = (F.cross_entropy(logits, half, reduction="none") for half in (y, partner))
        return ((1 - lam) * own + lam * other).mean()

    return mix, loss


PEERS = {"timm": timm, "torchvision": torchvision, "kornia": kornia}


def variants(case: Case) -> list[Variant]:
    found = [
        Variant(ratios.PLAIN, case.copy()),
        Variant(ratios.CONTROL, case.copy()),
        ours(case, ratios.OURS)[0],
        ours(case, "ours, input", ["input"])[0],
    ]
    for name, make in PEERS.items():
        try:
            prepare, criterion = make()
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error}")
            continue
        found.append(Variant(name, case.copy(), prepare, criterion, layers=("input",), drawn=lambda: "input"))
    return found


def main() -> int:
    define_torchvision_operators()
    arguments = harness.arguments(__doc__, ["preact_resnet18", "resnet50", "vit_tiny"])
    missed = 0
    for case in harness.cases(arguments):
        entry = harness.measure("peers", case, variants(case), arguments)
        missed += sum(not met for met, _ in ratios.targets(entry))
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
