"""One experiment: data x network x training x methods x seeds. Recipes are TOML files of it.

These classes state what can be set; :mod:`~manifold_mixup.lab.parsing` fills them from outside and checks that the
parts fit.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from manifold_mixup.lab.options import Options

__all__ = [
    "CLASSIFICATION",
    "Component",
    "ExperimentConfig",
    "MethodConfig",
    "PlannedRun",
    "RunConfig",
    "TrainConfig",
    "slug",
]


def _full_batch(value: Any) -> Any:
    return 0 if value == "full" else value


def _each_epoch(value: Any) -> Any:
    return 0 if value == "epoch" else value


class TrainConfig(Options):
    """How every method of an experiment is trained.

    The length is ``steps`` or ``epochs``; with neither it is 2,000 steps.
    """

    steps: int | None = Field(default=None, ge=1, description="optimiser updates; 2000 if epochs is unset too")
    epochs: int | None = Field(default=None, ge=1, description="passes over the training data, in place of steps")
    batch_size: Annotated[int, BeforeValidator(_full_batch)] = Field(
        default=100, ge=0, description="examples per batch over all devices; 0 or 'full' is the whole training set"
    )
    loss: Literal["cross-entropy", "bce-softmax"] = Field(
        default="cross-entropy",
        description="cross-entropy, or bce-softmax: binary cross-entropy of the softmax, as in the authors' code",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="share of each target that is spread over all classes"
    )
    optimizer: Literal["adam", "sgd"] = Field(default="adam", description="adam or sgd")
    lr: float = Field(default=1e-3, gt=0, description="learning rate, at its highest")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="momentum of sgd")
    nesterov: bool = Field(default=False, description="Nesterov's form of the momentum of sgd")
    schedule: Literal["constant", "cosine", "step", "one-cycle"] = Field(
        default="constant", description="of the learning rate"
    )
    milestones: list[int] = Field(
        default_factory=list,
        description="schedule 'step': when the rate falls, in epochs if epochs is set, else in steps",
    )
    gamma: float | None = Field(
        default=None, gt=0, lt=1, description="schedule 'step': factor of the rate at each milestone, 0.1 if unset"
    )
    warmup: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="schedule 'one-cycle': share of the steps in which the rate rises, 0.3 if unset",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="factor of the L2 penalty")
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay of a moving average of the weights, which is then what is measured; unset: none",
    )
    eval_every: Annotated[int, BeforeValidator(_each_epoch)] = Field(
        default=0, ge=0, description="steps between two looks at the validation split; 0 or 'epoch': once per epoch"
    )
    precision: Literal["32-true", "bf16-mixed"] = Field(default="32-true", description="of the training steps")
    compile: bool = Field(default=False, description="compile the network with torch.compile")
    threads: int = Field(
        default=1,
        ge=0,
        description="CPU threads of one run, 0 is all cores; sums of another number of threads have other bits",
    )

    @model_validator(mode="before")
    @classmethod
    def _length(cls, values: Any) -> Any:
        """Steps by default, so that a resolved config always says its length."""
        if isinstance(values, dict) and values.get("steps") is None and values.get("epochs") is None:
            return {**values, "steps": 2000}
        return values

    @model_validator(mode="after")
    def _no_ignored_key(self) -> TrainConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are two ways to say the length: give one of them")
        if self.optimizer != "sgd" and (self.momentum or self.nesterov):
            raise ValueError("momentum and nesterov are read by optimizer 'sgd' only")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if self.schedule != "one-cycle" and self.warmup is not None:
            raise ValueError("warmup is read by schedule 'one-cycle' only")
        if self.schedule != "step" and (self.milestones or self.gamma is not None):
            raise ValueError("milestones and gamma are read by schedule 'step' only")
        length = self.epochs or self.steps or 0
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule 'step' needs milestones, such as [400, 800]")
        if sorted(set(self.milestones)) != self.milestones or any(not 0 < m < length for m in self.milestones):
            unit = "epochs" if self.epochs else "steps"
            raise ValueError(f"milestones have to rise and lie between 0 and the {length} {unit}")
        return self

    def total_steps(self, examples: int) -> int:
        """Optimiser updates on a training split of this size; an incomplete last batch of an epoch is left out."""
        return self.steps if self.steps is not None else (self.epochs or 0) * self.steps_per_epoch(examples)

    def steps_per_epoch(self, examples: int) -> int:
        """Whole batches in a pass over the training data, at least 1."""
        return max(1, examples // (self.batch_size or examples))


class Component(Options):
    """A name in a registry with its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class MethodConfig(Component):
    """A method, its options and the label it carries in tables and folders."""

    label: str = Field(min_length=1)


CLASSIFICATION = Component(name="classification")


class RunConfig(Options):
    """All that determines the numbers of one run."""

    task: Component = CLASSIFICATION
    data: Component
    model: Component
    train: TrainConfig
    method: Component
    seed: int = Field(ge=0)

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits; equal for equal settings, whatever they were called.

        The supervised task is left out: a run keeps the hash that it had when there was no other.
        """
        settings = self.model_dump(mode="json", exclude={"task"} if self.task == CLASSIFICATION else None)
        text = json.dumps(settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PlannedRun:
    """One run of an experiment: where it belongs, and its settings."""

    experiment: str
    label: str
    config: RunConfig


class ExperimentConfig(Options):
    """One experiment."""

    name: str = Field(pattern=r"^[\w][\w.-]*$", description="names the folder of the runs")
    description: str = Field(default="", description="one or two sentences for the report")
    task: Component = CLASSIFICATION
    data: Component
    model: Component
    train: TrainConfig = TrainConfig()
    methods: list[MethodConfig] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    measures: list[str] = Field(
        default_factory=list,
        description="what finished runs are measured with beside what is in every record, as on the command line",
    )

    def runs(self) -> Iterator[PlannedRun]:
        """Every run, seed by seed, so that an interrupted experiment has all methods at the seeds it reached."""
        for seed in self.seeds:
            for method in self.methods:
                component = Component(name=method.name, options=method.options)
                run = RunConfig(
                    task=self.task, data=self.data, model=self.model, train=self.train, method=component, seed=seed
                )
                yield PlannedRun(self.name, method.label, run)


def slug(label: str) -> str:
    """A label as the name of a folder; labels with equal slugs are refused."""
    return re.sub(r"[^\w.=+-]+", "-", label.lower()).strip("-.")
