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

from lab.small import DIGITS, experiment
from manifold_mixup.lab.devices import Devices
from manifold_mixup.lab.errors import MissingExtra, UsageError
from manifold_mixup.lab.experiment import Settings, run_experiments

CLI = str(Path(__file__).parents[1] / "cli_process.py")
RECIPE = """
name = "grid"
seeds = [0]
[data]
name = "digits"
options = { train_examples = 50 }
[model]
name = "mlp"
options = { width = 12, depth = 2 }
[train]
steps = 12
batch_size = 10
eval_every = 4
[[methods]]
name = "none"
[[methods]]
name = "manifold_mixup"
[[methods]]
name = "input_noise"
label = "diverges"
options = { sd = 1e38 }
"""


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


# ---------------------------------------------------------------- killed


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
            yield f"127.0.0.1:{port}"
        finally:
            children = psutil.Process(head.pid).children(recursive=True)
            head.terminate()
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


def _workers():
    """Processes that are carrying out a run."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if "ray::_work" in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


def _begun(folder):
    """Runs that have a checkpoint and no record."""
    return [p for p in folder.rglob("checkpoint/state.json") if not (p.parents[1] / "record.json").exists()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twelve_runs_survive_the_end_of_a_worker_and_of_the_driver(tmp_path, cluster):
    recipe = tmp_path / "grid.toml"
    methods = RECIPE.replace('label = "diverges"\noptions = { sd = 1e38 }', 'label = "noise"')
    recipe.write_text(methods.replace("seeds = [0]", "seeds = [0, 1, 2, 3]").replace("steps = 12", "steps = 3000"))
    runs, arguments = tmp_path / "ray", ("--executor", "ray", "--ray-address", cluster, "--checkpoint-every", "0.2")
    subprocess.run(command(recipe, tmp_path / "local"), check=True, stdout=subprocess.DEVNULL, timeout=600)
    with subprocess.Popen(command(recipe, runs, *arguments), stdout=subprocess.DEVNULL) as driver:
        _wait(lambda: _begun(runs), 200)
        _workers()[0].kill()
        _wait(lambda: len(outcomes(runs)) >= 3 and _begun(runs), 300)
        assert driver.poll() is None, "it ended before it could be killed"
        driver.send_signal(signal.SIGKILL)
    finished = {path: path.stat().st_mtime_ns for path in runs.rglob("record.json")}
    assert 3 <= len(finished) < 12
    done = subprocess.run(command(recipe, runs, *arguments), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(outcomes(runs)) == 12
    assert outcomes(runs) == outcomes(tmp_path / "local")
    assert not list(runs.rglob("failure.json"))
    for path, written in finished.items():
        assert path.stat().st_mtime_ns == written  # what was finished was not done again
    for path in runs.rglob("log.jsonl"):
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps == sorted(set(steps))
