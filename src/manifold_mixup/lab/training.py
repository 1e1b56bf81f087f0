"""The loop: shuffled batches, one method's transform, validation, checkpoints, and resumption to the same bits.

It is given the training and the validation split and nothing else, so no choice made here can depend on test data.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from manifold_mixup.lab import storage, streams
from manifold_mixup.lab.config import TrainConfig
from manifold_mixup.lab.data import Examples
from manifold_mixup.lab.errors import ConfigMismatch, CorruptedFile, Diverged, Interrupted, StorageError, UsageError
from manifold_mixup.lab.methods import Method

__all__ = ["Batches", "Fitted", "Hooks", "fit"]


@dataclass(frozen=True)
class Hooks:
    """How a run talks to whoever started it. Nothing here has an influence on the numbers.

    Attributes:
        stop: Asked before every step; True makes the run leave a checkpoint and end with ``Interrupted``.
        progress: Told the number of finished steps.
        checkpoint_seconds: Longest time between two checkpoints.
        checkpoint_steps: Steps between two checkpoints, in addition, or None.
    """

    stop: Callable[[], bool] = lambda: False
    progress: Callable[[int], None] = lambda step: None
    checkpoint_seconds: float = 15.0
    checkpoint_steps: int | None = None


@dataclass(frozen=True)
class Fitted:
    """What the loop hands on; the network itself holds the last weights.

    Attributes:
        best: The weights with the lowest validation NLL.
        facts: What the record says about the training.
    """

    best: dict[str, Tensor]
    facts: dict[str, Any]


class Batches:
    """Shuffled batches without end; every pass over the data has a new order, an incomplete last batch is left out.

    Args:
        examples: Number of training examples.
        size: Examples per batch; 0 takes all.
        seed: Seed of the run.
    """

    def __init__(self, examples: int, size: int, seed: int) -> None:
        if size > examples:
            raise UsageError(
                f"train.batch_size {size} is more than the {examples} training examples; 0 takes all of them"
            )
        self.examples, self.size = examples, size or examples
        self._generator = streams.generator(seed, "batches")
        self._order = torch.randperm(examples, generator=self._generator)
        self._next = 0

    def draw(self) -> Tensor:
        """The next batch: indices of shape ``(size,)``."""
        if self._next + self.size > self.examples:
            self._order = torch.randperm(self.examples, generator=self._generator)
            self._next = 0
        rows = self._order[self._next : self._next + self.size]
        self._next += self.size
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The generator, the order of the current pass and the place in it."""
        return {"generator": self._generator.get_state(), "order": self._order, "next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._generator.set_state(state["generator"])
        self._order, self._next = state["order"], state["next"]


def fit(
    model: nn.Module,
    method: Method[Any],
    train: Examples,
    validation: Examples,
    settings: TrainConfig,
    *,
    hidden: Sequence[str],
    seed: int,
    folder: Path,
    config_hash: str,
    hooks: Hooks,
) -> Fitted:
    """Train a network in place, from its checkpoint if there is one.

    Args:
        model: The network with fresh weights; afterwards it holds the last ones, and the method is detached.
        method: What is compared.
        train: Training split.
        validation: Validation split, for the log and the choice of the best weights.
        settings: How to train.
        hidden: Names of the modules whose outputs are the hidden states.
        seed: Seed of the run.
        folder: Gets ``log.jsonl`` and ``checkpoint/``.
        config_hash: A checkpoint with another one is refused.
        hooks: Stopping, progress and the pace of checkpoints.

    Raises:
        Interrupted: ``hooks.stop`` said so; a checkpoint was written.
        CorruptedFile: The checkpoint is damaged.
        ConfigMismatch: The checkpoint belongs to another configuration.
        Diverged: The loss is no longer a number.
        StorageError: The folder cannot be written.
    """
    loop = _Loop(model, method, train, validation, settings, hidden, seed, folder, config_hash)
    try:
        loop.resume()
        loop.run(hooks)
    finally:
        method.detach()
    return Fitted(loop.best_weights, loop.facts())


class _Loop:
    """The state of one training run."""

    def __init__(
        self,
        model: nn.Module,
        method: Method[Any],
        train: Examples,
        validation: Examples,
        settings: TrainConfig,
        hidden: Sequence[str],
        seed: int,
        folder: Path,
        config_hash: str,
    ) -> None:
        self.fabric = Fabric(accelerator="auto", devices=1, precision=settings.precision)
        device = self.fabric.device
        self.model, self.method, self.settings = model, method, settings
        self.train = Examples(train.x.to(device), train.y.to(device))
        self.validation = Examples(validation.x.to(device), validation.y.to(device))
        self.log, self.checkpoint, self.config_hash = folder / "log.jsonl", folder / "checkpoint", config_hash
        self.batches = Batches(len(train), settings.batch_size, seed)
        self.transform = method.attach(model, hidden, streams.stream_seed(seed, "method"))
        self.optimizer = _optimizer(model, settings)
        self.schedule = _schedule(self.optimizer, settings)
        self.forward, self.stepper = self.fabric.setup(model, self.optimizer)
        self.step = 0
        self.loss_sum, self.loss_count = 0.0, 0
        self.best: dict[str, Any] = {}
        self.best_weights: dict[str, Tensor] = {}
        self.last_line: dict[str, Any] = {}
        self.seconds = 0.0
        self.mark = time.monotonic()

    def run(self, hooks: Hooks) -> None:
        """All steps that are left."""
        self.mark = saved = time.monotonic()
        hooks.progress(self.step)
        while self.step < self.settings.steps:
            stopped = hooks.stop()
            by_steps = hooks.checkpoint_steps is not None and self.step > 0 and self.step % hooks.checkpoint_steps == 0
            if stopped or by_steps or time.monotonic() - saved > hooks.checkpoint_seconds:
                self.save()
                saved = time.monotonic()
            if stopped:
                raise Interrupted(f"stopped at step {self.step} of {self.settings.steps}")
            self.update()
            if self.step % self.settings.eval_every == 0 or self.step == self.settings.steps:
                self.validate()
            hooks.progress(self.step)
        self.save()

    def update(self) -> None:
        """One step of the optimiser."""
        self.model.train()
        rows = self.batches.draw().to(self.fabric.device)
        x, y = self.transform(self.train.x[rows], self.train.y[rows])
        self.stepper.zero_grad()
        loss = F.cross_entropy(
            self.forward(x), y, reduction="none"
        ).mean()  # a weight per example needs a loss per example
        self.fabric.backward(loss)
        self.stepper.step()
        self.schedule.step()
        self.step += 1
        self.loss_sum += float(loss.detach())
        self.loss_count += 1

    def validate(self) -> None:
        """Measure on the validation split, keep the weights if they are the best so far, write a line of the log."""
        train_loss = self.loss_sum / self.loss_count
        error, nll = _evaluate(self.model, self.validation)
        if not math.isfinite(train_loss + nll):
            raise Diverged(
                f"the training diverged: training loss {train_loss}, validation NLL {nll} at step {self.step}; "
                "try a smaller train.lr"
            )
        self.loss_sum, self.loss_count = 0.0, 0
        if not self.best or nll < self.best["validation_nll"]:
            self.best = {"step": self.step, "validation_error": error, "validation_nll": nll}
            self.best_weights = _copy(self.model.state_dict())
        self.last_line = {
            "step": self.step,
            "train_loss": train_loss,
            "validation_error": error,
            "validation_nll": nll,
            "lr": self.schedule.get_last_lr()[0],
        }
        try:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.last_line) + "\n")
        except OSError as cause:
            raise StorageError(self.log, cause) from cause

    def save(self) -> None:
        """Write a checkpoint."""
        now = time.monotonic()
        self.seconds, self.mark = self.seconds + now - self.mark, now
        state = {
            "config_hash": self.config_hash,
            "step": self.step,
            "seconds": self.seconds,
            "loss": [self.loss_sum, self.loss_count],
            "last_line": self.last_line,
            "best": self.best,
            "best_weights": self.best_weights,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "batches": self.batches.state_dict(),
            "method": self.method.state_dict(),
            "torch": storage.torch_rng_state(),
        }
        storage.save_state(self.checkpoint, state, self.step)

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one; else clear what an interrupted start has left."""
        state = storage.load_state(self.checkpoint)
        if state is not None:
            if state.get("config_hash") != self.config_hash:
                raise ConfigMismatch(f"{self.checkpoint} belongs to a run of another config; delete it to start again")
            try:
                self._restore(state)
            except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise CorruptedFile(
                    f"the checkpoint {self.checkpoint} does not fit the run ({reason}); delete it to start again"
                ) from error
        _trim_log(self.log, self.step)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.batches.load_state_dict(state["batches"])
        self.method.load_state_dict(state["method"])
        storage.restore_torch_rng(state["torch"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.loss_sum, self.loss_count = state["loss"]
        self.best, self.best_weights, self.last_line = state["best"], state["best_weights"], state["last_line"]

    def facts(self) -> dict[str, Any]:
        """What the record says about the training."""
        return {
            "steps": self.step,
            "examples": len(self.train),
            "epochs": self.step * self.batches.size / self.batches.examples,
            "loss": self.last_line.get("train_loss"),
            "best_step": self.best["step"],
            "best_by": "validation_nll",
            "seconds": round(self.seconds, 3),
            **self.method.facts(),
        }


def _optimizer(model: nn.Module, settings: TrainConfig) -> torch.optim.Optimizer:
    """Adam or SGD; the fused kernels take a third of the time on networks as small as these."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
            fused=True,
        )
    return torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


def _schedule(optimizer: torch.optim.Optimizer, settings: TrainConfig) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate as a function of the step alone, so that resuming cannot change it."""

    def factor(step: int) -> float:
        return 1.0 if settings.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / settings.steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def _evaluate(model: nn.Module, examples: Examples) -> tuple[float, float]:
    """Error in percent and mean NLL in nats, in eval mode and full precision."""
    model.eval()
    logits = model(examples.x)
    error = (logits.argmax(1) != examples.y).double().mean().item()
    return 100 * error, F.cross_entropy(logits.double(), examples.y).item()


def _copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in weights.items()}


def _trim_log(path: Path, step: int) -> None:
    """Drop the lines after a step, and a last line that was cut off; the log then reads as if nothing had happened."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    storage.write_atomically(path, "".join(kept).encode())
