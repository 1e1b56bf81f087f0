"""Finished runs with everything that was measured on them, from the folders of runs or from lines of JSON.

Lines are what is committed: one run each, its record and its later evaluations together, without anything that belongs
to a machine's disk.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from manifold_mixup.lab import storage
from manifold_mixup.lab.errors import CorruptedFile, StorageError
from manifold_mixup.lab.records import EVALUATIONS, Record, find_records

__all__ = [
    "Result",
    "Weights",
    "by_seed",
    "measured_with",
    "public_command",
    "read_folder",
    "read_lines",
    "write_lines",
]

Weights = Literal["last", "best"]
"""The last weights of a run, or those that did best on its validation split."""

_NUMBERS = TypeAdapter(dict[str, float | None])
_MEASURES = TypeAdapter(dict[str, dict[str, Any]])


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        record: Its record.
        measured: Numbers of later evaluations of the last weights on the run's own data, by name.
        measures: The measures that gave them, with their options.
    """

    record: Record
    measured: Mapping[str, float | None]
    measures: Mapping[str, Mapping[str, Any]]

    def value(self, name: str, weights: Weights = "last") -> float | None:
        """A number of the last or the best weights; NaN if it was not finite, None if it was never measured."""
        for numbers in (self.record.metrics, self.measured) if weights == "last" else (self.record.best,):
            if name in numbers:
                value = numbers[name]
                return math.nan if value is None else value
        return None


def by_seed(results: Iterable[Result], label: str, metric: str, weights: Weights = "last") -> dict[int, float]:
    """Seed to number of one method."""
    found = {r.record.seed: r.value(metric, weights) for r in results if r.record.label == label}
    return {seed: value for seed, value in sorted(found.items()) if value is not None}


def measured_with(folder: Path, data: str) -> tuple[dict[str, float | None], dict[str, dict[str, Any]]]:
    """Numbers and measures of the evaluations of a run's last weights on its own data; of several, the latest count.

    Args:
        folder: The run's folder.
        data: Name of its data set.

    Raises:
        CorruptedFile: A line is no evaluation.
    """
    numbers: dict[str, float | None] = {}
    measures: dict[str, dict[str, Any]] = {}
    path = folder / EVALUATIONS
    if not path.exists():
        return numbers, measures
    for line in _lines(path):
        try:
            if line["weights"] == "last" and line["data"] == data:
                numbers |= _NUMBERS.validate_python(line["metrics"])
                measures |= _MEASURES.validate_python(line["measures"])
        except (KeyError, TypeError, ValidationError) as error:
            raise CorruptedFile(f"{path} is corrupted: a line is no evaluation") from error
    return numbers, measures


def read_folder(runs: Path, experiment: str) -> list[Result]:
    """All finished runs of an experiment.

    Raises:
        CorruptedFile: A record or an evaluation is damaged.
    """
    return [Result(record, *measured_with(record.folder, record.data)) for record in find_records(runs / experiment)]


def read_lines(path: Path) -> list[Result]:
    """Runs that :func:`write_lines` has written.

    Raises:
        CorruptedFile: A line is no run.
    """
    found = []
    for line in _lines(path):
        try:
            measured = _NUMBERS.validate_python(line.pop("measured", {}))
            measures = _MEASURES.validate_python(line.pop("measures", {}))
            found.append(Result(Record.model_validate(line), measured, measures))
        except (ValidationError, AttributeError, TypeError) as error:
            raise CorruptedFile(f"{path} holds a line that is no record of a run") from error
    return found


def write_lines(results: Sequence[Result], path: Path) -> None:
    """Write runs as lines of JSON, in the order given."""
    lines = []
    for result in results:
        line = result.record.model_dump(mode="json", by_alias=True)
        line["command"] = public_command(result.record.command)
        if result.measured:
            line |= {"measured": dict(result.measured), "measures": {k: dict(v) for k, v in result.measures.items()}}
        lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    storage.write_atomically(path, "".join(lines).encode())


PLACES = {"--runs": "RUNS", "--data-dir": "DIR"}


def public_command(command: str) -> str:
    """A command line without the places of one machine: their values become the name of the option in capitals.

    >>> public_command("manifold-mixup compare --recipe digits --data-dir /home/me/data")
    'manifold-mixup compare --recipe digits --data-dir DIR'
    """
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that is never closed: no command line, but it may hold places all the same
        words = command.split()
    for i, word in enumerate(words):
        option, equals, _ = word.partition("=")
        if option in PLACES and equals:
            words[i] = f"{option}={PLACES[option]}"
        elif option in PLACES and i + 1 < len(words):
            words[i + 1] = PLACES[option]
    return shlex.join(words)


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorruptedFile(f"{path} is corrupted: it is no UTF-8") from error
    except OSError as error:
        raise StorageError(path, error, "read") from error
    try:
        return [json.loads(line) for line in text.splitlines()]
    except ValueError as error:
        raise CorruptedFile(f"{path} is corrupted: a line is no JSON") from error
