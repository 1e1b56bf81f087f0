"""Records sorted into experiments, methods and seeds. Nothing is dropped on the way without a note."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.measures.catalog import MAIN, OWN

__all__ = ["Experiment", "FailedRun", "Method", "RunRecord", "collect", "settings_of"]


class RunRecord(Protocol):
    """What the report reads of one finished run."""

    @property
    def experiment(self) -> str:
        """Name of the experiment."""

    @property
    def data(self) -> str:
        """Name of the data set."""

    @property
    def model(self) -> str:
        """Name of the network."""

    @property
    def method(self) -> str:
        """Name of the method."""

    @property
    def label(self) -> str:
        """What the method is called in tables."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Options of the method."""

    @property
    def seed(self) -> int:
        """Seed of the run."""

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """Measures of the last weights; None is a value that is no finite number."""

    @property
    def best(self) -> Mapping[str, float | None]:
        """Measures of the weights with the best validation score; may be empty."""

    @property
    def seconds(self) -> float:
        """How long the run took."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the packages."""

    @property
    def hardware(self) -> Mapping[str, Any]:
        """What it ran on."""

    @property
    def command(self) -> str:
        """The command line."""

    @property
    def folder(self) -> Path:
        """Where the run's files lie, ``pictures.safetensors`` among them if there are pictures."""


class FailedRun(Protocol):
    """What the report reads of a run that ended with an error."""

    @property
    def experiment(self) -> str:
        """Name of the experiment."""

    @property
    def label(self) -> str:
        """What the method is called in tables."""

    @property
    def seed(self) -> int:
        """Seed of the run."""

    @property
    def error(self) -> str:
        """One line."""


@dataclass
class Method:
    """The runs of one method with one set of options.

    Attributes:
        label: What it is called in tables, unique within the experiment.
        runs: Seed to record.
    """

    label: str
    runs: dict[int, RunRecord] = field(default_factory=dict)

    @property
    def record(self) -> RunRecord:
        """Any of its runs, for what they all share."""
        return next(iter(self.runs.values()))

    def values(self, name: str, *, best: bool = False) -> dict[int, float]:
        """Seed to value of one measure; NaN where it is no finite number, nothing where it was not measured."""
        found = {seed: (run.best if best else run.metrics) for seed, run in self.runs.items()}
        return {seed: _number(metrics[name]) for seed, metrics in found.items() if name in metrics}


@dataclass
class Experiment:
    """One table of the report: methods x seeds on one data set and one network.

    Attributes:
        name: Name of the experiment.
        data: Name of the data set.
        model: Name of the network.
        methods: In the order in which they were met; the others are compared with the first one.
        failures: Runs that ended with an error.
        repeated: How many records were superseded by a later one of the same method and seed.
    """

    name: str
    data: str
    model: str
    methods: list[Method] = field(default_factory=list)
    failures: list[FailedRun] = field(default_factory=list)
    repeated: int = 0

    @property
    def seeds(self) -> list[int]:
        """Every seed that any method has, or failed at."""
        return sorted({s for m in self.methods for s in m.runs} | {f.seed for f in self.failures})

    @property
    def runs(self) -> list[RunRecord]:
        """All runs, method by method."""
        return [run for method in self.methods for run in method.runs.values()]

    def measures(self, *, best: bool = False) -> tuple[list[str], list[str]]:
        """The names of the measures that the page is about, and those of all others, each in a fixed order."""
        found = dict.fromkeys(name for run in self.runs for name in (run.best if best else run.metrics))
        main = [name for name in (*OWN, *MAIN) if name in found]
        if "test_accuracy" in main and "test_error" in main:
            main.remove("test_error")  # the same number seen from the other side
        return main, sorted(name for name in found if name not in main)


def collect(records: Sequence[RunRecord], failures: Sequence[FailedRun] = ()) -> list[Experiment]:
    """Sort records into experiments.

    Runs of one label with different options, or trained with different settings, are different methods: they are told
    apart in their labels, never averaged. Of two records of one method and seed the later one counts, and the number of
    superseded ones is kept.

    Args:
        records: Finished runs, the method to compare with first.
        failures: Runs that ended with an error.

    Returns:
        The experiments in the order in which they were met.

    Raises:
        UsageError: There are no records.
    """
    if not records:
        raise UsageError("there is nothing to report: no finished run was found")
    experiments: dict[tuple[str, str, str], Experiment] = {}
    methods: dict[tuple[str, ...], Method] = {}
    for record in records:
        where = (record.experiment, record.data, record.model)
        experiment = experiments.setdefault(where, Experiment(*where))
        options = json.dumps([dict(record.options), settings_of(record)], sort_keys=True, default=str)
        key = (*where, record.label, record.method, options)
        if key not in methods:
            methods[key] = Method(record.label)
            experiment.methods.append(methods[key])
        experiment.repeated += record.seed in methods[key].runs
        methods[key].runs[record.seed] = record
    for experiment in experiments.values():
        _tell_apart(experiment.methods)
        experiment.failures = [failure for failure in failures if failure.experiment == experiment.name]
    return list(experiments.values())


def settings_of(record: RunRecord) -> dict[str, Any]:
    """How the run was trained, as ``name: value``; empty if its record does not say."""
    train = getattr(record, "train", None) or {}
    flat = {}
    for part in ("settings", "model_options"):
        for name, value in dict(train.get(part) or {}).items():
            flat[name if part == "settings" else f"network {name}"] = value
    return flat


def _tell_apart(methods: Sequence[Method]) -> None:
    labels = [method.label for method in methods]
    for method in methods:
        if labels.count(method.label) > 1:
            options = ", ".join(f"{name}={value}" for name, value in method.record.options.items())
            method.label = f"{method.label} ({method.record.method}{': ' + options if options else ''})"
    seen: dict[str, int] = {}
    for method in methods:
        seen[method.label] = seen.get(method.label, 0) + 1
        if seen[method.label] > 1:
            method.label = f"{method.label}, other settings {seen[method.label] - 1}"


def _number(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else float(value)
