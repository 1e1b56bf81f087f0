"""What a run leaves on disk, and reading it back.

``RUNS/<experiment>/<label>/seed-<k>/`` holds

* ``config.json``: the settings and their hash; written first, so that a folder belongs to one configuration for good;
* ``log.jsonl``: one line per look at the validation split;
* ``log.csv``, ``tensorboard/``: the same lines, for whoever asked for them with ``--logger``;
* ``checkpoint/``: from which an interrupted run goes on;
* ``model.safetensors``, ``best.safetensors``: the last weights, and those that were best on validation data;
* ``data.json``: what the network reads: shape, classes, normalisation;
* ``evaluations.jsonl``: what ``manifold-mixup evaluate`` has measured, one line each time;
* ``.lock``: held by the process that is at work on the run;
* ``pictures.safetensors``: the arrays of the spiral's pictures;
* ``details.safetensors``: what the report draws of the last weights on test data: ``lab/measures/details.py``;
* ``<measure>.safetensors``: the arrays of a measure that ``evaluate`` took last on the last weights;
* ``record.json``: the results; written last and atomically, so its presence means that the run is finished;
* ``failure.json`` instead, if the run failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from manifold_mixup.lab import storage
from manifold_mixup.lab.config import PlannedRun, slug
from manifold_mixup.lab.data.base import DataInfo
from manifold_mixup.lab.errors import ConfigMismatch, CorruptedFile, FolderBusy, StorageError

__all__ = ["EVALUATIONS", "Failure", "Record", "RunFolder", "find_records"]

SCHEMA = 1
EVALUATIONS = "evaluations.jsonl"


class Record(BaseModel):
    """One finished run.

    ``metrics`` are those of the last weights, ``best`` those of the weights that did best on the validation split
    (``train["best_by"]`` says in what), under the same names; without a validation split ``best`` is empty. Errors,
    accuracies and calibration errors are percentages, likelihoods are nats.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=())

    schema_version: Literal[1] = Field(default=1, alias="schema")
    experiment: str
    task: str = "classification"
    data: str
    model: str
    method: str
    label: str
    options: dict[str, Any]
    seed: int
    metrics: dict[str, float | None]
    best: dict[str, float | None]
    train: dict[str, Any]
    config_hash: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    seconds: float
    command: str
    date: str
    folder: Path = Field(default=Path(), exclude=True)

    def pictures(self) -> dict[str, Tensor]:
        """The arrays that the report draws; empty if the data set has none.

        Raises:
            CorruptedFile: The file is damaged.
        """
        path = self.folder / "pictures.safetensors"
        return storage.read_tensors(path) if path.exists() else {}

    def summary(self) -> dict[str, Any]:
        """The part that ``--json`` prints."""
        names = (
            "experiment",
            "task",
            "data",
            "model",
            "method",
            "label",
            "options",
            "seed",
            "metrics",
            "best",
            "config_hash",
            "seconds",
        )
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Failure:
    """One run that ended with an error.

    Attributes:
        experiment: Name of the experiment.
        label: Label of the method.
        seed: Seed of the run.
        error: One line.
        traceback: For whoever looks into it.
    """

    experiment: str
    label: str
    seed: int
    error: str
    traceback: str = ""


class RunFolder:
    """The folder of one run.

    Args:
        runs: Where all experiments lie.
        run: The run.
    """

    def __init__(self, runs: Path, run: PlannedRun) -> None:
        self.run = run
        self.path = runs / run.experiment / slug(run.label) / f"seed-{run.config.seed}"
        self.checkpoint = self.path / "checkpoint"
        self.log = self.path / "log.jsonl"
        self._record = self.path / "record.json"
        self._failure = self.path / "failure.json"

    def check(self) -> None:
        """Refuse a folder that holds a run of another configuration; touch nothing.

        Raises:
            ConfigMismatch: Says what differs.
            CorruptedFile: ``config.json`` is damaged.
        """
        path = self.path / "config.json"
        try:
            if not path.exists():
                return
        except OSError as error:
            raise StorageError(path, error, "read") from error
        saved = storage.read_json(path)
        if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
            raise CorruptedFile(f"{path} is corrupted; delete {self.path} or choose another folder with --runs")
        if saved.get("hash") != self.run.config.hash:
            differences = describe_differences(saved["config"], self.run.config.model_dump(mode="json"))
            hint = "choose another folder with --runs or delete this one"
            raise ConfigMismatch(f"{self.path} holds a run of another config ({differences}); {hint}")

    def claim(self) -> None:
        """Create the folder for this run, or find that it is this run's already.

        Raises:
            ConfigMismatch: It belongs to a run of another configuration.
            StorageError: It cannot be written.
        """
        self.check()
        storage.make_folder(self.path)
        path = self.path / "config.json"
        if not path.exists():
            config = self.run.config
            storage.write_json(path, {"hash": config.hash, "config": config.model_dump(mode="json")})

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes off this folder; the system lets go of the lock however the process ends.

        Raises:
            FolderBusy: Another process holds it.
            StorageError: The folder cannot be written.
        """
        path, owner = self.path / ".lock", self.path / ".lock-owner"
        lock = FileLock(path, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout as error:
            with contextlib.suppress(OSError):
                raise FolderBusy(f"{self.path} is in use by another process ({owner.read_text().strip()})") from error
            raise FolderBusy(f"{self.path} is in use by another process") from error
        except OSError as error:
            raise StorageError(path, error) from error
        try:
            with contextlib.suppress(OSError):
                owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
            yield
        finally:
            with contextlib.suppress(OSError):
                owner.unlink(missing_ok=True)
            lock.release()

    def note_data(self, info: DataInfo) -> None:
        """Write down what the network reads, or find that it is what it read before.

        Raises:
            ConfigMismatch: The data under this name have changed since the run began.
        """
        path = self.path / "data.json"
        found = json.loads(json.dumps(asdict(info)))
        if not path.exists():
            storage.write_json(path, found)
            return
        saved = storage.read_json(path)
        if saved.get("fingerprint") != info.fingerprint:
            raise ConfigMismatch(
                f"the data {info.name!r} have changed since the run in {self.path} began; choose another folder with "
                "--runs or delete this one"
            )

    def read(self) -> Record | None:
        """The record if the run is finished, else None.

        Raises:
            CorruptedFile: The record is damaged.
        """
        return read_record(self._record) if self._record.exists() else None

    def write_pictures(self, pictures: Mapping[str, Tensor]) -> None:
        """Keep the arrays that the report draws."""
        if pictures:
            storage.write_tensors(self.path / "pictures.safetensors", pictures)

    def write_details(self, details: Mapping[str, Tensor]) -> None:
        """Keep what the report draws of the last weights on test data."""
        if details:
            storage.write_tensors(self.path / "details.safetensors", details)

    def write_model(self, last: Mapping[str, Tensor], best: Mapping[str, Tensor] | None) -> None:
        """Keep the last weights and those that were best on validation data."""
        storage.write_tensors(self.path / "model.safetensors", last)
        if best is not None:
            storage.write_tensors(self.path / "best.safetensors", best)

    def finish(self, record: Record) -> None:
        """Write the record, which marks the run as finished."""
        storage.write_json(self._record, record.model_dump(mode="json", by_alias=True))
        with contextlib.suppress(OSError):
            self._failure.unlink(missing_ok=True)

    def fail(self, failure: Failure) -> None:
        """Note down a failure, as far as the disk still allows it; the next attempt starts from the last checkpoint."""
        with contextlib.suppress(StorageError):
            storage.make_folder(self.path)
            storage.write_json(self._failure, vars(failure))


def read_record(path: Path) -> Record:
    """Read one ``record.json``.

    Raises:
        CorruptedFile: It is damaged or of another schema.
    """
    saved = storage.read_json(path)
    try:
        if saved.get("schema") != SCHEMA:
            raise CorruptedFile(f"{path} has schema {saved.get('schema')!r}, this version reads {SCHEMA}")
        return Record.model_validate({**saved, "folder": path.parent})
    except (ValidationError, AttributeError) as error:
        raise CorruptedFile(f"{path} is corrupted; delete {path.parent} to repeat the run") from error


def find_records(folder: Path) -> list[Record]:
    """All finished runs under a folder, in the order of their paths."""
    return [read_record(path) for path in sorted(folder.rglob("record.json"))]


def describe_differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The settings that differ, such as ``train.steps: 3000 there, 100 here``."""
    there, here = dict(_flatten(saved)), dict(_flatten(wanted))
    differing = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    shown = [f"{key}: {there.get(key, 'unset')} there, {here.get(key, 'unset')} here" for key in differing[:3]]
    more = [f"and {len(differing) - 3} more"] if len(differing) > 3 else []
    return "; ".join([*shown, *more]) or "its hash differs"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
