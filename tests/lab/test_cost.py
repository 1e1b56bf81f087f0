"""The time of a step and the peak memory, against clocks and memory that are known."""

import mmap
import statistics
import sys
import time

import pytest
import torch

from lab.small import one_run, train
from lab.test_training import stop_at
from manifold_mixup.lab import cost
from manifold_mixup.lab.cost import Meter
from manifold_mixup.lab.errors import Interrupted
from manifold_mixup.lab.methods import METHODS
from manifold_mixup.lab.training import Hooks

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [0.0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    return now


def test_the_time_of_a_step_is_the_median_of_the_last_ones(clock):
    meter = Meter(CPU)
    seconds = [float(1 + (7 * i) % 31) for i in range(300)]
    for spent in seconds:
        meter.begin()
        clock[0] += spent
        meter.end(1)
        clock[0] += 1000.0  # a validation
    assert meter.facts()["step_seconds"] == statistics.median(seconds[-200:])


def test_steps_that_end_together_count_with_their_mean(clock):
    meter = Meter(CPU)
    for steps, spent in ((1, 60.0), (50, 100.0), (50, 150.0), (50, 200.0)):
        meter.begin()
        clock[0] += spent
        meter.end(steps)
    assert meter.facts()["step_seconds"] == 3.0


def test_without_a_step_there_is_no_time():
    assert Meter(CPU).facts()["step_seconds"] is None


def test_validation_and_checkpoints_are_not_in_the_time_of_a_step(tmp_path, monkeypatch):
    original = METHODS["none"].loss

    def slow(self, *args):
        time.sleep(0.02)
        return original(self, *args)

    monkeypatch.setattr(METHODS["none"], "loss", slow)
    pause = Hooks(progress=lambda step: time.sleep(0.1), checkpoint_steps=1)
    _, fitted, _ = train(one_run(train__steps=5), tmp_path, pause)
    assert 0.02 <= fitted.facts["step_seconds"] < 0.1
    assert fitted.facts["seconds"] > 5 * 0.1


def test_a_resumed_run_measures_the_steps_since(tmp_path):
    with pytest.raises(Interrupted):
        train(one_run(), tmp_path, stop_at(5))
    assert train(one_run(), tmp_path)[1].facts["step_seconds"] > 0
    assert train(one_run(), tmp_path)[1].facts["step_seconds"] is None  # no steps were left


def fill(mebibytes):
    """Use memory and give it back to the system: what is freed to the allocator alone may be used again unseen."""
    with mmap.mmap(-1, mebibytes * MIB) as memory:
        for _ in range(mebibytes):
            memory.write(bytes(MIB))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell the peak since a moment")
def test_the_peak_is_that_since_the_beginning():
    fill(200)  # a peak from before the run
    meter = Meter(CPU)
    small = meter.facts()["peak_memory_mib"]
    fill(100)
    facts = meter.facts()
    assert facts["peak_memory_of"] == "process"
    assert 90 < facts["peak_memory_mib"] - small < 130


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"clear_refs": "", "status": "Name:\tpython\nVmPeak:\t 9 kB\nVmHWM:\t  2560 kB\nVmRSS:\t 1 kB\n"}, 2.5),
        ({"clear_refs": "", "status": "Name:\tpython\n"}, None),
        ({"clear_refs": "", "status": "VmHWM:\n"}, None),
        ({"clear_refs": ""}, None),
    ],
    ids=["told", "no such line", "no number", "no file"],
)
def test_the_peak_is_read_as_linux_writes_it(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert Meter(CPU, tmp_path).facts()["peak_memory_mib"] == expected
    assert (tmp_path / "clear_refs").read_text() == "5"


def test_where_the_peak_cannot_begin_anew_none_is_told(tmp_path):
    folder = tmp_path / "proc"
    (folder / "clear_refs").mkdir(parents=True)  # it cannot be written
    (folder / "status").write_text("VmHWM:\t 1024 kB\n")
    assert Meter(CPU, folder).facts() == {
        "step_seconds": None,
        "peak_memory_mib": None,
        "peak_memory_of": "process",
    }
    assert Meter(CPU, tmp_path / "nothing").facts()["peak_memory_mib"] is None


def test_on_a_gpu_the_peak_is_what_pytorch_held_there(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "init", lambda: calls.append("init"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(("reset", device)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * MIB // 2)
    device = torch.device("cuda", 0)
    facts = Meter(device).facts()
    assert calls == ["init", ("reset", device)]
    assert (facts["peak_memory_mib"], facts["peak_memory_of"]) == (1.5, "device")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_on_a_gpu_is_that_since_the_beginning():
    device = torch.device("cuda", 0)
    before = torch.ones(200 * MIB // 4, device=device)
    del before
    meter = Meter(device)
    small = meter.facts()["peak_memory_mib"]
    used = torch.ones(100 * MIB // 4, device=device)
    del used
    assert meter.facts()["peak_memory_mib"] - small == pytest.approx(100, abs=3)
