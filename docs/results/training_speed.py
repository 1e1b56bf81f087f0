"""The page of how fast the lab trains, from its records.

    python benchmarks/training.py --method manifold_mixup none --record docs/results/training_speed.jsonl
    python docs/results/training_speed.py                        # training_speed.jsonl -> training_speed.md

Of several records of one cell (method, compiled or not, network, width, device) the last one is shown. A test compares
the page with what its records make.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import rates
import ratios

HERE = Path(__file__).parent
RECORDS = HERE / "training_speed.jsonl"
HEAD = """# How fast the lab trains

Made by `python docs/results/training_speed.py` from the records in `training_speed.jsonl`: one line per table, with the
time of every turn. "ours" is the loop of every run of the lab: images stay on the device and are cropped, flipped and
normalised there a batch at a time, and the network computes in bf16. "authors' style" is a loop as in the code of the
method's authors, written anew from its description: worker processes that treat one image after the other, float32,
mixing written out in the forward, loss and accuracy read at every step. Both train the same network from the same
weights, with the same number of threads, and take turns; "times as fast" is the twin's time over ours in the same
round: median [quartiles], and the 95 % interval of the median. The shares of the peak count the network's forward and
backward alone, against the best matrix product measured in the same run. The script, `benchmarks/training.py`, says the
rest."""
NOTHING = "Nothing has been recorded yet."


def latest(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last record of each cell, in the order in which the cells first appear. Quick runs measure nothing."""
    cells = {}
    for record in records:
        if not record["quick"]:
            cells[tuple(record[key] for key in ("method", "compiled", "network", "width", "device"))] = record
    return list(cells.values())


def page(records: Iterable[Mapping[str, Any]]) -> str:
    """The whole page, in Markdown."""
    shown = latest(records)
    verdicts = "\n".join(f"* {verdict}" for record in shown for verdict in rates.verdicts(record))
    parts = [HEAD, "## What was aimed at", verdicts] if shown else [HEAD, NOTHING]
    for record in shown:
        where = f"{ratios.machine(record)}. `{record['command']}`"
        parts += [f"## {rates.title(record)}", where, f"{rates.conditions(record)}.", rates.table(record)]
    return "\n\n".join(parts) + "\n"


def records() -> list[dict[str, Any]]:
    """What has been recorded so far."""
    return ratios.read(RECORDS) if RECORDS.exists() else []


def main() -> None:
    RECORDS.with_suffix(".md").write_text(page(records()), encoding="utf-8")


if __name__ == "__main__":
    main()
