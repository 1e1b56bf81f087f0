import json
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

from lab.small import DIGITS, experiment
from manifold_mixup.lab import experiment as module
from manifold_mixup.lab import storage
from manifold_mixup.lab.errors import ConfigMismatch, ExperimentStopped, Interrupted, StorageError
from manifold_mixup.lab.experiment import Settings, Silent, run_experiments

TWO = [{"name": "none"}, {"name": "manifold_mixup"}]
# a convolution inside a residual branch: the mixer refuses it at the first batch
BROKEN = {
    "model": {"name": "preact_resnet8", "options": {"width": 4}},
    "methods": [
        {"name": "manifold_mixup", "options": {"layers": ["stage1.0.conv1"]}, "label": "broken"},
        {"name": "none"},
    ],
    "train__steps": 3,
}


class Watcher(Silent):
    def __init__(self):
        self.seen = []

    def started(self, run):
        self.seen.append(("started", run.label, run.config.seed))

    def ended(self, run, outcome):
        self.seen.append((type(outcome).__name__, run.label, run.config.seed))


def metrics(outcome):
    return {(r.experiment, r.label, r.seed): (r.metrics, r.best) for r in outcome.records}


def test_every_method_runs_at_every_seed(tmp_path):
    watcher = Watcher()
    outcome = run_experiments([experiment(DIGITS, methods=TWO, seeds=[1, 0])], Settings(tmp_path), watcher)
    assert [(r.label, r.seed) for r in outcome.records] == [
        ("none", 1),
        ("none", 0),
        ("manifold_mixup", 1),
        ("manifold_mixup", 0),
    ]
    assert outcome.failures == []
    assert [item for item in watcher.seen if item[0] == "started"] == [
        ("started", "none", 1),
        ("started", "manifold_mixup", 1),
        ("started", "none", 0),
        ("started", "manifold_mixup", 0),
    ]


def test_finished_runs_are_not_repeated(tmp_path):
    first = run_experiments([experiment(DIGITS, methods=TWO)], Settings(tmp_path))
    watcher = Watcher()
    second = run_experiments([experiment(DIGITS, methods=TWO, seeds=[0, 1])], Settings(tmp_path), watcher)
    assert ("started", "none", 0) not in watcher.seen
    assert ("Record", "none", 0) in watcher.seen
    assert ("started", "none", 1) in watcher.seen
    assert second.records[0] == first.records[0]


def test_processes_give_the_same_numbers(tmp_path):
    configs = [experiment(DIGITS, methods=[*TWO, {"name": "dropout"}]), experiment(DIGITS, name="other", seeds=[7])]
    here = run_experiments(configs, Settings(tmp_path / "a", jobs=1))
    watcher = Watcher()
    there = run_experiments(configs, Settings(tmp_path / "b", jobs=2, command="the command"), watcher)
    assert metrics(there) == metrics(here)
    assert [r.label for r in there.records] == ["none", "manifold_mixup", "dropout", "none"]
    assert there.records[0].command == "the command"
    assert len([item for item in watcher.seen if item[0] == "Record"]) == 4
    for record in here.records:
        path = record.folder.relative_to(tmp_path / "a") / "model.safetensors"
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    assert multiprocessing.active_children() == []


def test_a_failed_run_is_noted_and_the_others_go_on(tmp_path):
    outcome = run_experiments([experiment(DIGITS, **BROKEN)], Settings(tmp_path))
    assert [(failure.label, failure.seed) for failure in outcome.failures] == [("broken", 0)]
    assert [record.label for record in outcome.records] == ["none"]
    failure = outcome.failures[0]
    assert "stage1.0.conv1" in failure.error
    assert "\n" not in failure.error
    saved = json.loads((tmp_path / "small/broken/seed-0/failure.json").read_text())
    assert saved["error"] == failure.error
    assert "Traceback" in saved["traceback"]
    again = run_experiments([experiment(DIGITS, **BROKEN)], Settings(tmp_path))
    assert len(again.failures) == 1


class Killer(Silent):
    """Kills a worker as soon as a run has begun to move."""

    def __init__(self):
        self.killed = 0

    def advanced(self, run, step, steps, batch):
        if not self.killed and 0 < step < run.config.train.steps:
            self.killed = 1
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_dies_takes_one_run_with_it(tmp_path):
    config = experiment(DIGITS, methods=[*TWO, {"name": "dropout"}], train__steps=400, train__eval_every=400)
    killer = Killer()
    outcome = run_experiments([config], Settings(tmp_path, jobs=2), killer)
    assert killer.killed
    assert [failure.error for failure in outcome.failures] == ["the process died (killed, or out of memory?)"]
    assert len(outcome.records) == 2
    again = run_experiments([config], Settings(tmp_path, jobs=1))
    assert len(again.records) == 3


class CtrlC(Silent):
    """Presses Ctrl-C once, as soon as a run has begun to move."""

    pressed = False

    def advanced(self, run, step, steps, batch):
        if 0 < step < run.config.train.steps and not self.pressed:
            self.pressed = True
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_leaves_checkpoints_from_which_the_same_numbers_come(tmp_path, jobs):
    steps = 30 if jobs == 1 else 600
    config = experiment(DIGITS, methods=TWO, train__steps=steps)
    with pytest.raises(Interrupted, match="the same command goes on from here"):
        run_experiments([config], Settings(tmp_path / "a", jobs=jobs), CtrlC())
    assert list(tmp_path.rglob("state.json"))
    assert not list(tmp_path.rglob("record.json"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert multiprocessing.active_children() == []
    resumed = run_experiments([config], Settings(tmp_path / "a"))
    straight = run_experiments([config], Settings(tmp_path / "b"))
    assert metrics(resumed) == metrics(straight)


class LateCtrlC(Watcher):
    """Presses Ctrl-C at the very last step of the first run."""

    def advanced(self, run, step, steps, batch):
        if step == run.config.train.steps:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_at_the_last_step_keeps_that_run_and_starts_no_other(tmp_path):
    watcher = LateCtrlC()
    with pytest.raises(Interrupted):
        run_experiments([experiment(DIGITS, methods=TWO)], Settings(tmp_path), watcher)
    assert watcher.seen == [("started", "none", 0), ("Record", "none", 0)]


def test_a_second_ctrl_c_cuts_in():
    with pytest.raises(KeyboardInterrupt), module.stop_on_ctrl_c() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_runs_outside_the_main_thread(tmp_path):
    results = []
    config = experiment(DIGITS, train__steps=2)
    thread = threading.Thread(target=lambda: results.append(run_experiments([config], Settings(tmp_path))))
    thread.start()
    thread.join()
    assert len(results[0].records) == 1


def test_a_folder_of_another_config_stops_everything_before_it_starts(tmp_path):
    run_experiments([experiment(DIGITS, methods=[{"name": "none"}])], Settings(tmp_path))
    other = experiment(DIGITS, methods=[{"name": "dropout"}, {"name": "none"}], train__steps=13)
    watcher = Watcher()
    with pytest.raises(ConfigMismatch, match="train.steps: 12 there, 13 here"):
        run_experiments([other], Settings(tmp_path), watcher)
    assert watcher.seen == []
    assert not (tmp_path / "small" / "dropout").exists()


def test_a_full_disk_stops_everything(tmp_path, monkeypatch):
    write = storage.write_atomically

    def full(path, content):
        if "checkpoint" in path.parts:
            raise StorageError(path, OSError(28, "No space left on device"))
        write(path, content)

    monkeypatch.setattr(storage, "write_atomically", full)
    watcher = Watcher()
    with pytest.raises(StorageError, match="No space left on device"):
        run_experiments([experiment(DIGITS, methods=TWO)], Settings(tmp_path), watcher)
    assert watcher.seen == [("started", "none", 0)]


@pytest.mark.slow
def test_a_full_disk_in_a_process_stops_everything(tmp_path):
    """A file stands where the checkpoint's folder should be."""
    config = experiment(DIGITS, methods=TWO)
    for label in ("none", "manifold_mixup"):
        folder = tmp_path / "small" / label / "seed-0"
        folder.mkdir(parents=True)
        (folder / "checkpoint").write_text("in the way")
    with pytest.raises(ExperimentStopped, match="cannot create the folder"):
        run_experiments([config], Settings(tmp_path, jobs=2))


def test_jobs_zero_takes_every_core_but_no_more_than_there_are_runs(tmp_path, monkeypatch):
    used = []

    def spy(folders, settings, jobs, watcher):
        used.append(jobs)
        yield from ()

    monkeypatch.setattr(module, "_in_processes", spy)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for count in (3, 9):
        config = experiment(DIGITS, seeds=list(range(count)))
        with pytest.raises(KeyError):  # the spy finishes no run
            run_experiments([config], Settings(Path(tmp_path) / str(count), jobs=0))
    assert used == [3, 8]
