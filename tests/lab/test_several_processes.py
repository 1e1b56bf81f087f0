"""Two gloo processes that share every batch, started the way that the documentation says."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lab.small import DIGITS, equal, experiment
from manifold_mixup.lab import storage
from manifold_mixup.lab.devices import Devices
from manifold_mixup.lab.errors import ConfigMismatch, UsageError
from manifold_mixup.lab.experiment import Settings, run_experiments

CLI = str(Path(__file__).parents[1] / "cli_process.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", sys.executable, CLI]
TWO = ("--devices", "2", "--accelerator", "cpu")
RECIPE = """
name = "small"
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
lr = 0.01
eval_every = 4
"""
METHODS = '[[methods]]\nname = "none"\n[[methods]]\nname = "manifold_mixup"\n'


def environment():
    """Without what another launcher may have set, and without a second layer of threads."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS")
    return {k: v for k, v in os.environ.items() if k not in names} | {"OMP_NUM_THREADS": "1"}


def launch(launcher, *arguments):
    command = [*launcher, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=240)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Both methods, trained by two processes."""
    folder = tmp_path_factory.mktemp("pair")
    recipe = folder / "small.toml"
    recipe.write_text(RECIPE + METHODS)
    done = launch(TORCHRUN, "compare", "--recipe", recipe, "--runs", folder / "runs", "--json", *TWO)
    assert done.returncode == 0, done.stderr
    return folder / "runs/small", done.stdout


def test_two_processes_train_like_one(pair, tmp_path):
    """Gradients are means over both halves of each batch: equal to one process's but for the order of sums."""
    folder, _ = pair
    config = experiment(DIGITS, train__lr=0.01)
    (alone,) = run_experiments([config], Settings(tmp_path)).records
    together = json.loads((folder / "none/seed-0/record.json").read_text())
    assert together["train"]["processes"] == 2
    assert together["metrics"] == pytest.approx(alone.metrics, abs=1e-3)
    weights = [storage.read_tensors(path / "model.safetensors") for path in (folder / "none/seed-0", alone.folder)]
    for name, value in weights[1].items():
        assert torch.allclose(weights[0][name], value, atol=1e-5), name


def test_only_the_first_process_prints_and_writes(pair):
    folder, stdout = pair
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert [line["label"] for line in lines] == ["none", "manifold_mixup"]
    log = [json.loads(line)["step"] for line in (folder / "manifold_mixup/seed-0/log.jsonl").read_text().splitlines()]
    assert log == [4, 8, 12]


def test_each_process_mixes_on_its_own(pair):
    folder, _ = pair
    own = storage.load_state(folder / "manifold_mixup/seed-0/checkpoint")["own"]
    assert len(own) == 2
    generators = [list(_tensors(rank["method"])) for rank in own]
    assert generators[0]
    assert any(not torch.equal(a, b) for a, b in zip(*generators, strict=True))


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def test_a_run_of_two_processes_is_not_taken_up_by_one(pair, tmp_path):
    folder, _ = pair
    (folder / "none/seed-0/record.json").unlink()
    outcome = run_experiments([experiment(DIGITS, train__lr=0.01)], Settings(folder.parent))
    assert re.search(r"written by 2 processes, here are 1", outcome.failures[0].error)
    assert ConfigMismatch.__name__ in outcome.failures[0].traceback


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path):
    done = launch(
        TORCHRUN, "train", "--runs", tmp_path, "--steps", "2", "--set", "train.batch_size=11", "--quiet", *TWO
    )
    assert done.returncode != 0
    assert "train.batch_size 11 cannot be divided among 2 devices" in done.stderr


def test_the_first_process_is_known_before_anything_is_launched(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Devices("cpu", 2).first
    monkeypatch.setenv("RANK", "1")
    assert not Devices("cpu", 2).first
    assert Devices("cpu", 1).first  # a process of somebody else's job


def test_devices_that_are_not_there_are_a_clear_error():
    from manifold_mixup.lab.devices import make_fabric

    with pytest.raises(UsageError, match="accelerator 'cuda'"):
        make_fabric(Devices("cuda", 64), "32-true")


@pytest.mark.slow
def test_without_torchrun_the_processes_are_started_by_the_command(tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text(RECIPE + METHODS)
    done = launch([sys.executable, CLI], "compare", "--recipe", recipe, "--runs", tmp_path / "runs", "--json", *TWO)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.slow
def test_two_processes_that_were_killed_go_on_to_the_same_bits(tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text(RECIPE.replace("steps = 12", "steps = 300") + METHODS)

    def arguments(name):
        return [*TORCHRUN, "compare", "--recipe", str(recipe), "--runs", str(tmp_path / name), "--quiet", *TWO]

    assert launch(arguments("straight")).returncode == 0
    command = [*arguments("broken"), "--checkpoint-every", "0.5"]
    with subprocess.Popen(command, env=environment(), start_new_session=True, stderr=subprocess.DEVNULL) as process:
        checkpoint = tmp_path / "broken/small/none/seed-0/checkpoint/state.json"
        while not checkpoint.exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    assert not list(tmp_path.glob("broken/**/manifold_mixup/*/record.json"))
    assert launch(arguments("broken")).returncode == 0
    for label in ("none", "manifold_mixup"):
        runs = [tmp_path / name / "small" / label / "seed-0" for name in ("straight", "broken")]
        assert equal(*(storage.read_tensors(run / "model.safetensors") for run in runs))
