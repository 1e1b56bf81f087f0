"""What an experiment was meant to be: ``RUNS/<experiment>/experiment.json``, written before its first run begins.

A report of runs that go on, or of which some failed, reads there which runs there are to be. Runs are not bound to it:
what is damaged in it, or is not ours, is replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from manifold_mixup.lab import storage
from manifold_mixup.lab.config import ExperimentConfig
from manifold_mixup.lab.errors import StorageError

__all__ = ["PLAN", "Plan", "note_plan", "note_plans", "read_plan", "write_plan"]

PLAN = "experiment.json"


@dataclass(frozen=True)
class Plan:
    """The runs of an experiment that were asked for so far.

    Attributes:
        name: Name of the experiment.
        description: One or two sentences.
        data: Name of the data set.
        model: Name of the network.
        methods: Labels of the methods, in the order in which they are shown.
        seeds: Seeds, ascending.
        command: The command that asked for them last.
        date: When it did, in UTC.
    """

    name: str
    description: str
    data: str
    model: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    command: str
    date: str

    def over(self, earlier: Plan) -> Plan:
        """This plan with what an earlier one asked for: its other methods after this one's, and its seeds."""
        methods = (*self.methods, *(label for label in earlier.methods if label not in self.methods))
        return replace(self, methods=methods, seeds=tuple(sorted({*self.seeds, *earlier.seeds})))


_ADAPTER = TypeAdapter(Plan)


def read_plan(folder: Path) -> Plan | None:
    """The plan in the folder of an experiment; None if there is none that can be read."""
    try:
        return _ADAPTER.validate_json((folder / PLAN).read_bytes(), strict=True)
    except (OSError, ValidationError):
        return None


def write_plan(folder: Path, plan: Plan) -> None:
    """Write a plan into the folder of an experiment, which is made if need be; readers see the old one or the new one.

    Raises:
        StorageError: The folder cannot be written.
    """
    storage.make_folder(folder)
    storage.write_json(folder / PLAN, asdict(plan))


def note_plan(runs: Path, config: ExperimentConfig, command: str) -> None:
    """Write down what an experiment asks for, beside what was asked for before; if that is nothing new, write nothing.

    Args:
        runs: Folder of all experiments.
        config: The experiment.
        command: The command line.

    Raises:
        StorageError: The folder cannot be written.
    """
    folder = runs / config.name
    plan = Plan(
        name=config.name,
        description=config.description,
        data=config.data.name,
        model=config.model.name,
        methods=tuple(method.label for method in config.methods),
        seeds=tuple(sorted(config.seeds)),
        command=command,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    earlier = read_plan(folder)
    if earlier is not None:
        plan = plan.over(earlier)
        if plan == replace(earlier, command=plan.command, date=plan.date):
            return
    write_plan(folder, plan)


def note_plans(runs: Path, configs: Sequence[ExperimentConfig], command: str, *, needed: bool) -> None:
    """Write down what several experiments ask for.

    Args:
        runs: Folder of all experiments.
        configs: The experiments.
        command: The command line.
        needed: Whether a folder that cannot be written is an error.

    Raises:
        StorageError: A folder cannot be written, and it is needed.
    """
    for config in configs:
        try:
            note_plan(runs, config, command)
        except StorageError:
            if needed:
                raise
