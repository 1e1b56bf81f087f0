"""The checks of the theory are made once, kept, and shown."""

import json
from pathlib import Path

import pytest

from lab.test_cli import call  # noqa: F401  the fixture
from manifold_mixup.lab import theory_runs
from manifold_mixup.lab.errors import CorruptedFile, UsageError
from manifold_mixup.lab.theory_runs import read_theory, run_and_keep, theory_grids

DESK = Path(__file__).parents[2] / "docs" / "results" / "desk"


@pytest.fixture
def counted(monkeypatch):
    """The committed checks in place of a run, and how often they were asked for."""
    asked = []

    def run(seeds, progress=None):
        asked.append(list(seeds))
        return read_theory(DESK)[0]

    monkeypatch.setattr(theory_runs, "run_theory", run)
    return asked


def test_checks_are_made_once_for_the_same_seeds(tmp_path, counted):
    first = run_and_keep(tmp_path, [0, 1, 2], "manifold-mixup reproduce theory --runs /some/where")
    again = run_and_keep(tmp_path, [0, 1, 2], "another")
    assert again[0].to_records() == first[0].to_records()
    assert again[1] == first[1]
    assert first[1]["command"] == "manifold-mixup reproduce theory --runs RUNS"
    run_and_keep(tmp_path, [4], "another")
    assert counted == [[0, 1, 2], [4]]


def test_a_damaged_file_and_a_missing_one_are_named(tmp_path, counted):
    with pytest.raises(UsageError, match="reproduce theory makes them"):
        read_theory(tmp_path)
    run_and_keep(tmp_path, [0], "c")
    (tmp_path / "theory" / "theory.jsonl").write_text('{"name": ')
    with pytest.raises(CorruptedFile, match=r"theory\.jsonl is corrupted; delete"):
        read_theory(tmp_path)


def test_the_command_shows_what_passed_and_where_it_comes_from(call):  # noqa: F811
    code, out, err = call("reproduce", "theory", "--show", "--runs", DESK, "--markdown")
    checks = [json.loads(line) for line in (DESK / "theory.jsonl").read_text().splitlines()]
    passed = sum(check["passed"] is True for check in checks)
    assert (code, err) == (0, "")
    assert f"{passed} of {passed} checks passed." in out
    assert "Made by `manifold-mixup reproduce theory --runs RUNS`, commit " in out
    first, second = theory_grids(*read_theory(DESK))
    assert len(first.rows) > 10 < len(second.rows)


def test_a_check_that_fails_makes_the_command_fail(tmp_path, counted, call, monkeypatch):  # noqa: F811
    run_and_keep(tmp_path, [0], "c")
    path = tmp_path / "theory" / "theory.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["passed"] = False
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, err = call("reproduce", "theory", "--show", "--runs", tmp_path)
    assert (code, "a check failed: " in err) == (1, True)
