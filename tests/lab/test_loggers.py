"""``log.csv`` and TensorBoard's events hold the lines of ``log.jsonl``, each once, whatever happened to the run."""

import csv
import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lab.small import DIGITS, SPIRAL, experiment, one_run, train, train_images
from lab.test_cli import RECIPE
from lab.test_training import PowerCut, cut_at, stop_at
from manifold_mixup.lab import cli, loggers, storage
from manifold_mixup.lab import run as run_module
from manifold_mixup.lab.errors import Interrupted, MissingExtra, StorageError, UsageError
from manifold_mixup.lab.experiment import Settings, run_experiments
from manifold_mixup.lab.invocation import make_settings
from manifold_mixup.lab.loggers import open_loggers
from manifold_mixup.lab.training import Hooks

CLI = str(Path(__file__).parents[1] / "cli_process.py")
BOTH = ("csv", "tensorboard")
# TensorBoard's name, and the key in log.jsonl
SCALARS = {
    "train/loss": "train_loss",
    "train/lr": "lr",
    "validation/error": "validation_error",
    "validation/nll": "validation_nll",
}


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def table(folder):
    """What ``log.csv`` holds, as numbers."""
    with (folder / "log.csv").open(newline="") as file:
        return [{key: json.loads(value) for key, value in row.items()} for row in csv.DictReader(file)]


def events(folder):
    """What TensorBoard shows: by tag the steps, values and wall times."""
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}


def check_that_all_logs_agree(folder):
    log, shown = lines(folder), events(folder)
    assert log
    assert table(folder) == log
    assert [list(row) for row in table(folder)] == [list(line) for line in log]  # the columns in their order
    for tag, key in SCALARS.items():
        expected = [(line["step"], float(np.float32(line[key]))) for line in log if key in line]
        assert [(event.step, event.value) for event in shown.get(tag, [])] == expected, tag


def fit(folder, hooks=None, names=BOTH, **changes):
    """Train the small run, with loggers."""
    hooks = hooks or Hooks()
    with open_loggers(names, folder) as opened:
        return train(one_run(**changes), folder, Hooks(**{**vars(hooks), "loggers": opened}))


# ---------------------------------------------------------------- what they hold


def test_they_hold_the_lines_of_the_log(tmp_path):
    begun = time.time()
    fit(tmp_path)
    check_that_all_logs_agree(tmp_path)
    assert [row["step"] for row in table(tmp_path)] == [4, 8, 12]
    times = [event.wall_time for event in events(tmp_path)["train/loss"]]
    assert begun <= min(times) <= max(times) <= time.time()
    assert times == sorted(times)


def test_without_a_validation_split_there_are_no_such_columns(tmp_path):
    with open_loggers(BOTH, tmp_path) as opened:
        train_images(tmp_path, Hooks(loggers=opened), validation=0)
    check_that_all_logs_agree(tmp_path)
    assert list(table(tmp_path)[0]) == ["step", "epoch", "train_loss", "lr"]
    assert set(events(tmp_path)) == {"train/loss", "train/lr"}


PARTS = [
    {"step": 1, "epoch": 1.0, "train_loss": 0.5, "graph_loss": 0.5, "lr": 0.1},
    {"step": 2, "epoch": 2.0, "train_loss": 0.4, "labelled_loss": 0.3, "unlabelled_weight": 0.1, "lr": 0.1},
    {"step": 3, "epoch": 3.0, "train_loss": 0.1 + 0.2, "graph_loss": 1e-7, "lr": 0.1},
    {"step": 4, "epoch": 4.0, "train_loss": 0.2, "lr": 0.1, "labelled_loss": 0.25},
]


@pytest.mark.parametrize("resumed", range(5))
def test_numbers_that_come_later_or_are_missing_in_some_lines(tmp_path, resumed):
    """Parts of a loss: a line has those that a step had since the line before."""
    with open_loggers(BOTH, tmp_path) as opened:
        for done in range(5):
            if done in (0, resumed):
                for logger in opened:
                    logger.resume(PARTS[:done])
            if done < 4:
                storage.append(tmp_path / "log.jsonl", json.dumps(PARTS[done]) + "\n")
                for logger in opened:
                    logger.log(PARTS[done])
    with (tmp_path / "log.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["step", "epoch", "train_loss", "graph_loss", "lr", "labelled_loss", "unlabelled_weight"]
    found = [{k: json.loads(cell) for k, cell in zip(head, row, strict=True) if cell} for row in rows]
    assert found == PARTS
    shown = events(tmp_path)
    for key in ("graph_loss", "labelled_loss", "unlabelled_weight"):
        expected = [(line["step"], float(np.float32(line[key]))) for line in PARTS if key in line]
        assert [(event.step, event.value) for event in shown[f"train/{key}"]] == expected
    assert set(shown) == {f"train/{key}" for key in ("loss", "lr", "graph_loss", "labelled_loss", "unlabelled_weight")}


@pytest.mark.parametrize("step", range(1, 13))
def test_after_a_power_cut_at_any_step_they_hold_every_line_once(tmp_path, step):
    with pytest.raises(PowerCut):
        fit(tmp_path, cut_at(step, checkpoint_steps=5))
    fit(tmp_path)
    check_that_all_logs_agree(tmp_path)
    assert [row["step"] for row in table(tmp_path)] == [4, 8, 12]


def test_after_many_stops_they_hold_every_line_once(tmp_path):
    for more in (3, 1, 4, 2):
        with pytest.raises(Interrupted):
            fit(tmp_path, stop_at(more))
        assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    fit(tmp_path)
    check_that_all_logs_agree(tmp_path)


def test_between_two_files_tensorboard_shows_every_step_once(tmp_path, monkeypatch):
    """Killed after the new file was written and before the old one was deleted."""
    with pytest.raises(PowerCut):
        fit(tmp_path, cut_at(9, checkpoint_steps=5))  # step 8 is logged, and lost
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        fit(tmp_path)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    check_that_all_logs_agree(tmp_path)
    fit(tmp_path)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    check_that_all_logs_agree(tmp_path)


def test_wall_times_outlive_a_resumption(tmp_path):
    with pytest.raises(Interrupted):
        fit(tmp_path, stop_at(9))
    before = [event.wall_time for event in events(tmp_path)["train/loss"]]
    fit(tmp_path)
    after = [event.wall_time for event in events(tmp_path)["train/loss"]]
    assert len(before) == 2
    assert after[:2] == before
    assert after[2] > before[1]


def test_logging_that_begins_in_the_middle_has_the_earlier_lines(tmp_path):
    with pytest.raises(Interrupted):
        fit(tmp_path, stop_at(9), names=())
    assert not (tmp_path / "log.csv").exists()
    fit(tmp_path)
    check_that_all_logs_agree(tmp_path)


def test_logging_that_paused_in_the_middle_has_no_gap(tmp_path):
    with pytest.raises(Interrupted):
        fit(tmp_path, stop_at(5))
    with pytest.raises(Interrupted):
        fit(tmp_path, stop_at(5), names=())
    fit(tmp_path)
    check_that_all_logs_agree(tmp_path)


def test_what_a_start_without_a_checkpoint_has_left_is_gone(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "log.csv").write_text("step\n1\n")
    with open_loggers(BOTH, tmp_path) as (as_csv, tensorboard):
        as_csv.resume([])
        tensorboard.resume([])
    assert not (tmp_path / "log.csv").exists()
    fit(tmp_path)
    check_that_all_logs_agree(tmp_path)


@pytest.mark.parametrize("damage", ["cut off", "changed"])
def test_a_damaged_event_file_costs_wall_times_and_nothing_else(tmp_path, damage):
    with pytest.raises(Interrupted):
        fit(tmp_path, stop_at(9))
    (path,) = (tmp_path / "tensorboard").iterdir()
    content = path.read_bytes()
    changed = content[:-20] + struct.pack("<I", 7) * 5
    path.write_bytes(content[:-3] if damage == "cut off" else changed)
    before = [event.wall_time for event in events(tmp_path)["train/loss"]]
    assert len(before) == 1
    fit(tmp_path)
    check_that_all_logs_agree(tmp_path)
    assert [event.wall_time for event in events(tmp_path)["train/loss"]][:1] == before


@pytest.mark.parametrize("name", BOTH)
def test_a_full_disk_is_a_clear_error(tmp_path, monkeypatch, name):
    class Full:
        """A file on a disk that is full."""

        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    with open_loggers([name], tmp_path) as (logger,):
        monkeypatch.setattr(Path, "open", lambda self, *args, **kwargs: Full())
        with pytest.raises(StorageError, match="No space left on device"):
            logger.resume([{"step": 1, "train_loss": 1.0}])


# ---------------------------------------------------------------- whole experiments


def settled(record):
    """A record without what is measured with a clock or a scale, and without where it lies."""
    content = record.model_dump(exclude={"seconds", "date", "folder"})
    for name in ("seconds", "step_seconds", "peak_memory_mib", "peak_memory_of"):
        del content["train"][name]
    return content


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_experiment_has_the_same_records_with_loggers_and_without(tmp_path, jobs):
    config = experiment(DIGITS, methods=[{"name": "none"}, {"name": "manifold_mixup"}])
    plain = run_experiments([config], Settings(tmp_path / "plain")).records
    logged = run_experiments([config], Settings(tmp_path / "logged", jobs=jobs, loggers=BOTH)).records
    assert [settled(record) for record in logged] == [settled(record) for record in plain]
    for one, other in zip(plain, logged, strict=True):
        assert not {"log.csv", "tensorboard"} & {path.name for path in one.folder.iterdir()}
        assert (one.folder / "config.json").read_bytes() == (other.folder / "config.json").read_bytes()
        assert (one.folder / "log.jsonl").read_bytes() == (other.folder / "log.jsonl").read_bytes()
        assert (one.folder / "model.safetensors").read_bytes() == (other.folder / "model.safetensors").read_bytes()
        check_that_all_logs_agree(other.folder)


def test_the_metrics_of_the_test_split_are_scalars_of_the_last_step(tmp_path):
    (record,) = run_experiments([experiment(SPIRAL)], Settings(tmp_path, loggers=BOTH)).records
    shown = {tag: event for tag, event in events(record.folder).items() if tag.startswith("test/")}
    tested = {key: value for key, value in record.metrics.items() if key.startswith("test_") and value is not None}
    assert {"test/error", "test/nll", "test/ece", "test/accuracy"} <= shown.keys()
    assert len(shown) == len(tested)
    for key, value in tested.items():
        (event,) = shown[key.replace("_", "/", 1)]
        assert (event.step, event.value) == (12, float(np.float32(value)))
    assert events(record.folder)["train/loss"][-1].step == 12


def test_an_interruption_while_measuring_leaves_no_second_test_metrics(tmp_path, monkeypatch):
    def broken(self, record):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module.RunFolder, "finish", broken)  # after the loggers were told
        with pytest.raises(KeyboardInterrupt):
            run_experiments([experiment(DIGITS)], Settings(tmp_path, loggers=BOTH))
    (record,) = run_experiments([experiment(DIGITS)], Settings(tmp_path, loggers=BOTH)).records
    check_that_all_logs_agree(record.folder)
    assert [event.step for event in events(record.folder)["test/error"]] == [12]


def test_a_finished_run_that_is_only_read_gets_no_logs(tmp_path):
    (record,) = run_experiments([experiment(DIGITS)], Settings(tmp_path)).records
    again = run_experiments([experiment(DIGITS)], Settings(tmp_path, loggers=BOTH)).records
    assert again == [record]
    run = one_run(DIGITS)
    with open_loggers(BOTH, record.folder) as opened:  # another process finished it while this one waited for the lock
        assert run_module.execute(run_module.RunFolder(tmp_path, run), Hooks(loggers=opened)) == record
    assert not {"log.csv", "tensorboard"} & {path.name for path in record.folder.iterdir()}


def test_only_the_first_of_several_processes_logs(tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text(RECIPE)
    started = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    command = [*started, sys.executable, CLI, "train", "--recipe", str(recipe), "--runs", str(tmp_path / "runs")]
    more = ["--devices", "2", "--accelerator", "cpu", "--quiet", "--logger", "csv,tensorboard"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *more], capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    (folder,) = (path.parent for path in (tmp_path / "runs").rglob("record.json"))
    check_that_all_logs_agree(folder)
    assert [row["step"] for row in table(folder)] == [4, 8, 12]
    assert len(list((folder / "tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_a_command_that_was_killed_goes_on_to_the_same_logs(tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text(RECIPE.replace("steps = 12", "steps = 3000"))
    command = [sys.executable, CLI, "compare", "--recipe", str(recipe), "--runs", str(tmp_path / "runs"), "--quiet"]
    command += ["--jobs", "2", "--logger", "csv", "--logger", "tensorboard"]
    checkpoint = tmp_path / "runs/small/none/seed-0/checkpoint/state.json"
    with subprocess.Popen([*command, "--checkpoint-every", "0.3"], start_new_session=True) as process:
        while not checkpoint.exists():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (checkpoint.parents[1] / "record.json").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=240)
    folders = [path.parent for path in (tmp_path / "runs").rglob("record.json")]
    assert len(folders) == 4
    for folder in folders:
        check_that_all_logs_agree(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)  # Ray starts half a dozen processes
def test_runs_on_ray_log_too(tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text(RECIPE.replace("seeds = [0, 1]", "seeds = [0]"))
    command = [sys.executable, CLI, "compare", "--recipe", str(recipe), "--runs", str(tmp_path / "runs"), "--quiet"]
    more = ["--executor", "ray", "--jobs", "1", "--logger", "csv,tensorboard"]
    subprocess.run([*command, *more], check=True, stdout=subprocess.DEVNULL, timeout=500)
    folders = [path.parent for path in (tmp_path / "runs").rglob("record.json")]
    assert len(folders) == 2
    for folder in folders:
        check_that_all_logs_agree(folder)


# ---------------------------------------------------------------- asking for them


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (None, ()),
        (["csv"], ("csv",)),
        (["tensorboard,csv"], BOTH[::-1]),
        (["csv", "tensorboard", "csv"], BOTH),
        ([" csv , tensorboard ,"], BOTH),
    ],
)
def test_names_are_repeated_or_joined_by_commas(said, expected):
    assert make_settings(Path("runs"), 1, 15.0, logger=said).loggers == expected


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UsageError, match="--logger 'wandb' should be csv or tensorboard"):
        make_settings(tmp_path, 1, 15.0, logger=["csv,wandb"])
    with pytest.raises(UsageError, match="'wandb'"):
        run_experiments([experiment(DIGITS)], Settings(tmp_path / "runs", loggers=("wandb",)))
    assert not (tmp_path / "runs").exists()


def test_a_missing_package_is_named_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    message = r"needs the package 'tensorboard': pip install 'manifold-mixup\[tensorboard\]'"
    with pytest.raises(MissingExtra, match=message):
        make_settings(tmp_path, 1, 15.0, logger=["tensorboard"])
    with pytest.raises(MissingExtra, match=message):
        run_experiments([experiment(DIGITS)], Settings(tmp_path / "runs", loggers=("csv", "tensorboard")))
    assert not (tmp_path / "runs").exists()
    loggers.check(["csv"])  # needs nothing


@pytest.mark.parametrize(
    ("command", "more"),
    [("demo", []), ("compare", ["--recipe", "digits"]), ("train", []), ("reproduce", ["table1", "--scale", "desk"])],
)
def test_every_command_that_trains_takes_the_option(command, more, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, *more, "--logger", "wandb"])
    assert caught.value.code == 2
    assert "--logger 'wandb' should be csv or tensorboard" in capsys.readouterr().err
