"""Finished runs are measured with what their experiment lists: what they lack, each for itself, and once."""

import json
import os
import re
import signal

import pytest

from lab.small import DIGITS, experiment
from lab.test_cli import call, compare, recipe  # noqa: F401  fixtures and a helper
from manifold_mixup.lab import measuring
from manifold_mixup.lab.devices import Devices
from manifold_mixup.lab.errors import StorageError, UsageError
from manifold_mixup.lab.evaluation import evaluate_run, parse_measures
from manifold_mixup.lab.experiment import Outcome, Settings, run_experiments
from manifold_mixup.lab.invocation import ExperimentPage
from manifold_mixup.lab.measuring import measure_outcome, measure_runs

TWO = [{"name": "none"}, {"name": "dropout"}]
FGSM = "fgsm:epsilon=8+16,normalised=none"
OPTIONS = {"epsilon": [8.0, 16.0], "normalised": [], "loss": "cross-entropy", "examples": None}


def lines_of(record):
    path = record.folder / "evaluations.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def asked_for(record):
    return [list(line["measures"]) for line in lines_of(record)]


@pytest.fixture
def outcome(tmp_path):
    config = experiment(DIGITS, methods=TWO)
    return run_experiments([config], Settings(tmp_path))


@pytest.fixture
def settings(tmp_path):
    return Settings(tmp_path, command="the command")


def listing(*measures):
    return experiment(DIGITS, methods=TWO, measures=list(measures))


def test_every_run_is_measured_with_what_the_experiment_lists_and_only_once(outcome, settings):
    config = listing("spectra", FGSM)
    heard = []
    found = measure_outcome(outcome, [config], settings, lambda *told: heard.append(told))
    assert found == outcome
    assert heard == [("measuring spectra, fgsm", done, 2) for done in range(3)]
    for record in outcome.records:
        (line,) = lines_of(record)
        assert (line["weights"], line["data"], line["command"]) == ("last", "digits", "the command")
        assert line["measures"]["fgsm"] == OPTIONS
        assert {"fgsm_8_accuracy", "fgsm_16_accuracy", "svd_effective_rank"} <= line["metrics"].keys()
    heard.clear()
    assert measure_outcome(outcome, [config], settings, lambda *told: heard.append(told)) == outcome
    assert [asked_for(record) for record in outcome.records] == [[["spectra", "fgsm"]]] * 2
    assert heard == []


def test_only_what_a_run_lacks_is_measured(outcome, settings):
    first, second = outcome.records
    evaluate_run(first.folder, parse_measures([{"name": "fgsm", "options": {"epsilon": "8+16", "normalised": "none"}}]))
    evaluate_run(second.folder, parse_measures([{"name": "fgsm", "options": {"epsilon": 8}}]))  # other options
    evaluate_run(second.folder, parse_measures([{"name": "spectra", "options": {}}]), weights="best")  # other weights
    assert measure_runs(outcome.records, ["spectra", FGSM], settings) == []
    assert asked_for(first)[1:] == [["spectra"]]
    assert asked_for(second)[2:] == [["spectra", "fgsm"]]


def test_an_experiment_that_lists_nothing_leaves_nothing(outcome, settings):
    assert measure_outcome(outcome, [listing()], settings) == outcome
    assert [lines_of(record) for record in outcome.records] == [[], []]


def test_measures_belong_to_the_runs_of_their_own_experiment(tmp_path, settings):
    configs = [experiment(DIGITS, measures=["spectra"]), experiment(DIGITS, name="other", measures=["knn:k=1"])]
    outcome = run_experiments(configs, settings)
    measure_outcome(outcome, configs, settings)
    assert [(r.experiment, asked_for(r)) for r in outcome.records] == [("small", [["spectra"]]), ("other", [["knn"]])]


def test_of_several_processes_only_the_first_measures(outcome, settings, monkeypatch):
    monkeypatch.setattr(Devices, "first", property(lambda self: False))
    assert measure_outcome(outcome, [listing("spectra")], settings) == outcome
    assert [lines_of(record) for record in outcome.records] == [[], []]


def test_what_fails_is_noted_and_costs_neither_other_runs_nor_other_measures(outcome, settings):
    first, second = outcome.records
    broken = "spectra:layer=nowhere"
    found = measure_runs(outcome.records, ["knn:k=1", broken, FGSM], settings)
    assert [(f.experiment, f.label, f.seed) for f in found] == [("small", "none", 0), ("small", "dropout", 0)]
    assert all("nowhere" in f.error and "Traceback" in f.traceback for f in found)
    assert asked_for(first) == asked_for(second) == [["knn"], ["fgsm"]]
    (second.folder / "model.safetensors").unlink()
    found = measure_runs(outcome.records, ["spectra"], settings)
    assert [f.label for f in found] == ["dropout"]
    assert "holds no model.safetensors" in found[0].error
    assert asked_for(first)[-1] == ["spectra"]


def test_damaged_evaluations_cost_only_their_own_run(outcome, settings):
    first, second = outcome.records
    (first.folder / "evaluations.jsonl").write_text("{")
    (failure,) = measure_runs(outcome.records, ["spectra"], settings)
    assert failure.label == "none"
    assert "evaluations.jsonl is corrupted" in failure.error
    assert asked_for(second) == [["spectra"]]


def test_a_bug_in_a_measure_is_named_and_a_full_disk_ends_it(outcome, settings, monkeypatch):
    def bug(*arguments, **options):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(measuring, "evaluate_run", bug)
    found = measure_runs(outcome.records, ["spectra", FGSM], settings)
    assert [f.error for f in found] == ["ZeroDivisionError: division by zero"] * 2

    def full(folder, *arguments, **options):
        raise StorageError(folder, OSError("no space left on device"))

    monkeypatch.setattr(measuring, "evaluate_run", full)
    with pytest.raises(StorageError, match="no space left"):
        measure_runs(outcome.records, ["spectra"], settings)


def test_a_text_that_is_no_measure_is_refused_before_anything_is_measured(outcome, settings):
    with pytest.raises(UsageError, match="measure 'spectra': colour: unknown key"):
        measure_runs(outcome.records, ["knn", "spectra:colour=1"], settings)
    assert lines_of(outcome.records[0]) == []


def test_no_run_no_measuring(settings):
    assert measure_outcome(Outcome(), [listing("spectra")], settings) == Outcome()


# ---------------------------------------------------------------- the commands


@pytest.fixture
def quick(call, monkeypatch):  # noqa: F811
    """The command without its page, which is not what is looked at here."""
    monkeypatch.setattr(ExperimentPage, "write", lambda page: page.path)
    return call


def evaluations(runs):
    return {path.parent.parent.name: path.read_text().splitlines() for path in runs.rglob("evaluations.jsonl")}


def test_compare_measures_with_the_recipe_or_with_what_it_is_told(quick, recipe):  # noqa: F811
    recipe.write_text(recipe.read_text().replace("seeds = [0, 1]", 'seeds = [0]\nmeasures = ["knn:k=1"]'))
    assert quick(*compare(recipe))[0] == 0
    runs = recipe.parent / "runs"
    first = evaluations(runs)
    assert {name: [list(json.loads(line)["measures"]) for line in lines] for name, lines in first.items()} == {
        "none": [["knn"]],
        "hidden-only": [["knn"]],
    }
    assert quick(*compare(recipe))[0] == 0
    assert quick(*compare(recipe, "--measures", "none"))[0] == 0
    assert evaluations(runs) == first
    code, out, err = quick(*compare(recipe, "--measures", "spectra,geometry", "--measure", FGSM, "--json"))
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 2
    last = json.loads(evaluations(runs)["none"][-1])
    assert list(last["measures"]) == ["spectra", "geometry", "fgsm"]
    assert last["measures"]["fgsm"] == OPTIONS


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        ("knm", r"measures\.0: unknown measure 'knm': did you mean 'knn'"),
        ("knn:neighbours=3", r"measures\.0: knn\.neighbours: unknown key"),
        ("knn:k=0", r"measures\.0: knn\.k: .*"),
    ],
)
def test_a_measure_that_is_none_is_refused_before_anything_runs(quick, recipe, measure, message):  # noqa: F811
    code, out, err = quick(*compare(recipe, "--measure", measure))
    assert (code, out) == (2, "")
    assert re.search(message, err), err
    assert err.count("\n") == 1
    assert not (recipe.parent / "runs").exists()


def test_runs_that_cannot_be_measured_make_the_exit_code_one_after_the_results(quick, recipe):  # noqa: F811
    code, out, err = quick(*compare(recipe, "--measure", "spectra:layer=nowhere", "--measure", "knn:k=1"))
    assert code == 1
    assert "page: " in out
    assert "4 of 4 runs could not be measured; the first: none, seed 0: " in err
    assert "nowhere" in err
    assert len(evaluations(recipe.parent / "runs")) == 2


def test_ctrl_c_keeps_what_is_measured_and_the_same_command_goes_on(quick, recipe, monkeypatch):  # noqa: F811
    measured = []

    def interrupted(folder, *arguments, **options):
        if len(measured) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        measured.append(folder)
        return evaluate_run(folder, *arguments, **options)

    monkeypatch.setattr(measuring, "evaluate_run", interrupted)
    code, out, err = quick(*compare(recipe, "--measures", "spectra"))
    assert (code, out) == (130, "")
    assert err == "error: stopped by Ctrl-C; the same command goes on from here\n"
    files = list((recipe.parent / "runs").rglob("evaluations.jsonl"))
    assert {path.parent for path in files} == set(measured[:3])
    before = {path: path.read_text() for path in files}
    monkeypatch.setattr(measuring, "evaluate_run", evaluate_run)
    assert quick(*compare(recipe, "--measures", "spectra"))[0] == 0
    assert all(path.read_text() == text for path, text in before.items())
    assert len(list((recipe.parent / "runs").rglob("evaluations.jsonl"))) == 4
