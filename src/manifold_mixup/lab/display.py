"""What people see in the terminal: progress on stderr, tables on stdout."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from manifold_mixup.cutpoints import CutPoint
from manifold_mixup.lab.config import PlannedRun
from manifold_mixup.lab.data.base import DataInfo
from manifold_mixup.lab.measures.catalog import MAIN, OWN, describe
from manifold_mixup.lab.options import Options
from manifold_mixup.lab.records import Failure, Record
from manifold_mixup.lab.selection import score
from manifold_mixup.lab.statistics import format_mean_sd, paired_difference, summary

if TYPE_CHECKING:
    from manifold_mixup.lab.evaluation import Evaluation

__all__ = [
    "Bars",
    "comparison",
    "console",
    "cut_point_table",
    "listing",
    "measured",
    "options_text",
    "print_measured",
    "single",
    "size_text",
    "working",
]


def console(*, stderr: bool = False) -> Console:
    """A console that does not squeeze tables to 80 columns where the output is a file or a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 120, soft_wrap=False, highlight=False)


class _ExamplesPerSecond(ProgressColumn):
    """Training examples per second of a run, over the last half minute."""

    def render(self, task: Task) -> Text:
        batch = task.fields.get("batch") or 0
        return Text(f"{task.speed * batch:,.0f}/s" if batch and task.speed else "", style="progress.data.speed")


class Bars:
    """A watcher with one bar for all runs and one for each run that is going on; silent unless stderr is a terminal.

    Args:
        runs: Number of runs.
        quiet: Show nothing.
    """

    def __init__(self, runs: int, *, quiet: bool = False) -> None:
        target = console(stderr=True)
        self._runs = runs
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _ExamplesPerSecond(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=target,
            disable=quiet or not target.is_terminal,
            transient=True,
        )
        self._all = self._progress.add_task("runs", total=runs)
        self._running: dict[tuple[str, str, int], TaskID] = {}
        self._preparing: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def started(self, run: PlannedRun) -> None:
        """A bar for a run."""
        text = f"{run.experiment}: {run.label}, seed {run.config.seed}"
        self._running[_key(run)] = self._progress.add_task(escape(text), total=run.config.train.steps, batch=0)

    def advanced(self, run: PlannedRun, step: int, steps: int, batch: int) -> None:
        """Move its bar."""
        if _key(run) in self._running:
            self._progress.update(self._running[_key(run)], completed=step, total=steps or None, batch=batch)

    def prepared(self, what: str, done: int, total: int) -> None:
        """A bar for a download or for the decoding of images, until it is complete."""
        task = self._preparing.get(what)
        if task is None:
            task = self._preparing[what] = self._progress.add_task(escape(what), total=total or None)
        self._progress.update(task, completed=done, total=total or None)
        if total and done >= total:
            self._progress.remove_task(self._preparing.pop(what))

    def ended(self, run: PlannedRun, outcome: Record | Failure) -> None:
        """Remove its bar; of several runs, say at once which one failed (a single one's error ends the command)."""
        task = self._running.pop(_key(run), None)
        if task is not None:
            self._progress.remove_task(task)
        self._progress.advance(self._all)
        if isinstance(outcome, Failure) and self._runs > 1:
            text = f"failed: {outcome.label}, seed {outcome.seed}: {outcome.error}"
            self._progress.console.print(text, markup=False, soft_wrap=True)


def _key(run: PlannedRun) -> tuple[str, str, int]:
    return run.experiment, run.label, run.config.seed


def working(text: str, *, quiet: bool = False) -> AbstractContextManager[Any]:
    """A spinner for what takes a moment; silent unless stderr is a terminal."""
    target = console(stderr=True)
    return nullcontext() if quiet or not target.is_terminal else target.status(escape(text))


def comparison(records: Sequence[Record]) -> Iterable[Table]:
    """Tables of one experiment: mean ± sd over seeds, and the paired difference to the first method.

    The first table holds error, likelihood and calibration; a second one the data set's own measures, if it has any.
    """
    by_label: dict[str, dict[int, Mapping[str, float | None]]] = {}
    for record in records:
        by_label.setdefault(record.label, {})[record.seed] = record.metrics
    if not records:
        return
    first = records[0]
    own = [name for name in OWN if any(name in record.metrics for record in records)]
    for names, title in (
        (MAIN, f"{first.experiment}: {first.data}, {first.model}"),
        (own, "the data set's own measures"),
    ):
        if names:
            yield _comparison_table(escape(title), names, by_label)


def _comparison_table(
    title: str, names: Sequence[str], by_label: Mapping[str, Mapping[int, Mapping[str, float | None]]]
) -> Table:
    baseline, *others = by_label
    caption = "mean ± sd over seeds, of the last weights"
    if others:
        caption += f"; below it the difference to {baseline!r}, paired by seed, with its 95 % interval"
    table = Table(title=title, show_lines=True, caption=escape(caption), caption_justify="left")
    table.add_column("method")
    table.add_column("seeds", justify="right")
    for name in names:
        metric = describe(name)
        table.add_column(escape(f"{metric.title} ({metric.unit})" if metric.unit else metric.title), justify="right")
    for label, runs in by_label.items():
        cells = []
        for name in names:
            values = _values(runs, name)
            text = format_mean_sd(summary(values.values()), describe(name).digits) if values else "-"
            if label != baseline:
                text += _difference(values, _values(by_label[baseline], name), describe(name).digits)
            cells.append(escape(text))
        table.add_row(escape(label), str(len(runs)), *cells)
    return table


def _difference(values: Mapping[int, float], reference: Mapping[int, float], digits: int) -> str:
    """The lines below a mean: the paired difference, its interval, and whether that leaves out 0."""
    found = paired_difference(values, reference)
    if found.n == 0:
        return ""
    text = f"\n{found.mean:+.{digits}f}"
    if found.low is not None and found.high is not None:
        text += f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    if found.n > 1 and not found.significant:
        text += "\nno significant difference"
    return text


def _values(by_seed: Mapping[int, Mapping[str, float | None]], name: str) -> dict[int, float]:
    """Seed to value; NaN where it was no finite number, so that a run that diverged shows in the mean."""
    found = {seed: metrics[name] for seed, metrics in by_seed.items() if name in metrics}
    return {seed: math.nan if value is None else value for seed, value in found.items()}


def single(record: Record) -> Table:
    """All metrics of one run, of the last weights and, with a validation split, of those that did best on it."""
    table = Table(title=escape(f"{record.data}, {record.model}, {record.label}, seed {record.seed}"))
    table.add_column("metric")
    table.add_column("last weights", justify="right")
    if record.best:
        table.add_column(
            f"lowest validation {score(record.train)} (step {record.train.get('best_step')})", justify="right"
        )
    for name, value in record.metrics.items():
        values = [value, *([record.best.get(name)] if record.best else [])]
        table.add_row(name, *("-" if v is None else f"{v:.4f}" for v in values))
    return table


def measured(evaluations: Sequence[Evaluation]) -> Table:
    """What was measured on one run or on several: numbers in rows, methods in columns, mean ± sd over seeds."""
    by_label: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        by_label.setdefault(evaluation.label, []).append(evaluation)
    first = evaluations[0]
    weights = " and ".join(dict.fromkeys(evaluation.weights for evaluation in evaluations))
    table = Table(title=escape(f"measured on {first.data}"), caption=f"weights: {weights}", caption_justify="left")
    table.add_column("measure")
    for label, group in by_label.items():
        seeds = ", ".join(str(evaluation.seed) for evaluation in group)
        table.add_column(escape(f"{label}\nseed{'s' * (len(group) > 1)} {seeds}"), justify="right")
    for name in dict.fromkeys(name for evaluation in evaluations for name in evaluation.metrics):
        metric = describe(name)
        cells = []
        for group in by_label.values():
            values = [evaluation.metrics[name] for evaluation in group if name in evaluation.metrics]
            numbers = [math.nan if value is None else value for value in values]
            cells.append(format_mean_sd(summary(numbers), metric.digits) if numbers else "-")
        table.add_row(escape(f"{metric.title} ({metric.unit})" if metric.unit else metric.title), *cells)
    return table


def size_text(info: DataInfo) -> str:
    """How many examples of what shape and how many classes, as far as that is known without the data."""
    examples = "" if info.sizes is None else f"{info.sizes[0]:,} to train, {info.sizes[1]:,} to test\n"
    shape = f"{shape_text(info.shape)}\n" if info.shape else ""
    if info.nodes:
        shape = f"{info.nodes:,} nodes of {shape_text(info.shape)} features\n"
    return f"{examples}{shape}{len(info.classes)} classes" if info.classes else f"{examples}{shape}" or "as it is"


def listing(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A plain table of text."""
    table = Table(title=title, show_lines=True)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def options_text(model: type[Options]) -> str:
    """The options of a part, one per line, with default and meaning."""
    lines = [f"{name}={field.default}: {field.description}" for name, field in model.model_fields.items()]
    return "\n".join(lines) or "-"


def cut_point_table(title: str, points: Sequence[CutPoint], layers: Sequence[str]) -> Table:
    """The places where a network may be mixed, with those of S marked."""
    masks = any(point.masks for point in points)
    caption = (
        "S: the layers that are drawn from. Compute: share of the forward's FLOPs up to and with the layer, and inside "
        "it. End: of a stage, a run of layers of one shape."
    )
    if masks:
        caption += " Masks: mixing here unites the two examples' masks from there on."
    table = Table(title=escape(title), caption=escape(caption), caption_justify="left")
    table.add_column("S")
    table.add_column("layer", overflow="fold")
    table.add_column("one hidden state")
    for heading in ("features", "compute", "its own"):
        table.add_column(heading, justify="right")
    for heading in ("end", "masks")[: 1 + masks]:
        table.add_column(heading, justify="center")
    for point in points:
        marks = (point.stage_end, point.masks)[: 1 + masks]
        table.add_row(
            "●" if point.name in layers else "",
            escape(point.name),
            shape_text(point.shape),
            f"{point.features:,}",
            f"{point.compute:.1%}",
            f"{point.own_compute:.1%}",
            *("●" if mark else "" for mark in marks),
        )
    return table


def shape_text(shape: tuple[Any, ...]) -> str:
    """``64×56×56``; several tensors that are mixed together are joined by +."""
    if shape and isinstance(shape[0], tuple):
        return " + ".join(map(shape_text, shape))
    return "\N{MULTIPLICATION SIGN}".join(map(str, shape)) or "1"


def print_measured(found: Sequence[Evaluation]) -> None:
    """The table of some evaluations, and below it the notes of each."""
    out = console()
    out.print(measured(found))
    for note in dict.fromkeys(f"{evaluation.folder}: {note}" for evaluation in found for note in evaluation.notes):
        out.print(note, markup=False, highlight=False, soft_wrap=True)
