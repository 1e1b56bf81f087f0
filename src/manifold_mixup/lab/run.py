"""One run, from its settings to its record."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manifold_mixup.lab import streams
from manifold_mixup.lab.data import Examples, get_dataset, load_data
from manifold_mixup.lab.measures import evaluate
from manifold_mixup.lab.methods import make_method
from manifold_mixup.lab.models import build_model, hidden_layers
from manifold_mixup.lab.parsing import effective_settings
from manifold_mixup.lab.records import Record, RunFolder
from manifold_mixup.lab.training import Hooks, fit

__all__ = ["execute"]


def execute(folder: RunFolder, hooks: Hooks | None = None, command: str = "") -> Record:
    """Carry out one run, or go on with it, and write its record; a finished run is only read.

    Torch's global random state and number of threads are put back afterwards.

    Args:
        folder: The folder of the run, which says what to run.
        hooks: Stopping, progress and the pace of checkpoints.
        command: The command line, for the record.

    Raises:
        Interrupted: ``hooks.stop`` said so; a checkpoint was written.
        LabError: The folder belongs to another configuration or cannot be written, the checkpoint is damaged, ...
        ManifoldMixupError: The mixer refuses the network or the layers.
    """
    folder.claim()
    record = folder.read()
    if record is not None:
        return record
    with _isolated():
        return _execute(folder, hooks or Hooks(), command)


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Keep torch's random state and threads; with one thread a run has the same bits however many run beside it."""
    threads = torch.get_num_threads()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _execute(folder: RunFolder, hooks: Hooks, command: str) -> Record:
    run = folder.run.config
    splits = load_data(run.data.name, run.data.options, run.seed)
    model_options, settings = effective_settings(run)
    method = make_method(run.method.name, run.method.options)
    torch.manual_seed(streams.stream_seed(run.seed, "weights"))
    model = build_model(run.model.name, model_options, splits.info.shape, len(splits.info.classes))
    torch.manual_seed(streams.stream_seed(run.seed, "torch"))  # dropout's masks
    fitted = fit(
        model,
        method,
        splits.train,
        splits.validation,
        settings,
        hidden=hidden_layers(run.model.name, model_options),
        seed=run.seed,
        folder=folder.path,
        config_hash=run.hash,
        hooks=hooks,
    )
    trained = time.monotonic()
    model.cpu()
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.hand_out_test()}
    last = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.load_state_dict(fitted.best)
    best, _ = _measure(model, parts, run.data.name, run.seed)
    model.load_state_dict(last)
    metrics, pictures = _measure(model, parts, run.data.name, run.seed)
    folder.write_model(last)
    folder.write_pictures(pictures)
    record = Record(
        experiment=folder.run.experiment,
        data=run.data.name,
        model=run.model.name,
        method=run.method.name,
        label=folder.run.label,
        options=run.method.options,
        seed=run.seed,
        metrics=metrics,
        best=best,
        train={**fitted.facts, "settings": settings.model_dump(mode="json"), "model_options": model_options},
        config_hash=run.hash,
        versions=_versions(),
        hardware=_hardware(),
        seconds=round(fitted.facts["seconds"] + time.monotonic() - trained, 3),
        command=command,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        folder=folder.path,
    )
    folder.finish(record)
    return record


def _measure(
    model: nn.Module, parts: Mapping[str, Examples], data: str, seed: int
) -> tuple[dict[str, float | None], dict[str, Tensor]]:
    """Every metric of one set of weights, and the arrays to draw; a value that is no finite number becomes None."""
    model.eval()
    metrics: dict[str, float] = {}
    for name, part in parts.items():
        metrics |= evaluate(model, part.x, part.y, prefix=name)
    pictures: dict[str, Tensor] = {}
    own = get_dataset(data).measures
    if own is not None:
        measure = getattr(import_module(f"manifold_mixup.lab.measures.{own}"), f"{own}_measures")
        train, test = parts["train"], parts["test"]
        more, arrays = measure(model, train.x, train.y, test.x, test.y, seed)
        metrics |= more
        pictures = {name: torch.as_tensor(array) for name, array in arrays.items()}
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}, pictures


def _versions() -> dict[str, str]:
    names = ("manifold-mixup", "torch", "lightning-fabric", "numpy", "scikit-learn", "torchmetrics")
    versions = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _cpu() -> str:
    """The processor's name; Python itself knows it on some systems only."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _hardware() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "device": device,
        "threads": 1,
    }
