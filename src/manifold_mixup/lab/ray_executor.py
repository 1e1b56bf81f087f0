"""Many runs on a Ray cluster: one started for the occasion, or one that is there already.

Each run is a task. A worker that dies is replaced, and its run goes on from its last checkpoint; a run that fails by
itself is not repeated. The cluster's nodes have to see the folder of the runs, and the data, under the same paths. When
the driver is killed Ray ends its tasks; the same command started again goes on with them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

from manifold_mixup.lab.config import PlannedRun
from manifold_mixup.lab.errors import (
    ExperimentStopped,
    FolderBusy,
    Interrupted,
    MissingExtra,
    StorageError,
    UsageError,
)
from manifold_mixup.lab.experiment import GRACE, STOPPED, TICK, Settings, Watcher, attempt, silent, stop_on_ctrl_c
from manifold_mixup.lab.parsing import effective_settings
from manifold_mixup.lab.records import Failure, Record, RunFolder

__all__ = ["in_ray"]

RETRIES = 3  # of a run whose worker died
BUSY = 30.0  # seconds that a worker which is being ended may still hold a run's folder
PAUSE = 0.5  # seconds between two reports of a run
OBJECTS = 100_000_000  # bytes for Ray's object store; records are small


def in_ray(
    folders: Sequence[RunFolder], settings: Settings, jobs: int, watcher: Watcher
) -> Generator[tuple[RunFolder, Record | Failure], None, None]:
    """Carry out runs on a Ray cluster; yields each with its outcome as it ends.

    Raises:
        MissingExtra: Ray is not installed.
        UsageError: There is no cluster at the address.
        Interrupted: After Ctrl-C.
        ExperimentStopped: Something that would stop the other runs, too.
    """
    if not folders:
        return
    ray = _import_ray()
    started = _connect(ray, settings, jobs)
    try:
        yield from _carry_out(ray, folders, settings, watcher)
    finally:
        if started:
            ray.shutdown()


def _import_ray() -> Any:
    # Ray would hide the GPUs of tasks that ask for none, and says in a warning that it will stop doing so.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingExtra("ray", "ray") from error
    return ray


def _connect(ray: Any, settings: Settings, jobs: int) -> bool:
    """Join the cluster, or start one on this machine; whether it has to be left again."""
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if settings.ray_address is None:
        ray.init(num_cpus=jobs, include_dashboard=False, object_store_memory=OBJECTS, **quiet)
        return True
    try:
        ray.init(address=settings.ray_address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"there is no Ray cluster at --ray-address {settings.ray_address!r}: {reason}") from error
    return True


def _carry_out(
    ray: Any, folders: Sequence[RunFolder], settings: Settings, watcher: Watcher
) -> Generator[tuple[RunFolder, Record | Failure], None, None]:
    board = ray.remote(num_cpus=0)(_Board).remote()
    plain = replace(settings, report=silent)
    largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    running = {}
    for folder in folders:
        task = ray.remote(_work).options(
            num_cpus=min(_threads(folder.run, largest), largest),
            num_gpus=_gpus(settings),
            max_retries=RETRIES,
            retry_exceptions=False,
        )
        running[task.remote(folder, plain, board)] = folder
    shown: set[RunFolder] = set()
    with stop_on_ctrl_c() as stopped:
        try:
            while running:
                done, _ = ray.wait(list(running), num_returns=1, timeout=TICK)
                if stopped():
                    board.stop.remote()
                    ray.wait(list(running), num_returns=len(running), timeout=GRACE)
                    raise Interrupted(STOPPED)
                _tell(ray, board, running, watcher, shown)
                for reference in done:
                    folder = running.pop(reference)
                    if folder not in shown:
                        watcher.started(folder.run)
                    yield folder, _result(ray, reference, folder)
        finally:
            for reference in running:
                with contextlib.suppress(Exception):
                    ray.cancel(reference, force=True)


def _threads(run: PlannedRun, largest: int) -> int:
    _, train = effective_settings(run.config)
    return train.threads or largest


def _gpus(settings: Settings) -> float:
    """GPUs of one run: what was said, or one where this machine has some and they are not ruled out."""
    import torch

    if settings.gpus_per_run is not None:
        return settings.gpus_per_run
    return float(settings.devices.accelerator in ("auto", "cuda") and torch.cuda.is_available())


def _tell(ray: Any, board: Any, running: dict[Any, RunFolder], watcher: Watcher, shown: set[RunFolder]) -> None:
    """Pass on what the runs have reported; a board that is gone must not end them."""
    by_path = {str(folder.path): folder for folder in running.values()}
    with contextlib.suppress(ray.exceptions.RayError):
        for path, progress in ray.get(board.read.remote(), timeout=TICK).items():
            if (folder := by_path.get(path)) is None:
                continue
            if folder not in shown:
                shown.add(folder)
                watcher.started(folder.run)
            watcher.advanced(folder.run, *progress)


def _result(ray: Any, reference: Any, folder: RunFolder) -> Record | Failure:
    try:
        result: Record | Failure | str = ray.get(reference)
    except ray.exceptions.RayError as error:
        run, reason = folder.run, " ".join(str(error).split())[:200]
        text = f"its process died {RETRIES + 1} times (killed, or out of memory?): {reason}"
        failure = Failure(run.experiment, run.label, run.config.seed, text)
        folder.fail(failure)
        return failure
    if isinstance(result, str):
        raise ExperimentStopped(result)
    return result


class _Board:
    """An actor on which runs write how far they are, and read whether they should stop."""

    def __init__(self) -> None:
        self._progress: dict[str, tuple[int, int, int]] = {}
        self._stop = False

    def write(self, path: str, progress: tuple[int, int, int]) -> bool:
        """Note the progress of a run; returns whether it should stop."""
        self._progress[path] = progress
        return self._stop

    def read(self) -> dict[str, tuple[int, int, int]]:
        """All that was noted."""
        return self._progress

    def stop(self) -> None:
        """Tell all runs to leave a checkpoint and end."""
        self._stop = True


def _work(folder: RunFolder, settings: Settings, board: Any) -> Record | Failure | str:
    """In a worker: carry out one run; the text is what ends the whole experiment."""
    latest = [0, 0, 0]
    stop, over = threading.Event(), threading.Event()

    def progress(step: int, steps: int, batch: int) -> None:
        latest[:] = step, steps, batch

    reporter = threading.Thread(target=_report, args=(board, str(folder.path), latest, stop, over), daemon=True)
    reporter.start()
    try:
        return _patiently(lambda: attempt(folder, settings, stop.is_set, progress), stop)
    except (Interrupted, StorageError, FolderBusy) as error:
        return str(error)
    finally:
        over.set()


def _patiently(run: Callable[[], Record | Failure], stop: threading.Event) -> Record | Failure:
    """Wait for the worker of a killed driver, or of a lost attempt, to let go of the folder."""
    end = time.monotonic() + BUSY
    while True:
        try:
            return run()
        except FolderBusy:
            if time.monotonic() > end or stop.wait(PAUSE):
                raise


def _report(board: Any, path: str, latest: list[int], stop: threading.Event, over: threading.Event) -> None:
    import ray

    while not over.wait(PAUSE):
        try:
            if ray.get(board.write.remote(path, tuple(latest)), timeout=10 * PAUSE):
                stop.set()
        except ray.exceptions.GetTimeoutError:
            continue
        except ray.exceptions.RayError:
            return  # the board is gone; the run goes on
