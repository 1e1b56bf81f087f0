"""One run, from its settings to its record."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from manifold_mixup.lab import streams
from manifold_mixup.lab.config import RunConfig, TrainConfig
from manifold_mixup.lab.data import DataInfo, DataSplits, Places, get_dataset
from manifold_mixup.lab.devices import Devices, make_fabric
from manifold_mixup.lab.measures.base import Subject
from manifold_mixup.lab.measures.details import details
from manifold_mixup.lab.measures.registry import always, finite, measure
from manifold_mixup.lab.methods import make_method
from manifold_mixup.lab.models import build_model, hidden_layers
from manifold_mixup.lab.parsing import effective_settings
from manifold_mixup.lab.records import Record, RunFolder
from manifold_mixup.lab.tasks import make_task
from manifold_mixup.lab.training import Fitted, Hooks, fit

__all__ = ["execute", "fresh_model", "hardware", "versions"]


def execute(
    folder: RunFolder,
    hooks: Hooks | None = None,
    command: str = "",
    places: Places | None = None,
    devices: Devices | None = None,
) -> Record:
    """Carry out one run, or go on with it, and write its record; a finished run is only read.

    Torch's global random state and number of threads are put back afterwards. With several processes every one of them
    calls this; the first one writes.

    Args:
        folder: The folder of the run, which says what to run.
        hooks: Stopping, progress and the pace of checkpoints.
        command: The command line, for the record.
        places: Where the data lie.
        devices: What to train on; one device if None.

    Raises:
        Interrupted: ``hooks.stop`` said so; a checkpoint was written.
        FolderBusy: Another process is at work on the folder.
        LabError: The folder belongs to another configuration or cannot be written, the checkpoint is damaged, ...
        ManifoldMixupError: The mixer refuses the network or the layers.
    """
    devices = devices or Devices()
    if devices.first:
        folder.claim()
    record = folder.read()
    if record is not None:
        return record
    with _isolated(folder.run.config.train), folder.lock() if devices.first else contextlib.nullcontext():
        record = folder.read()  # whoever held the lock before may have finished it
        return record or _execute(folder, hooks or Hooks(), command, places or Places(), devices)


@contextlib.contextmanager
def _isolated(settings: TrainConfig) -> Iterator[None]:
    """Keep torch's random state and settings; with one thread a run has the same bits however many run beside it."""
    threads, searched = torch.get_num_threads(), torch.backends.cudnn.benchmark
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.set_num_threads(settings.threads or os.cpu_count() or 1)
        torch.backends.cudnn.benchmark = True  # every batch has one shape: the fastest kernels are worth a search
        if settings.compile:  # the networks of earlier runs would count towards the limit on recompiling one forward
            torch.compiler.reset()
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.backends.cudnn.benchmark = searched


def fresh_model(run: RunConfig, info: DataInfo) -> tuple[nn.Module, list[str]]:
    """The network of a run with its first weights, and the names of its hidden layers; sets torch's global seed."""
    options, _ = effective_settings(run)
    torch.manual_seed(streams.stream_seed(run.seed, "weights"))
    model = build_model(run.model.name, options, info.shape, len(info.classes))
    return model, hidden_layers(run.model.name, options)


def _execute(folder: RunFolder, hooks: Hooks, command: str, places: Places, devices: Devices) -> Record:
    run = folder.run.config
    _commit()  # now, for files may change while the run goes on
    task = make_task(run.task)
    splits = task.splits(run.data, run.seed, places)
    model_options, settings = effective_settings(run)
    fabric = make_fabric(devices, settings.precision)
    if fabric.is_global_zero:
        folder.note_data(splits.info)
    model, hidden = fresh_model(run, splits.info)
    task.place(model, splits)
    fitted = _fit(folder, model, hidden, splits, settings, hooks, fabric)
    if not fabric.is_global_zero:
        fabric.barrier("measured")
        record = folder.read()
        assert record is not None
        return record
    trained = time.monotonic()
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.hand_out_test()}
    subject = Subject(model, splits.info, parts, hidden, run.seed)
    best, _ = _measure(_with(subject, fitted.best), run.data.name) if fitted.best is not None else ({}, {})
    last = _with(subject, fitted.last)
    metrics, pictures = _measure(last, run.data.name)
    read = {"data_fingerprint": splits.info.fingerprint} if splits.info.fingerprint else {}
    folder.write_model(fitted.last, fitted.best)
    folder.write_pictures(pictures)
    folder.write_details(details(last))
    record = Record(
        experiment=folder.run.experiment,
        task=run.task.name,
        data=run.data.name,
        model=run.model.name,
        method=run.method.name,
        label=folder.run.label,
        options=run.method.options,
        seed=run.seed,
        metrics=metrics,
        best=best,
        train={**fitted.facts, "settings": settings.model_dump(mode="json"), "model_options": model_options, **read},
        config_hash=run.hash,
        versions=versions(),
        hardware=hardware(str(fabric.device), fabric.world_size),
        seconds=round(fitted.facts["seconds"] + time.monotonic() - trained, 3),
        command=command,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        folder=folder.path,
    )
    for logger in hooks.loggers:  # before the run counts as finished, for then nothing is written any more
        logger.finish(fitted.facts["steps"], metrics)
    folder.finish(record)
    fabric.barrier("measured")
    return record


def _fit(
    folder: RunFolder,
    model: nn.Module,
    hidden: list[str],
    splits: DataSplits,
    settings: TrainConfig,
    hooks: Hooks,
    fabric: Fabric,
) -> Fitted:
    run = folder.run.config
    torch.manual_seed(streams.stream_seed(run.seed, "torch"))  # dropout's masks
    return fit(
        model,
        make_method(run.method.name, run.method.options),
        splits.train,
        splits.validation,
        settings,
        hidden=hidden,
        seed=run.seed,
        folder=folder.path,
        config_hash=run.hash,
        hooks=hooks,
        pixels=splits.info.pixels,
        fabric=fabric,
        unlabelled=splits.unlabelled,
        choose=make_task(run.task).choose,
    )


def _with(subject: Subject, weights: Mapping[str, Tensor]) -> Subject:
    """The subject once its network has these weights."""
    subject.model.load_state_dict(weights)
    subject.model.eval()
    return subject.on(subject.parts)


def _measure(subject: Subject, data: str) -> tuple[dict[str, float | None], dict[str, Tensor]]:
    """Every metric, and the arrays to draw."""
    metrics = measure(subject, always(subject))
    own = get_dataset(data).measures
    if own is None:
        return metrics, {}
    compute = getattr(import_module(f"manifold_mixup.lab.measures.{own}"), f"{own}_measures")
    train, test = subject.parts["train"], subject.parts["test"]
    more, arrays = compute(subject.model, train.x, train.y, test.x, test.y, subject.seed)
    return metrics | finite(more), {name: torch.as_tensor(array) for name, array in arrays.items()}


def versions() -> dict[str, str]:
    """Of everything that has an influence on numbers, and the commit of a source checkout."""
    names = (
        "manifold-mixup",
        "torch",
        "lightning-fabric",
        "numpy",
        "scikit-learn",
        "torchmetrics",
        "timm",
        "torchvision",
        "torch-geometric",
    )
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if commit := _commit():
        found["commit"] = commit
    return found


@functools.cache
def _commit() -> str:
    """The commit of a source checkout, with a + if tracked files differ from it; empty for an installed package."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return ""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "constraints.txt")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu() -> str:
    """The processor's name; Python itself knows it on some systems only."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def hardware(device: str, processes: int) -> dict[str, Any]:
    """The machine: processor, cores, device, and the threads and processes that are used."""
    if device.startswith("cuda"):
        device = torch.cuda.get_device_name(device)
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": processes,
    }
