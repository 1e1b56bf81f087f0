"""One process at a time works on a run's folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lab.small import DIGITS, experiment, one_run
from manifold_mixup.lab.errors import FolderBusy
from manifold_mixup.lab.experiment import Settings, run_experiments
from manifold_mixup.lab.records import RunFolder
from manifold_mixup.lab.run import execute

HOLD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from lab.small import DIGITS, one_run
from manifold_mixup.lab.records import RunFolder
folder = RunFolder(Path(sys.argv[1]), one_run(DIGITS))
folder.claim()
with folder.lock():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that works on the run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path), str(Path(__file__).parents[1])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_told_who_holds_it(holder, tmp_path):
    folder = RunFolder(tmp_path, one_run(DIGITS))
    with pytest.raises(FolderBusy, match=f"seed-0 is in use by another process .process {holder.pid} on "):
        execute(folder)
    assert folder.read() is None


def test_nothing_is_started_where_one_of_the_runs_is_at_work(holder, tmp_path):
    config = experiment(DIGITS, methods=[{"name": "none"}, {"name": "dropout"}])
    with pytest.raises(FolderBusy, match="in use"):
        run_experiments([config], Settings(tmp_path))
    assert not list(tmp_path.rglob("record.json"))
    assert not list(tmp_path.rglob("log.jsonl"))


def test_a_process_that_was_killed_leaves_no_lock(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    record = execute(RunFolder(tmp_path, one_run(DIGITS)))
    assert record.seed == 0


def test_the_lock_is_let_go_after_a_run_and_after_an_error(tmp_path):
    folder = RunFolder(tmp_path, one_run(DIGITS))
    folder.claim()
    with pytest.raises(RuntimeError, match="inside"), folder.lock():
        raise RuntimeError("inside")
    with folder.lock():
        assert (folder.path / ".lock-owner").exists()
    assert not (folder.path / ".lock-owner").exists()
