"""Pages of the studies at desk scale, and the tables that sum them up, from the records in desk/.

    python docs/results/studies.py collect RUNS   # finished runs of the desk recipes -> desk/RECIPE.jsonl
    python docs/results/studies.py                # desk/RECIPE.jsonl -> desk/STUDY.md, and tables in both READMEs

A test compares every page and table with what the records make.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from manifold_mixup.lab.published import Published
from manifold_mixup.lab.recipe import load_recipe, recipe_files
from manifold_mixup.lab.reproduce import Piece, gather, grids_of, plan
from manifold_mixup.lab.results import by_seed, read_folder, write_lines
from manifold_mixup.lab.side_by_side import as_page, duration, measured_text, verdicts
from manifold_mixup.lab.statistics import paired_difference
from manifold_mixup.lab.studies import Study, load_study, study_files
from manifold_mixup.lab.theory_runs import NOTE, TITLE, read_theory, theory_grids, write_theory
from manifold_mixup.lab.verdict import OUTCOMES

HERE = Path(__file__).parent
DESK = HERE / "desk"
README = HERE.parents[1] / "README.md"
MAIN = ("none", "input mixup", "manifold mixup")
BEGIN, END = "<!-- {}: made by docs/results/studies.py -->", "<!-- end of {} -->"


def collect(runs: Path) -> None:
    """Take over the finished runs of every desk recipe as it is today."""
    for name, path in recipe_files().items():
        if path.parent.name != "desk" or not (runs / name).is_dir():
            continue
        config = load_recipe(name)
        wanted = {run.config.hash for run in config.runs()}
        order = [method.label for method in config.methods]
        found = [result for result in read_folder(runs, name) if result.record.config_hash in wanted]
        found.sort(key=lambda r: (order.index(r.record.label), r.record.seed))
        if found:
            write_lines(found, DESK / f"{name}.jsonl")
            print(f"{name}: {len(found)} of {len(wanted)} runs")
    if (runs / "theory").is_dir():
        write_theory(*read_theory(runs), DESK)


def studies() -> Iterator[tuple[Study, list[Piece]]]:
    """The studies with committed runs at desk scale, each with those of its panels that have some."""
    for name in study_files():
        study = load_study(name)
        pieces = plan(study, "desk")
        for piece in pieces:
            gather(piece, DESK)
        if found := [piece for piece in pieces if piece.results]:
            yield study, found


def pages() -> dict[Path, str]:
    """Every page that is made as a whole: one for each study with runs, and the theory's."""
    found = {}
    for study, pieces in studies():
        judged = [verdict for piece in pieces for verdict in verdicts(piece.panel, piece.results)]
        found[DESK / f"{study.name}.md"] = as_page(study.title, study.note, grids_of(pieces, "desk"), judged)
    found[DESK / "theory.md"] = as_page(TITLE, NOTE, theory_grids(*read_theory(DESK)), [])
    return found


def overview() -> str:
    """One line for each study: what its claims came to, how many runs, and what they cost."""
    heads = ["study", *OUTCOMES[:3], "runs", "cost"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for study, pieces in studies():
        judged = [verdict.outcome for piece in pieces for verdict in verdicts(piece.panel, piece.results)]
        records = [result.record for piece in pieces for result in piece.results]
        counts = [str(judged.count(outcome)) for outcome in OUTCOMES[:3]]
        cost = duration(sum(record.seconds for record in records))
        link = f"[{study.title}](desk/{study.name}.md)"
        lines.append("| " + " | ".join([link, *counts, str(len(records)), cost]) + " |")
    theory, made = read_theory(DESK)
    passed = [check.passed for check in theory.checks if check.passed is not None]
    counts = [f"{sum(passed)} checks passed", f"{len(passed) - sum(passed)} failed", "-"]
    cells = [f"[{TITLE}](desk/theory.md)", *counts, f"{len(made['seeds'])} seeds", duration(made["seconds"])]
    lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary() -> str:
    """One line for each experiment that has no mixing, input mixup and manifold mixup: their test errors and NLL."""
    heads = ["experiment", "seeds", *(f"{label}, error (%) / NLL" for label in MAIN), "manifold - none, error", "95 %"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    wide = {}  # of several studies of one experiment, the first one that shows all of it
    for _, pieces in studies():
        for piece in pieces:
            metrics = {column.metric: column for column in piece.panel.columns}
            labels = {row.label for row in piece.panel.rows}
            if piece.config is not None and labels >= set(MAIN) and {"test_error", "test_nll"} <= metrics.keys():
                wide.setdefault(piece.config.name, (piece, piece.config.description, metrics))
    for piece, description, metrics in wide.values():
        values = {label: by_seed(piece.results, label, "test_error") for label in MAIN}
        cells = [
            " / ".join(
                measured_text(by_seed(piece.results, label, metric), metrics[metric])
                for metric in ("test_error", "test_nll")
            )
            for label in MAIN
        ]
        found = paired_difference(values["manifold mixup"], values["none"])
        interval = "-" if found.low is None else f"[{found.low:+.2f}, {found.high:+.2f}]"
        row = [description, str(found.n), *cells, f"{found.mean:+.2f}", interval]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


TASKS = {"graphmix": "GraphMix", "semi-supervised": "manifold mixup"}


def beyond() -> str:
    """One line for each experiment with few labels or on a graph: test errors of the control and of the method."""
    heads = ["experiment", "seeds", "control", "method", "method - control", "95 %", "published: control", "method"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for study, pieces in studies():
        for piece in pieces if study.name in TASKS else ():
            panel = piece.panel
            column = panel.column("test_error", "best")
            control = panel.rows[0]
            method = next(row for row in panel.rows if row.label == TASKS[study.name])
            values = {row.label: by_seed(piece.results, row.label, "test_error", "best") for row in (control, method)}
            found = paired_difference(values[method.label], values[control.label])
            interval = "-" if found.low is None else f"[{found.low:+.2f}, {found.high:+.2f}]"
            plain = column.model_copy(update={"complement": False})
            ours = [f"{row.label}: {measured_text(values[row.label], plain)}" for row in (control, method)]
            printed = [_as_error(panel.twin(row, column)) for row in (control, method)]
            cells = [panel.title, str(found.n), *ours, f"{found.mean:+.2f}", interval, *printed]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _as_error(entry: Published | None) -> str:
    """A published error, or 100 minus a published accuracy."""
    if entry is None:
        return "-"
    value = 100 - entry.value if "accuracy" in entry.metric else entry.value
    return f"{value:.2f}" if entry.std is None else f"{value:.2f} ± {entry.std:.2f}"


def with_table(text: str, name: str, table: str) -> str:
    """A page with the table between two marks replaced."""
    begin, end = BEGIN.format(name), END.format(name)
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"there is no {begin} ... {end}")
    return pattern.sub(lambda _: f"{begin}\n\n{table}\n\n{end}", text)


def everything() -> dict[Path, str]:
    """All that this script writes, by file."""
    results = HERE / "README.md"
    return {
        **pages(),
        results: with_table(results.read_text(encoding="utf-8"), "overview", overview()),
        README: with_table(
            with_table(README.read_text(encoding="utf-8"), "summary", summary()),
            "tasks",
            beyond(),
        ),
    }


def main() -> None:
    if sys.argv[1:2] == ["collect"]:
        collect(Path(sys.argv[2]))
        return
    for path, text in everything().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
