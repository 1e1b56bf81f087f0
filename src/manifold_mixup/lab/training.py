"""The loop: shuffled batches, one method's transform, validation, checkpoints, and resumption to the same bits.

It is given the training and the validation split and nothing else, so no choice made here can depend on test data.
Sets of images stay on the device as uint8; a batch is cropped, flipped and normalised there.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from manifold_mixup.lab import loggers, storage, streams
from manifold_mixup.lab.config import TrainConfig
from manifold_mixup.lab.cost import Meter
from manifold_mixup.lab.criterion import make_criterion
from manifold_mixup.lab.data import Examples, Pixels, Unlabelled
from manifold_mixup.lab.devices import Devices, gather, make_fabric
from manifold_mixup.lab.errors import ConfigMismatch, CorruptedFile, Diverged, Interrupted, UsageError
from manifold_mixup.lab.feed import Feed
from manifold_mixup.lab.hooks import Hooks
from manifold_mixup.lab.measures.inference import predicted_logits
from manifold_mixup.lab.methods.base import Batch, Method, StepMethod
from manifold_mixup.lab.optim import lay_out_like_parameters, make_average, make_optimizer, make_schedule
from manifold_mixup.lab.selection import Best, Choice

__all__ = ["Fitted", "Hooks", "fit"]

LONGEST = 60.0  # seconds of work that a power cut may cost
COST = 20.0  # between two checkpoints lie at least so many times the seconds that writing one takes, up to LONGEST
LOOK = 50  # steps on a device other than the CPU between two looks at the losses, each of which waits for the device
AGREE = 10  # steps between two agreements of several processes on whether to stop or to write a checkpoint


@dataclass(frozen=True)
class Fitted:
    """What the loop hands on.

    Attributes:
        last: The last weights; with ``train.ema`` their average; a teacher's, if the method has one.
        best: The weights that were best on the validation split, or None without one.
        facts: What the record says about the training.
    """

    last: dict[str, Tensor]
    best: dict[str, Tensor] | None
    facts: dict[str, Any]


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
    pixels: Pixels | None = None,
    fabric: Fabric | None = None,
    unlabelled: Unlabelled | None = None,
    choose: Choice = "validation_nll",
) -> Fitted:
    """Train a network in place, from its checkpoint if there is one.

    Args:
        model: The network with fresh weights; afterwards it holds the last ones, and the method is detached.
        method: What is compared.
        train: Training split.
        validation: Validation split, for the log and the choice of the best weights; may be empty.
        settings: How to train.
        hidden: Names of the modules whose outputs are the hidden states.
        seed: Seed of the run.
        folder: Gets ``log.jsonl`` and ``checkpoint/``.
        config_hash: A checkpoint with another one is refused.
        hooks: Stopping, progress and the pace of checkpoints.
        pixels: How uint8 images are varied and normalised; None for examples that are read as they are.
        fabric: The devices; None takes one, the best there is.
        unlabelled: Further examples, for methods that look at them.
        choose: Which weights are the best ones.

    Raises:
        Interrupted: ``hooks.stop`` said so; a checkpoint was written.
        CorruptedFile: The checkpoint is damaged.
        ConfigMismatch: The checkpoint belongs to another configuration.
        Diverged: The loss is no longer a number; the last checkpoint is from before that.
        StorageError: The folder cannot be written.
        UsageError: A batch is larger than the training split, or cannot be divided among the devices; or the method
            trains on one device only.
    """
    fabric = fabric or make_fabric(Devices(), settings.precision)
    try:
        where, best = (folder, config_hash), Best(choose)
        loop = _Loop(model, method, train, validation, settings, hidden, seed, where, pixels, fabric, unlabelled, best)
        loop.resume()
        loop.run(hooks)
    finally:
        method.detach()
    return Fitted(loop.weights(), loop.best.weights or None, loop.facts())


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
        where: tuple[Path, str],
        pixels: Pixels | None,
        fabric: Fabric,
        unlabelled: Unlabelled | None,
        best: Best,
    ) -> None:
        self.fabric, device = fabric, fabric.device
        self.meter = Meter(device)
        self.model, self.method, self.settings, self.pixels = model.to(device), method, settings, pixels
        self.labels = train.y.to(device)
        self.validation = Examples(validation.x.to(device), validation.y.to(device))
        folder, self.config_hash = where
        self.log, self.checkpoint = folder / "log.jsonl", folder / "checkpoint"
        self.feed = Feed(train.x, settings.batch_size, seed, fabric, pixels)
        self.unlabelled = self.second_feed(unlabelled, seed)
        if pixels is not None:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = make_average(model, settings)
        rank = fabric.global_rank
        own = "method" if rank == 0 else f"method/{rank}"  # every device mixes with weights and partners of its own
        self.transform = method.attach(model, hidden, streams.stream_seed(seed, own))
        if rank > 0:
            torch.manual_seed(streams.stream_seed(seed, f"torch/{rank}"))
        self.companion = method.companion()
        if self.companion is not None:
            self.companion.to(device)
        teacher = method.teacher()
        self.measured = model if teacher is None else teacher
        if self.average is not None:
            if teacher is not None:
                raise UsageError(f"method {method.name!r} has a teacher, an average of its own: leave train.ema unset")
            self.measured = self.average.module
        beside = [] if self.companion is None else list(self.companion.parameters())
        self.optimizer = make_optimizer([*model.parameters(), *beside], settings)
        self.per_epoch = settings.steps_per_epoch(len(train))
        self.steps = settings.total_steps(len(train))
        self.schedule = make_schedule(self.optimizer, settings, self.steps, self.per_epoch)
        self.criterion = make_criterion(settings)
        runs: Any = torch.compile(model) if settings.compile else model
        self.forward, self.stepper = fabric.setup(runs, self.optimizer)
        self.step = 0
        self.losses: list[Tensor] = []  # of the steps since the last look at them
        self.loss_sum, self.loss_count = 0.0, 0
        self.best = best
        self.last_line: dict[str, Any] = {}
        self.loggers: Sequence[loggers.Logger] = ()
        self.seconds = 0.0
        self.mark = time.monotonic()

    def run(self, hooks: Hooks) -> None:
        """All steps that are left."""
        self.mark = saved = time.monotonic()
        pause = hooks.checkpoint_seconds
        self.loggers = hooks.loggers if self.fabric.is_global_zero else ()
        for logger in self.loggers:
            logger.resume(loggers.read(self.log))
        hooks.sizes(self.steps, self.feed.batches.size)
        hooks.progress(self.step)
        every = self.settings.eval_every or self.per_epoch
        while self.step < self.steps:
            stopped, due = self.agree(hooks.stop(), time.monotonic() - saved > pause)
            by_steps = hooks.checkpoint_steps is not None and self.step > 0 and self.step % hooks.checkpoint_steps == 0
            if stopped or due or by_steps:
                saved = time.monotonic()
                self.save()
                cost, saved = time.monotonic() - saved, time.monotonic()
                pause = max(pause, min(COST * cost, LONGEST - cost)) if pause else 0.0  # 0 asks for one at every step
            if stopped:
                raise Interrupted(f"stopped at step {self.step} of {self.steps}")
            self.update()
            if self.step % every == 0 or self.step == self.steps:
                self.validate()
            hooks.progress(self.step)
        self.save()

    def agree(self, stop: bool, due: bool) -> tuple[bool, bool]:
        """With several processes: what the first one says, now and then, so that all do the same."""
        if self.fabric.world_size == 1:
            return stop, due
        if self.step % AGREE:
            return False, False
        said = self.fabric.broadcast([stop, due])
        return bool(said[0]), bool(said[1])

    def second_feed(self, unlabelled: Unlabelled | None, seed: int) -> Feed | None:
        """Batches of unlabelled examples, for a method that looks at them."""
        if not isinstance(self.method, StepMethod):
            return None
        if self.fabric.world_size > 1:
            raise UsageError(f"method {self.method.name!r} trains on one device, not on {self.fabric.world_size}")
        if unlabelled is None:
            return None
        size, again = unlabelled.batch_size, unlabelled.replacement
        return Feed(unlabelled.x, size, seed, self.fabric, self.pixels, stream="/unlabelled", replacement=again)

    def loss(self) -> Tensor:
        """The loss of the next batch."""
        if isinstance(self.method, StepMethod):
            with self.fabric.autocast():
                rows, x = self.feed.draw()
                more = None if self.unlabelled is None else self.unlabelled.draw()[1]
                batch = Batch(x, self.labels[rows], more, self.step, self.steps)
                return self.method.step(self.forward, self.criterion, batch)
        with self.fabric.autocast():  # a method may have a network of its own
            rows, x = self.feed.draw()
            x, y = self.transform(x, self.labels[rows])
        return self.method.loss(self.criterion, self.forward(x), y)

    def update(self) -> None:
        """One step of the optimiser."""
        if not self.model.training:
            self.model.train()
        if not self.losses:
            self.meter.begin()
        self.stepper.zero_grad()
        loss = self.loss()
        self.fabric.backward(loss)
        self.stepper.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.method.after_step()
        self.step += 1
        self.losses.append(loss.detach())
        if self.fabric.device.type == "cpu" or len(self.losses) >= LOOK:
            self.look()

    def look(self) -> None:
        """Read the losses since the last look.

        Raises:
            Diverged: One of them is no number; the step is named.
        """
        if not self.losses:
            return
        first = self.step - len(self.losses) + 1
        values = torch.stack(self.losses).tolist()
        self.meter.end(len(values))
        self.losses.clear()
        for step, value in enumerate(values, first):
            if not math.isfinite(value):
                raise self.diverged(f"the training loss is {value} at step {step}")
            self.loss_sum += value  # one after the other: the sum must not depend on when they are looked at
            self.loss_count += 1

    def diverged(self, what: str) -> Diverged:
        """The error, which says what is still there."""
        kept = storage.saved_step(self.checkpoint)
        there = "there is no checkpoint yet" if kept is None else f"the checkpoint of step {kept} is kept"
        return Diverged(f"the training diverged: {what} of {self.steps}; {there}; try a smaller train.lr")

    def validate(self) -> None:
        """Measure on the validation split, keep the weights if they are the best so far, write a line of the log."""
        self.look()
        self.last_line = {
            "step": self.step,
            "epoch": round(self.step / self.per_epoch, 4),
            "train_loss": self.loss_sum / self.loss_count,
            **self.method.logged(),
            "lr": self.schedule.get_last_lr()[0],
        }
        self.loss_sum, self.loss_count = 0.0, 0
        if len(self.validation):
            measured = self.evaluate() if self.fabric.is_global_zero else (0.0, 0.0)
            error, nll = self.fabric.broadcast(measured)  # every process chooses the same best weights
            if not math.isfinite(nll):
                raise self.diverged(f"the validation NLL is {nll} at step {self.step}")
            self.last_line |= {"validation_error": error, "validation_nll": nll}
            self.best.consider(self.step, error, nll, self.weights)
        if self.fabric.is_global_zero:
            storage.append(self.log, json.dumps(self.last_line) + "\n")
        for logger in self.loggers:
            logger.log(self.last_line)

    def evaluate(self) -> tuple[float, float]:
        """Error in percent and mean NLL in nats on the validation split, in the precision of the training."""
        prepare = None if self.pixels is None else self.pixels.normalise
        with self.fabric.autocast():
            logits = predicted_logits(self.measured, self.validation.x, prepare=prepare)
        y = self.validation.y.cpu()
        return 100 * (logits.argmax(1) != y).double().mean().item(), F.cross_entropy(logits, y).item()

    def weights(self) -> dict[str, Tensor]:
        """A copy of what is measured: the weights, their average, or the teacher's."""
        return {name: value.detach().clone() for name, value in self.measured.state_dict().items()}

    def save(self) -> None:
        """Write a checkpoint, unless what it would hold has diverged."""
        self.look()
        if not all(torch.stack([p.detach().abs().max() for p in self.model.parameters() if p.numel()]).isfinite()):
            raise self.diverged(f"a weight is no number after step {self.step}")
        now = time.monotonic()
        self.seconds, self.mark = self.seconds + now - self.mark, now
        own = gather(self.fabric, {"method": self.method.state_dict(), "torch": storage.torch_rng_state()})
        if not self.fabric.is_global_zero:
            return
        state = {
            "config_hash": self.config_hash,
            "step": self.step,
            "seconds": self.seconds,
            "loss": [self.loss_sum, self.loss_count],
            "last_line": self.last_line,
            **self.best.state_dict(),
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "companion": None if self.companion is None else self.companion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            **self.feed.state_dict(),
            "unlabelled": None if self.unlabelled is None else self.unlabelled.state_dict(),
            "own": own,
        }
        storage.save_state(self.checkpoint, state, self.step)

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one; else clear what an interrupted start has left."""
        state = storage.load_state(self.checkpoint)
        if state is not None:
            if state.get("config_hash") != self.config_hash:
                raise ConfigMismatch(f"{self.checkpoint} belongs to a run of another config; delete it to start again")
            if len(state.get("own", ())) != self.fabric.world_size:
                raise ConfigMismatch(
                    f"{self.checkpoint} was written by {len(state.get('own', ()))} processes, here are "
                    f"{self.fabric.world_size}; use as many, or delete it to start again"
                )
            try:
                self._restore(state)
            except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise CorruptedFile(
                    f"the checkpoint {self.checkpoint} does not fit the run ({reason}); delete it to start again"
                ) from error
        if self.fabric.is_global_zero:
            storage.trim_log(self.log, self.step)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for part, saved in ((self.average, state["average"]), (self.companion, state["companion"])):
            if part is not None:
                part.load_state_dict(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        lay_out_like_parameters(self.optimizer)
        self.schedule.load_state_dict(state["schedule"])
        self.feed.load_state_dict(state)
        if self.unlabelled is not None:
            self.unlabelled.load_state_dict(state["unlabelled"])
        own = state["own"][self.fabric.global_rank]
        self.method.load_state_dict(own["method"])
        storage.restore_torch_rng(own["torch"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.loss_sum, self.loss_count = state["loss"]
        self.best.load_state_dict(state)
        self.last_line = state["last_line"]

    def facts(self) -> dict[str, Any]:
        """What the record says about the training."""
        batches = self.feed.batches
        return {
            "steps": self.step,
            "examples": batches.examples,
            **({} if self.unlabelled is None else {"unlabelled": self.unlabelled.batches.examples}),
            "epochs": self.step * batches.size / batches.examples,
            "loss": self.last_line.get("train_loss"),
            **self.best.facts(),
            "processes": self.fabric.world_size,
            "seconds": round(self.seconds, 3),
            **self.meter.facts(),
            **self.method.facts(),
        }
