import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab.small import DIGITS
from manifold_mixup.lab import cli
from manifold_mixup.lab.data import DATASETS
from manifold_mixup.lab.methods import METHODS
from manifold_mixup.lab.recipe import load_recipe

PROCESS = Path(__file__).parents[1] / "cli_process.py"
RECIPE = """
name = "small"
description = "A small experiment"
seeds = [0, 1]
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
label = "hidden only"
options = { layers = ["hidden.1"] }
"""
COMMANDS = ("demo", "compare", "train", "methods", "datasets")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def call(capsys):
    """Call the command in this process: exit code, stdout, stderr."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return run


def compare(recipe, *arguments):
    return ("compare", "--recipe", recipe, "--runs", recipe.parent / "runs", "--jobs", 1, *arguments)


def assert_refused(result, pattern):
    """Whether the result is one line that says what is wrong, and nothing else."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert re.match(rf"error: .*{pattern}", err), err


def test_compare_prints_tables_and_names_the_page(call, recipe):
    code, out, err = call(*compare(recipe))
    assert (code, err) == (0, "")
    words = " ".join(out.split())
    for text in ("none", "hidden only", "test error (%)", "test NLL (nats)", "test ECE (%)", "±", "paired by seed"):
        assert text in words
    page = Path(re.search(r"^page: (.*)$", out, re.MULTILINE)[1])
    assert page == recipe.parent / "runs" / "small" / "report.html"
    assert "A small experiment." in page.read_text()


def test_one_seed_has_no_interval_and_no_spread(call, recipe):
    code, out, _ = call(*compare(recipe, "--seeds", 1))
    assert code == 0
    rows = [line for line in out.splitlines() if "│" in line]
    assert rows
    assert not any("±" in row or "[" in row or "significant" in row for row in rows)


def test_json_is_one_object_per_run_and_nothing_else(call, recipe):
    code, out, err = call(*compare(recipe, "--json"))
    assert (code, err) == (0, "")
    records = [json.loads(line) for line in out.splitlines()]
    assert [(r["label"], r["seed"]) for r in records] == [
        ("none", 0),
        ("none", 1),
        ("hidden only", 0),
        ("hidden only", 1),
    ]
    for record in records:
        assert (record["data"], record["model"]) == ("digits", "mlp")
        assert {"test_error", "test_nll", "test_ece"} <= record["metrics"].keys()
    assert records[2]["method"] == "manifold_mixup"
    assert 0 <= records[0]["metrics"]["test_error"] <= 100


def test_json_of_every_command_that_prints_results(call, tmp_path, recipe, monkeypatch):
    train = call(
        "train",
        "--runs",
        tmp_path / "runs",
        "--steps",
        3,
        "--seed",
        4,
        "--method",
        "none",
        "--json",
        "--set",
        "train.eval_every=3",
    )
    record = json.loads(train[1])
    assert (record["method"], record["seed"]) == ("none", 4)
    for command, registry in (("methods", METHODS), ("datasets", DATASETS)):
        code, out, err = call(command, "--json")
        assert (code, err) == (0, "")
        assert [json.loads(line)["name"] for line in out.splitlines()] == list(registry)


def test_demo_runs_both_recipes_with_three_methods(call, tmp_path, monkeypatch):
    seen = []

    def small(name, overrides):
        config = load_recipe(name, overrides)
        seen.append((name, [method.name for method in config.methods], config.seeds))
        train = config.train.model_copy(update={"steps": 2})
        return config.model_copy(update={"train": train})

    monkeypatch.setattr("manifold_mixup.lab.recipe.load_recipe", small)
    code, out, _ = call("demo", "--runs", tmp_path, "--seeds", 1, "--jobs", 1)
    assert code == 0
    assert [(name, seeds) for name, _, seeds in seen] == [("spiral", [0]), ("digits", [0])]
    assert all(set(methods) == {"none", "input_mixup", "manifold_mixup"} for _, methods, _ in seen)
    assert "low confidence" in out
    assert (tmp_path / "demo.html").exists()
    code, out, _ = call("demo", "--runs", tmp_path, "--seeds", 1, "--jobs", 1, "--json")
    assert {json.loads(line)["data"] for line in out.splitlines()} == {"spiral", "digits"}


def test_methods_from_the_command_line_stand_side_by_side(call, recipe):
    code, out, _ = call(
        *compare(recipe, "-m", "none", "-m", "manifold_mixup:alpha=2,layers=hidden.1+hidden.2,label=two layers"),
        *("-m", "manifold_mixup:alpha=1,per=example", "--seeds", "5,", "--steps", 5, "--json"),
    )
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [r["label"] for r in records] == ["none", "two layers", "manifold_mixup (alpha=1, per=example)"]
    assert records[1]["options"]["layers"] == ["hidden.1", "hidden.2"]
    assert {r["seed"] for r in records} == {5}


def test_train_prints_all_metrics_and_the_folder(call, tmp_path):
    code, out, _ = call(
        "train",
        "--data",
        "digits:train_examples=50",
        "--steps",
        3,
        "--runs",
        tmp_path,
        "-m",
        "none",
        "--set",
        "train.batch_size=10",
    )
    assert code == 0
    assert "test_nll" in out
    assert f"run: {tmp_path}" in out.replace("\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert f"manifold-mixup {command}" in out


def test_version(call):
    code, out, _ = call("--version")
    assert code == 0
    assert re.fullmatch(r"manifold-mixup \d+\.\d+\.\d+\S*\n", out)


def test_listings_show_every_name_and_option(call):
    _, out, _ = call("methods")
    assert all(name in out for name in METHODS)
    assert "alpha=2.0" in out
    _, out, _ = call("datasets")
    assert all(name in out for name in DATASETS)
    assert "train_examples=1000" in out


BAD = {
    "data set": (("--data", "digts"), "unknown data set 'digts': did you mean 'digits'"),
    "method": (("--method", "mixdown"), "unknown method 'mixdown'"),
    "model": (("--model", "mpl"), "unknown model 'mpl'"),
    "layer": (("--method", "manifold_mixup:layers=hidden.9"), "no module named 'hidden.9'"),
    "alpha": (("--method", "manifold_mixup:alpha=-1"), r"methods.0.options.alpha: input should be .* \(got -1\)"),
    "key": (("--set", "train.stepz=3"), "train.stepz: unknown key, did you mean 'steps'"),
    "three": (
        ("--set", "train.stepz=3", "--data", "digts", "--method", "manifold_mixup:alpha=-1"),
        r"3 mistakes: \(1\) train.stepz.*\(2\) data.name.*\(3\) methods.0.options.alpha",
    ),
    "seeds": (("--seeds", "many"), "--seeds 'many' should read"),
    "jobs": (("--jobs", "-1"), "Invalid value for '--jobs'"),
    "flag": (("--step", "3"), "No such option"),
    "method syntax": (("--method", "none:"), "should read name"),
}


@pytest.mark.parametrize(("arguments", "pattern"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(call, recipe, arguments, pattern):
    assert_refused(call(*compare(recipe, *arguments)), pattern)
    assert not (recipe.parent / "runs").exists()


def test_unknown_recipe_command_and_missing_option_are_one_line(call):
    assert_refused(call("compare", "--recipe", "spirl"), "unknown recipe 'spirl': did you mean 'spiral'")
    assert_refused(call("comparr"), "No such command")
    assert_refused(call("compare"), "--recipe NAME, or --data NAME")


def test_a_folder_of_another_config_is_one_line(call, recipe):
    assert call(*compare(recipe))[0] == 0
    assert_refused(
        call(*compare(recipe, "--steps", 13)), "holds a run of another config .*train.steps: 12 there, 13 here.*--runs"
    )


def test_a_corrupted_checkpoint_is_one_line(call, recipe):
    assert call(*compare(recipe))[0] == 0
    folder = recipe.parent / "runs/small/none/seed-0"
    (folder / "record.json").unlink()
    path = folder / "checkpoint" / "tensors-12.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    code, _, err = call(*compare(recipe))
    assert code == 1
    assert re.search(r"^error: 1 of 4 runs failed; the first: none, seed 0: .*corrupted.*; delete ", err, re.MULTILINE)
    assert "Traceback" not in err
    (folder / "config.json").write_text("{")
    assert_refused(call(*compare(recipe)), "config.json is corrupted")


def test_an_unwritable_folder_is_one_line(call, recipe):
    (recipe.parent / "runs").write_text("in the way")
    assert_refused(call(*compare(recipe)), r"cannot (create the folder|read) ")
    assert_refused(
        call("compare", "--recipe", recipe, "--runs", "/proc/nowhere", "--jobs", 1),
        "cannot create the folder /proc/nowhere",
    )


def test_a_full_disk_is_one_line(call, recipe, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(call(*compare(recipe)), "cannot write .*: No space left on device")


def test_failed_runs_make_the_exit_code_one_and_the_others_are_reported(call, recipe):
    # two batches in one of five examples: the mixer refuses what it cannot halve
    arguments = (
        "-m",
        "none",
        "-m",
        "manifold_mixup:layers=hidden.1.linear,pairing=two-batches",
        "--set",
        "train.batch_size=5",
    )
    code, out, err = call(*compare(recipe, *arguments, "--seeds", 1, "--json"))
    assert code == 1
    assert [json.loads(line)["label"] for line in out.splitlines()] == ["none"]
    assert re.search(r"^error: 1 of 2 runs failed; the first: manifold_mixup", err, re.MULTILINE)
    assert "Traceback" not in err


def test_an_unexpected_error_is_one_line_too_unless_debugging(call, recipe, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("manifold_mixup.lab.experiment.run_experiments", broken)
    assert_refused(call(*compare(recipe)), "RuntimeError: first line second line .*--debug")
    with pytest.raises(RuntimeError, match="first line"):
        cli.main(["--debug", *map(str, compare(recipe))])


def test_keyboard_interrupt_has_its_own_exit_code(call, recipe, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("manifold_mixup.lab.experiment.run_experiments", broken)
    code, out, err = call(*compare(recipe))
    assert (code, out) == (130, "")
    assert "Traceback" not in err


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_in_a_process_of_its_own_and_the_same_command_again(call, recipe, jobs):
    runs = recipe.parent / "runs"
    arguments = [
        str(a) for a in compare(recipe, "--seeds", "3,", "--steps", 1000, "--set", "train.eval_every=50", "--json")
    ]
    arguments[arguments.index("--jobs") + 1] = str(jobs)
    process = subprocess.Popen(
        [sys.executable, str(PROCESS), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(runs.rglob("log.jsonl")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert err == "error: stopped by Ctrl-C; the same command goes on from here\n"
    assert list(runs.rglob("state.json"))
    assert len(list(runs.rglob("record.json"))) < 2
    arguments[arguments.index("--jobs") + 1] = "1"
    _, resumed, err = call(*arguments)
    assert err == ""
    _, straight, _ = call(*[f"{runs}-straight" if argument == str(runs) else argument for argument in arguments])

    def numbers(text):
        return [(r["label"], r["metrics"], r["best"]) for r in map(json.loads, text.splitlines())]

    assert numbers(resumed) == numbers(straight)
    assert len(numbers(resumed)) == 2


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from manifold_mixup.lab import cli\n"
        "heavy = {'lightning_fabric', 'sklearn', 'scipy', 'pydantic', 'plotly', 'torchmetrics', 'jinja2'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_small_recipe_is_the_small_experiment(recipe):
    config = load_recipe(str(recipe))
    assert config.data.options == DIGITS["data"]["options"]
    assert config.train.steps == DIGITS["train"]["steps"]
