"""Measuring the finished runs of an experiment, each only with what it was not measured with before."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from manifold_mixup.errors import ManifoldMixupError
from manifold_mixup.lab.components import parse_component
from manifold_mixup.lab.config import ExperimentConfig
from manifold_mixup.lab.errors import FolderBusy, Interrupted, StorageError
from manifold_mixup.lab.evaluation import evaluate_run, parse_measures
from manifold_mixup.lab.experiment import STOPPED, Outcome, Settings
from manifold_mixup.lab.records import Failure, Record
from manifold_mixup.lab.results import measured_with

__all__ = ["Progress", "measure_outcome", "measure_runs"]

Progress = Callable[[str, int, int], None]
"""Is told what is being measured, how many runs are done, and of how many."""

Component = Mapping[str, Any]


def measure_outcome(
    outcome: Outcome, configs: Sequence[ExperimentConfig], settings: Settings, progress: Progress | None = None
) -> Outcome:
    """Measure the finished runs of some experiments with the measures that those list.

    Args:
        outcome: Their runs.
        configs: The experiments.
        settings: How the runs were carried out; of several processes only the first one measures.
        progress: Is told how far it is.

    Returns:
        The outcome with what could not be measured.

    Raises:
        Interrupted: After Ctrl-C.
        StorageError: The disk is full or a folder cannot be written.
    """
    if not settings.devices.first:
        return outcome
    failures = []
    for config in configs:
        records = [record for record in outcome.records if record.experiment == config.name]
        failures += measure_runs(records, config.measures, settings, progress)
    return dataclasses.replace(outcome, unmeasured=failures)


def measure_runs(
    records: Sequence[Record], texts: Sequence[str], settings: Settings, progress: Progress | None = None
) -> list[Failure]:
    """Measure the last weights of finished runs, on their own data, with what they lack.

    What is measured is on disk at once: whoever stops it goes on from there next time.

    Args:
        records: The runs.
        texts: The measures, ``name`` or ``name:key=value,...`` each.
        settings: Where data lie, what to compute on, and the command line.
        progress: Is told how far it is; of runs that lack nothing it hears nothing.

    Returns:
        One for every run that could not be measured with everything: the others are.

    Raises:
        Interrupted: After Ctrl-C.
        UsageError: A text names no measure or none of its options.
        StorageError: The disk is full or a folder cannot be written.
    """
    components = [parse_component(text, "--measure") for text in texts]
    wanted = {entry.name: options.model_dump(mode="json") for entry, options in parse_measures(components)}
    failures: list[Failure] = []
    waiting: list[tuple[Record, list[Component]]] = []
    for record in records:
        try:
            _, there = measured_with(record.folder, record.data)
        except Exception as error:
            failures.append(_failure(record, error))
            continue
        missing: list[Component] = [c for c in components if there.get(c["name"]) != wanted[c["name"]]]
        if missing:
            waiting.append((record, missing))
    what = f"measuring {', '.join(wanted)}"
    try:
        for i, (record, missing) in enumerate(waiting):
            if progress is not None:
                progress(what, i, len(waiting))
            failures += _measure(record, missing, settings)
    except KeyboardInterrupt as error:
        raise Interrupted(STOPPED) from error
    if progress is not None and waiting:
        progress(what, len(waiting), len(waiting))
    return failures


def _measure(record: Record, missing: Sequence[Component], settings: Settings) -> list[Failure]:
    """Measure one run; if that fails, with one measure after the other, so that one does not cost the others."""
    try:
        evaluate_run(
            record.folder,
            parse_measures(missing),
            weights="last",
            places=settings.places,
            devices=dataclasses.replace(settings.devices, count=1, nodes=1),
            command=settings.command,
        )
    except (Interrupted, StorageError, FolderBusy):
        raise
    except Exception as error:
        if len(missing) == 1:
            return [_failure(record, error)]
        alone = [failure for component in missing for failure in _measure(record, [component], settings)]
        if not alone:
            return []
        text = "; ".join(dict.fromkeys(failure.error for failure in alone))
        return [dataclasses.replace(alone[0], error=text)]
    return []


def _failure(record: Record, error: Exception) -> Failure:
    text = str(error) if isinstance(error, ManifoldMixupError) else f"{type(error).__name__}: {error}"
    return Failure(record.experiment, record.label, record.seed, " ".join(text.split()), traceback.format_exc())
