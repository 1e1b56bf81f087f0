import dataclasses
import json

import pytest
import torch

from lab.small import DIGITS, SPIRAL, equal, one_run, train
from manifold_mixup.lab import data as data_module
from manifold_mixup.lab import run as run_module
from manifold_mixup.lab import storage
from manifold_mixup.lab.data import load_data
from manifold_mixup.lab.errors import Interrupted
from manifold_mixup.lab.measures import evaluate
from manifold_mixup.lab.measures.registry import MEASURES
from manifold_mixup.lab.models import build_model
from manifold_mixup.lab.records import RunFolder
from manifold_mixup.lab.run import execute
from manifold_mixup.lab.training import Hooks


@pytest.fixture
def digits(tmp_path):
    return RunFolder(tmp_path / "runs", one_run(DIGITS, methods=[{"name": "manifold_mixup"}]))


def test_a_record_says_what_was_done(digits):
    record = execute(digits, command="manifold-mixup compare")
    assert (record.experiment, record.data, record.model, record.seed) == ("small", "digits", "mlp", 0)
    assert (record.method, record.label, record.options["alpha"]) == ("manifold_mixup", "manifold_mixup", 2.0)
    assert {"test_error", "test_nll", "test_ece", "train_error", "validation_nll"} <= record.metrics.keys()
    assert record.best.keys() == record.metrics.keys()
    assert record.config_hash == digits.run.config.hash
    assert record.command == "manifold-mixup compare"
    assert record.train["steps"] == 12
    assert record.train["layers"][0] == "input"
    assert record.train["settings"]["lr"] == 0.01
    assert record.versions["torch"] == torch.__version__
    assert record.hardware["threads"] == 1
    assert record.seconds > 0
    assert digits.read() == record


def test_the_metrics_are_those_of_the_saved_weights_on_the_test_split(digits):
    record = execute(digits)
    model = build_model("mlp", digits.run.config.model.options, (1, 8, 8), 10)
    model.load_state_dict(storage.read_tensors(digits.path / "model.safetensors"))
    test = load_data("digits", digits.run.config.data.options, 0).hand_out_test()
    for name, value in evaluate(model, test.x, test.y, prefix="test").items():
        assert record.metrics[name] == pytest.approx(value, abs=1e-6)


def test_last_and_best_are_both_measured(tmp_path):
    run = one_run(DIGITS, train__steps=60, train__lr=0.05, train__eval_every=3)
    record = execute(RunFolder(tmp_path, run))
    assert record.train["best_step"] < 60
    assert record.best["validation_nll"] < record.metrics["validation_nll"]
    weights, _, _ = train(run, tmp_path / "by-hand")
    assert equal(storage.read_tensors(record.folder / "model.safetensors"), weights)


def test_the_spirals_own_measures_and_pictures(tmp_path):
    record = execute(RunFolder(tmp_path, one_run(SPIRAL)))
    assert {
        "train_accuracy",
        "test_accuracy",
        "low_confidence_share",
        "within_between_ratio",
        "margin",
    } <= record.metrics.keys()
    assert record.metrics["test_accuracy"] == pytest.approx(100 - record.metrics["test_error"])
    assert record.pictures()


def test_a_finished_run_is_only_read(digits, monkeypatch):
    first = execute(digits)
    monkeypatch.setattr(run_module, "fit", None)
    assert execute(digits) == first


def test_an_interrupted_run_ends_with_the_same_record(tmp_path):
    run = one_run(DIGITS, methods=[{"name": "manifold_mixup"}])
    straight = execute(RunFolder(tmp_path / "a", run))
    asked = iter([False] * 5 + [True] * 99)
    with pytest.raises(Interrupted):
        execute(RunFolder(tmp_path / "b", run), Hooks(stop=lambda: next(asked)))
    resumed = execute(RunFolder(tmp_path / "b", run))
    assert resumed.metrics == straight.metrics
    assert resumed.best == straight.best
    assert (tmp_path / "a/small/manifold_mixup/seed-0/model.safetensors").read_bytes() == (
        tmp_path / "b/small/manifold_mixup/seed-0/model.safetensors"
    ).read_bytes()


def test_an_interruption_while_measuring_repeats_the_measuring_only(digits, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_measure", broken)
        with pytest.raises(KeyboardInterrupt):
            execute(digits)
    assert digits.read() is None
    steps = []
    execute(digits, Hooks(progress=steps.append))
    assert steps == [12]


def test_random_state_and_threads_are_put_back(digits):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    execute(digits)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_a_run_takes_one_thread_whatever_the_caller_has(digits):
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        execute(digits, Hooks(progress=lambda step: seen.append(torch.get_num_threads())))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


def test_the_callers_random_state_has_no_influence(tmp_path):
    run = one_run(DIGITS, methods=[{"name": "dropout"}])
    torch.manual_seed(1)
    first = execute(RunFolder(tmp_path / "a", run))
    torch.manual_seed(2)
    assert execute(RunFolder(tmp_path / "b", run)).metrics == first.metrics


def test_the_test_split_is_taken_after_the_training(digits, monkeypatch):
    order = []
    hand_out, fit = data_module.DataSplits.hand_out_test, run_module.fit
    monkeypatch.setattr(data_module.DataSplits, "hand_out_test", lambda self: order.append("test") or hand_out(self))
    monkeypatch.setattr(run_module, "fit", lambda *args, **kwargs: (fit(*args, **kwargs), order.append("trained"))[0])
    execute(digits)
    assert order == ["trained", "test"]


def test_a_measure_that_is_no_finite_number_is_none(digits, monkeypatch):
    entry = dataclasses.replace(MEASURES["classification"], compute=lambda subject, options: {"test_nll": float("nan")})
    monkeypatch.setitem(MEASURES, "classification", entry)
    record = execute(digits)
    assert record.metrics["test_nll"] is None
    assert json.loads((digits.path / "record.json").read_text())["metrics"]["test_nll"] is None
