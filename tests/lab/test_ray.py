"""Runs on a Ray cluster: the numbers of local runs, errors that are named, and a worker and the driver killed."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from lab.small import DIGITS, experiment, one_run
from lab.test_cli import RECIPE as SMALL
from manifold_mixup.lab import ray_executor
from manifold_mixup.lab.devices import Devices
from manifold_mixup.lab.errors import ExperimentStopped, MissingExtra, UsageError
from manifold_mixup.lab.experiment import Settings, run_experiments
from manifold_mixup.lab.records import Failure, RunFolder

CLI = str(Path(__file__).parents[1] / "cli_process.py")
RECIPE = (
    SMALL.replace("seeds = [0, 1]", "seeds = [0]")
    + """
[[methods]]
name = "input_noise"
label = "diverges"
options = { sd = 1e38 }
"""
)


def command(recipe, runs, *more):
    return [sys.executable, CLI, "compare", "--recipe", str(recipe), "--runs", str(runs), "--quiet", *more]


def outcomes(folder):
    """What every finished run measured, logged and learned, by its folder."""
    return {
        path.parent.relative_to(folder): (
            json.loads(path.read_text())["metrics"],
            (path.parent / "log.jsonl").read_text(),
            (path.parent / "model.safetensors").read_bytes(),
        )
        for path in folder.rglob("record.json")
    }


@pytest.mark.timeout(600)  # Ray starts half a dozen processes, which takes minutes where others have all cores
def test_a_cluster_gives_the_numbers_of_local_runs_and_a_failed_run_does_not_stop_the_others(tmp_path):
    recipe = tmp_path / "grid.toml"
    recipe.write_text(RECIPE)
    ray = subprocess.run(
        command(recipe, tmp_path / "ray", "--executor", "ray", "--jobs", "2"),
        capture_output=True,
        text=True,
        timeout=500,
    )
    local = subprocess.run(command(recipe, tmp_path / "local", "--jobs", "1"), capture_output=True, text=True)
    assert (ray.returncode, local.returncode) == (1, 1)  # some runs failed
    assert ray.stderr.splitlines()[-1] == local.stderr.splitlines()[-1]
    assert "1 of 3 runs failed; the first: diverges, seed 0" in ray.stderr
    assert len(outcomes(tmp_path / "ray")) == 2
    assert outcomes(tmp_path / "ray") == outcomes(tmp_path / "local")
    assert len(list((tmp_path / "ray").rglob("failure.json"))) == 1


def test_without_ray_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"manifold-mixup\[ray\]"):
        run_experiments([experiment(DIGITS)], Settings(tmp_path, executor="ray"))


def test_several_processes_for_one_run_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--executor ray gives each run one process"):
        run_experiments([experiment(DIGITS)], Settings(tmp_path, executor="ray", devices=Devices(count=2)))


def test_an_address_without_a_cluster_is_named(tmp_path):
    recipe = tmp_path / "grid.toml"
    recipe.write_text(RECIPE)
    arguments = ("--executor", "ray", "--ray-address", "nothing here")
    done = subprocess.run(command(recipe, tmp_path / "runs", *arguments), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "error: there is no Ray cluster at --ray-address 'nothing here'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--executor", "spark"), "--executor 'spark' should be local or ray"),
        (("--ray-address", "auto"), "--ray-address is read by --executor ray only"),
        (("--gpus-per-run", "0.25"), "--gpus-per-run is read by --executor ray only"),
    ],
)
def test_bad_choices_are_named(tmp_path, arguments, message):
    recipe = tmp_path / "grid.toml"
    recipe.write_text(RECIPE)
    done = subprocess.run(command(recipe, tmp_path / "runs", *arguments), capture_output=True, text=True)
    assert (done.returncode, message in done.stderr) == (2, True)


# ---------------------------------------------------------------- its parts


@pytest.mark.parametrize(
    ("said", "accelerator", "address", "cuda_here", "most", "expected"),
    [
        (None, "auto", None, False, 0.0, 0.0),
        (None, "auto", None, True, 2.0, 1.0),
        (None, "auto", None, False, 2.0, 0.0),  # there is a card, but this machine's torch cannot use it
        (None, "auto", "host:1", False, 2.0, 1.0),  # the driver has none, the cluster has
        (None, "cpu", "host:1", True, 2.0, 0.0),
        (None, "cuda", "host:1", False, 1.0, 1.0),
        (0.25, "auto", None, True, 1.0, 0.25),
        (2.0, "auto", None, True, 2.0, 2.0),
        (0.0, "cuda", None, True, 1.0, 0.0),
    ],
)
def test_gpus_of_a_run_are_what_was_said_or_one_where_it_can_be_used(
    monkeypatch, said, accelerator, address, cuda_here, most, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda_here)
    settings = Settings(Path(), devices=Devices(accelerator), ray_address=address, gpus_per_run=said)
    assert ray_executor._gpus(settings, most) == expected


@pytest.mark.parametrize(
    ("said", "accelerator", "message"),
    [
        (1.5, "auto", "--gpus-per-run 1.5: above 1 it should be a whole number"),
        (4.0, "auto", "--gpus-per-run 4: the Ray cluster has no node with so many GPUs; the most that one has is 0"),
        (None, "cuda", "--accelerator cuda: the Ray cluster has no node with so many GPUs"),
    ],
)
def test_gpus_that_no_node_has_are_refused_instead_of_waited_for(said, accelerator, message):
    with pytest.raises(UsageError, match=message):
        ray_executor._gpus(Settings(Path(), devices=Devices(accelerator), gpus_per_run=said), 0.0)


def test_a_node_that_does_not_see_the_folder_says_so_and_makes_none(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_executor, "UNSEEN", 0.0)
    monkeypatch.setattr(ray_executor, "PAUSE", 0.01)
    monkeypatch.chdir(tmp_path)  # a task changes to the driver's folder
    folder = RunFolder(tmp_path / "elsewhere", one_run(DIGITS))
    text = ray_executor._work(folder, Settings(tmp_path / "elsewhere"), None, tmp_path)
    assert f"does not see {folder.path}: every node has to see the folder of the runs" in text
    assert not list(tmp_path.iterdir())


class Answers:
    """In the place of Ray: what ``ray.get`` returns or raises."""

    def __init__(self, answer):
        from ray import exceptions

        self.exceptions, self.answer = exceptions, answer

    def get(self, reference):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_a_dead_worker_is_started_again_until_it_has_died_too_often(tmp_path):
    from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

    folder = RunFolder(tmp_path, one_run(DIGITS))
    folder.claim()
    for error in (WorkerCrashedError(), OutOfMemoryError("no memory left"), NodeDiedError("the node is gone")):
        assert ray_executor._result(Answers(error), None, folder, again=True) is None
        assert not (folder.path / "failure.json").exists()
    failure = ray_executor._result(Answers(OutOfMemoryError("no memory left")), None, folder, again=False)
    assert isinstance(failure, Failure)
    assert failure.error == "its process died 4 times (killed, or out of memory?): no memory left"
    assert json.loads((folder.path / "failure.json").read_text())["error"] == failure.error


def test_a_worker_that_cannot_begin_fails_at_once_and_a_text_ends_everything(tmp_path):
    from ray.exceptions import RaySystemError

    folder = RunFolder(tmp_path, one_run(DIGITS))
    folder.claim()
    error = RaySystemError("a trace\nModuleNotFoundError: No module named 'manifold_mixup'")
    failure = ray_executor._result(Answers(error), None, folder, again=True)
    assert isinstance(failure, Failure)
    assert failure.error.startswith("its worker could not begin it, is manifold-mixup installed on every node?")
    assert failure.error.endswith("No module named 'manifold_mixup'")
    with pytest.raises(ExperimentStopped, match="the disk is full"):
        ray_executor._result(Answers("the disk is full"), None, folder, again=True)


# ---------------------------------------------------------------- stopped and killed


@pytest.fixture
def cluster(monkeypatch):
    """The address of a cluster of two CPUs that outlives its drivers; its sockets need a short path."""
    folder = Path("/tmp") / f"mm-ray-{os.getpid()}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    start += [f"--temp-dir={folder}", "--include-dashboard=false", "--object-store-memory=100000000"]
    start += ["--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # of the cluster and of its drivers: no token in somebody's home
    with subprocess.Popen(start, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as head:
        try:
            _wait(lambda: _open(port), 120)
            yield f"127.0.0.1:{port}", psutil.Process(head.pid)
        finally:
            children = psutil.Process(head.pid).children(recursive=True)
            head.kill()  # asked politely it takes half a minute
            for process in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            head.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


def _open(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(condition, seconds):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.1)
    return found


def _is_named(process, name):
    """Whether this is one of Ray's processes of that name; one that has ended, or is a zombie, is not."""
    try:
        return name in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _worker_of(folder):
    """The process that is at work on a run, as it has written down; None if there is none at this moment."""
    with contextlib.suppress(OSError, IndexError, psutil.NoSuchProcess):
        process = psutil.Process(int((folder / ".lock-owner").read_text().split()[1]))
        return process if _is_named(process, "ray::") else None
    return None


def _begun(folder):
    """Runs that have a checkpoint and no record."""
    return [p for p in folder.rglob("checkpoint/state.json") if not (p.parents[1] / "record.json").exists()]


def _strictly_increasing(runs):
    """Every look at the validation split of every run was logged once, in order."""
    logs = [[json.loads(line)["step"] for line in path.read_text().splitlines()] for path in runs.rglob("log.jsonl")]
    return bool(logs) and all(steps == sorted(set(steps)) for steps in logs)


def _grid(folder, seeds, steps):
    recipe = folder / "grid.toml"
    methods = RECIPE.replace('label = "diverges"\noptions = { sd = 1e38 }', 'label = "noise"')
    recipe.write_text(methods.replace("seeds = [0]", f"seeds = {seeds}").replace("steps = 12", f"steps = {steps}"))
    return recipe


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twelve_runs_survive_the_end_of_a_worker_and_of_the_driver(tmp_path, cluster):
    address, head = cluster
    recipe, runs = _grid(tmp_path, [0, 1, 2, 3], 3000), tmp_path / "ray"
    again = command(recipe, "ray", "--executor", "ray", "--ray-address", address, "--checkpoint-every", "0.2")
    subprocess.run(command(recipe, tmp_path / "local"), check=True, stdout=subprocess.DEVNULL, timeout=600)
    # the folder of the runs is a relative path, and the cluster was started elsewhere
    with subprocess.Popen(again, stdout=subprocess.DEVNULL, cwd=tmp_path) as driver:
        _wait(lambda: _begun(runs), 200)
        _wait(lambda: [w for path in _begun(runs) if (w := _worker_of(path.parents[1]))], 60)[0].kill()
        [board] = [process for process in head.children(recursive=True) if _is_named(process, "ray::_Board")]
        board.kill()  # progress is lost for a moment, the runs are not
        _wait(lambda: len(outcomes(runs)) >= 3 and _begun(runs), 300)
        assert driver.poll() is None, "it ended before it could be killed"
        driver.send_signal(signal.SIGKILL)
    finished = {path: path.stat().st_mtime_ns for path in runs.rglob("record.json")}
    assert 3 <= len(finished) < 12
    done = subprocess.run(again, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(outcomes(runs)) == 12
    assert outcomes(runs) == outcomes(tmp_path / "local")
    assert not list(runs.rglob("failure.json"))
    for path, written in finished.items():
        assert path.stat().st_mtime_ns == written  # what was finished was not done again
    assert _strictly_increasing(runs)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_leaves_checkpoints_starts_nothing_more_and_the_same_command_goes_on(tmp_path):
    recipe, runs = _grid(tmp_path, [0, 1], 2000), tmp_path / "ray"
    again = command(recipe, runs, "--executor", "ray", "--jobs", "2", "--checkpoint-every", "1000")
    with subprocess.Popen(again, stderr=subprocess.PIPE, text=True, start_new_session=True) as driver:
        begun = _wait(lambda: len(found := list(runs.rglob("log.jsonl"))) >= 2 and found, 200)
        os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: everybody in the group gets it
        _, text = driver.communicate(timeout=120)
    assert (driver.returncode, "the same command goes on from here" in text) == (130, True), text
    assert len(begun) == 2
    assert sorted(runs.rglob("log.jsonl")) == sorted(begun)  # the four that were waiting did not begin
    assert len(_begun(runs)) == 2  # no checkpoint was due for many minutes: these are those of the stop
    done = subprocess.run(again, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert len(outcomes(runs)) == 6
    assert _strictly_increasing(runs)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_whose_worker_dies_four_times_has_failed_and_the_others_go_on(tmp_path):
    recipe, runs = _grid(tmp_path, [0], 4000), tmp_path / "ray"
    unlucky = runs / "small" / "none" / "seed-0"
    killed = set()
    again = command(recipe, runs, "--executor", "ray", "--jobs", "2", "--checkpoint-every", "0.2")
    with subprocess.Popen(again, stderr=subprocess.PIPE, text=True) as driver:
        for _ in range(4):
            worker = _wait(lambda: (w := _worker_of(unlucky)) and w.pid not in killed and w, 120)
            killed.add(worker.pid)
            worker.kill()
        _, text = driver.communicate(timeout=400)
    assert driver.returncode == 1
    assert "1 of 3 runs failed; the first: none, seed 0: its process died 4 times" in text
    assert (unlucky / "failure.json").exists()
    assert {path.parts[1] for path in outcomes(runs)} == {"hidden-only", "noise"}
