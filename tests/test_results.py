"""The tables of docs/results are those of the records beside them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def test_every_table_is_made_from_the_records():
    tables = runpy.run_path(str(RESULTS / "tables.py"))
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    for name in tables["EXPERIMENTS"]:
        assert tables["table"](RESULTS / f"{name}.jsonl") in text, name


def test_every_record_says_where_it_comes_from():
    for name, command in runpy.run_path(str(RESULTS / "tables.py"))["EXPERIMENTS"].items():
        path = RESULTS / f"{name}.jsonl"
        runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len({(run["label"], run["seed"]) for run in runs}) == len(runs)
        for run in runs:
            assert run["versions"]["torch"]
            assert run["hardware"]["cpu"]
            assert run["command"] in (command, "manifold-mixup demo --runs runs")
