"""Published numbers and ours, side by side: grids of text, which the terminal and the pages of results show alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from manifold_mixup.lab.measures.catalog import describe
from manifold_mixup.lab.published import Published
from manifold_mixup.lab.records import Record
from manifold_mixup.lab.results import Result, by_seed, public_command
from manifold_mixup.lab.statistics import format_mean_sd, summary
from manifold_mixup.lab.studies import Column, Panel, Row, Scale
from manifold_mixup.lab.verdict import OUTCOMES, Verdict, judge

__all__ = [
    "Grid",
    "as_markdown",
    "as_page",
    "duration",
    "measured_text",
    "panel_grid",
    "printed",
    "provenance",
    "summed_up",
    "verdicts",
]

NOTHING = "-"


@dataclass(frozen=True)
class Grid:
    """A table of text.

    Attributes:
        title: What it shows.
        head: Names of the columns.
        rows: Cells, as many in each row as in the head.
        notes: Sentences below it.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default_factory=tuple)


def panel_grid(panel: Panel, results: Iterable[Result], scale: Scale, notes: Sequence[str] = ()) -> Grid:
    """One panel: for each method and number the published value, ours as mean ± sd, and over how many runs.

    Args:
        panel: The panel.
        results: Our runs of its recipe.
        scale: The scale of that recipe.
        notes: Sentences to add below it.
    """
    results = list(results)
    # a number that was never published has no column of dashes
    known = [any(panel.twin(row, c) is not None for row in panel.rows) for c in panel.columns]
    any_known, first = any(known), panel.rows[0]

    def cells(row: Row, column: Column, published: bool) -> list[str]:
        values = by_seed(results, row.label, column.metric, column.weights)
        if column.relative:
            base = by_seed(results, first.label, column.metric, column.weights)
            values = {seed: value / base[seed] for seed, value in values.items() if base.get(seed)}
        ours = measured_text(values, column)
        if not published:
            return [ours]
        return [printed(panel.twin(row, column), panel.twin(first, column) if column.relative else None), ours]

    def kinds(published: bool) -> tuple[str, ...]:
        return ("published", scale) if published else (scale,)

    runs = Counter(result.record.label for result in results)
    title = f"{panel.title} ({scale}: {panel.recipes[scale]})" if scale in panel.recipes else panel.title
    if panel.transpose:
        head = ["", *(f"{row.label}, {kind}" for row in panel.rows for kind in kinds(any_known))]
        body = [
            [column.heading, *(c for row in panel.rows for c in cells(row, column, any_known))]
            for column in panel.columns
        ]
        body.append(["runs", *(c for row in panel.rows for c in [*[""] * any_known, str(runs[row.label])])])
    else:
        columns = list(zip(panel.columns, known, strict=True))
        head = ["method", *(f"{c.heading}, {kind}" for c, published in columns for kind in kinds(published)), "runs"]
        body = [
            [row.label, *(cell for c, published in columns for cell in cells(row, c, published)), str(runs[row.label])]
            for row in panel.rows
        ]
    return Grid(title, head, body, [*([panel.note] if panel.note else []), *notes])


def printed(entry: Published | None, base: Published | None = None) -> str:
    """A published number as it is printed, or its ratio to another one."""
    if entry is None:
        return NOTHING
    if base is not None:
        return f"{entry.value / base.value:.2f}"
    digits = max(2 if entry.unit == "percent" else 3, _decimals(entry.value))
    if entry.unit == "1":
        digits = 2
    value = f"{entry.value:.{digits}f}"
    return value if entry.std is None else f"{value} ± {entry.std:.{max(3, _decimals(entry.std))}f}"


def _decimals(value: float) -> int:
    return len(repr(value).partition(".")[2])


def measured_text(values: Mapping[int, float], column: Column) -> str:
    """A number of ours as mean ± sd over the seeds; runs that diverged are counted, not averaged."""
    if not values:
        return NOTHING
    digits = 2 if column.relative else describe(column.metric).digits
    shown = [100 - v for v in values.values()] if column.complement else list(values.values())
    finite = [v for v in shown if math.isfinite(v)]
    if len(finite) < len(shown):
        text = format_mean_sd(summary(finite), digits) if finite else "no number"
        return f"{text} ({len(shown) - len(finite)} of {len(shown)} diverged)"
    return format_mean_sd(summary(shown), digits)


def verdicts(panel: Panel, results: Iterable[Result]) -> list[Verdict]:
    """What our runs say of every claim of a panel."""
    results = list(results)
    found = []
    for claim in panel.claims:
        for metric in claim.metrics:
            column = panel.column(metric, claim.weights)
            words = "lower" if column.lower_is_better else "higher"
            name = (column.title or describe(metric).title) + column.suffix  # differences are of what is recorded
            text = f"{panel.title}, {name}: {claim.better} is {words} than {claim.than}"
            better, than = (by_seed(results, label, metric, claim.weights) for label in (claim.better, claim.than))
            digits = describe(metric).digits
            found.append(judge(text, better, than, lower_is_better=column.lower_is_better, digits=digits))
    return found


def summed_up(found: Sequence[Verdict]) -> str:
    """How many there are of each, such as: Of 4 claims 2 hold, 0 do not hold, 2 our runs cannot decide."""
    count = Counter(verdict.outcome for verdict in found)
    words = dict(zip(OUTCOMES, ("hold", "do not hold", "our runs cannot decide", "were not run"), strict=True))
    parts = [f"{count[outcome]} {words[outcome]}" for outcome in OUTCOMES if count[outcome] or outcome != "not run"]
    return f"Of {len(found)} claims {', '.join(parts)}."


def provenance(results: Iterable[Result]) -> str:
    """Where numbers come from, in one sentence: command, commit, machine, date, and what they cost."""
    records = [result.record for result in results]
    if not records:
        return ""

    def all_of(values: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(value for value in values if value)) or "not recorded"

    dates = sorted(record.date[:10] for record in records)
    day = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    commands = all_of(f"`{public_command(record.command)}`" for record in records)
    commits = all_of(record.versions.get("commit", "") for record in records)
    torch = all_of(record.versions.get("torch", "") for record in records)
    cost = duration(sum(record.seconds for record in records))
    machine = all_of(map(_machine, records))
    return (
        f"Made by {commands}, commit {commits}, PyTorch {torch}, {machine}, {day}: {len(records)} runs, {cost} in all."
    )


def _machine(record: Record) -> str:
    found = record.hardware
    if not str(found.get("device", "cpu")).startswith("cpu"):
        return str(found["device"])
    return f"{found.get('cpu')}, {found.get('cpus')} cores, {found.get('threads')} a run"


def duration(seconds: float) -> str:
    """``45 s``, ``20 min`` or ``3.3 h``."""
    minutes, hours = round(seconds / 60), seconds / 3600
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{hours:.1f} h"


def as_page(title: str, note: str, grids: Sequence[Grid], found: Sequence[Verdict]) -> str:
    """A study as a page of Markdown: what it is, its tables, and what our runs say of each claim."""
    parts = [f"# {title}", *([note] if note else [])]
    for grid in grids:
        parts += [f"## {grid.title}", as_markdown(grid)]
    if found:
        parts += ["## Claims, and what our runs say of them", summed_up(found)]
        parts += ["\n".join(f"- {v.claim}: **{v.outcome}** ({v.reason})" for v in found)]
    return "\n\n".join(parts) + "\n"


def as_markdown(grid: Grid) -> str:
    """A grid as a table in Markdown."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(" ".join(cell.splitlines()).replace("|", "\\|") for cell in cells) + " |"

    lines = [line(grid.head), line(["---"] * len(grid.head)), *map(line, grid.rows)]
    return "\n".join([*lines, *(f"\n{note}" for note in grid.notes)])
