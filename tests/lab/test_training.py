import errno
import inspect
import json
import os

import pytest
import torch

from lab.small import DIGITS, SPIRAL, equal, one_run, train
from manifold_mixup.lab import storage, training
from manifold_mixup.lab.config import TrainConfig
from manifold_mixup.lab.data import DataSplits
from manifold_mixup.lab.errors import ConfigMismatch, CorruptedFile, Diverged, Interrupted, StorageError, UsageError
from manifold_mixup.lab.methods import METHODS
from manifold_mixup.lab.training import Batches, Hooks, fit


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def stop_at(step):
    """Stop before this step, the way Ctrl-C does: between two steps, with a checkpoint."""
    seen = []

    def stop():
        seen.append(None)
        return len(seen) > step

    return Hooks(stop=stop)


class PowerCut(BaseException):
    """Nothing gets the chance to write a checkpoint."""


def cut_at(step, **hooks):
    def progress(done):
        if done == step:
            raise PowerCut

    return Hooks(progress=progress, **hooks)


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_ends_with_the_same_bits(method, tmp_path):
    run = one_run(methods=[{"name": method}], train__schedule="cosine")
    straight, fitted, _ = train(run, tmp_path / "straight")
    for more, reached in ((3, 3), (4, 7)):
        with pytest.raises(Interrupted, match=f"stopped at step {reached} of 12"):
            train(run, tmp_path / "broken", stop_at(more))
    resumed, refitted, _ = train(run, tmp_path / "broken")
    assert equal(resumed, straight)
    assert equal(refitted.best, fitted.best)
    assert log(tmp_path / "broken") == log(tmp_path / "straight")
    assert refitted.facts["best_step"] == fitted.facts["best_step"]


@pytest.mark.parametrize(
    "changes",
    [
        {"train__optimizer": "sgd", "train__momentum": 0.9, "train__nesterov": True},
        {"train__precision": "bf16-mixed"},
        {"train__batch_size": "full"},
        {"model__options": {"width": 8, "dropout": 0.3, "batch_norm": True}},
        {"train__eval_every": 5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_resuming_is_exact_for_every_kind_of_training(changes, tmp_path):
    run = one_run(methods=[{"name": "manifold_mixup"}], **changes)
    straight, fitted, _ = train(run, tmp_path / "straight")
    with pytest.raises(Interrupted):
        train(run, tmp_path / "broken", stop_at(6))
    resumed, refitted, _ = train(run, tmp_path / "broken")
    assert equal(resumed, straight)
    assert equal(refitted.best, fitted.best)
    assert log(tmp_path / "broken") == log(tmp_path / "straight")


def test_a_power_cut_at_any_step_loses_no_more_than_the_steps_since_the_last_checkpoint(tmp_path):
    run = one_run(methods=[{"name": "manifold_mixup"}])
    straight, _, _ = train(run, tmp_path / "straight")
    for step in range(1, 13):
        folder = tmp_path / str(step)
        with pytest.raises(PowerCut):
            train(run, folder, cut_at(step, checkpoint_steps=5))
        state = storage.load_state(folder / "checkpoint")
        assert (state["step"] if state else 0) == (step - 1) // 5 * 5
        assert equal(train(run, folder)[0], straight)
        assert log(folder) == log(tmp_path / "straight")


def test_checkpoints_by_time(tmp_path):
    with pytest.raises(PowerCut):
        train(one_run(), tmp_path, cut_at(7, checkpoint_seconds=0.0))
    assert storage.load_state(tmp_path / "checkpoint")["step"] == 6


def test_the_pace_of_checkpoints_changes_nothing(tmp_path):
    run = one_run(methods=[{"name": "dropout"}])
    rarely, often = train(run, tmp_path / "a")[0], train(run, tmp_path / "b", Hooks(checkpoint_steps=1))[0]
    assert equal(rarely, often)


def test_a_finished_training_is_not_trained_again(tmp_path):
    run = one_run()
    first = train(run, tmp_path)[0]
    steps = []
    assert equal(train(run, tmp_path, Hooks(progress=steps.append))[0], first)
    assert steps == [12]


def test_a_line_of_the_log_that_was_cut_off_is_dropped(tmp_path):
    run = one_run()
    with pytest.raises(Interrupted):
        train(run, tmp_path, stop_at(9))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 12, "train_loss": 1}\n{"step": 16, "tra')
    train(run, tmp_path)
    assert [line["step"] for line in log(tmp_path)] == [4, 8, 12]


CHANGES = {
    "steps": {"train__steps": 13},
    "batch_size": {"train__batch_size": 11},
    "full batch": {"train__batch_size": 0},
    "optimizer": {"train__optimizer": "sgd"},
    "momentum": {"train__optimizer": "sgd", "train__momentum": 0.5},
    "nesterov": {"train__optimizer": "sgd", "train__momentum": 0.5, "train__nesterov": True},
    "lr": {"train__lr": 0.02},
    "schedule": {"train__schedule": "cosine"},
    "weight_decay": {"train__weight_decay": 0.1},
    "precision": {"train__precision": "bf16-mixed"},
    "seed": {"seeds": [1]},
}


def test_every_training_setting_is_read(tmp_path):
    seen = {"default": train(one_run(), tmp_path / "default")[0]}
    for name, changes in CHANGES.items():
        weights = train(one_run(**changes), tmp_path / name)[0]
        assert not [other for other, before in seen.items() if equal(weights, before)], f"{name} changed nothing"
        seen[name] = weights
    assert set(TrainConfig.model_fields) - CHANGES.keys() == {"eval_every"}  # has a test of its own


def test_eval_every_is_read(tmp_path):
    train(one_run(train__eval_every=5), tmp_path)
    assert [line["step"] for line in log(tmp_path)] == [5, 10, 12]


def test_eval_every_does_not_change_the_weights(tmp_path):
    a, b = (train(one_run(train__eval_every=n), tmp_path / str(n))[0] for n in (2, 5))
    assert equal(a, b)


def test_best_weights_are_those_with_the_lowest_validation_nll(tmp_path):
    run = one_run(train__steps=60, train__lr=0.05, train__eval_every=3)
    last, fitted, _ = train(run, tmp_path)
    lines = log(tmp_path)
    best = min(lines, key=lambda line: line["validation_nll"])
    assert fitted.facts["best_step"] == best["step"]
    shorter = one_run(train__steps=best["step"], train__lr=0.05, train__eval_every=3)
    assert equal(fitted.best, train(shorter, tmp_path / "shorter")[0])
    assert best["step"] != 60
    assert not equal(fitted.best, last)


def test_the_cosine_ends_at_zero(tmp_path):
    train(one_run(train__schedule="cosine", train__steps=8), tmp_path)
    rates = [line["lr"] for line in log(tmp_path)]
    assert rates == pytest.approx([0.005, 0.0], abs=1e-12)


def test_two_methods_see_the_same_batches_from_the_same_weights(tmp_path):
    """A method that only changes what the optimiser does after the first step has the plain run's first loss."""
    losses = []
    for name in ("none", "weight_decay"):
        run = one_run(DIGITS, methods=[{"name": name}], train__steps=1, train__eval_every=1)
        train(run, tmp_path / name)
        losses.append(log(tmp_path / name)[0]["train_loss"])
    assert losses[0] == losses[1]


def test_training_gets_no_object_that_holds_test_data():
    hints = inspect.signature(fit).parameters
    assert {"train", "validation"} <= hints.keys()
    assert not any("test" in name for name in hints)
    assert not any(DataSplits.__name__ in str(parameter.annotation) for parameter in hints.values())
    assert "hand_out_test" not in inspect.getsource(training)


def test_batches_shuffle_and_leave_nothing_out():
    batches = Batches(10, 5, seed=0)
    first, second = (torch.cat([batches.draw(), batches.draw()]) for _ in range(2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()


def test_an_incomplete_last_batch_is_left_out():
    batches = Batches(10, 4, seed=0)
    drawn = [batches.draw() for _ in range(5)]
    assert [len(rows) for rows in drawn] == [4] * 5
    assert not set(drawn[0].tolist()) & set(drawn[1].tolist())


def test_the_full_batch_is_everything():
    assert sorted(Batches(7, 0, seed=0).draw().tolist()) == list(range(7))


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(UsageError, match="batch_size 100 is more than the 24 training examples"):
        train(one_run(train__batch_size=100), tmp_path)


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        train(one_run(), tmp_path, stop_at(5))
    with pytest.raises(ConfigMismatch, match="another config"):
        train(one_run(train__lr=0.5), tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        train(one_run(), tmp_path, stop_at(5))
    path = tmp_path / "checkpoint" / "tensors-5.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptedFile, match="checksum"):
        train(one_run(), tmp_path)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    run = one_run()
    with pytest.raises(Interrupted):
        train(run, tmp_path, stop_at(5))
    state = storage.load_state(tmp_path / "checkpoint")
    del state["model"]["head.weight"]
    storage.save_state(tmp_path / "checkpoint", state, 5)
    with pytest.raises(CorruptedFile, match="does not fit"):
        train(run, tmp_path)


def test_a_full_disk_is_a_clear_error(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        train(one_run(), tmp_path)


def test_a_loss_that_is_no_number_is_a_clear_error(tmp_path):
    with pytest.raises(Diverged, match=r"diverged.*try a smaller train.lr"):
        train(one_run(train__optimizer="sgd", train__lr=1e30), tmp_path)


def test_the_method_is_detached_after_an_error(tmp_path, monkeypatch):
    detached = []
    monkeypatch.setattr(METHODS["none"], "detach", lambda self: detached.append(True))
    with pytest.raises(PowerCut):
        train(one_run(SPIRAL), tmp_path, cut_at(3))
    assert detached == [True]
