"""Measuring a run after the fact: any measure, on its own test data or on anybody's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from manifold_mixup.lab import storage
from manifold_mixup.lab.config import Component, RunConfig
from manifold_mixup.lab.data import DATASETS, DataInfo, DataSplits, Examples, Pixels, Places, load_test
from manifold_mixup.lab.devices import Devices, make_fabric
from manifold_mixup.lab.errors import CorruptedFile, LabError, UsageError, nearest
from manifold_mixup.lab.measures.base import Measure, Subject
from manifold_mixup.lab.measures.registry import always, get_measure, measure
from manifold_mixup.lab.parsing import explain
from manifold_mixup.lab.records import EVALUATIONS
from manifold_mixup.lab.run import fresh_model
from manifold_mixup.lab.tasks import make_task

__all__ = ["Evaluation", "Weights", "evaluate_run", "find_runs", "parse_measures"]

Weights = Literal["last", "best", "checkpoint"]


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one run.

    Attributes:
        folder: The run's folder.
        label: Label of its method.
        seed: Its seed.
        weights: Which weights: the last ones, those that were best on validation, or those of the checkpoint.
        data: What it was measured on.
        measures: What was asked for, as names with their options.
        metrics: The numbers; None is one that is not finite.
        notes: What whoever reads them should know.
        date: When.
        command: The command line.
    """

    folder: Path
    label: str
    seed: int
    weights: str
    data: str
    measures: dict[str, dict[str, Any]]
    metrics: dict[str, float | None]
    notes: tuple[str, ...]
    date: str
    command: str

    def summary(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {**asdict(self), "folder": str(self.folder), "notes": list(self.notes)}


def find_runs(path: Path) -> list[Path]:
    """The folders of all runs at or below a path, in order.

    Raises:
        UsageError: There is none.
    """
    found = sorted(config.parent for config in path.rglob("config.json")) if path.is_dir() else []
    if not found:
        raise UsageError(f"{path} is no folder of a run, and holds none: it should hold config.json, as runs do")
    return found


def parse_measures(components: Sequence[Mapping[str, Any]]) -> list[tuple[Measure, Any]]:
    """Measures with their options, from ``{"name": ..., "options": ...}``.

    Raises:
        UnknownName: There is no such measure.
        UsageError: An option is not the measure's.
    """
    requests = []
    for component in components:
        entry = get_measure(component["name"])
        try:
            requests.append((entry, entry.options.model_validate(component["options"])))
        except ValidationError as error:
            raise UsageError(f"measure {entry.name!r}: {'; '.join(explain(error, entry.options))}") from error
    return requests


def evaluate_run(
    folder: Path,
    requests: Sequence[tuple[Measure, Any]],
    *,
    weights: Weights | None = None,
    data: Component | None = None,
    by_order: bool = False,
    places: Places | None = None,
    devices: Devices | None = None,
    command: str = "",
) -> Evaluation:
    """Measure one run and add the numbers to its ``evaluations.jsonl``.

    Measures of the last weights on the run's own data that have arrays to draw keep them in ``<measure>.safetensors``.

    Args:
        folder: The run's folder.
        requests: What to measure; the measures of every record if empty.
        weights: Which weights; None takes the last ones, or those of the checkpoint if the run is not finished.
        data: Other examples than the run's own test split; their classes are the run's, told apart by name.
        by_order: Take the n-th class of ``data`` for the n-th of the run, whatever their names.
        places: Where data lie.
        devices: What to compute on.
        command: The command line, for the record.

    Raises:
        LabError: A file is missing or damaged, the data do not fit the network, a measure lacks what it needs.
    """
    run, label = _read_config(folder)
    info = _read_info(folder)
    which, state = _read_weights(folder, weights)
    notes = ["the run is not finished: these are the weights of its checkpoint"] if which == "checkpoint" else []
    splits = _own_splits(run, info, places, notes, needed=data is None)
    parts = {} if splits is None else _parts(splits)
    if data is not None:
        parts["test"] = _foreign(data, info, by_order, places or Places())
        if seen := _seen(parts):
            notes.append(f"the run was trained or validated on {seen} of these {len(parts['test'])} examples")
    model, hidden = _network(run, info, state, folder, splits)
    model.to(make_fabric(devices or Devices(), "32-true").device).eval()
    subject = Subject(model, info, parts, hidden, run.seed)
    chosen = list(requests) or always(subject)
    found = Evaluation(
        folder=folder,
        label=label,
        seed=run.seed,
        weights=which,
        data=run.data.name if data is None else f"{data.name} {json.dumps(data.options)}",
        measures={entry.name: options.model_dump(mode="json") for entry, options in chosen},
        metrics=measure(subject, chosen),
        notes=tuple(notes),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
    )
    if which == "last" and data is None:
        _keep_arrays(subject, chosen, folder)
    line = json.dumps(found.summary(), ensure_ascii=False, allow_nan=False)
    storage.append(folder / EVALUATIONS, f"{line}\n")
    return found


def _parts(splits: DataSplits) -> dict[str, Examples]:
    return {"train": splits.train, "validation": splits.validation, "test": splits.hand_out_test()}


def _network(
    run: RunConfig, info: DataInfo, state: Mapping[str, Tensor], folder: Path, splits: DataSplits | None
) -> tuple[nn.Module, list[str]]:
    """The run's network with these weights and, on a graph, that graph; and the names of its hidden layers."""
    with torch.random.fork_rng(devices=[]):
        model, hidden = fresh_model(run, info)
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise CorruptedFile(f"the weights in {folder} do not fit the network: {error}") from error
    if splits is not None:
        make_task(run.task).place(model, splits)
    return model, hidden


def _keep_arrays(subject: Subject, chosen: Sequence[tuple[Measure, Any]], folder: Path) -> None:
    for entry, options in chosen:
        if entry.arrays is not None:
            storage.write_tensors(folder / f"{entry.name}.safetensors", entry.arrays(subject, options))


def _read_config(folder: Path) -> tuple[RunConfig, str]:
    path = folder / "config.json"
    saved = storage.read_json(path)
    try:
        return RunConfig.model_validate(saved["config"]), folder.parent.name
    except (ValidationError, KeyError, TypeError) as error:
        raise CorruptedFile(f"{path} is no configuration of a run that this version reads") from error


def _read_info(folder: Path) -> DataInfo:
    path = folder / "data.json"
    if not path.exists():
        raise UsageError(f"{folder} holds no {path.name}: the run has not begun, or was made by an older version")
    saved = storage.read_json(path)
    try:
        for name in ("shape", "classes", "features"):
            saved[name] = tuple(saved[name])
        if saved["pixels"] is not None:
            pixels = saved["pixels"]
            saved["pixels"] = Pixels(**{**pixels, "mean": tuple(pixels["mean"]), "sd": tuple(pixels["sd"])})
        if "unit_range" not in saved and saved["name"] in DATASETS:  # older than the field: our own sets never changed
            saved["unit_range"] = DATASETS[saved["name"]].info.unit_range
        return DataInfo(**saved)
    except (KeyError, TypeError) as error:
        raise CorruptedFile(f"{path} is corrupted") from error


def _read_weights(folder: Path, weights: Weights | None) -> tuple[str, Mapping[str, Tensor]]:
    names = {"last": "model.safetensors", "best": "best.safetensors"}
    finished = (folder / "record.json").exists()
    which = weights or ("last" if finished else "checkpoint")
    if which in names:
        path = folder / names[which]
        if not path.exists():
            why = "the run had no validation split" if finished else "the run is not finished; try --weights checkpoint"
            raise UsageError(f"{folder} holds no {path.name}: {why}")
        return which, storage.read_tensors(path)
    state = storage.load_state(folder / "checkpoint")
    if state is None:
        raise UsageError(f"{folder} holds no checkpoint yet")
    if state.get("average") is None:
        return which, state["model"]
    prefix = "module."
    return which, {k.removeprefix(prefix): v for k, v in state["average"].items() if k.startswith(prefix)}


def _own_splits(
    run: RunConfig, info: DataInfo, places: Places | None, notes: list[str], *, needed: bool
) -> DataSplits | None:
    """The run's own splits; if they are not at hand and not asked for, None, and a note that says so."""
    try:
        splits = make_task(run.task).splits(run.data, run.seed, places)
        if splits.info.fingerprint != info.fingerprint:
            raise UsageError(f"the data {info.name!r} have changed since the run was trained on them")
    except LabError as error:
        if needed:
            raise
        notes.append(f"without the run's own data ({error})")
        return None
    return splits


def _seen(parts: Mapping[str, Examples]) -> int:
    """How many of the test examples are, to the last bit, among those that the run learned from or was chosen by."""

    def rows(part: str) -> list[int]:
        x = parts[part].x.flatten(1).contiguous() if part in parts else torch.empty(0, 1)
        return [hash(row.tobytes()) for row in x.numpy()]

    known = {*rows("train"), *rows("validation")}
    return sum(row in known for row in rows("test"))


def _foreign(data: Component, own: DataInfo, by_order: bool, places: Places) -> Examples:
    """Other examples with the run's labels.

    Raises:
        UsageError: Their shape or their classes are not the run's, or one of them is a graph.
    """
    if own.nodes:
        raise UsageError("a network on a graph is measured on that graph only: leave out --data")
    options = dict(data.options)
    if data.name in ("folder", "hf") and own.pixels is not None:  # made to fit, unless told otherwise
        options.setdefault("size", own.shape[-1])
        options.setdefault("channels", own.shape[0])
    info, examples = load_test(data.name, options, places)
    if info.shape != own.shape or (info.pixels is None) != (own.pixels is None):
        raise UsageError(f"data {data.name!r} have examples of shape {info.shape}, the network reads {own.shape}")
    if by_order:
        if len(info.classes) != len(own.classes):
            raise UsageError(f"data {data.name!r} have {len(info.classes)} classes, the network {len(own.classes)}")
        return examples
    unknown = [name for name in info.classes if name not in own.classes]
    if unknown:
        raise UsageError(
            f"data {data.name!r} have classes that the network was not trained on: {', '.join(map(repr, unknown[:5]))}"
            f"{' and more' if len(unknown) > 5 else ''} ({nearest(unknown[0], own.classes)}); rename them, or pass "
            "--classes-by-order if the n-th class of both is the same"
        )
    places_of = torch.tensor([own.classes.index(name) for name in info.classes])
    return Examples(examples.x, places_of[examples.y])
