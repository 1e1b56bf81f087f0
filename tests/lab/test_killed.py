"""The command killed with SIGKILL at random moments, and its workers: started again, it ends with the same numbers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab.test_images_end_to_end import draw

CLI = str(Path(__file__).parents[1] / "cli_process.py")
KILLS = 3


def numbers(folder):
    """What every run measured, and its weights, by its folder."""
    return {
        path.parent.relative_to(folder): (
            json.loads(path.read_text())["metrics"],
            json.loads(path.read_text())["best"],
            (path.parent / "model.safetensors").read_bytes(),
            (path.parent / "log.jsonl").read_text(),
        )
        for path in folder.rglob("record.json")
    }


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_numbers(tmp_path):
    photos = draw(tmp_path / "photos", n=30)
    environment = {**os.environ, "MANIFOLD_MIXUP_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    methods = "none,input_mixup,manifold_mixup,cutmix,adamixup"
    arguments = ["--data", f"folder:{photos}", "--width", "0.1", "--methods", methods, "--seeds", "2", "-j", "2"]
    arguments += ["--epochs", "30", "--set", "train.batch_size=12", "--checkpoint-every", "0.3", "--quiet"]

    def command(runs):
        return [sys.executable, CLI, "compare", *arguments, "--runs", str(tmp_path / runs)]

    subprocess.run(command("straight"), env=environment, check=True, stdout=subprocess.DEVNULL, timeout=240)
    seconds = random.Random(0)
    killed = 0
    while killed < KILLS:
        with subprocess.Popen(
            command("broken"), env=environment, start_new_session=True, stdout=subprocess.DEVNULL
        ) as process:
            begun = len(list((tmp_path / "broken").rglob("checkpoint/state.json")))
            while len(list((tmp_path / "broken").rglob("checkpoint/state.json"))) == begun:
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.05)
            time.sleep(seconds.uniform(0, 2))
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
    left = 10 - len(numbers(tmp_path / "broken"))
    assert left > 0
    subprocess.run(command("broken"), env=environment, check=True, stdout=subprocess.DEVNULL, timeout=240)
    straight = numbers(tmp_path / "straight")
    assert len(straight) == 10
    assert numbers(tmp_path / "broken") == straight
