"""What the page says of how the runs were made: cost, settings, examples, versions, and every run by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from manifold_mixup.lab.measures.catalog import describe
from manifold_mixup.lab.report.collect import Experiment, Run, settings_of
from manifold_mixup.lab.report.findings import called, listed, number
from manifold_mixup.lab.report.tables import NOTHING, Plain, plain
from manifold_mixup.lab.side_by_side import duration
from manifold_mixup.lab.statistics import format_mean_sd, summary
from manifold_mixup.lab.tasks import TASKS

__all__ = ["cost_table", "facts", "methods_table", "runs_table"]


def cost_table(experiment: Experiment) -> Plain | None:
    """Time and memory, per method; they are measurements of one machine that may have done other things as well."""
    columns: list[tuple[str, Callable[[Run], float | None], Callable[[float], float], int]] = [
        ("step time (ms)", lambda run: _fact(run, "step_seconds"), lambda value: 1000 * value, 2),
        ("peak memory (MiB)", lambda run: _fact(run, "peak_memory_mib"), float, 0),
        ("wall time of a run (s)", lambda run: run.record.seconds, float, 1),
    ]
    there = [c for c in columns if any(c[1](run) is not None for run in experiment.runs)]
    if not experiment.runs:
        return None
    timed = there[0][0].startswith("step time")
    rows = []
    base: float | None = None
    for method in experiment.methods:
        cells = []
        for title, read, convert, digits in there:
            values = [convert(value) for run in method.runs.values() if (value := read(run)) is not None]
            cells.append(format_mean_sd(summary(values), digits) if values else NOTHING)
            if title.startswith("step time"):
                mean = summary(values).mean if values else None
                base = mean if method is experiment.methods[0] else base
                cells.append(NOTHING if mean is None or not base else f"{mean / base:.2f}")
        rows.append([method.label, *cells, str(len(method.runs))])
    titles = [title for title, *_ in there]
    if timed:
        titles.insert(1, f"step time, ratio to {experiment.methods[0].label}")
    devices = _distinct(str(run.record.hardware.get("device", "")) for run in experiment.runs)
    kinds = _distinct(str(run.record.train.get("peak_memory_of", "")) for run in experiment.runs)
    notes = [f"Measured while the runs were made{' on ' + ', '.join(devices) if devices else ''}, not a benchmark."]
    if kinds:
        notes.append(f"Peak memory is that of the {', '.join(kinds)}.")
    return plain("Cost", ["method", *titles, "runs"], rows, notes=notes)


def _fact(run: Run, name: str) -> float | None:
    value = run.record.train.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def runs_table(experiment: Experiment, names: Sequence[str]) -> Plain | None:
    """The measures of every run, with its time and its folder; None if there is no run."""
    metrics = [describe(name) for name in names]
    rows = []
    for method in experiment.methods:
        for seed, run in sorted(method.runs.items()):
            values = [method.values(name).get(seed) for name in names]
            cells = [NOTHING if v is None else number(v, m.digits) for v, m in zip(values, metrics, strict=True)]
            rows.append([method.label, str(seed), *cells, f"{run.record.seconds:.1f}", _place(run)])
    columns = ["method", "seed", *(m.title for m in metrics), "seconds", "folder"]
    return plain("All runs", columns, rows) if rows else None


def _place(run: Run) -> str:
    """A run's folder below that of all runs: where those lie on a machine is not for all who are sent the page."""
    return "/".join(run.folder.parts[-3:]) or NOTHING


def methods_table(experiment: Experiment) -> Plain | None:
    """The options of every method, and settings that not all methods share; None if there is no run."""
    shared = _shared(experiment)
    rows = []
    for method in experiment.methods:
        own = {**method.record.options, **{k: v for k, v in settings_of(method.record).items() if k not in shared}}
        rows.append([method.label, method.record.method, _assignments(own) or NOTHING])
    columns = ["method", "name", "options and own settings"]
    return plain("Methods", columns, rows, numeric=False) if rows else None


def _shared(experiment: Experiment) -> dict[str, Any]:
    """The settings that all runs have in common."""
    settings = [settings_of(run.record) for run in experiment.runs]
    names = list(dict.fromkeys(name for setting in settings for name in setting))
    missing = object()
    return {
        name: settings[0][name]
        for name in names
        if all(setting.get(name, missing) == settings[0].get(name, missing) for setting in settings)
    }


def facts(experiment: Experiment) -> list[tuple[str, str]]:
    """Name and value of what the runs have in common, and each value of what differs between them."""
    records = [run.record for run in experiment.runs]
    seconds = [record.seconds for record in records]
    dates = sorted(record.date[:10] for record in records)
    days = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else ""
    return [
        *(("task", TASKS[name].title if name in TASKS else name) for name in sorted(experiment.tasks)),
        ("data", experiment.data),
        *(("training examples", text) for text in _examples(experiment)),
        ("network", experiment.model),
        ("seeds", ", ".join(map(str, experiment.seeds))),
        ("training, all methods", _assignments(_shared(experiment)) or "not recorded"),
        ("runs", f"{len(seconds)}, {duration(sum(seconds))} in all"),
        *((("date", days),) if days else ()),
        *(("versions", text) for text in _distinct(_items(record.versions) for record in records)),
        *(("hardware", text) for text in _distinct(_items(record.hardware) for record in records)),
        ("configurations", f"{len({record.config_hash for record in records})} of different hash"),
    ]


def _examples(experiment: Experiment) -> list[str]:
    """How many examples were trained on: once if all runs agree, else with the methods that each number is of."""
    found: dict[str, list[str]] = {}
    for method in experiment.methods:
        for run in method.runs.values():
            train = run.record.train
            counts = [(train.get("examples"), " labelled" if run.record.task != "classification" else "")]
            counts += [(train.get("unlabelled"), " unlabelled")]
            text = ", ".join(f"{count:,}{kind}" for count, kind in counts if isinstance(count, int))
            found.setdefault(text, []).append(called(method.label))
    found.pop("", None)
    if len(found) < 2:
        return list(found)
    return [f"{listed(list(dict.fromkeys(labels)))}: {text}" for text, labels in found.items()]


def _assignments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items())


def _items(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _distinct(found: Iterable[str]) -> list[str]:
    return [text for text in dict.fromkeys(found) if text]
