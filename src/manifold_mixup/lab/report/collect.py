"""Runs sorted into experiments, methods and seeds. Nothing is dropped on the way without a note."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt

from manifold_mixup.lab.config import slug
from manifold_mixup.lab.errors import CorruptedFile, StorageError, UsageError
from manifold_mixup.lab.measures.catalog import MAIN, OWN
from manifold_mixup.lab.records import Failure, Record
from manifold_mixup.lab.results import Result

__all__ = ["Arrays", "Experiment", "Going", "Method", "Run", "collect", "read_arrays", "read_log", "settings_of"]

Arrays = dict[str, npt.NDArray[Any]]


def read_arrays(folder: Path, kind: str) -> Arrays | None:
    """The arrays of one kind that a run has kept, ``FOLDER/<kind>.safetensors``; None if it kept none.

    Raises:
        CorruptedFile: The file is damaged.
        StorageError: It cannot be read.
    """
    import safetensors.numpy

    if folder == Path():  # a run that was read from lines of JSON has no folder
        return None
    path = folder / f"{kind}.safetensors"
    try:
        found: Arrays = safetensors.numpy.load(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(path, error, "read") from error
    except safetensors.SafetensorError as error:
        raise CorruptedFile(f"{path} is corrupted: {error}") from error
    return found


def read_log(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """The lines of a run's log; a line that is being written, or is damaged, ends them."""
    if folder == Path():
        return ()
    try:
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ()
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict):
            break
        found.append(entry)
    return tuple(found)


@dataclass(frozen=True)
class Run:
    """One finished run with all that was kept of it; files are read when they are asked for."""

    result: Result

    @property
    def record(self) -> Record:
        """Its record."""
        return self.result.record

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.result.record.seed

    @property
    def folder(self) -> Path:
        """Where its files lie; the empty path if it was read from lines of JSON."""
        return self.result.record.folder

    @cached_property
    def metrics(self) -> Mapping[str, float | None]:
        """Measures of the last weights, those of later evaluations among them; None is no finite number."""
        return {**self.result.measured, **self.result.record.metrics}

    @cached_property
    def log(self) -> tuple[Mapping[str, Any], ...]:
        """One mapping for each look at the validation split: step, epoch, train_loss, lr, validation_error, ..."""
        return read_log(self.folder)

    def arrays(self, kind: str) -> Arrays | None:
        """The arrays of one kind, such as ``"details"``, or None; raises as :func:`read_arrays`."""
        return read_arrays(self.folder, kind)


@dataclass(frozen=True)
class Going:
    """One run that is not finished.

    Attributes:
        experiment: Name of the experiment.
        data: Name of the data set.
        model: Name of the network.
        label: What its method is called in tables.
        seed: Its seed.
        running: Whether a process is at work on it, as far as its folder knows.
        step: Steps it has made, as far as its log and its checkpoint know.
        steps: All steps; None if that depends on the data.
        log: As :attr:`Run.log`.
        task: Name of what is learned.
    """

    experiment: str
    data: str
    model: str
    label: str
    seed: int
    running: bool = False
    step: int = 0
    steps: int | None = None
    log: tuple[Mapping[str, Any], ...] = ()
    task: str = "classification"


@dataclass
class Method:
    """The runs of one method with one set of options.

    Attributes:
        label: What it is called in tables, unique within the experiment.
        index: Its place among the experiment's methods, from 0; it decides its colour.
        runs: Seed to run.
        going: Its runs that are not finished.
    """

    label: str
    index: int = 0
    runs: dict[int, Run] = field(default_factory=dict)
    going: list[Going] = field(default_factory=list)

    @property
    def record(self) -> Record:
        """The record of its first run, for what they all share."""
        return next(iter(self.runs.values())).record

    def values(self, name: str, *, best: bool = False) -> dict[int, float]:
        """Seed to value of one measure; NaN where it is no finite number, nothing where it was not measured."""
        found = {seed: (run.record.best if best else run.metrics) for seed, run in self.runs.items()}
        return {seed: _number(metrics[name]) for seed, metrics in found.items() if name in metrics}

    def logs(self) -> dict[int, tuple[Mapping[str, Any], ...]]:
        """Seed to log of every run that has one, the unfinished ones among them."""
        found = {going.seed: going.log for going in self.going} | {seed: run.log for seed, run in self.runs.items()}
        return {seed: log for seed, log in sorted(found.items()) if log}


@dataclass
class Experiment:
    """One table of the report: methods x seeds on one data set and one network.

    Attributes:
        name: Name of the experiment.
        data: Name of the data set.
        model: Name of the network.
        methods: Those with a finished run, in order; the others are compared with the first one.
        waiting: Methods of which no run is finished yet.
        failures: Runs that ended with an error.
        repeated: How many records were superseded by a later one of the same method and seed.
        planned: The seeds that were planned, if that is known.
    """

    name: str
    data: str
    model: str
    methods: list[Method] = field(default_factory=list)
    waiting: list[Method] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    repeated: int = 0
    planned: tuple[int, ...] = ()

    @property
    def seeds(self) -> list[int]:
        """Every seed that was planned, or that any method has, works on, or failed at."""
        met = {seed for method in self.methods for seed in method.runs} | {f.seed for f in self.failures}
        return sorted(met | {going.seed for going in self.going} | set(self.planned))

    @property
    def runs(self) -> list[Run]:
        """All finished runs, method by method."""
        return [run for method in self.methods for run in method.runs.values()]

    @property
    def going(self) -> list[Going]:
        """All unfinished runs."""
        return [going for method in (*self.methods, *self.waiting) for going in method.going]

    @property
    def tasks(self) -> set[str]:
        """Names of what is learned: one, unless runs of several tasks share a name, a data set and a network."""
        return {run.record.task for run in self.runs} | {going.task for going in self.going}

    def measures(self, *, best: bool = False) -> tuple[list[str], list[str]]:
        """The names of the measures that the page is about, and those of all others, each in a fixed order."""
        found = dict.fromkeys(name for run in self.runs for name in (run.record.best if best else run.metrics))
        main = [name for name in (*OWN, *MAIN) if name in found]
        if "test_accuracy" in main and "test_error" in main:
            main.remove("test_error")  # the same number seen from the other side
        return main, sorted(name for name in found if name not in main)


def collect(
    results: Sequence[Result],
    failures: Sequence[Failure] = (),
    going: Sequence[Going] = (),
    planned: Mapping[str, tuple[int, ...]] | None = None,
) -> list[Experiment]:
    """Sort runs into experiments.

    Runs of one label with different options, or trained with different settings, are different methods: they are told
    apart in their labels, never averaged. Of two records of one method and seed the later one counts, and the number of
    superseded ones is kept.

    Args:
        results: Finished runs, the method to compare with first.
        failures: Runs that ended with an error.
        going: Runs that are not finished.
        planned: The seeds that were planned for each experiment, where that is known.

    Returns:
        The experiments in the order in which they were met.

    Raises:
        UsageError: There are no runs at all.
    """
    if not results and not going and not failures:
        raise UsageError("there is nothing to report: no run was found")
    experiments: dict[tuple[str, str, str], Experiment] = {}
    methods: dict[tuple[str, ...], Method] = {}
    for result in results:
        record = result.record
        where = (record.experiment, record.data, record.model)
        experiment = experiments.setdefault(where, Experiment(*where))
        options = json.dumps([dict(record.options), settings_of(record)], sort_keys=True, default=str)
        key = (*where, record.label, record.method, options)
        if key not in methods:
            methods[key] = Method(record.label, len(experiment.methods))
            experiment.methods.append(methods[key])
        experiment.repeated += record.seed in methods[key].runs
        methods[key].runs[record.seed] = Run(result)
    for run in going:
        where = (run.experiment, run.data, run.model)
        _add_going(experiments.setdefault(where, Experiment(*where)), run)
    for experiment in experiments.values():
        _tell_apart(experiment.methods)
        experiment.failures = [failure for failure in failures if failure.experiment == experiment.name]
        experiment.planned = (planned or {}).get(experiment.name, ())
    return list(experiments.values())


def _add_going(experiment: Experiment, run: Going) -> None:
    """Put an unfinished run to the finished ones of its method; of the label its folder may know a slug only."""
    for method in (*experiment.methods, *experiment.waiting):
        if slug(method.record.label if method.runs else method.label) == slug(run.label):
            method.going.append(run)
            return
    index = len(experiment.methods) + len(experiment.waiting)
    experiment.waiting.append(Method(run.label, index, going=[run]))


def settings_of(record: Record) -> dict[str, Any]:
    """How the run was trained, as ``name: value``; empty if its record does not say."""
    flat = {}
    for part in ("settings", "model_options"):
        for name, value in dict(record.train.get(part) or {}).items():
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
