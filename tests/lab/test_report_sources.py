"""What a report reads: which runs it finds, in which order, and what it makes of unfinished and damaged ones."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lab.report_runs import log_lines, write_log, write_run
from lab.reporting import Page
from manifold_mixup.lab.config import Component, ExperimentConfig, PlannedRun, RunConfig, TrainConfig, slug
from manifold_mixup.lab.errors import CorruptedFile, UsageError
from manifold_mixup.lab.plan_file import PLAN, Plan, note_plan, write_plan
from manifold_mixup.lab.records import Failure, RunFolder
from manifold_mixup.lab.report import write_report
from manifold_mixup.lab.report.sources import gather, is_running, planned_runs
from manifold_mixup.lab.results import write_lines

HOST = socket.gethostname()


def configured(method="none", seed=0, steps=30):
    """The settings of one run."""
    return RunConfig(
        data=Component(name="digits"),
        model=Component(name="mlp"),
        train=TrainConfig(steps=steps),
        method=Component(name=method),
        seed=seed,
    )


def begin(runs, label="none", seed=0, experiment="digits"):
    """A run that has begun: its folder and its config."""
    folder = RunFolder(runs, PlannedRun(experiment, label, configured(seed=seed)))
    folder.claim()
    return folder.path


def finish(runs, label="none", seed=0, experiment="digits", **keys):
    """A finished run with its config."""
    result = write_run(runs, label, seed, experiment=experiment, **keys)
    begin(runs, label, seed, experiment)
    return result.record.folder


def plan(runs, *labels, seeds=(0,), experiment="digits"):
    asked = Plan(experiment, "About it", "digits", "mlp", labels, seeds, "the command", "2026-01-02")
    write_plan(runs / experiment, asked)


def order(found):
    return [(r.record.experiment, r.record.label, r.record.seed) for r in found.results]


# ---------------------------------------------------------------- finished runs


def test_methods_come_in_the_order_of_the_plan(tmp_path):
    for label in ("b", "none", "a", "Unplanned"):
        for seed in (10, 9):
            finish(tmp_path, label, seed)
    plan(tmp_path, "b", "a", "none", seeds=(9, 10, 11))
    found = gather([tmp_path])
    assert order(found) == [("digits", x, seed) for x in ("b", "a", "none", "Unplanned") for seed in (9, 10)]
    assert found.planned == {"digits": (9, 10, 11)}
    assert found.descriptions == {"digits": "About it"}


@pytest.mark.parametrize("note", [None, "{", '{"name": 1}'])
def test_without_a_plan_plain_training_is_first_and_the_others_follow_by_name(tmp_path, note):
    for label, method in (("a", "dropout"), ("plain", "none"), ("b", "dropout")):
        finish(tmp_path, label, method=method)
    if note is not None:
        (tmp_path / "digits" / PLAN).write_text(note)
    found = gather([tmp_path])
    assert [label for _, label, _ in order(found)] == ["plain", "a", "b"]
    assert found.planned == {}


def test_the_baseline_goes_first_and_the_rest_stays_in_order(tmp_path):
    for label in ("a", "b", "none"):
        finish(tmp_path, label)
        finish(tmp_path, label, experiment="other")
    finish(tmp_path, "c", experiment="other")
    plan(tmp_path, "none", "b", "a")
    labels = [(experiment, label) for experiment, label, _ in order(gather([tmp_path], baseline="a"))]
    assert labels == [
        *(("digits", label) for label in ("a", "none", "b")),
        *(("other", label) for label in ("a", "b", "c", "none")),
    ]


def test_a_baseline_that_nobody_is_called_is_refused(tmp_path):
    finish(tmp_path, "b")
    begin(tmp_path, "a")
    assert [going.label for going in gather([tmp_path], baseline="a").going] == ["a"]
    with pytest.raises(UsageError, match="^no method is called 'none'; there is a, b$"):
        gather([tmp_path], baseline="none")


def test_folders_of_any_depth_and_files_of_lines_are_one_report(tmp_path):
    one = finish(tmp_path / "runs", "none", 0)
    finish(tmp_path / "runs", "none", 1)
    finish(tmp_path / "more", "none", 0, "second")
    committed = write_run(tmp_path / "old", "none", 0, experiment="third", measured={"test_ece": 1.5})
    write_lines([committed], tmp_path / "lines.jsonl")
    assert order(gather([one])) == [("digits", "none", 0)]
    assert len(gather([one.parent]).results) == len(gather([tmp_path / "runs"]).results) == 2
    found = gather([tmp_path / "more", tmp_path / "lines.jsonl", tmp_path / "runs"])
    assert [name for name, _, _ in order(found)] == ["second", "third", "digits", "digits"]
    third = found.results[1]
    assert (third.measured, third.record.folder) == ({"test_ece": 1.5}, Path())


def test_a_run_below_two_of_the_paths_is_one_run(tmp_path, monkeypatch):
    finish(tmp_path / "runs", "none", 0)
    begin(tmp_path / "runs", "none", 1)
    (begin(tmp_path / "runs", "none", 2) / "failure.json").write_text('{"error": "why"}')
    monkeypatch.chdir(tmp_path)
    found = gather([tmp_path / "runs", tmp_path / "runs" / "digits", Path("runs")])
    assert (len(found.results), len(found.going), len(found.failures)) == (1, 1, 1)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_the_names_of_folders_are_known_from_inside_of_them(tmp_path, monkeypatch, depth):
    folder = begin(tmp_path / "runs", "Hidden Only", 3)
    plan(tmp_path / "runs", "Hidden Only", seeds=(3,))
    monkeypatch.chdir([folder, *folder.parents][depth])
    found = gather([Path()])
    assert [(g.experiment, g.label, g.seed) for g in found.going] == [("digits", "Hidden Only", 3)]
    assert found.planned == {"digits": (3,)}
    (folder / "config.json").write_text("{")
    (failure,) = gather([Path()]).failures
    assert (failure.experiment, failure.label, failure.seed) == ("digits", "Hidden Only", 3)


def test_later_evaluations_of_the_last_weights_belong_to_a_run(tmp_path):
    finish(tmp_path, measured={"test_ece": 1.25}, measures={"calibration": {}})
    (result,) = gather([tmp_path]).results
    assert result.measured == {"test_ece": 1.25}
    assert result.value("test_ece") == 1.25


# ---------------------------------------------------------------- what is not there


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "nowhere is neither a folder of runs nor a .jsonl file with records"),
        ("nowhere.jsonl", "nowhere.jsonl is neither a folder of runs nor a .jsonl file with records"),
        ("text.txt", "text.txt is neither a folder of runs nor a .jsonl file with records"),
        ("empty", "empty holds no run: a run is a folder with config.json, as compare and train write"),
    ],
)
def test_a_path_without_runs_is_refused(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("words")
    finish(tmp_path / "runs")
    with pytest.raises(UsageError, match=message):
        gather([tmp_path / "runs", tmp_path / path])


@pytest.mark.parametrize("content", [b"{\n", b"[]\n", b"[1, 2]\n", b'"text"\n', b"{}\n", b"3\n", b"\xff\n"])
def test_lines_that_are_no_runs_are_refused(tmp_path, content):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(CorruptedFile, match=r"bad\.jsonl"):
        gather([tmp_path / "bad.jsonl"])


# ---------------------------------------------------------------- damaged runs


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"schema": 2}', '{"schema": 1}'])
def test_a_damaged_record_is_a_failure_with_a_name(tmp_path, content):
    finish(tmp_path, "good")
    (finish(tmp_path, "Bad One", 4) / "record.json").write_text(content)
    plan(tmp_path, "good", "Bad One")
    found = gather([tmp_path])
    (failure,) = found.failures
    assert (failure.experiment, failure.label, failure.seed) == ("digits", "Bad One", 4)
    assert "record.json" in failure.error
    assert "\n" not in failure.error
    assert order(found) == [("digits", "good", 0)]
    page = Page(write_report(found, tmp_path / "page.html", "t").read_text(encoding="utf-8"))
    assert f"Failed: Bad One, seed 4: {failure.error}" in page.words


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"config": 3}', '{"config": {"seed": -1}}', '"config"'])
def test_a_damaged_config_is_a_failure_with_a_name(tmp_path, content):
    finish(tmp_path, "good")
    (begin(tmp_path, "bad", 12) / "config.json").write_text(content)
    found = gather([tmp_path])
    (failure,) = found.failures
    assert (failure.experiment, failure.label, failure.seed) == ("digits", "bad", 12)
    assert "config.json is no configuration of a run that this version reads" in failure.error
    assert len(found.results) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"{}",
        b"\xff",
        b'{"weights": "last", "data": "digits"}',
        b'{"weights": "last", "data": "digits", "metrics": [], "measures": {}}',
        b'{"weights": "last", "data": "digits", "metrics": {"test_ece": "low"}, "measures": {}}',
    ],
)
def test_damaged_evaluations_are_a_failure_with_a_name(tmp_path, content):
    finish(tmp_path, "good")
    (finish(tmp_path, "bad", 1) / "evaluations.jsonl").write_bytes(content + b"\n")
    found = gather([tmp_path])
    (failure,) = found.failures
    assert (failure.label, failure.seed) == ("bad", 1)
    assert "evaluations.jsonl is corrupted" in failure.error
    assert order(found) == [("digits", "good", 0)]


@pytest.mark.parametrize(
    ("note", "reason"),
    [
        ('{"error": "out of memory"}', "out of memory"),
        ("{", "it failed, and the note that says why is damaged"),
        ("[]", "it failed, and the note that says why is damaged"),
        ("{}", "it failed, and the note that says why is damaged"),
    ],
)
def test_a_failed_run_is_a_failure_with_its_reason(tmp_path, note, reason):
    (begin(tmp_path, "a", 2) / "failure.json").write_text(note)
    found = gather([tmp_path])
    assert found.failures == [Failure("digits", "a", 2, reason)]
    assert (found.results, found.going) == ([], [])


def test_a_failed_run_that_is_tried_again_is_at_work(tmp_path):
    folder = begin(tmp_path)
    (folder / "failure.json").write_text('{"error": "out of memory"}')
    (folder / ".lock-owner").write_text(f"process {os.getpid()} on {HOST}\n")
    found = gather([tmp_path])
    assert found.failures == []
    assert [going.running for going in found.going] == [True]


# ---------------------------------------------------------------- unfinished runs


def test_an_unfinished_run_says_how_far_it_is(tmp_path):
    folder = begin(tmp_path, "a", 5)
    (going,) = gather([tmp_path]).going
    assert (going.step, going.steps, going.log, going.running) == (0, 30, (), False)
    lines = log_lines([9.0, 8.0])
    write_log(folder, lines)
    (going,) = gather([tmp_path]).going
    assert (going.experiment, going.data, going.model) == ("digits", "digits", "mlp")
    assert (going.label, going.seed, going.step) == ("a", 5, 20)
    assert list(going.log) == lines
    (folder / "checkpoint").mkdir()
    for saved, step in ((15, 20), (25, 25)):
        (folder / "checkpoint" / "state.json").write_text(json.dumps({"step": saved}))
        assert gather([tmp_path]).going[0].step == step
    (folder / "checkpoint" / "state.json").write_text("{")
    assert gather([tmp_path]).going[0].step == 20


@pytest.mark.parametrize(
    ("last", "lines", "step"),
    [
        ('{"step": 3', 2, 20),
        ("[3]", 2, 20),
        ('{"epoch": 3}', 3, 0),
        ('{"step": null}', 3, 0),
        ('{"step": "3"}', 3, 0),
    ],
)
def test_a_log_that_is_cut_off_or_damaged_is_read_as_far_as_it_goes(tmp_path, last, lines, step):
    folder = begin(tmp_path)
    write_log(folder, log_lines([9.0, 8.0]))
    after = '{"step": 40}\n' if lines == 2 else ""  # what follows damage is not believed
    with (folder / "log.jsonl").open("a") as log:
        log.write(f"{last}\n{after}")
    (going,) = gather([tmp_path]).going
    assert (len(going.log), going.step) == (lines, step)


def test_a_log_that_is_no_text_is_none(tmp_path):
    (begin(tmp_path) / "log.jsonl").write_bytes(b"\xff\xfe")
    assert gather([tmp_path]).going[0].log == ()


def test_unfinished_runs_are_in_the_order_of_the_plan(tmp_path):
    for label in ("c", "b", "none"):
        for seed in (10, 2):
            begin(tmp_path, label, seed)
    assert [g.label for g in gather([tmp_path]).going] == ["none", "none", "b", "b", "c", "c"]
    plan(tmp_path, "c", "none", "b")
    assert [(g.label, g.seed) for g in gather([tmp_path]).going] == [
        (label, seed) for label in ("c", "none", "b") for seed in (2, 10)
    ]


@pytest.mark.parametrize("label", ["Manifold Mixup (\N{GREEK SMALL LETTER ALPHA}=2)", "UPPER", "two  words!"])
def test_a_label_that_is_no_folder_name_is_restored_from_the_plan(tmp_path, label):
    assert slug(label) != label
    folder = begin(tmp_path, label)
    assert gather([tmp_path]).going[0].label == slug(label)
    plan(tmp_path, "none", label)
    assert gather([tmp_path]).going[0].label == label
    (folder / "failure.json").write_text('{"error": "why"}')
    assert gather([tmp_path]).failures == [Failure("digits", label, 0, "why")]


# ---------------------------------------------------------------- who is at work


@pytest.fixture(scope="module")
def ended():
    """The number of a process that is no more."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_the_process_that_is_alive_is_at_work_and_one_that_has_ended_is_not(tmp_path, ended):
    owner = tmp_path / ".lock-owner"
    assert not is_running(owner)
    owner.write_text(f"process {os.getpid()} on {HOST}\n")
    assert is_running(owner)
    owner.write_text(f"process {ended} on {HOST}\n")
    assert not is_running(owner)


def test_the_owner_that_a_lock_writes_down_is_understood(tmp_path):
    folder = RunFolder(tmp_path, PlannedRun("digits", "none", configured()))
    folder.claim()
    with folder.lock():
        assert gather([tmp_path]).going[0].running
    assert not gather([tmp_path]).going[0].running


def test_another_machine_is_believed(tmp_path, ended):
    (tmp_path / ".lock-owner").write_text(f"process {ended} on another-{HOST}\n")
    assert is_running(tmp_path / ".lock-owner")


@pytest.mark.parametrize(
    "content",
    [b"", b"process", b"process 12", b"process 12 on", b"\xff\xfe\xfd a b c", f"process {'9' * 30} on {HOST}".encode()],
)
def test_a_damaged_owner_is_nobody(tmp_path, content):
    (tmp_path / ".lock-owner").write_bytes(content)
    assert not is_running(tmp_path / ".lock-owner")


def test_the_folder_of_another_users_process_is_in_use(tmp_path, monkeypatch):
    def refuse(pid, signal):
        assert signal == 0, "it must not be stopped"
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    (tmp_path / ".lock-owner").write_text(f"process 1 on {HOST}\n")
    assert is_running(tmp_path / ".lock-owner")


# ---------------------------------------------------------------- planned runs


def test_planned_runs_are_those_of_the_experiments_and_no_others(tmp_path):
    config = ExperimentConfig(
        name="digits",
        description="Why",
        data={"name": "digits"},
        model={"name": "mlp"},
        train={"steps": 30},
        methods=[{"name": "dropout", "label": "Second First"}, {"name": "none", "label": "none"}],
        seeds=[1, 0],
    )
    note_plan(tmp_path, config.model_copy(update={"seeds": [7]}), "an earlier command")
    finish(tmp_path, "none", 7)
    finish(tmp_path, "stranger", 0)
    finish(tmp_path, "none", 0, "other")
    finish(tmp_path, "none", 0)
    finish(tmp_path, "Second First", 1)
    (tmp_path / "digits" / "second-first" / "seed-0").mkdir(parents=True)
    (tmp_path / "digits" / "second-first" / "seed-0" / "failure.json").write_text('{"error": "why"}')
    found = planned_runs([config], tmp_path)
    assert order(found) == [("digits", "Second First", 1), ("digits", "none", 0)]
    assert found.failures == [Failure("digits", "Second First", 0, "why")]
    assert [(g.label, g.seed, g.step, g.steps) for g in found.going] == [("none", 1, 0, 30)], "it has no folder yet"
    assert found.planned == {"digits": (1, 0)}
    assert found.descriptions == {"digits": "Why"}
    words = Page(write_report(found, tmp_path / "page.html", "t").read_text(encoding="utf-8")).words
    assert "2 of 4 runs are finished, 1 failed." in words
    assert "stranger" not in words
