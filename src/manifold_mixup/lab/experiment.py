"""Methods x seeds -> runs -> records, in one process or in several.

A run that fails is noted down as failed and the others go on. A stop leaves every run with a checkpoint, so the same
command goes on where it was.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from manifold_mixup.errors import ManifoldMixupError
from manifold_mixup.lab import loggers
from manifold_mixup.lab.config import ExperimentConfig, PlannedRun
from manifold_mixup.lab.data import Places, Report, prepare_data
from manifold_mixup.lab.devices import Devices
from manifold_mixup.lab.errors import ExperimentStopped, FolderBusy, Interrupted, StorageError, UsageError
from manifold_mixup.lab.plan_file import note_plans
from manifold_mixup.lab.records import Failure, Record, RunFolder

__all__ = [
    "GRACE",
    "STOPPED",
    "TICK",
    "Outcome",
    "Settings",
    "Silent",
    "Watcher",
    "attempt",
    "run_experiments",
    "silent",
    "stop_on_ctrl_c",
]

GRACE = 5.0  # seconds that interrupted runs have to write their checkpoints
TICK = 0.1  # seconds between two looks at the running processes
STOPPED = "stopped by Ctrl-C; the same command goes on from here"


class Watcher(Protocol):
    """Whoever wants to see the runs go on."""

    def started(self, run: PlannedRun) -> None:
        """A run begins."""

    def advanced(self, run: PlannedRun, step: int, steps: int, batch: int) -> None:
        """A run has finished so many of its steps, of so many examples each; 0 of 0 until they are known."""

    def ended(self, run: PlannedRun, outcome: Record | Failure) -> None:
        """A run is over, or was over already when the experiment began."""


class Silent:
    """A watcher that says nothing."""

    def started(self, run: PlannedRun) -> None:
        """Say nothing."""

    def advanced(self, run: PlannedRun, step: int, steps: int, batch: int) -> None:
        """Say nothing."""

    def ended(self, run: PlannedRun, outcome: Record | Failure) -> None:
        """Say nothing."""


def silent(what: str, done: int, total: int) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Settings:
    """How runs are carried out; nothing here has an influence on their numbers.

    Attributes:
        runs: Folder of all experiments.
        jobs: Processes; 1 runs in this one, 0 takes one for every core.
        command: The command line, for the records.
        checkpoint_seconds: Longest time between two checkpoints of a run.
        places: Where the data lie.
        devices: What a run trains on; with several processes there is one job, which all of them share.
        report: Is told about downloads and the decoding of images.
        executor: ``"local"``, processes of this machine, or ``"ray"``, a Ray cluster.
        ray_address: Of the cluster, as ``ray.init`` takes it; None starts one on this machine, with ``jobs`` CPUs.
        gpus_per_run: GPUs, or a share of one, that Ray sets aside for each run; None takes one where there are any.
        loggers: What else a run's log is written for, names in :data:`manifold_mixup.lab.loggers.LOGGERS`.
    """

    runs: Path
    jobs: int = 1
    command: str = ""
    checkpoint_seconds: float = 15.0
    places: Places = field(default_factory=Places)
    devices: Devices = field(default_factory=Devices)
    report: Report = silent
    executor: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    gpus_per_run: float | None = None
    loggers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of the runs, all lists by method and then by seed, as the experiment lists them.

    Attributes:
        records: The finished runs.
        failures: Those that ended with an error.
        unmeasured: Finished ones that could not be measured with all that the experiment lists.
    """

    records: list[Record] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    unmeasured: list[Failure] = field(default_factory=list)


def run_experiments(configs: Sequence[ExperimentConfig], settings: Settings, watcher: Watcher | None = None) -> Outcome:
    """Carry out every run that is not finished yet.

    Args:
        configs: The experiments.
        settings: Where and with how many processes.
        watcher: Is told about the progress.

    Raises:
        Interrupted: After Ctrl-C; unfinished runs left a checkpoint.
        ConfigMismatch: A run folder belongs to another configuration; nothing was started.
        FolderBusy: Another process is at work on one of the runs; nothing was started.
        StorageError: The disk is full or the folder cannot be written.
        UsageError: Ray was asked for runs of several processes, or there is no such logger.
        LabError: The data, or the package of a logger, cannot be had.
    """
    watcher = watcher or Silent()
    loggers.check(settings.loggers)
    if settings.executor == "ray" and settings.devices.several:
        raise UsageError("--executor ray gives each run one process: it does not go with --devices or --nodes above 1")
    folders = [RunFolder(settings.runs, run) for config in configs for run in config.runs()]
    for folder in folders:
        folder.check()
    results: dict[Path, Record | Failure] = {}
    waiting = []
    for folder in folders:
        record = folder.read()
        if record is None:
            waiting.append(folder)
        else:
            results[folder.path] = record
            watcher.ended(folder.run, record)
    if settings.devices.first:
        for folder in waiting:
            folder.claim()
            if settings.executor == "local":  # on a cluster, workers of a killed driver may take a moment to end
                with folder.lock():  # whoever is at work on it is found before anything is started
                    pass
        # where all runs are finished, the folder may be one that can only be read
        note_plans(settings.runs, configs, settings.command, needed=bool(waiting))
    if settings.devices.first or int(os.environ.get("LOCAL_RANK", "0")) == 0:  # once on every machine
        for name, options in _data_sets(waiting):
            prepare_data(name, options, settings.places, settings.report)
    jobs = 1 if settings.devices.several else min(settings.jobs or os.cpu_count() or 1, len(waiting))
    carry_out = _in_this_process if jobs <= 1 else _in_processes
    if settings.executor == "ray":
        from manifold_mixup.lab.ray_executor import in_ray

        carry_out = in_ray
    with contextlib.closing(carry_out(waiting, settings, jobs, watcher)) as finished:
        for folder, result in finished:
            results[folder.path] = result
            watcher.ended(folder.run, result)
    listed = [(config.name, method.label) for config in configs for method in config.methods]
    folders.sort(key=lambda folder: listed.index((folder.run.experiment, folder.run.label)))  # seeds keep their order
    ordered = [results[folder.path] for folder in folders]
    return Outcome([r for r in ordered if isinstance(r, Record)], [r for r in ordered if isinstance(r, Failure)])


def _data_sets(folders: Sequence[RunFolder]) -> list[tuple[str, dict[str, Any]]]:
    """Every data set of the runs once."""
    found: list[tuple[str, dict[str, Any]]] = []
    for folder in folders:
        data = folder.run.config.data
        if (data.name, data.options) not in found:
            found.append((data.name, data.options))
    return found


def attempt(
    folder: RunFolder, settings: Settings, stop: Callable[[], bool], progress: Callable[[int, int, int], None]
) -> Record | Failure:
    """Carry out one run; its own errors become a failure, a stop and a full disk end the whole experiment.

    With several processes every error ends it.
    """
    from manifold_mixup.lab.run import execute
    from manifold_mixup.lab.training import Hooks

    length = [0, 0]  # all steps, examples of a step

    def sizes(steps: int, batch: int) -> None:
        length[:] = steps, batch

    try:
        with loggers.open_loggers(settings.loggers, folder.path) as logs:
            hooks = Hooks(stop, lambda step: progress(step, *length), sizes, settings.checkpoint_seconds, loggers=logs)
            return execute(folder, hooks, settings.command, settings.places, settings.devices)
    except (Interrupted, StorageError, FolderBusy):
        raise
    except Exception as error:
        text = str(error) if isinstance(error, ManifoldMixupError) else f"{type(error).__name__}: {error}"
        run = folder.run
        failure = Failure(run.experiment, run.label, run.config.seed, " ".join(text.split()), traceback.format_exc())
        if settings.devices.first:
            folder.fail(failure)
        if settings.devices.several:  # the others are waiting for this process: only its end can tell them
            raise ExperimentStopped(failure.error) from error
        return failure


# ---------------------------------------------------------------- one process


def _in_this_process(
    folders: Sequence[RunFolder], settings: Settings, jobs: int, watcher: Watcher
) -> Generator[tuple[RunFolder, Record | Failure], None, None]:
    with stop_on_ctrl_c() as stop:
        for folder in folders:
            run = folder.run
            watcher.started(run)
            try:
                result = attempt(folder, settings, stop, partial(watcher.advanced, run))
            except Interrupted as error:
                raise Interrupted(STOPPED) from error
            yield folder, result
            if stop():
                raise Interrupted(STOPPED)


@contextlib.contextmanager
def stop_on_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, looked at between two steps, when the state is whole; a second one cuts in."""
    asked = threading.Event()

    def handler(signum: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    in_main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, handler) if in_main else None
    try:
        yield asked.is_set
    finally:
        if in_main:
            signal.signal(signal.SIGINT, previous)


# ---------------------------------------------------------------- several processes


class _Slot:
    """One worker process, replaced when it dies: with one process per pool it is known which run went down with it."""

    def __init__(self, index: int, context: Any, progress: Any, stop: Any) -> None:
        self.index, self.progress, self.stop = index, progress, stop
        self.folder: RunFolder | None = None
        self._context = context
        self.pool = self._open()

    def _open(self) -> ProcessPoolExecutor:
        initargs = (self.index, self.progress, self.stop)
        return ProcessPoolExecutor(1, mp_context=self._context, initializer=_start_worker, initargs=initargs)

    def submit(self, folder: RunFolder, settings: Settings) -> Future[Record | Failure | str]:
        """Start a run."""
        self.folder = folder
        self.progress[3 * self.index : 3 * self.index + 3] = [0, 0, 0]
        with _ctrl_c_held_back():
            return self.pool.submit(_work, folder, replace(settings, report=silent))

    def reopen(self) -> None:
        """A new process after the old one died."""
        self.pool.shutdown(wait=False)
        self.pool = self._open()

    def close(self, *, kill: bool) -> None:
        """End the process, and if need be the run in it: what is on disk is whole at any moment."""
        processes = list((self.pool._processes or {}).values()) if kill else []
        for process in processes:
            process.kill()
        self.pool.shutdown(wait=True, cancel_futures=True)


def _in_processes(
    folders: Sequence[RunFolder], settings: Settings, jobs: int, watcher: Watcher
) -> Generator[tuple[RunFolder, Record | Failure], None, None]:
    context = multiprocessing.get_context("spawn")
    # plain shared memory: a worker that is killed cannot leave a lock behind
    progress, stop = context.RawArray("q", 3 * jobs), context.RawValue("b", 0)
    slots = [_Slot(i, context, progress, stop) for i in range(jobs)]
    free, waiting = list(slots), list(folders)
    running: dict[Future[Record | Failure | str], _Slot] = {}
    try:
        with stop_on_ctrl_c() as stopped:
            while waiting or running:
                while waiting and free and not stopped():
                    slot = free.pop(0)
                    folder = waiting.pop(0)
                    running[slot.submit(folder, settings)] = slot
                    watcher.started(folder.run)
                done, _ = wait(running, timeout=TICK, return_when=FIRST_COMPLETED)
                if stopped():
                    stop.value = 1
                    wait(running, timeout=GRACE)
                    raise Interrupted(STOPPED)
                for slot in running.values():
                    assert slot.folder is not None
                    watcher.advanced(slot.folder.run, *progress[3 * slot.index : 3 * slot.index + 3])
                for future in done:
                    slot = running.pop(future)
                    free.append(slot)
                    assert slot.folder is not None
                    yield slot.folder, _result(future, slot)
    finally:
        stop.value = 1
        for slot in slots:
            slot.close(kill=slot not in free)


def _result(future: Future[Record | Failure | str], slot: _Slot) -> Record | Failure:
    try:
        result = future.result()
        if isinstance(result, str):
            raise ExperimentStopped(result)
        return result
    except BrokenProcessPool:
        folder = slot.folder
        assert folder is not None
        slot.reopen()
        run = folder.run
        failure = Failure(run.experiment, run.label, run.config.seed, "the process died (killed, or out of memory?)")
        folder.fail(failure)
        return failure


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Start processes with SIGINT blocked: a Ctrl-C in the terminal reaches all of them but is for the parent."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


_worker: dict[str, Any] = {}


def _start_worker(index: int, progress: Any, stop: Any) -> None:
    """In a new process: leave Ctrl-C to the parent, and watch that the parent is there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker.update(index=index, progress=progress, stop=stop)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """A parent that was killed cannot say so; without it a worker would train for nobody."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _work(folder: RunFolder, settings: Settings) -> Record | Failure | str:
    """In a worker: carry out one run; the text is what ends the whole experiment."""
    place = 3 * _worker["index"]

    def progress(step: int, steps: int, batch: int) -> None:
        _worker["progress"][place : place + 3] = [step, steps, batch]

    try:
        return attempt(folder, settings, lambda: bool(_worker["stop"].value), progress)
    except (Interrupted, StorageError, FolderBusy) as error:
        return str(error)
