"""The tables of the page, each with its forms to copy: Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from manifold_mixup.lab.measures.catalog import Metric, describe
from manifold_mixup.lab.report.collect import Experiment, Method
from manifold_mixup.lab.report.findings import MINUS, missing, number
from manifold_mixup.lab.side_by_side import Grid, as_markdown
from manifold_mixup.lab.statistics import Difference, format_mean_sd, paired_difference, summary

__all__ = ["NOTHING", "Cell", "Copies", "Plain", "Row", "Table", "as_csv", "as_latex", "main_table", "plain", "table"]

NOTHING = "\N{EN DASH}"

Twins = Mapping[tuple[str, str], str]
"""Published numbers as printed, by label of the method and name of the measure."""


@dataclass(frozen=True)
class Cell:
    """One measure of one method.

    Attributes:
        value: Mean ± standard deviation.
        sort: The mean in full, for sorting; NaN where there is none.
        notes: What a reader must know about it: missing or diverged runs.
        difference: Mean difference to the first method, empty for the first method itself.
        interval: Its 95 % interval, empty where there is none.
        verdict: Why there is no interval, or that it holds 0.
        significant: Whether the interval leaves out 0.
        published: The published number, empty where none belongs to it.
        numbers: Mean, standard deviation, difference and the ends of its interval, None for what there is not.
    """

    value: str
    sort: float = math.nan
    notes: tuple[str, ...] = ()
    difference: str = ""
    interval: str = ""
    verdict: str = ""
    significant: bool = False
    published: str = ""
    numbers: tuple[float | None, ...] = (None,) * 5


@dataclass(frozen=True)
class Row:
    """One method of the table."""

    label: str
    index: int
    n: int
    note: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Copies:
    """A table in other forms."""

    markdown: str
    csv: str
    latex: str


@dataclass(frozen=True)
class Table:
    """Methods x measures."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    copies: Copies


@dataclass(frozen=True)
class Plain:
    """A table of text."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    numeric: bool = True
    copies: Copies = field(default_factory=lambda: Copies("", "", ""))


def heading(metric: Metric) -> str:
    """A measure's title with its unit."""
    return f"{metric.title} ({metric.unit})" if metric.unit else metric.title


def table(
    experiment: Experiment, names: Sequence[str], *, best: bool = False, twins: Twins | None = None
) -> tuple[Row, ...]:
    """Methods x measures, each with its difference to the first method.

    Args:
        experiment: The runs.
        names: The measures, one per column.
        best: Whether to take the weights with the best validation score instead of the last ones.
        twins: Published numbers.
    """
    rows = []
    for method in experiment.methods:
        first = None if method is experiment.methods[0] else experiment.methods[0]
        cells = tuple(
            _cell(method, first, name, best, (twins or {}).get((method.record.label, name), "")) for name in names
        )
        rows.append(Row(method.label, method.index, len(method.runs), missing(experiment, method), cells))
    return tuple(rows)


def main_table(
    experiment: Experiment, caption: str, names: Sequence[str], *, best: bool = False, twins: Twins | None = None
) -> Table:
    """The same with its caption and its forms to copy."""
    rows = table(experiment, names, best=best, twins=twins)
    columns = tuple(heading(describe(name)) for name in names)
    shown = [[row.label, str(row.n), *(_in_one_line(cell) for cell in row.cells)] for row in rows]
    head = ["method", "n", *columns]
    parts = ("mean", "sd", "difference", "low", "high")
    wide = ["method", "n", *(f"{name} {part}" for name in names for part in parts)]
    numbers: list[list[object]] = [[r.label, r.n, *(v for c in r.cells for v in c.numbers)] for r in rows]
    copies = Copies(as_markdown(Grid(caption, head, shown)), as_csv(wide, numbers), as_latex(head, shown, caption))
    return Table(caption, columns, rows, copies)


def plain(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], **keys: object) -> Plain:
    """A table of text with its forms to copy; ``keys`` are the others of :class:`Plain`."""
    copies = Copies(as_markdown(Grid(caption, columns, rows)), as_csv(columns, rows), as_latex(columns, rows, caption))
    return Plain(caption, columns, rows, copies=copies, **keys)  # type: ignore[arg-type]


def _cell(method: Method, first: Method | None, name: str, best: bool, published: str) -> Cell:
    metric = describe(name)
    values = method.values(name, best=best)
    finite = [value for value in values.values() if math.isfinite(value)]
    lost = [str(seed) for seed, value in values.items() if not math.isfinite(value)]
    notes = []
    if len(values) < len(method.runs):
        notes.append(f"measured in {len(values)} of {len(method.runs)} runs")
    if lost:
        where = f"{'seed' if len(lost) == 1 else 'seeds'} {', '.join(lost)}"
        notes.append(f"no finite number at {where}" + (", left out of the mean" if finite else ""))
    found = summary(finite) if finite else None
    shown = NOTHING if found is None else format_mean_sd(found, metric.digits).replace("-", MINUS)
    mean, sd = (math.nan, None) if found is None else (found.mean, found.sd)
    ours = (None if found is None else mean, sd)
    if first is None or not values:
        return Cell(shown, mean, tuple(notes), published=published, numbers=(*ours, None, None, None))
    difference = paired_difference(values, first.values(name, best=best))
    known = math.isfinite(difference.mean)
    return Cell(
        shown,
        mean,
        tuple(notes),
        number(difference.mean, metric.digits, sign=True) if known else "",
        "" if difference.low is None else _interval(difference, metric),
        _why(difference),
        difference.significant,
        published,
        (*ours, difference.mean if known else None, difference.low, difference.high),
    )


def _why(difference: Difference) -> str:
    if difference.n == 0:
        return "no common seed"
    if not math.isfinite(difference.mean):
        return "no difference: a run has no finite number"
    if difference.n == 1:
        return "one common seed, so no interval"
    if difference.low is None:
        return f"the same in all {difference.n} seeds, so no interval"
    return "" if difference.significant else "no significant difference"


def _interval(difference: Difference, metric: Metric) -> str:
    low, high = difference.low or 0.0, difference.high or 0.0
    return f"[{number(low, metric.digits, sign=True)}, {number(high, metric.digits, sign=True)}]"


def _in_one_line(cell: Cell) -> str:
    """``2.10 ± 0.30 (-0.52 [-0.80, -0.24])``, as it is shown on the page."""
    inner = " ".join(part for part in (cell.difference, cell.interval) if part)
    return f"{cell.value} ({inner})" if inner else cell.value


# ---------------------------------------------------------------- forms to copy


def as_csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Comma-separated values with a header, by RFC 4180; None is an empty field, numbers keep all their digits.

    A text that a spreadsheet would read as a formula gets an apostrophe in front.
    """

    def field_of(value: object) -> str:
        if value is None:
            return ""
        if isinstance(value, (int, float)):
            return repr(value)
        text = "\n".join(str(value).replace(MINUS, "-").splitlines())  # a bare carriage return is not quoted
        return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\n") and not _is_number(text) else text

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(field_of, columns))
    writer.writerows(map(field_of, row) for row in rows)
    return out.getvalue()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


LATEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    MINUS: r"$-$",
    NOTHING: "--",
    "λ": r"$\lambda$",
    "\N{GREEK SMALL LETTER ALPHA}": r"$\alpha$",
    "ε": r"$\epsilon$",
    "²": r"$^2$",
    "\N{NO-BREAK SPACE}": "~",
}


def escaped(text: str) -> str:
    """Text for LaTeX."""
    replace: Callable[[re.Match[str]], str] = lambda match: LATEX[match[0]]  # noqa: E731
    return re.sub("|".join(map(re.escape, LATEX)), replace, re.sub(r"[ \t\r\n]+", " ", text).strip())


def as_latex(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """A table for LaTeX with the rules of the package booktabs."""

    def line(cells: Sequence[str]) -> str:
        text = " & ".join(map(escaped, cells))
        # after the end of a row, LaTeX would read these as an argument of it
        return ("{}" if text.startswith(("[", "*")) else "") + text + r" \\"

    body = "\n".join(map(line, rows))
    align = "l" + "r" * (len(columns) - 1)
    return (
        f"% needs \\usepackage{{booktabs}}\n\\begin{{table}}\n\\centering\n\\caption{{{escaped(caption)}}}\n"
        f"\\begin{{tabular}}{{{align}}}\n\\toprule\n{line(columns)}\n\\midrule\n{body}\n\\bottomrule\n"
        "\\end{tabular}\n\\end{table}\n"
    )
