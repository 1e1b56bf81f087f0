"""What an experiment was meant to be: written before the first run, merged, and never in the way of the runs."""

import dataclasses
import json
import re

import pytest

from lab.small import DIGITS, experiment
from manifold_mixup.lab import experiment as module
from manifold_mixup.lab import plan_file
from manifold_mixup.lab.errors import ConfigMismatch, StorageError, UsageError
from manifold_mixup.lab.evaluation import find_runs
from manifold_mixup.lab.experiment import Settings, Silent, run_experiments
from manifold_mixup.lab.plan_file import PLAN, Plan, note_plan, read_plan, write_plan
from manifold_mixup.lab.records import find_records
from manifold_mixup.lab.results import read_folder

TWO = [{"name": "none"}, {"name": "manifold_mixup", "label": "Hidden Only"}]
SOME = Plan("small", "words: ü", "digits", "mlp", ("none", "Hidden Only"), (0, 3), "the command", "2026-01-02")


def test_a_plan_is_read_as_it_was_written(tmp_path):
    folder = tmp_path / "deep" / "small"
    assert read_plan(folder) is None
    write_plan(folder, SOME)
    assert read_plan(folder) == SOME
    assert [path.name for path in folder.iterdir()] == ["experiment.json"]
    assert json.loads((folder / PLAN).read_text()) == {
        "name": "small",
        "description": "words: ü",
        "data": "digits",
        "model": "mlp",
        "methods": ["none", "Hidden Only"],
        "seeds": [0, 3],
        "command": "the command",
        "date": "2026-01-02",
    }


def test_the_plan_is_there_before_the_first_run_begins(tmp_path):
    seen = []

    class Watcher(Silent):
        def started(self, run):
            seen.append((read_plan(tmp_path / "small"), list(tmp_path.rglob("log.jsonl"))))

    config = experiment(DIGITS, methods=TWO, seeds=[1, 0], description="words", measures=["spectra"])
    run_experiments([config], Settings(tmp_path, command="manifold-mixup compare"), Watcher())
    plan, logs = seen[0]
    assert logs == []
    assert dataclasses.replace(plan, date="") == Plan(
        "small", "words", "digits", "mlp", ("none", "Hidden Only"), (0, 1), "manifold-mixup compare", ""
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", plan.date)
    assert all(later == plan for later, _ in seen)


def test_later_methods_come_first_and_seeds_are_gathered(tmp_path):
    def ask(methods, seeds, command):
        labelled = [{"name": "none", "label": label} for label in methods]
        note_plan(tmp_path, experiment(DIGITS, methods=labelled, seeds=seeds), command)
        plan = read_plan(tmp_path / "small")
        return plan.methods, plan.seeds, plan.command

    assert ask(["a", "b"], [3, 1], "one") == (("a", "b"), (1, 3), "one")
    assert ask(["c", "b"], [2], "two") == (("c", "b", "a"), (1, 2, 3), "two")
    assert ask(["a"], [0, 3], "three") == (("a", "c", "b"), (0, 1, 2, 3), "three")


def test_what_is_no_news_is_not_written(tmp_path):
    config = experiment(DIGITS, methods=TWO, seeds=[0, 1])
    note_plan(tmp_path, config, "first")
    before = (tmp_path / "small" / PLAN).stat().st_mtime_ns
    note_plan(tmp_path, config, "second")
    note_plan(tmp_path, experiment(DIGITS, methods=TWO), "third")
    assert (tmp_path / "small" / PLAN).stat().st_mtime_ns == before
    note_plan(tmp_path, experiment(DIGITS, methods=TWO, description="now with words"), "fourth")
    plan = read_plan(tmp_path / "small")
    assert (plan.description, plan.command, plan.seeds) == ("now with words", "fourth", (0, 1))


FOREIGN = {
    "empty": "",
    "cut": '{"name": "small", "desc',
    "a list": "[1, 2]",
    "of something else": '{"name": "small", "version": 3}',
    "wrong types": json.dumps({**dataclasses.asdict(SOME), "seeds": ["0"]}),
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_what_is_damaged_or_not_ours_is_replaced(tmp_path, content):
    path = tmp_path / "small" / PLAN
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_plan(path.parent) is None
    outcome = run_experiments([experiment(DIGITS)], Settings(tmp_path))
    assert len(outcome.records) == 1
    assert read_plan(path.parent).methods == ("none",)


def test_readers_of_runs_are_not_confused_by_it(tmp_path):
    config = experiment(DIGITS, methods=TWO)
    outcome = run_experiments([config], Settings(tmp_path))
    assert (tmp_path / "small" / PLAN).exists()
    assert find_records(tmp_path) == sorted(outcome.records, key=lambda record: record.folder)
    assert find_runs(tmp_path) == sorted(record.folder for record in outcome.records)
    assert len(read_folder(tmp_path, "small")) == 2
    again = run_experiments([config], Settings(tmp_path))  # the folders of the runs are still taken for theirs
    assert again.records == outcome.records
    (tmp_path / "empty").mkdir()
    write_plan(tmp_path / "empty", SOME)
    with pytest.raises(UsageError, match="holds none"):
        find_runs(tmp_path / "empty")


def test_what_is_refused_leaves_no_plan(tmp_path):
    run_experiments([experiment(DIGITS)], Settings(tmp_path))
    before = (tmp_path / "small" / PLAN).read_text()
    with pytest.raises(ConfigMismatch):
        run_experiments([experiment(DIGITS, train__steps=3, seeds=[0, 1])], Settings(tmp_path))
    assert (tmp_path / "small" / PLAN).read_text() == before


def test_only_the_first_process_writes_it(tmp_path, monkeypatch):
    run_experiments([experiment(DIGITS)], Settings(tmp_path))
    (tmp_path / "small" / PLAN).unlink()
    monkeypatch.setattr(module.Devices, "first", property(lambda self: False))
    run_experiments([experiment(DIGITS)], Settings(tmp_path))
    assert not (tmp_path / "small" / PLAN).exists()


def test_a_folder_that_can_only_be_read_is_enough_where_all_is_finished(tmp_path, monkeypatch):
    config = experiment(DIGITS)
    outcome = run_experiments([config], Settings(tmp_path))
    (tmp_path / "small" / PLAN).unlink()

    def refused(*arguments):
        raise StorageError(tmp_path, OSError("read-only file system"))

    monkeypatch.setattr(plan_file, "note_plan", refused)
    assert run_experiments([config], Settings(tmp_path)).records == outcome.records
    with pytest.raises(StorageError, match="read-only"):
        run_experiments([experiment(DIGITS, seeds=[0, 1])], Settings(tmp_path))
