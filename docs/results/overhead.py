"""The page of what a training step costs, from its records.

    python benchmarks/step_overhead.py --record docs/results/overhead.jsonl    # measure, append
    python benchmarks/peers.py --record docs/results/overhead.jsonl
    python docs/results/overhead.py                                            # overhead.jsonl -> overhead.md

Of several records of one cell (benchmark, network, mode, device) the last one is shown. A test compares the page with
what its records make.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import ratios

HERE = Path(__file__).parent
TITLES = {"step_overhead": "Beside plain training and the naive way", "peers": "Beside other libraries"}
HEAD = """# What a training step costs

Made by `python docs/results/overhead.py` from the records in `overhead.jsonl`: one line per table, with every single
time. A step is forward, loss, backward, optimizer and `zero_grad`. The variants take turns step by step, on one
set of weights, and a ratio is to plain training of the same round: median [quartiles], and the 95 % interval of the
median. The second copy of plain shows what the measurement itself is off by. Extra memory is that of a step at its
peak, beyond plain's. "ours" draws from S, "ours, NAME" mixes at that layer alone; "naive" is
`lam * h + (1 - lam) * h[perm]` in the forward and two cross-entropies. timm, torchvision and kornia mix inputs only.
The scripts, `benchmarks/step_overhead.py` and `benchmarks/peers.py`, say the rest."""


def latest(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last record of each cell, in the order in which the cells first appear. Quick runs measure nothing."""
    cells = {}
    for record in records:
        if not record["quick"]:
            cells[tuple(record[key] for key in ("benchmark", "network", "mode", "device"))] = record
    return list(cells.values())


def page(records: Iterable[Mapping[str, Any]]) -> str:
    """The whole page, in Markdown."""
    shown = latest(records)
    verdicts = "\n".join(f"* {verdict}" for record in shown for verdict in ratios.verdicts(record))
    parts = [HEAD, "## What was aimed at", verdicts]
    for benchmark, text in TITLES.items():
        found = [record for record in shown if record["benchmark"] == benchmark]
        parts += [f"## {text}"] if found else []
        for record in found:
            where = f"{ratios.machine(record)}. `{record['command']}`"
            parts += [f"### {ratios.title(record)}", where, ratios.table(record)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    (HERE / "overhead.md").write_text(page(ratios.read(HERE / "overhead.jsonl")), encoding="utf-8")


if __name__ == "__main__":
    main()
