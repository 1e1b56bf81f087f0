"""What the report reads: folders of runs, finished or not, and files with lines of records."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from manifold_mixup.lab import storage
from manifold_mixup.lab.config import ExperimentConfig, RunConfig, slug
from manifold_mixup.lab.errors import LabError, UsageError
from manifold_mixup.lab.plan_file import Plan, read_plan
from manifold_mixup.lab.records import Failure, RunFolder, read_record
from manifold_mixup.lab.report.collect import Going, read_log
from manifold_mixup.lab.results import Result, measured_with, read_lines

__all__ = ["Sources", "gather", "is_running", "planned_runs"]


@dataclass
class Sources:
    """Everything that a page is made of.

    Attributes:
        results: Finished runs, the method to compare with first.
        failures: Runs that ended with an error, or whose files are damaged.
        going: Runs that are not finished.
        planned: The seeds that were planned for an experiment, by its name.
        descriptions: What an experiment is about, by its name.
    """

    results: list[Result] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    going: list[Going] = field(default_factory=list)
    planned: dict[str, tuple[int, ...]] = field(default_factory=dict)
    descriptions: dict[str, str] = field(default_factory=dict)


def gather(paths: Sequence[Path], baseline: str | None = None) -> Sources:
    """All runs at or below some folders, and those of files with lines of records.

    The methods of an experiment come in the order in which it was planned; where that is not known, plain training
    comes first and the others by name.

    Args:
        paths: Folders of runs, of experiments or of one run; or files ending in ``.jsonl``.
        baseline: Label of the method that the others are compared with; None takes the first one.

    Raises:
        UsageError: A path is not there, there is nothing below it, or no method is called ``baseline``.
        CorruptedFile: A file of lines holds one that is no run.
    """
    found = Sources()
    plans: dict[str, Plan] = {}
    seen: set[Path] = set()
    for path in paths:
        if path.is_file() and path.suffix == ".jsonl":
            found.results += read_lines(path)
        elif path.is_dir():
            folders = sorted(config.parent for config in path.rglob("config.json"))
            if not folders:
                raise UsageError(f"{path} holds no run: a run is a folder with config.json, as compare and train write")
            for folder in folders:
                if (there := folder.resolve()) not in seen:  # paths may overlap
                    seen.add(there)
                    _read(folder, found, plans)
        else:
            raise UsageError(f"{path} is neither a folder of runs nor a .jsonl file with records")
    for plan in plans.values():
        found.planned[plan.name] = tuple(plan.seeds)
        found.descriptions[plan.name] = plan.description
    labels = {result.record.label for result in found.results} | {going.label for going in found.going}
    if baseline is not None and baseline not in labels:
        raise UsageError(f"no method is called {baseline!r}; there is {', '.join(sorted(labels))}")
    _order(found, {name: list(plan.methods) for name, plan in plans.items()}, baseline)
    return found


def planned_runs(configs: Sequence[ExperimentConfig], runs: Path) -> Sources:
    """The runs of some experiments, as far as they have come; nothing else that may lie in their folders.

    Args:
        configs: The experiments.
        runs: The folder of all runs.
    """
    found = Sources()
    for config in configs:
        found.planned[config.name] = tuple(config.seeds)
        found.descriptions[config.name] = config.description
        for run in config.runs():
            folder = RunFolder(runs, run).path
            _read_run(folder, run.experiment, run.label, run.config, found)
    _order(found, {config.name: [method.label for method in config.methods] for config in configs}, None)
    return found


def _read(folder: Path, found: Sources, plans: dict[str, Plan]) -> None:
    """One run of whose plan nothing is known but what lies beside it."""
    there = folder.resolve()  # "." has no name
    home, method = there.parent.parent, there.parent.name
    experiment = home.name
    plan = plans.get(experiment)
    if plan is None and (plan := read_plan(home)) is not None:
        plans[experiment] = plan
    labels = {slug(label): label for label in plan.methods} if plan is not None else {}
    label = labels.get(method, method)
    try:
        config = RunConfig.model_validate(storage.read_json(folder / "config.json")["config"])
    except (LabError, ValidationError, KeyError, TypeError) as error:
        reason = f"{folder / 'config.json'} is no configuration of a run that this version reads ({_line(error)})"
        found.failures.append(Failure(experiment, label, _seed(folder), reason))
        return
    _read_run(folder, experiment, label, config, found)


def _read_run(folder: Path, experiment: str, label: str, config: RunConfig, found: Sources) -> None:
    """Sort one run by what its folder holds: a damaged file is a failure that the page names, not the page's end."""
    try:
        if (folder / "record.json").exists():
            record = read_record(folder / "record.json")
            found.results.append(Result(record, *measured_with(folder, record.data)))
            return
    except LabError as error:
        found.failures.append(Failure(experiment, label, config.seed, _line(error)))
        return
    running = is_running(folder / ".lock-owner")
    if not running and (failure := _failure(folder / "failure.json")) is not None:
        found.failures.append(Failure(experiment, label, config.seed, failure))
        return
    log = read_log(folder)
    last = log[-1].get("step") if log else None
    step = last if isinstance(last, int) else 0
    with contextlib.suppress(LabError, OSError, ValueError):
        step = max(step, storage.saved_step(folder / "checkpoint") or 0)
    found.going.append(
        Going(
            experiment,
            config.data.name,
            config.model.name,
            label,
            config.seed,
            running=running,
            step=step,
            steps=_steps(config),
            log=log,
            task=config.task.name,
        )
    )


def _steps(config: RunConfig) -> int | None:
    """All steps of a run, where that does not depend on the data: an epoch of full batches is one step."""
    return config.train.epochs if config.train.batch_size == 0 and config.train.epochs else config.train.steps


def is_running(owner: Path) -> bool:
    """Whether the process that a folder names as its owner is alive; of another machine's it is believed.

    The lock itself is not tried: whoever tries it holds it for a moment, and a run that starts then would be refused.
    """
    try:
        _, pid, _, host = owner.read_text(encoding="utf-8").split(maxsplit=3)
    except (OSError, ValueError):
        return False
    if host.strip() != socket.gethostname() or not pid.isdecimal():
        return True
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):  # no system counts that far
        return False
    except OSError:  # it is there, and somebody else's
        return True
    return True


def _failure(path: Path) -> str | None:
    """What a failed run's note says, or None if there is none."""
    try:
        saved: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return str(saved["error"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return "it failed, and the note that says why is damaged"


def _seed(folder: Path) -> int:
    number = folder.resolve().name.removeprefix("seed-")
    return int(number) if number.isdecimal() else 0


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _order(found: Sources, labels: Mapping[str, Sequence[str]], baseline: str | None) -> None:
    """Sort by experiment, method and seed; experiments as they were met."""
    experiments = list(dict.fromkeys(_names(found)))

    def key(experiment: str, label: str, method: str, seed: int) -> tuple[Any, ...]:
        known = list(labels.get(experiment, ()))
        place = known.index(label) if label in known else len(known)
        return experiments.index(experiment), label != baseline, place, method != "none", label, seed

    found.results.sort(key=lambda r: key(r.record.experiment, r.record.label, r.record.method, r.record.seed))
    found.going.sort(key=lambda g: key(g.experiment, g.label, g.label, g.seed))


def _names(found: Sources) -> Iterable[str]:
    yield from (result.record.experiment for result in found.results)
    yield from (going.experiment for going in found.going)
