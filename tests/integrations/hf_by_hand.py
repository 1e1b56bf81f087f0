"""Training loops by hand, and what is compared with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hf_models import SEED, trainer_of
from torch import Tensor, nn
from transformers import TrainerCallback

from manifold_mixup import ManifoldMixup
from manifold_mixup.integrations.transformers import ManifoldMixupCallback

LABELS = {"labels", "start_positions", "end_positions"}


class Draws(TrainerCallback):
    """Writes down the draw of every micro-batch."""

    def __init__(self, callback: ManifoldMixupCallback) -> None:
        self.callback, self.drawn = callback, []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        last = self.callback.mixup.last
        self.drawn.append((last.layer, last.lam, last.partner.tolist()))

    on_substep_end = on_step_end


def loss_of_model(model: nn.Module, x: dict[str, Tensor], labels: Any, items: Any) -> Tensor:
    labels = labels if isinstance(labels, dict) else {"labels": labels}
    return model(**x, **labels, **({} if items is None else {"num_items_in_batch": items})).loss


def by_hand(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    *,
    steps: int = 4,
    accumulate: int = 1,
    loss_of: Callable[..., Tensor] = loss_of_model,
    ignore: tuple[str, ...] = (),
    shifted: bool = False,
    **options: Any,
) -> list[Any]:
    """The training, with the two labels of every example as plain tensors: λ·ℓ(y) + (1 - λ)·ℓ(y')."""
    model.train()
    mixup = ManifoldMixup(model, **{"seed": SEED, **options})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    draws = []
    for step in range(steps):
        group = batches[step * accumulate : (step + 1) * accumulate]
        items = None
        if "labels" in group[0]:
            items = sum((b["labels"][..., 1:] if shifted else b["labels"]).ne(-100).sum() for b in group)
        for batch in group:
            labels = {key: batch[key] for key in batch if key in LABELS}
            x = {key: batch[key] for key in batch if key not in LABELS and key not in ignore}
            x, target = mixup(x, labels["labels"] if len(labels) == 1 else labels)
            own, partner = (loss_of(model, x, half, items) for half in (target.y, target.y_partner))
            (target.lam * own + (1 - target.lam) * partner).backward()
            draws.append((mixup.last.layer, mixup.last.lam, mixup.last.partner.tolist()))
        optimizer.step()
        optimizer.zero_grad()
    mixup.remove()
    return draws


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def train_both(
    folder: Path, model: nn.Module, rows: list[dict[str, Any]], by_hand_options: Any = None, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """One model trained by the Trainer, its copy by hand; the draws agree, and mixing makes a difference."""
    mixing = options.pop("mixing", {})
    reference, plain = copy.deepcopy(model), copy.deepcopy(model)
    callback = ManifoldMixupCallback(**mixing)
    draws = Draws(callback)
    trainer, batches = trainer_of(model, folder, [callback, draws], rows, **options)
    trainer.train()
    steps = {"steps": options.get("max_steps", 4), "accumulate": options.get("gradient_accumulation_steps", 1)}
    assert draws.drawn == by_hand(reference, batches, **steps, **mixing, **(by_hand_options or {}))
    assert {layer for layer, *_ in draws.drawn} == set(callback.mixup.layers)
    trainer_of(plain, folder, [], rows, **options)[0].train()
    assert distance(model, plain) > 1e-4
    return model, reference
