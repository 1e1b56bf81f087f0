"""Many runs on a Ray cluster: one started for the occasion, or one that is there already.

Each run is a task. A worker that dies is replaced, and its run goes on from its last checkpoint; a run that fails by
itself is not repeated. The cluster's nodes have to see the folder of the runs, and the data, under the same paths. When
the driver is killed Ray ends its tasks; the same command started again goes on with them.

Deaths are counted here and not by Ray, which starts a task that was killed for want of memory again without end.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
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
UNSEEN = 10.0  # seconds until a network file system shows a new folder to the other nodes
PAUSE = 0.5  # seconds between two reports of a run
OBJECTS = 100_000_000  # bytes for Ray's object store; records are small


def in_ray(
    folders: Sequence[RunFolder], settings: Settings, jobs: int, watcher: Watcher
) -> Generator[tuple[RunFolder, Record | Failure], None, None]:
    """Carry out runs on a Ray cluster; yields each with its outcome as it ends.

    Raises:
        MissingExtra: Ray is not installed.
        UsageError: There is no cluster at the address, or no node of it has the GPUs of a run.
        Interrupted: After Ctrl-C.
        ExperimentStopped: Something that would stop the other runs, too.
    """
    if not folders:
        return
    ray = _import_ray()
    cores = os.cpu_count() or 1
    wanted = sum(_threads(folder.run, cores) for folder in folders)
    joined = _connect(ray, settings, max(jobs, min(settings.jobs or cores, wanted)))
    running: dict[Any, RunFolder] = {}
    try:
        yield from _carry_out(ray, running, folders, settings, watcher)
    finally:
        if joined:
            ray.shutdown()  # ends the tasks, too
        else:
            _cancel(ray, running)


def _import_ray() -> Any:
    # Ray would hide the GPUs of tasks that ask for none, and says in a warning that it will stop doing so.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # or runs would wait for everything else on this machine
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingExtra("ray", "ray") from error
    return ray


def _connect(ray: Any, settings: Settings, cpus: int) -> bool:
    """Join the cluster, or start one on this machine; whether it has to be left again."""
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if settings.ray_address is None:  # "local", or Ray would join whatever cluster it finds here or in RAY_ADDRESS
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECTS, **quiet)
        return True
    if paths := os.environ.get("PYTHONPATH"):  # of a source checkout; a cluster was started without it
        full = os.pathsep.join(str(Path(path).absolute()) for path in paths.split(os.pathsep) if path)
        quiet["runtime_env"] = {"env_vars": {"PYTHONPATH": f"{full}{os.pathsep}${{PYTHONPATH}}"}}
    try:
        ray.init(address=settings.ray_address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"there is no Ray cluster at --ray-address {settings.ray_address!r}: {reason}") from error
    return True


def _carry_out(
    ray: Any, running: dict[Any, RunFolder], folders: Sequence[RunFolder], settings: Settings, watcher: Watcher
) -> Generator[tuple[RunFolder, Record | Failure], None, None]:
    start = _starter(ray, settings, board := ray.remote(num_cpus=0, max_restarts=-1)(_Board).remote())
    running.update((start(folder), folder) for folder in folders)
    deaths: Counter[RunFolder] = Counter()
    shown: set[RunFolder] = set()
    with stop_on_ctrl_c() as stopped:
        while running:
            done, _ = ray.wait(list(running), num_returns=1, timeout=TICK)
            if stopped():
                board.stop.remote()
                _tell(ray, board, running, watcher, shown)
                if begun := [reference for reference, folder in running.items() if folder in shown]:
                    ray.wait(begun, num_returns=len(begun), timeout=GRACE)
                raise Interrupted(STOPPED)
            _tell(ray, board, running, watcher, shown)
            for reference in done:
                folder = running.pop(reference)
                result = _result(ray, reference, folder, again=deaths[folder] < RETRIES)
                if result is None:
                    deaths[folder] += 1
                    running[start(folder)] = folder
                    continue
                if folder not in shown:
                    watcher.started(folder.run)
                yield folder, result


def _cancel(ray: Any, running: dict[Any, RunFolder]) -> None:
    """End the tasks of a cluster that somebody else goes on using; Ray aborts if one is cancelled as it ends."""
    with contextlib.suppress(Exception):
        _, left = ray.wait(list(running), num_returns=len(running), timeout=0)
        for reference in left:
            ray.cancel(reference, force=True)


def _starter(ray: Any, settings: Settings, board: Any) -> Callable[[RunFolder], Any]:
    """What makes a task of a run and returns Ray's reference to it. Paths are in full: workers start elsewhere."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = max(int(node.get("CPU", 0)) for node in nodes)
    gpus = _gpus(settings, max(node.get("GPU", 0.0) for node in nodes))
    places, here = settings.places, Path.cwd()
    plain = replace(
        settings,
        report=silent,
        runs=settings.runs.absolute(),
        places=replace(places, data_dir=places.data_dir and places.data_dir.absolute(), cache=places.cache.absolute()),
    )

    def start(folder: RunFolder) -> Any:
        threads = max(1, min(_threads(folder.run, cpus), cpus))
        task = ray.remote(_work).options(num_cpus=threads, num_gpus=gpus, max_retries=0)
        return task.remote(RunFolder(plain.runs, folder.run), plain, board, here)

    return start


def _threads(run: PlannedRun, cores: int) -> int:
    _, train = effective_settings(run.config)
    return train.threads or cores


def _gpus(settings: Settings, most: float) -> float:
    """GPUs of one run: what was said, or one if they are asked for, or not ruled out and there.

    Args:
        settings: May say how many.
        most: GPUs of the node that has most of them.

    Raises:
        UsageError: No node has so many: the run would wait for ever.
    """
    import torch

    here = settings.ray_address is not None or torch.cuda.is_available()  # of what is elsewhere only Ray knows
    accelerator = settings.devices.accelerator
    gpus = settings.gpus_per_run
    if gpus is None:
        gpus = float(accelerator == "cuda" or (accelerator == "auto" and here and most > 0))
    if gpus > 1 and gpus != int(gpus):
        raise UsageError(f"--gpus-per-run {gpus:g}: above 1 it should be a whole number")
    if gpus > most:
        asked = "--accelerator cuda" if settings.gpus_per_run is None else f"--gpus-per-run {gpus:g}"
        raise UsageError(f"{asked}: the Ray cluster has no node with so many GPUs; the most that one has is {most:g}")
    return gpus


def _tell(ray: Any, board: Any, running: dict[Any, RunFolder], watcher: Watcher, shown: set[RunFolder]) -> None:
    """Pass on what the runs have reported; a board that is gone must not end them."""
    by_path = {str(folder.path.absolute()): folder for folder in running.values()}
    with contextlib.suppress(ray.exceptions.RayError):
        for path, progress in ray.get(board.read.remote(), timeout=TICK).items():
            if (folder := by_path.get(path)) is None:
                continue
            if folder not in shown:
                shown.add(folder)
                watcher.started(folder.run)
            watcher.advanced(folder.run, *progress)


def _result(ray: Any, reference: Any, folder: RunFolder, *, again: bool) -> Record | Failure | None:
    """What became of a run; None if its worker died and it should be started again."""
    errors, run = ray.exceptions, folder.run
    try:
        result: Record | Failure | str = ray.get(reference)
    except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError, errors.ObjectLostError) as error:
        if again:
            return None
        reason = " ".join(str(error).split())[:200]
        text = f"its process died {RETRIES + 1} times (killed, or out of memory?): {reason}"
        result = Failure(run.experiment, run.label, run.config.seed, text)
        folder.fail(result)
    except errors.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        text = f"its worker could not begin it, is manifold-mixup installed on every node? {lines[-1].strip()}"
        result = Failure(run.experiment, run.label, run.config.seed, text, str(error))
        folder.fail(result)
    if isinstance(result, str):
        raise ExperimentStopped(result)
    return result.model_copy(update={"folder": folder.path}) if isinstance(result, Record) else result


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


def _work(folder: RunFolder, settings: Settings, board: Any, here: Path) -> Record | Failure | str:
    """In a worker: carry out one run; the text is what ends the whole experiment.

    Args:
        folder: The folder of the run, in full.
        settings: How to carry it out, with paths in full.
        board: The actor for progress and stops.
        here: Folder of the driver, from which paths in a recipe count.
    """
    with contextlib.suppress(OSError):
        os.chdir(here)
    if not _seen(folder.path):  # the driver has made it
        hint = "every node has to see the folder of the runs under the same path"
        return f"the Ray node {socket.gethostname()} does not see {folder.path}: {hint}"
    latest = [0, 0, 0]
    if _write(board, str(folder.path), latest):
        return STOPPED  # it waited for a free worker when the others were stopped
    stop, over = threading.Event(), threading.Event()

    def progress(step: int, steps: int, batch: int) -> None:
        latest[:] = step, steps, batch

    def report() -> None:
        while not over.wait(PAUSE):
            if _write(board, str(folder.path), latest):
                stop.set()

    threading.Thread(target=report, daemon=True).start()
    try:
        return _patiently(lambda: attempt(folder, settings, stop.is_set, progress), stop)
    except (Interrupted, StorageError, FolderBusy) as error:
        return str(error)
    finally:
        over.set()


def _seen(path: Path) -> bool:
    end = time.monotonic() + UNSEEN
    while not path.is_dir():
        if time.monotonic() > end:
            return False
        time.sleep(PAUSE)
    return True


def _write(board: Any, path: str, progress: Sequence[int]) -> bool:
    """Note the progress of a run; whether it should stop. Without the board it goes on."""
    import ray

    try:
        return bool(ray.get(board.write.remote(path, tuple(progress)), timeout=10 * PAUSE))
    except ray.exceptions.RayError:
        return False


def _patiently(run: Callable[[], Record | Failure], stop: threading.Event) -> Record | Failure:
    """Wait for the worker of a killed driver, or of a lost attempt, to let go of the folder."""
    end = time.monotonic() + BUSY
    while True:
        try:
            return run()
        except FolderBusy:
            if time.monotonic() > end or stop.wait(PAUSE):
                raise
