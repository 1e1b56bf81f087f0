"""Measuring runs after the fact: the same numbers as in their records, on other weights and on other people's data."""

import dataclasses
import json
import shutil

import pytest
import torch

from lab.small import DIGITS, experiment, one_run
from manifold_mixup.lab import cli, storage
from manifold_mixup.lab import data as data_module
from manifold_mixup.lab.config import Component
from manifold_mixup.lab.data import Examples, load_data
from manifold_mixup.lab.errors import ConfigMismatch, CorruptedFile, Interrupted, UnknownName, UsageError
from manifold_mixup.lab.evaluation import evaluate_run, find_runs, parse_measures
from manifold_mixup.lab.experiment import Settings, run_experiments
from manifold_mixup.lab.measures.registry import MEASURES
from manifold_mixup.lab.records import RunFolder
from manifold_mixup.lab.run import execute
from manifold_mixup.lab.training import Hooks


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run whose best weights are not its last ones."""
    config = experiment(DIGITS, train__steps=60, train__lr=0.05, train__eval_every=3)
    (record,) = run_experiments([config], Settings(tmp_path_factory.mktemp("runs"))).records
    assert record.best != record.metrics
    return record


def everything():
    return [(entry, entry.options()) for entry in MEASURES.values()]


def test_the_measures_of_a_record_can_be_had_again(finished):
    own = {name: value for name, value in finished.metrics.items() if value is not None}
    assert own
    again = evaluate_run(finished.folder, ())
    assert again.metrics == pytest.approx(own, abs=1e-6)
    assert (again.weights, again.seed, again.label, again.data) == ("last", 0, "none", "digits")
    best = evaluate_run(finished.folder, (), weights="best")
    assert best.metrics == pytest.approx(finished.best, abs=1e-6)


def test_every_measure_runs_on_a_run_and_leaves_the_random_state(finished):
    before = torch.get_rng_state()
    found = evaluate_run(finished.folder, everything())
    assert torch.equal(torch.get_rng_state(), before)
    assert found.measures.keys() == {entry.name for entry, _ in everything()}
    for entry, _ in everything():
        assert any(entry.describe(name) for name in found.metrics), entry.name
    for name in found.metrics:
        assert any(entry.describe(name) for entry, _ in everything()), f"{name} is described by no measure"


def test_what_was_measured_is_added_to_the_folder(finished):
    first = evaluate_run(finished.folder, (), command="manifold-mixup evaluate")
    second = evaluate_run(finished.folder, (), weights="best")
    lines = [json.loads(line) for line in (finished.folder / "evaluations.jsonl").read_text().splitlines()]
    assert lines[-2:] == [json.loads(json.dumps(found.summary())) for found in (first, second)]
    assert lines[-2]["command"] == "manifold-mixup evaluate"


def test_arrays_of_the_last_weights_on_own_data_are_kept_in_the_folder(finished, foreign):
    def ask(*measures, **options):
        requests = parse_measures([{"name": name, "options": settings} for name, settings in measures])
        return evaluate_run(finished.folder, requests, **options)

    path = finished.folder / "spectra.safetensors"
    path.unlink(missing_ok=True)
    ask(("classification", {}))
    ask(("spectra", {}), weights="best")
    ask(("spectra", {}), data=foreign())
    assert not path.exists()
    numbers = ask(("spectra", {}), ("classification", {})).metrics
    kept = storage.read_tensors(path)
    assert kept["by_class"].shape == (10, 12)
    assert kept["effective_rank"].mean().item() == pytest.approx(numbers["svd_effective_rank"])
    assert bytes(kept["layer"].tolist()) == b"hidden.1"
    ask(("spectra", {"layer": "logits"}))
    assert storage.read_tensors(path)["by_class"].shape == (10, 10)
    assert not list(finished.folder.glob("classification*"))


def test_a_run_that_is_not_finished_is_measured_at_its_checkpoint(tmp_path):
    folder = RunFolder(tmp_path, one_run(DIGITS))
    asked = iter([False] * 7 + [True] * 99)
    with pytest.raises(Interrupted):
        execute(folder, Hooks(stop=lambda: next(asked)))
    found = evaluate_run(folder.path, ())
    assert found.weights == "checkpoint"
    assert "not finished" in found.notes[0]
    with pytest.raises(UsageError, match=r"no model.safetensors: the run is not finished; try --weights checkpoint"):
        evaluate_run(folder.path, (), weights="last")


def test_the_average_of_a_checkpoint_is_what_is_measured(tmp_path):
    folder = RunFolder(tmp_path, one_run(DIGITS, train__ema=0.9))
    record = execute(folder)
    found = evaluate_run(folder.path, (), weights="checkpoint")
    assert found.metrics == pytest.approx(record.metrics, abs=1e-6)


@pytest.fixture
def foreign(monkeypatch):
    """Registers a data set of the digits' test images, with what is changed about it."""

    def register(name="other", **changes):
        test = load_data("digits", {}, 0).hand_out_test()
        entry = data_module.DATASETS["digits"]
        info = dataclasses.replace(entry.info, name=name, **changes.pop("info", {}))
        examples = Examples(changes.get("x", test.x), changes.get("y", test.y))
        other = dataclasses.replace(entry, info=info, test=lambda options, places: (info, examples))
        monkeypatch.setitem(data_module.DATASETS, name, other)
        return Component(name=name)

    return register


def error(found):
    return found.metrics["test_error"]


def test_other_data_are_measured_in_place_of_the_test_split(finished, foreign):
    test = load_data("digits", {}, 0).hand_out_test()
    wrong = (test.y + 1) % 10
    right = error(evaluate_run(finished.folder, (), data=foreign()))
    assert right == pytest.approx(finished.metrics["test_error"])
    assert error(evaluate_run(finished.folder, (), data=foreign(y=wrong))) > right


def test_classes_are_told_apart_by_name_in_whatever_order(finished, foreign):
    test = load_data("digits", {}, 0).hand_out_test()
    turned = foreign(y=9 - test.y, info={"classes": tuple("9876543210")})
    assert error(evaluate_run(finished.folder, (), data=turned)) == finished.metrics["test_error"]
    assert error(evaluate_run(finished.folder, (), data=turned, by_order=True)) > finished.metrics["test_error"]


def test_a_part_of_the_classes_is_enough(finished, foreign):
    test = load_data("digits", {}, 0).hand_out_test()
    keep = test.y >= 7
    some = foreign(x=test.x[keep], y=test.y[keep] - 7, info={"classes": ("7", "8", "9")})
    assert 0 <= error(evaluate_run(finished.folder, (), data=some)) <= 100
    with pytest.raises(UsageError, match="have 3 classes, the network 10"):
        evaluate_run(finished.folder, (), data=some, by_order=True)


def test_what_does_not_fit_the_network_is_refused(finished, foreign):
    named = foreign(info={"classes": ("zero", *map(str, range(1, 10)))})
    with pytest.raises(UsageError, match=r"was not trained on: 'zero'.*--classes-by-order"):
        evaluate_run(finished.folder, (), data=named)
    with pytest.raises(UsageError, match=r"examples of shape \(1, 9, 9\), the network reads \(1, 8, 8\)"):
        evaluate_run(finished.folder, (), data=foreign(info={"shape": (1, 9, 9)}))


def test_without_its_own_data_a_run_is_measured_on_others_and_says_so(finished, foreign, monkeypatch):
    data = foreign()

    def gone(options, seed, places):
        raise UsageError("the files have gone")

    digits = data_module.DATASETS["digits"]
    monkeypatch.setitem(data_module.DATASETS, "digits", dataclasses.replace(digits, load=gone))
    found = evaluate_run(finished.folder, (), data=data)
    assert "test_error" in found.metrics
    assert "validation_error" not in found.metrics
    assert found.notes == ("without the run's own data (the files have gone)",)
    with pytest.raises(UsageError, match="files have gone"):
        evaluate_run(finished.folder, ())


def test_data_that_changed_are_noticed(tmp_path, monkeypatch):
    digits = data_module.DATASETS["digits"]
    folder = RunFolder(tmp_path, one_run(DIGITS))
    execute(folder)

    def changed(options, seed, places):
        splits = digits.load(options, seed, places)
        splits.info = dataclasses.replace(splits.info, fingerprint="other")
        return splits

    monkeypatch.setitem(data_module.DATASETS, "digits", dataclasses.replace(digits, load=changed))
    with pytest.raises(UsageError, match="have changed since the run was trained"):
        evaluate_run(folder.path, ())
    (folder.path / "record.json").unlink()
    with pytest.raises(ConfigMismatch, match="have changed since the run in .* began"):
        execute(folder)


def test_a_run_that_is_older_than_images_from_0_to_1_is_measured_like_any_other(finished, tmp_path):
    folder = tmp_path / "seed-0"
    shutil.copytree(finished.folder, folder)
    facts = json.loads((folder / "data.json").read_text())
    assert facts.pop("unit_range") is True
    requests = parse_measures([{"name": "fgsm", "options": {}}, {"name": "deformations", "options": {}}])
    (folder / "data.json").write_text(json.dumps(facts))
    assert evaluate_run(folder, requests).metrics == evaluate_run(finished.folder, requests).metrics
    (folder / "data.json").write_text(json.dumps({**facts, "name": "a set of somebody else"}))
    assert evaluate_run(folder, ()).metrics
    with pytest.raises(UsageError, match="measure 'fgsm' needs images"):
        evaluate_run(folder, requests)


def test_runs_are_found_in_folders_of_folders(finished, tmp_path):
    assert find_runs(finished.folder) == find_runs(finished.folder.parents[2]) == [finished.folder]
    with pytest.raises(UsageError, match="holds none"):
        find_runs(tmp_path)


def test_measures_are_named_with_options():
    name = next(iter(MEASURES))
    ((entry, options),) = parse_measures([{"name": name, "options": {}}])
    assert (entry.name, options) == (name, entry.options())
    with pytest.raises(UnknownName, match="unknown measure"):
        parse_measures([{"name": "mesure", "options": {}}])
    with pytest.raises(UsageError, match=f"measure {name!r}: colour: unknown key"):
        parse_measures([{"name": name, "options": {"colour": 1}}])


def test_a_number_that_would_be_overwritten_is_refused(finished):
    twice = parse_measures([{"name": "spectra", "options": {"layer": layer}} for layer in ("hidden.1", "hidden.2")])
    with pytest.raises(UsageError, match="a second time"):
        evaluate_run(finished.folder, twice)


def test_damaged_weights_are_a_clear_error(finished, tmp_path):
    folder = RunFolder(tmp_path, one_run(DIGITS))
    execute(folder)
    storage.write_tensors(folder.path / "model.safetensors", {"head.weight": torch.zeros(2, 2)})
    with pytest.raises(CorruptedFile, match="do not fit the network"):
        evaluate_run(folder.path, ())


def test_the_command_prints_a_table_or_json(finished, capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            cli.main(["evaluate", str(finished.folder), *arguments])
        return caught.value.code, *capsys.readouterr()

    code, out, _ = call("--threads", "1")
    assert code == 0
    assert "test error" in out
    assert "seed 0" in out
    code, out, _ = call("--json", "--measures", "classification", "--weights", "best", "--threads", "1")
    assert code == 0
    (line,) = out.splitlines()
    assert json.loads(line)["weights"] == "best"
    code, out, err = call("--weights", "worst")
    assert (code, out) == (2, "")
    assert "should be last, best or checkpoint" in err
