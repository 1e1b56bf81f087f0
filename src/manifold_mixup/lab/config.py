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

__all__ = ["Component", "ExperimentConfig", "MethodConfig", "PlannedRun", "RunConfig", "TrainConfig", "slug"]


def _full_batch(value: Any) -> Any:
    return 0 if value == "full" else value


class TrainConfig(Options):
    """How every method of an experiment is trained."""

    steps: int = Field(default=2000, ge=1, description="optimiser updates")
    batch_size: Annotated[int, BeforeValidator(_full_batch)] = Field(
        default=100, ge=0, description="examples per batch; 0 or 'full' is the whole training set"
    )
    optimizer: Literal["adam", "sgd"] = Field(default="adam", description="adam or sgd")
    lr: float = Field(default=1e-3, gt=0, description="learning rate")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="momentum of sgd")
    nesterov: bool = Field(default=False, description="Nesterov's form of the momentum of sgd")
    schedule: Literal["constant", "cosine"] = Field(default="constant", description="of the learning rate")
    weight_decay: float = Field(default=0.0, ge=0, description="factor of the L2 penalty")
    eval_every: int = Field(default=100, ge=1, description="steps between two looks at the validation split")
    precision: Literal["32-true", "bf16-mixed"] = Field(default="32-true", description="of the training steps")

    @model_validator(mode="after")
    def _no_ignored_key(self) -> TrainConfig:
        if self.optimizer != "sgd" and (self.momentum or self.nesterov):
            raise ValueError("momentum and nesterov are read by optimizer 'sgd' only")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class Component(Options):
    """A name in a registry with its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class MethodConfig(Component):
    """A method, its options and the label it carries in tables and folders."""

    label: str = Field(min_length=1)


class RunConfig(Options):
    """All that determines the numbers of one run."""

    data: Component
    model: Component
    train: TrainConfig
    method: Component
    seed: int = Field(ge=0)

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits; equal for equal settings, whatever they were called."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
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
    data: Component
    model: Component
    train: TrainConfig = TrainConfig()
    methods: list[MethodConfig] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)

    def runs(self) -> Iterator[PlannedRun]:
        """Every run, seed by seed, so that an interrupted experiment has all methods at the seeds it reached."""
        for seed in self.seeds:
            for method in self.methods:
                component = Component(name=method.name, options=method.options)
                run = RunConfig(data=self.data, model=self.model, train=self.train, method=component, seed=seed)
                yield PlannedRun(self.name, method.label, run)


def slug(label: str) -> str:
    """A label as the name of a folder; labels with equal slugs are refused."""
    return re.sub(r"[^\w.=+-]+", "-", label.lower()).strip("-.")
