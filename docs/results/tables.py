"""Records and tables of docs/results.

    python docs/results/tables.py collect RUNS NAME   # RUNS/.../record.json -> docs/results/NAME.jsonl
    python docs/results/tables.py                     # those records -> the tables in README.md beside this file

A test compares the tables with what the records make. studies.py makes those of the studies.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from manifold_mixup.lab.measures.catalog import MAIN, OWN, describe
from manifold_mixup.lab.methods import METHODS
from manifold_mixup.lab.recipe import load_recipe, recipe_files
from manifold_mixup.lab.statistics import paired_difference, summary

HERE = Path(__file__).parent
EXPERIMENTS = {  # and how each was made; overhead.py, families.py and training_speed.py make pages of their own
    "digits": "manifold-mixup compare --recipe digits",
    "digits_resnet": "manifold-mixup compare --recipe digits_resnet",
    "spiral": "manifold-mixup compare --recipe spiral",
    "cifar10_quarter": "manifold-mixup compare --data cifar10 --data-dir DIR --train-examples 10000 "
    "--model preact_resnet18 --width 0.25 --methods none,input_mixup,manifold_mixup --seeds 3 --epochs 40",
}


def collect(runs: Path, name: str) -> None:
    """One record a line, methods in the order of the recipe or of the registry; folders of the machine are left out."""
    records: list[dict[str, Any]] = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(runs.rglob("record.json"))
    ]
    order = [m.label for m in load_recipe(name).methods] if name in recipe_files() else list(METHODS)
    records.sort(key=lambda r: (order.index(r["label"]), r["seed"]))
    lines = (json.dumps(record | {"command": EXPERIMENTS[name]}, ensure_ascii=False) + "\n" for record in records)
    (HERE / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


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


def page() -> str:
    """README.md with every table made anew."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    for name in EXPERIMENTS:
        found = re.compile(rf"^\| {name} \|.*?(?=\n\n|\Z)", re.DOTALL | re.MULTILINE)
        if len(found.findall(text)) != 1:
            raise SystemExit(f"README.md should hold one table of {name}")
        made = table(HERE / f"{name}.jsonl")
        text = found.sub(lambda _, made=made: made, text)  # type: ignore[misc]
    return text


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
        collect(Path(sys.argv[2]), sys.argv[3])
    else:
        (HERE / "README.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
