"""The tables of docs/results are those of the records beside them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from manifold_mixup.lab.recipe import load_recipe
from manifold_mixup.lab.results import read_lines

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


@pytest.fixture(scope="module")
def studies():
    return runpy.run_path(str(RESULTS / "studies.py"))


def test_every_page_of_a_study_and_both_readmes_are_made_from_the_records(studies):
    made = studies["everything"]()
    assert {path for path in made if path.parent.name == "desk"} == set((RESULTS / "desk").glob("*.md"))
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: make results"


def test_the_first_page_is_made_from_its_records_to_the_byte():
    made = runpy.run_path(str(RESULTS / "tables.py"))["page"]()
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == made


@pytest.mark.parametrize("path", sorted((RESULTS / "desk").glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_records_of_a_desk_recipe_belong_to_it_as_it_is_today(path):
    if path.stem == "theory":
        pytest.skip("no recipe: see test_theory.py")
    config = load_recipe(path.stem)
    known = {(run.label, run.config.seed): run.config.hash for run in config.runs()}
    results = read_lines(path)
    assert len({(r.record.label, r.record.seed) for r in results}) == len(results) > 0
    for result in results:
        record = result.record
        assert record.config_hash == known[record.label, record.seed], (record.label, record.seed)
        assert record.experiment == path.stem
        assert record.versions["commit"]
        assert not record.versions["commit"].endswith("+")
        assert record.hardware["cpu"]
        assert "--data-dir DIR" in record.command or record.data == "digits"
