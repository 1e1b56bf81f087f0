"""Pages that are written again while runs go on: how often, what they show, and what they cost the runs."""

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lab.small import experiment, one_run
from lab.test_cli import call, compare, recipe  # noqa: F401  the fixtures
from lab.test_reproduce import study  # noqa: F401  the fixture
from manifold_mixup.lab import invocation
from manifold_mixup.lab.errors import CorruptedFile, Interrupted, StorageError
from manifold_mixup.lab.experiment import STOPPED, Settings
from manifold_mixup.lab.plan_file import PLAN
from manifold_mixup.lab.records import EVALUATIONS, Failure
from manifold_mixup.lab.report import live
from manifold_mixup.lab.report.live import FILES, PAUSE, Both, LivePage, follow, look
from manifold_mixup.lab.storage import write_atomically

RUN = one_run()


class Clock:
    """A clock that goes on when it is told to, and a page that takes some of its seconds and may fail."""

    def __init__(self, cost=0.0):
        self.now, self.cost, self.writes, self.trouble, self.said = 0.0, cost, [], None, []

    def write(self):
        self.writes.append(self.now)
        self.now += self.cost
        if self.trouble is not None:
            raise self.trouble

    def page(self):
        return LivePage(self.write, self.said.append, lambda: self.now)


def no_space(path="page.html"):
    return StorageError(Path(path), OSError(28, "No space left on device"))


# ---------------------------------------------------------------- how often


def test_it_is_there_when_the_first_run_begins_and_then_every_ten_seconds():
    clock = Clock()
    page = clock.page()
    page.started(RUN)
    for step in range(1, 100):
        clock.now += 1.0
        page.advanced(RUN, step, 100, 8)
    assert clock.writes == [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0]


@pytest.mark.parametrize("cost", [0.01, 0.3, 4.0])
def test_writing_takes_less_than_two_percent_of_the_time_whatever_happens(cost):
    clock, dice = Clock(cost), random.Random(0)
    page = clock.page()
    for _ in range(20000):
        happening = dice.choice([page.started, lambda run: page.ended(run, None), lambda run: page.progressed()])
        happening(RUN)
        clock.now += dice.expovariate(2.0)
    gaps = [later - earlier for earlier, later in itertools.pairwise(clock.writes)]
    assert len(gaps) > 20
    assert min(gaps) >= PAUSE + cost
    assert max(gaps) < max(PAUSE, 50 * cost) + cost + 10  # and it is not forgotten either
    assert cost * len(gaps) / (clock.writes[-1] - clock.writes[0]) < 0.02


def test_a_run_that_stands_still_is_no_news_but_what_waited_is_written():
    clock = Clock()
    page = clock.page()
    page.started(RUN)
    clock.now = 5.0
    page.advanced(RUN, 1, 9, 8)  # too early
    clock.now = 20.0
    page.advanced(RUN, 1, 9, 8)  # nothing new since, but step 1 was not written
    clock.now = 40.0
    page.advanced(RUN, 1, 9, 8)
    assert clock.writes == [0.0, 20.0]


def test_runs_that_were_over_before_are_no_news():
    clock = Clock()
    with clock.page() as page:
        page.ended(RUN, Failure("small", "none", 0, "x"))
    with pytest.raises(Interrupted), clock.page():
        raise Interrupted(STOPPED)
    assert clock.writes == []


# ---------------------------------------------------------------- when it cannot be written, and at the end


@pytest.mark.parametrize("trouble", [no_space(), CorruptedFile("x"), ZeroDivisionError("a bug")])
def test_a_page_that_cannot_be_written_does_not_stop_the_runs(trouble):
    clock = Clock()
    clock.trouble = trouble
    with clock.page() as page:
        page.started(RUN)
        clock.now = 11.0
        page.ended(RUN, Failure("small", "none", 0, "x"))
    assert clock.writes == [0.0, 11.0]
    assert clock.said == []  # the last write is the command's, and raises


@pytest.mark.parametrize("stop", [Interrupted(STOPPED), KeyboardInterrupt()])
def test_runs_that_are_stopped_leave_a_page_of_where_they_stand(stop):
    clock = Clock()
    with pytest.raises(type(stop)), clock.page() as page:
        page.started(RUN)
        clock.now = 3.0
        raise stop
    assert clock.writes == [0.0, 3.0]
    assert clock.said == []


def test_that_the_page_of_stopped_runs_is_old_is_said_once_and_not_if_the_disk_stopped_them():
    for stop, said in ((Interrupted(STOPPED), 1), (no_space("tensors"), 0)):
        clock = Clock()
        clock.trouble = no_space()
        with pytest.raises(type(stop)), clock.page() as page:
            page.started(RUN)
            clock.now = 30.0
            page.advanced(RUN, 3, 9, 8)
            raise stop
        assert len(clock.writes) == 3
        assert len(clock.said) == said
        assert all("No space left on device" in text and "page.html" in text for text in clock.said)


def test_it_is_said_on_stderr_in_one_line(capsys):
    def write():
        raise CorruptedFile("two\nlines")

    with pytest.raises(Interrupted), LivePage(write) as page:
        page.started(RUN)
        raise Interrupted(STOPPED)
    assert capsys.readouterr() == ("", "the page does not show where things stand: two lines\n")


def test_several_watchers_hear_the_same_in_order():
    heard = []

    class Ear:
        def __init__(self, name):
            self.name = name

        def started(self, run):
            heard.append((self.name, "started", run))

        def advanced(self, run, *numbers):
            heard.append((self.name, "advanced", run, *numbers))

        def ended(self, run, outcome):
            heard.append((self.name, "ended", run, outcome))

    both, failure = Both(Ear("a"), Ear("b")), Failure("small", "none", 0, "x")
    both.started(RUN)
    both.advanced(RUN, 1, 9, 8)
    both.ended(RUN, failure)
    said = [("started", RUN), ("advanced", RUN, 1, 9, 8), ("ended", RUN, failure)]
    assert heard == [(name, *what) for what in said for name in "ab"]


# ---------------------------------------------------------------- compare


@pytest.fixture
def states(monkeypatch):
    """What every page that is written shows: how many runs are finished, and the steps of those that are not.

    The pages are written at every step; they are no pages but a line, which is quicker.
    """
    from manifold_mixup.lab.report import page

    found = []

    def spy(sources, path, title):
        found.append((len(sources.results), [(g.running, g.step) for g in sources.going]))
        write_atomically(path, b"a page")
        return path

    monkeypatch.setattr(page, "write_report", spy)
    monkeypatch.setattr(live, "PAUSE", 0.0)
    monkeypatch.setattr(live, "SHARE", 0)
    return found


def test_compare_writes_its_page_while_the_runs_go_on(call, recipe, states):  # noqa: F811
    code, out, err = call(*compare(recipe))
    assert (code, err) == (0, "")
    path = recipe.parent / "runs" / "small" / "report.html"
    assert out.endswith(f"page: {path}\n")
    assert states[0] == (0, [(False, 0)] * 4)  # before the first step
    assert states[-1] == states[-2] == (4, [])  # when the last run ended, and when all was done
    finished = [done for done, _ in states]
    assert finished == sorted(finished)
    assert set(finished) == {0, 1, 2, 3, 4}
    assert (True, 4) in {run for _, going in states for run in going}  # one that was at work after its first look
    assert sorted(os.listdir(path.parent)) == ["experiment.json", "hidden-only", "none", "report.html"]


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_compare_that_is_stopped_leaves_a_page_that_says_how_far_it_came(call, recipe, monkeypatch, jobs, request):  # noqa: F811
    from manifold_mixup.lab.report import page

    write = page.write_report
    states = request.getfixturevalue("states")
    note = page.write_report

    def stop(sources, *arguments):
        note(sources, *arguments)
        if len(sources.results) == 1 and any(going.running for going in sources.going):
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr(page, "write_report", finish)

    def finish(sources, *arguments):
        note(sources, *arguments)
        write(sources, *arguments)

    monkeypatch.setattr(page, "write_report", stop)
    arguments = [*compare(recipe, "--json", "--set", "train.steps=400")]
    arguments[arguments.index("--jobs") + 1] = jobs
    code, out, err = call(*arguments)
    assert (code, out, err) == (130, "", f"error: {STOPPED}\n")
    done, going = states[-1]
    assert 1 <= done < 4
    assert not any(running for running, _ in going)
    text = (recipe.parent / "runs" / "small" / "report.html").read_text()
    assert f"{done} of 4" in " ".join(text.split())


def test_a_page_that_cannot_be_written_costs_no_run_and_is_an_error_at_the_end(call, recipe):  # noqa: F811
    (recipe.parent / "runs" / "small" / "report.html").mkdir(parents=True)
    code, out, err = call(*compare(recipe, "--json"))
    assert (code, out) == (2, "")
    assert err.startswith("error: cannot write ")
    assert err.count("\n") == 1
    assert len(list(recipe.parent.rglob("record.json"))) == 4


def test_where_every_run_fails_the_failure_is_what_is_said(call, recipe):  # noqa: F811
    # two batches in one of five examples: the mixer refuses what it cannot halve
    method = "manifold_mixup:layers=hidden.1.linear,pairing=two-batches"
    code, out, err = call(*compare(recipe, "-m", method, "--set", "train.batch_size=5"))
    assert code == 1
    assert "error: 2 of 2 runs failed" in err
    page = Path(out.removeprefix("page: ").strip()).read_text(encoding="utf-8")
    assert page.count("failed: ") == 2, "the page names them as well"


def test_reproduce_writes_a_page_of_its_study_and_show_writes_none(study, tmp_path, call, states):  # noqa: F811
    command = ("reproduce", "table0", "--scale", "desk", "--runs", tmp_path, "--quiet", "--jobs", 1)
    assert call(*command, "--show")[0] == 0
    assert not list(tmp_path.glob("*.html"))
    code, out, err = call(*command)
    assert (code, err) == (0, "")
    assert out.endswith(f"page: {tmp_path / 'table0-desk.html'}\n")
    assert states[0] == (0, [(False, 0)] * 4)
    assert states[-1] == (4, [])
    assert len(states) > 40, "every step was news"
    code, out, _ = call(*command, "--json")
    assert "page: " not in out
    code, out, _ = call(*command, "--markdown")
    assert "page: " not in out


def test_a_page_changes_no_number(tmp_path, states):
    config = experiment(methods=[{"name": "manifold_mixup"}], train__steps=30)
    found = []
    for name in ("with", "without"):
        runs = tmp_path / name
        page = invocation.ExperimentPage([config], runs, runs / "page.html", "t") if name == "with" else None
        outcome = invocation.run_all([config], Settings(runs), quiet=True, page=page)
        found.append([(record.metrics, record.best) for record in outcome.records])
    assert found[0] == found[1]
    assert len(states) > 3


def test_only_the_first_of_several_processes_writes(tmp_path, states, monkeypatch):
    from manifold_mixup.lab.devices import Devices

    config = experiment()
    page = invocation.ExperimentPage([config], tmp_path, tmp_path / "page.html", "t")
    for rank, kind in (("0", Both), ("1", LivePage)):
        monkeypatch.setenv("RANK", rank)
        settings = Settings(tmp_path, devices=Devices(count=2))
        with invocation.shown([config], settings, True, page) as (_, watcher, _progress):
            watcher.started(RUN)
            assert isinstance(watcher, kind) == (rank == "0")
    assert len(states) == 1


# ---------------------------------------------------------------- runs of whomever


def folder_with(runs, *names):
    folder = runs / "small" / "none" / "seed-0"
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


def test_the_files_that_tell_are_those_of_the_lab():
    assert {PLAN, EVALUATIONS, "record.json", "config.json", "log.jsonl", "failure.json"} < FILES


def test_a_stamp_changes_with_what_a_page_shows_and_with_nothing_else(tmp_path):
    lines = tmp_path / "runs.jsonl"
    paths = [tmp_path / "runs", lines]
    stamps = [look(paths).stamp]
    folder = folder_with(tmp_path / "runs")
    assert look(paths).stamp == stamps[0]
    wanted = [
        folder / "config.json",
        folder / "log.jsonl",
        folder / "checkpoint" / "state.json",
        folder / "record.json",
    ]
    for path in (*wanted, folder / "evaluations.jsonl", folder.parents[1] / PLAN, lines):
        path.write_text("{}")
        stamps.append(look(paths).stamp)
    (folder / "log.jsonl").write_text("{}\n{}")  # longer
    stamps.append(look(paths).stamp)
    os.utime(folder / "record.json", ns=(1, 1))  # as long as before
    stamps.append(look(paths).stamp)
    (folder / "record.json").unlink()
    stamps.append(look(paths).stamp)
    assert len(set(stamps)) == len(stamps) == 11
    for name in ("model.safetensors", "checkpoint/tensors-3.safetensors", "report.html", ".report.html.1.tmp", ".lock"):
        (folder / name).write_text("x")
    assert look(paths).stamp == stamps[-1]


def test_a_process_that_was_killed_is_noticed(tmp_path):
    folder = folder_with(tmp_path, "config.json")
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (folder / ".lock-owner").write_text(f"process {process.pid} on {socket.gethostname()}\n")
    before = look([tmp_path]).stamp
    assert look([tmp_path]).stamp == before
    process.kill()
    process.communicate()
    assert look([tmp_path]).stamp != before


def test_what_is_there_is_what_holds_a_run(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "lines.jsonl").write_text("")
    folder_with(tmp_path / "runs", "config.json")
    paths = [tmp_path / name for name in ("empty", "nowhere", "runs", "lines.jsonl", "other.jsonl")]
    assert look(paths).there == (tmp_path / "runs", tmp_path / "lines.jsonl")


class Sleep:
    """Changes something while its caller sleeps, and ends it with Ctrl-C when nothing is left to change."""

    def __init__(self, *changes):
        self.changes, self.slept = list(changes), []

    def __call__(self, seconds):
        self.slept.append(seconds)
        if not self.changes:
            raise KeyboardInterrupt
        self.changes.pop(0)()


def test_following_writes_again_when_something_has_changed_until_ctrl_c(tmp_path):
    folder, written, said, now = folder_with(tmp_path, "config.json"), [], [], [0.0]

    def write():
        now[0] += 3.0
        written.append(sorted(os.listdir(folder)))
        if len(written) == 2:
            raise CorruptedFile("a line is no JSON")

    sleep = Sleep(
        lambda: None,
        lambda: (folder / "log.jsonl").write_text("{"),
        lambda: None,
        lambda: (folder / "log.jsonl").write_text("{}"),
    )
    follow([tmp_path], write, said.append, sleep, lambda: now[0])
    assert [len(names) for names in written] == [2, 3, 3]
    assert said == ["a line is no JSON"]
    assert sleep.slept == [2.0, 2.0, 15.0, 2.0, 15.0]


def test_following_begins_with_a_page_or_an_error(tmp_path):
    def write():
        raise CorruptedFile("x")

    with pytest.raises(CorruptedFile):
        follow([tmp_path], write, print, Sleep())
