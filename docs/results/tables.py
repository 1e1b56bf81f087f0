"""Records and tables of docs/results.

    python docs/results/tables.py collect RUNS    # RUNS/<experiment>/.../record.json -> docs/results/<experiment>.jsonl
    python docs/results/tables.py                 # those records -> the tables, in Markdown, on stdout

The tables in README.md beside this file are that output; a test compares them.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from manifold_mixup.lab.measures.catalog import MAIN, OWN, describe
from manifold_mixup.lab.recipe import load_recipe
from manifold_mixup.lab.statistics import paired_difference, summary

HERE = Path(__file__).parent
EXPERIMENTS = ("digits", "digits_resnet", "spiral")  # overhead.py and families.py make pages of their own


def collect(runs: Path) -> None:
    """One file per experiment, one record a line, methods in the order of the recipe."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(runs.glob("*/*/*/record.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        found[record["experiment"]].append(record)
    for name, records in found.items():
        order = [method.label for method in load_recipe(name).methods]
        records.sort(key=lambda r: (order.index(r["label"]), r["seed"]))
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (HERE / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def table(path: Path) -> str:
    """Methods in rows, measures in columns: mean ± sd, and below it the paired difference to the first method."""
    values: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name, value in record["metrics"].items():
            values[record["label"]][name][record["seed"]] = math.nan if value is None else value
    first = next(iter(values))
    shown = [
        name for name in (*OWN, *MAIN) if name in values[first] and not (name == MAIN[0] and OWN[1] in values[first])
    ]
    heads = [f"{m.title} ({m.unit})" if m.unit else m.title for m in map(describe, shown)]
    lines = [f"| {path.stem} | n | " + " | ".join(heads) + " |", "| --- | --- " + "| --- " * len(shown) + "|"]
    for label, measures in values.items():
        cells = [_cell(measures[name], None if label == first else values[first][name], name) for name in shown]
        lines.append(f"| {label} | {len(measures[shown[0]])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: dict[int, float], baseline: dict[int, float] | None, name: str) -> str:
    digits = describe(name).digits
    finite = [v for v in values.values() if math.isfinite(v)]
    found = summary(finite)
    text = f"{found.mean:.{digits}f} ± {found.sd:.{digits}f}" if found.sd is not None else f"{found.mean:.{digits}f}"
    if len(finite) < len(values):
        return f"{text} (no number in {len(values) - len(finite)} of {len(values)} runs)"
    if baseline is not None:
        difference = paired_difference(values, baseline)
        if difference.low is not None and difference.high is not None:
            interval = f"[{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"
            text += f"<br>**{interval}**" if difference.significant else f"<br>{interval}"
    return text


def main() -> None:
    if sys.argv[1:2] == ["collect"]:
        collect(Path(sys.argv[2]))
    else:
        print("\n\n".join(table(HERE / f"{name}.jsonl") for name in EXPERIMENTS))


if __name__ == "__main__":
    main()
