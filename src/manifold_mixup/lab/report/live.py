"""Pages that are written again while what they show goes on, and how one finds out that it has gone on."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from manifold_mixup.lab.config import PlannedRun
    from manifold_mixup.lab.experiment import Watcher
    from manifold_mixup.lab.records import Failure, Record

__all__ = ["EASE", "PAUSE", "SHARE", "Both", "LivePage", "Look", "follow", "look"]

PAUSE = 10.0  # seconds between two writes of a page while its runs go on, at least
SHARE = 50  # and so many times what the last write took: 1 / 51 of the time is less than 2 %
TICK = 2.0  # seconds between two looks at folders that somebody else writes
EASE = 5  # and so many times what looking and writing took last: the runs need the processor more

OWNER = ".lock-owner"
FILES = frozenset(
    {
        "experiment.json",
        "config.json",
        "log.jsonl",
        "state.json",
        "record.json",
        "failure.json",
        "evaluations.jsonl",
        OWNER,
    }
)


# ---------------------------------------------------------------- runs of this process


class Both:
    """A watcher that tells others what it is told, in order.

    Args:
        watchers: The others.
    """

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = watchers

    def started(self, run: PlannedRun) -> None:
        """A run begins."""
        for watcher in self._watchers:
            watcher.started(run)

    def advanced(self, run: PlannedRun, step: int, steps: int, batch: int) -> None:
        """A run has come further."""
        for watcher in self._watchers:
            watcher.advanced(run, step, steps, batch)

    def ended(self, run: PlannedRun, outcome: Record | Failure) -> None:
        """A run is over."""
        for watcher in self._watchers:
            watcher.ended(run, outcome)


class LivePage:
    """A watcher that writes a page again whenever its runs have come further, and seldom enough to cost them nothing.

    Between two writes lie at least 10 seconds, and 50 times what the last one took. A page that cannot be written does
    not stop the training. When the runs end well, the last write is left to whoever asked for the page, who has to hear
    of its errors; when they are stopped, it is done here, so that the page shows where things stand.

    Args:
        write: Writes the page.
        say: Is told once, at the end, that the page of runs that were stopped could not be written.
        clock: Seconds.
    """

    def __init__(
        self,
        write: Callable[[], object],
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write_page = write
        self._say = say or _complain
        self._clock = clock
        self._steps: dict[tuple[str, str, int], int] = {}  # of the runs that were started
        self._begun = False  # whether anything has happened that the page has to show
        self._behind = False  # whether anything has happened since it was written last
        self._due = -float("inf")
        self._trouble: Exception | None = None

    def __enter__(self) -> LivePage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from manifold_mixup.lab.errors import LabError, StorageError

        if kind is None or not self._begun:
            return
        self._write()
        if self._trouble is not None and not issubclass(kind, StorageError):  # that is said already
            reason = self._trouble if isinstance(self._trouble, LabError) else repr(self._trouble)
            self._say(f"the page does not show where things stand: {reason}")

    def started(self, run: PlannedRun) -> None:
        """A run begins."""
        self._steps[_key(run)] = 0
        self._happened()

    def advanced(self, run: PlannedRun, step: int, steps: int, batch: int) -> None:
        """A run has come further, or has merely been looked at."""
        if self._behind or step != self._steps.get(_key(run)):
            self._steps[_key(run)] = step
            self._happened()

    def ended(self, run: PlannedRun, outcome: Record | Failure) -> None:
        """A run is over; one that was over before anything began is no news."""
        if self._steps.pop(_key(run), None) is not None:
            self._happened()

    def progressed(self) -> None:
        """Finished runs are being measured."""
        self._happened()

    def _happened(self) -> None:
        self._begun = self._behind = True
        if self._clock() >= self._due:
            self._write()

    def _write(self) -> None:
        began = self._clock()
        try:
            self._write_page()
            self._trouble = None
        except Exception as error:  # whatever it is, hours of training are not to end by it; the last write tells
            self._trouble = error
        self._behind = False
        ended = self._clock()
        self._due = ended + max(PAUSE, SHARE * (ended - began))


def _key(run: PlannedRun) -> tuple[str, str, int]:
    return run.experiment, run.label, run.config.seed


def _complain(text: str) -> None:
    typer.echo(" ".join(text.split()), err=True)


# ---------------------------------------------------------------- runs of whomever


@dataclass(frozen=True)
class Look:
    """What lies in some folders of runs.

    Attributes:
        stamp: Changes whenever a run begins, comes further, ends or is measured.
        there: Those of the paths that hold a run, or are a file.
    """

    stamp: str
    there: tuple[Path, ...]


def look(paths: Sequence[Path]) -> Look:
    """Look at some folders of runs, or files with lines of records, without reading any file.

    Args:
        paths: The folders and files; what is not there, or not there any more, is no error.
    """
    found: list[str] = []
    there = []
    for path in paths:
        holds_run = False
        for folder, folders, files in os.walk(path):
            folders.sort()
            holds_run = holds_run or "config.json" in files
            found += (_stamp(Path(folder, name)) for name in sorted(FILES.intersection(files)))
        if path.is_file():
            holds_run = True
            found.append(_stamp(path))
        if holds_run:
            there.append(path)
    return Look(hashlib.sha256("\n".join(found).encode("utf-8", "surrogateescape")).hexdigest()[:16], tuple(there))


def _stamp(path: Path) -> str:
    from manifold_mixup.lab.report.sources import is_running

    try:
        status = path.stat()
    except OSError:  # it has gone in between
        return ""
    running = path.name == OWNER and is_running(path)  # a process that is killed leaves the file as it was
    return f"{path} {status.st_mtime_ns} {status.st_size} {running}"


def follow(
    paths: Sequence[Path],
    write: Callable[[], object],
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Write a page, and again whenever the runs that it shows have come further, until Ctrl-C.

    Args:
        paths: Folders of runs, and files with lines of records.
        write: Writes the page.
        say: Is told why it could not be written again; the next change gives it another chance.
        sleep: Waits for so many seconds.
        clock: Seconds.

    Raises:
        LabError: The page cannot be written the first time.
    """
    from manifold_mixup.lab.errors import LabError

    try:
        seen = look(paths).stamp
        write()
        cost = 0.0
        while True:
            sleep(max(TICK, EASE * cost))
            began = clock()
            stamp = look(paths).stamp
            if stamp != seen:
                seen = stamp
                try:
                    write()
                except LabError as error:
                    say(str(error))
            cost = clock() - began
    except KeyboardInterrupt:
        return
