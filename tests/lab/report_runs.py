"""Folders of runs that never took place, with the files that a report reads."""

from __future__ import annotations

import json
import math

import numpy as np
from safetensors.numpy import save_file

from manifold_mixup.lab import storage
from manifold_mixup.lab.config import slug
from manifold_mixup.lab.records import EVALUATIONS, Record
from manifold_mixup.lab.report.collect import Going, collect
from manifold_mixup.lab.results import Result, measured_with

BINS = 15


def record_fields(label="none", seed=0, **changes):
    """The fields of a record, but for its folder."""
    return {
        "experiment": "digits",
        "data": "digits",
        "model": "mlp",
        "method": "none",
        "label": label,
        "options": {},
        "seed": seed,
        "metrics": {"test_error": 3.0, "test_nll": 0.1},
        "best": {},
        "train": {},
        "config_hash": "0" * 16,
        "versions": {"torch": "2.13.0"},
        "hardware": {"cpus": 2},
        "seconds": 1.5,
        "command": "manifold-mixup compare --recipe digits",
        "date": "2026-01-01T00:00:00+00:00",
        **changes,
    }


def write_run(runs, label="none", seed=0, *, log=(), arrays=None, classes=(), measured=None, measures=None, **changes):
    """A finished run as the lab leaves it, read back as a `Result`.

    ``arrays``: kind to named arrays; ``measured``, ``measures``: of a later evaluation; ``changes``: of the record.
    """
    fields = record_fields(label, seed, **changes)
    folder = runs / fields["experiment"] / (slug(label) or "run") / f"seed-{seed}"
    folder.mkdir(parents=True)
    record = Record(**fields, folder=folder)
    storage.write_json(folder / "record.json", record.model_dump(mode="json", by_alias=True))
    if log:
        write_log(folder, log)
    if classes:
        storage.write_json(folder / "data.json", {"name": record.data, "classes": list(classes)})
    for kind, named in (arrays or {}).items():
        save_file({name: np.asarray(a, order="C") for name, a in named.items()}, folder / f"{kind}.safetensors")
    if measured:
        line = {"weights": "last", "data": record.data, "metrics": measured, "measures": measures or {}}
        (folder / EVALUATIONS).write_text(json.dumps(line) + "\n", encoding="utf-8")
    return Result(record, *measured_with(folder, record.data))


def write_log(folder, lines):
    """``log.jsonl``, one line for each mapping."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def log_lines(values, *, every=10, per_epoch=10):
    """Looks at the validation split, ``every`` so many steps; ``values`` are the errors in %, NLL and loss follow."""
    return [
        {
            "step": every * place,
            "epoch": every * place / per_epoch,
            "train_loss": None if value is None else value / 50,
            "lr": 0.1,
            "validation_error": value,
            "validation_nll": None if value is None else value / 25,
        }
        for place, value in enumerate(values, 1)
    ]


def going(label="none", seed=0, values=(), **keys):
    """An unfinished run whose log holds these validation errors."""
    return Going("digits", "digits", "mlp", label, seed, log=tuple(log_lines(values)), **keys)


def experiment_of(results, unfinished=()):
    """The one experiment that the runs belong to."""
    return collect(results, going=unfinished)[0]


def details(probabilities, y, *, temperature=2.0, images=None, most=12):
    """The arrays of ``details.safetensors`` by plain loops, from probabilities ``(n, classes)`` and true classes."""
    scaled = probabilities ** (1 / temperature)
    scaled = scaled / scaled.sum(axis=1, keepdims=True)
    confusion = np.zeros((probabilities.shape[1],) * 2, np.int64)
    for row, true in zip(probabilities, y, strict=True):
        confusion[true, row.argmax()] += 1
    wrong = [i for i, row in enumerate(probabilities) if row.argmax() != y[i]]
    wrong = np.array(sorted(wrong, key=lambda i: -probabilities[i].max())[:most], np.int64)
    return {
        "reliability": reliability(probabilities, y),
        "reliability_scaled": reliability(scaled, y),
        "temperature": np.array([temperature]),
        "confusion": confusion,
        "mistakes_index": wrong,
        "mistakes_true": np.asarray(y, np.int64)[wrong],
        "mistakes_predicted": probabilities.argmax(axis=1)[wrong],
        "mistakes_confidence": probabilities.max(axis=1)[wrong],
        **({} if images is None else {"mistakes_image": images[wrong]}),
    }


def reliability(probabilities, y):
    """Count, sum of confidences and number right, ``(15, 3)``, of the bins of the top probability."""
    table = np.zeros((BINS, 3))
    for row, true in zip(probabilities, y, strict=True):
        place = min(max(math.ceil(row.max() * BINS) - 1, 0), BINS - 1)
        table[place] += 1, row.max(), row.argmax() == true
    return table
