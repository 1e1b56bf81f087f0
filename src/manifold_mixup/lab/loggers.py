"""The log of a run in other formats, written beside it: ``log.csv`` and ``tensorboard/``.

``log.jsonl`` is the log; these repeat it. When a run begins or goes on they are built anew from its lines, so they hold
each of them once, wherever the run was killed and whenever its user began to ask for them.

The loggers of Lightning Fabric do not do that: its ``CSVLogger`` deletes what is there and forgets the earlier lines,
and its ``TensorBoardLogger`` is a ``SummaryWriter``, which adds a file to those that are there, whatever these hold.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from manifold_mixup.lab import storage
from manifold_mixup.lab.errors import MissingExtra, StorageError, UsageError

__all__ = ["LOGGERS", "CsvLogger", "Logger", "TensorBoardLogger", "check", "open_loggers", "parse", "read"]

TAGS = {  # TensorBoard's names; it groups them by what is before the slash
    "train_loss": "train/loss",
    "validation_error": "validation/error",
    "validation_nll": "validation/nll",
}
AXES = ("step", "epoch")  # all else in a line is a number of the training, such as lr or a part of a method's loss


class Logger(Protocol):
    """Writes down what a run logs, in the process that trains; with several processes in the first.

    Making one touches nothing: a finished run that is only read has loggers which are never resumed.
    """

    def resume(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """The training begins, or goes on, with these lines of ``log.jsonl``.

        Raises:
            StorageError: The folder cannot be written.
        """

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a line, which ``log.jsonl`` holds already.

        Raises:
            StorageError: The folder cannot be written.
        """

    def finish(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """The training is over, after so many steps, and the last weights were measured.

        Raises:
            StorageError: The folder cannot be written.
        """

    def close(self) -> None:
        """Let go of files."""


class CsvLogger:
    """``log.csv``: the columns of ``log.jsonl``, in the order in which they came; empty where a line lacks one.

    Args:
        folder: Folder of the run.
    """

    package: str | None = None

    def __init__(self, folder: Path) -> None:
        self._log, self._path = folder / "log.jsonl", folder / "log.csv"
        self._columns: list[str] = []

    def resume(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the file anew; without lines there is none yet."""
        self._columns = list(dict.fromkeys(name for line in lines for name in line))
        if lines:
            header = dict(zip(self._columns, self._columns, strict=True))
            storage.write_atomically(self._path, self._table([header, *lines]).encode())
            return
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(self._path, error) from error

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a line; a column that no line had before is one of the whole table."""
        if line.keys() <= set(self._columns):
            storage.append(self._path, self._table([line]))
        else:
            self.resume(read(self._log))

    def finish(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Nothing: the metrics are no line of the log."""

    def close(self) -> None:
        """Nothing: the file is open only while it is written."""

    def _table(self, lines: Sequence[Mapping[str, Any]]) -> str:
        """The lines as CSV. Numbers read back as they are in ``log.jsonl``."""
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(lines)
        return text.getvalue()


class TensorBoardLogger:
    """``tensorboard/``: the numbers of ``log.jsonl`` by step, and at the end those of the test split at the last step.

    The file is written here and not by ``SummaryWriter``, whose thread would print a full disk as a stack trace. An
    earlier file is replaced by one of another name, which tells a TensorBoard that is looking on to forget what it has
    read; the wall times of its lines are kept.

    Args:
        folder: Folder of the run.
    """

    package: str | None = "tensorboard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._file: io.BufferedWriter | None = None

    def resume(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Begin a file with all lines, then delete what was there before."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self.close()
        storage.make_folder(self._folder)
        earlier = sorted(self._folder.glob("events.out.tfevents.*"))
        times = _wall_times(earlier)
        # TensorBoard reads files in the order of their names, and finds them by this beginning
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        with self._storing():
            self._file = (self._folder / name).open("xb")
        self._write(file_version="brain.Event:2")
        if earlier:  # until they are deleted they are there, too: drop all that was read of them
            self._write(step=0, session_log=SessionLog(status=SessionLog.START))
        for line in lines:
            self._write_line(line, times.get(line["step"]))
        with self._storing():
            for path in earlier:
                path.unlink()

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a line."""
        self._write_line(line)

    def finish(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Add ``test/error``, ``test/nll`` and so on."""
        tested = {f"test/{name.removeprefix('test_')}": v for name, v in metrics.items() if name.startswith("test_")}
        self._write_scalars(step, {tag: value for tag, value in tested.items() if value is not None})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with self._storing():
                self._file.close()
            self._file = None

    def _write_line(self, line: Mapping[str, Any], wall_time: float | None = None) -> None:
        numbers = {TAGS.get(name, f"train/{name}"): value for name, value in line.items() if name not in AXES}
        self._write_scalars(line["step"], numbers, wall_time)

    def _write_scalars(self, step: int, values: Mapping[str, float], wall_time: float | None = None) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._write(wall_time, step=step, summary=summary)

    def _write(self, wall_time: float | None = None, **content: Any) -> None:
        """One event, in the file when this returns: no checkpoint may be ahead of it."""
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard import RecordWriter

        assert self._file is not None, "resume comes first"
        event = Event(wall_time=time.time() if wall_time is None else wall_time, **content)
        with self._storing():
            RecordWriter(self._file).write(event.SerializeToString())
            self._file.flush()

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(self._folder, error) from error


def _wall_times(paths: Iterable[Path]) -> dict[int, float]:
    """When the lines in event files were written, by step; a file that was cut off is read up to there."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return {
        event.step: event.wall_time
        for path in paths
        for event in EventFileLoader(str(path)).Load()
        if any(value.tag == TAGS["train_loss"] for value in event.summary.value)
    }


LOGGERS: dict[str, type[CsvLogger] | type[TensorBoardLogger]] = {"csv": CsvLogger, "tensorboard": TensorBoardLogger}


def parse(texts: Iterable[str]) -> tuple[str, ...]:
    """The names in ``--logger``, each of which may be several joined by commas.

    Raises:
        UsageError: One is not known.
        MissingExtra: Its package is not installed.
    """
    names = tuple(dict.fromkeys(name.strip() for text in texts for name in text.split(",") if name.strip()))
    check(names)
    return names


def check(names: Iterable[str]) -> None:
    """Refuse loggers that could not be made, before anything is trained.

    Raises:
        UsageError: One is not known.
        MissingExtra: Its package is not installed.
    """
    for name in names:
        if name not in LOGGERS:
            raise UsageError(f"--logger {name!r} should be {' or '.join(LOGGERS)}")
        package = LOGGERS[name].package
        if package is not None:
            try:
                importlib.import_module(package)
            except ModuleNotFoundError as error:
                raise MissingExtra(package, name) from error


@contextlib.contextmanager
def open_loggers(names: Iterable[str], folder: Path) -> Iterator[list[Logger]]:
    """The loggers of one run, closed at the end.

    Args:
        names: Of :data:`LOGGERS`.
        folder: Folder of the run.
    """
    check(names := list(names))
    loggers: list[Logger] = [LOGGERS[name](folder) for name in names]
    with contextlib.ExitStack() as stack:
        for logger in loggers:
            stack.callback(logger.close)
        yield loggers


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``log.jsonl``; none if there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
