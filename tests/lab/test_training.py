import errno
import inspect
import json
import os

import pytest
import torch
from pydantic import ValidationError

from lab.small import DIGITS, SPIRAL, equal, one_run, train, train_images
from manifold_mixup.lab import storage, training
from manifold_mixup.lab.batches import Batches
from manifold_mixup.lab.config import TrainConfig
from manifold_mixup.lab.data import DataSplits
from manifold_mixup.lab.errors import ConfigMismatch, CorruptedFile, Diverged, Interrupted, StorageError, UsageError
from manifold_mixup.lab.methods import METHODS
from manifold_mixup.lab.records import RunFolder
from manifold_mixup.lab.run import execute
from manifold_mixup.lab.training import Hooks, fit


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


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if "classification" in method.tasks])
def test_an_interrupted_run_ends_with_the_same_bits(method, tmp_path):
    options = {"size": 4} if method == "cutout" else {}
    changes = {"methods": [{"name": method, "options": options}], "train__schedule": "cosine"}
    if method in ("cutmix", "cutout"):  # which read images
        run = one_run(DIGITS, model={"name": "preact_resnet8", "options": {"width": 4}}, **changes)
    else:
        run = one_run(**changes)
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
    "loss": {"train__loss": "bce-softmax"},
    "label_smoothing": {"train__label_smoothing": 0.1},
    "milestones": {"train__schedule": "step", "train__milestones": [3]},
    "gamma": {"train__schedule": "step", "train__milestones": [3], "train__gamma": 0.5},
    "one-cycle": {"train__schedule": "one-cycle"},
    "warmup": {"train__schedule": "one-cycle", "train__warmup": 0.6},
    "seed": {"seeds": [1]},
}


def test_every_training_setting_is_read(tmp_path):
    seen = {"default": train(one_run(), tmp_path / "default")[0]}
    for name, changes in CHANGES.items():
        weights = train(one_run(**changes), tmp_path / name)[0]
        assert not [other for other, before in seen.items() if equal(weights, before)], f"{name} changed nothing"
        seen[name] = weights
    # those below have tests of their own
    assert set(TrainConfig.model_fields) - CHANGES.keys() == {"epochs", "eval_every", "ema", "compile", "threads"}


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


def test_a_loss_that_is_no_number_names_the_step(tmp_path):
    with pytest.raises(Diverged, match=r"loss is \w+ at step \d+ of 12; there is no checkpoint.*a smaller train.lr"):
        train(one_run(train__optimizer="sgd", train__lr=1e30), tmp_path)


class Poison:
    """A method whose loss is no number from one step on, or whose gradients are."""

    def __init__(self, monkeypatch, step, *, gradient=False):
        self.calls, self.step, self.gradient = 0, step, gradient
        monkeypatch.setattr(METHODS["none"], "loss", self.loss)

    def loss(self, criterion, output, target):
        self.calls += 1
        loss = criterion(output, target)
        if self.calls < self.step:
            return loss
        if self.gradient:
            return loss + (output - output.detach()).sqrt().sum()  # 0, with an infinite slope
        return loss * float("nan")


def test_the_last_good_checkpoint_is_kept(tmp_path, monkeypatch):
    Poison(monkeypatch, 8)
    message = r"training loss is nan at step 8 of 12; the checkpoint of step 5 is kept"
    with pytest.raises(Diverged, match=message):
        train(one_run(), tmp_path, Hooks(checkpoint_steps=5))
    state = storage.load_state(tmp_path / "checkpoint")
    assert state["step"] == 5
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_weight_that_is_no_number_is_never_saved(tmp_path, monkeypatch):
    Poison(monkeypatch, 10, gradient=True)
    with pytest.raises(Diverged, match=r"no number after step 10 of 12; the checkpoint of step 8 is kept"):
        train(one_run(train__eval_every=12), tmp_path, Hooks(checkpoint_steps=2))
    assert storage.load_state(tmp_path / "checkpoint")["step"] == 8


def test_the_method_is_detached_after_an_error(tmp_path, monkeypatch):
    detached = []
    monkeypatch.setattr(METHODS["none"], "detach", lambda self: detached.append(True))
    with pytest.raises(PowerCut):
        train(one_run(SPIRAL), tmp_path, cut_at(3))
    assert detached == [True]


# ---------------------------------------------------------------- images


def test_epochs_are_passes_over_whole_batches(tmp_path):
    _, fitted = train_images(tmp_path, epochs=3, batch_size=10)  # 32 images: 3 batches of 10
    assert (fitted.facts["steps"], fitted.facts["examples"]) == (9, 32)
    assert [(line["step"], line["epoch"]) for line in log(tmp_path)] == [(3, 1), (6, 2), (9, 3)]


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 3},
        {"precision": "bf16-mixed"},
        {"ema": 0.8},
        {"loss": "bce-softmax"},
        {"method": "none", "validation": 0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_resuming_on_images_is_exact(settings, tmp_path):
    straight, fitted = train_images(tmp_path / "straight", **settings)
    with pytest.raises(Interrupted):
        train_images(tmp_path / "broken", stop_at(7), **settings)
    resumed, refitted = train_images(tmp_path / "broken", **settings)
    assert equal(resumed, straight)
    assert equal(refitted.last, fitted.last)
    assert log(tmp_path / "broken") == log(tmp_path / "straight")


def test_the_pace_of_checkpoints_changes_nothing_on_images(tmp_path):
    often = train_images(tmp_path / "a", Hooks(checkpoint_steps=1))[0]
    assert equal(often, train_images(tmp_path / "b")[0])
    assert log(tmp_path / "a") == log(tmp_path / "b")


def test_without_a_validation_split_there_are_no_best_weights(tmp_path):
    weights, fitted = train_images(tmp_path, validation=0)
    assert fitted.best is None
    assert equal(fitted.last, weights)
    assert "best_step" not in fitted.facts
    assert all("validation_nll" not in line and line["train_loss"] > 0 for line in log(tmp_path))


def test_an_average_of_the_weights_is_what_is_measured(tmp_path):
    weights, fitted = train_images(tmp_path / "average", ema=0.8)
    plain, _ = train_images(tmp_path / "plain")
    assert equal(weights, plain)  # the average looks on
    assert not equal(fitted.last, weights)
    trained = [log(tmp_path / name)[-1]["validation_nll"] for name in ("average", "plain")]
    assert trained[0] != trained[1]


def test_an_average_with_its_weight_on_the_present_is_the_weights(tmp_path):
    weights, fitted = train_images(tmp_path, ema=1e-9)
    for name, value in weights.items():
        if value.is_floating_point():
            assert torch.allclose(fitted.last[name], value, atol=1e-5), name


def test_images_are_trained_on_and_learned(tmp_path):
    train_images(tmp_path, method="none", steps=40)
    first, *_, last = log(tmp_path)
    assert last["validation_nll"] < first["validation_nll"]
    assert last["validation_error"] == 0


# the compiler hides a warning about .grad, makes objects of autograd functions, and imports what is deprecated
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.slow
def test_a_compiled_network_trains_to_the_same_weights(tmp_path):
    compiled, _ = train_images(tmp_path / "a", compile=True)
    eager, _ = train_images(tmp_path / "b")
    assert not (set(compiled) ^ set(eager))
    for name, value in eager.items():
        assert torch.allclose(compiled[name].double(), value.double(), atol=1e-4), name


def test_several_threads_are_used_when_asked_for(tmp_path):
    seen = []
    run = RunFolder(tmp_path, one_run(DIGITS, train__threads=2))
    execute(run, Hooks(progress=lambda step: seen.append(torch.get_num_threads())))
    assert set(seen) == {2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 3, "epochs": 3}, "give one of them"),
        ({"schedule": "step"}, "needs milestones"),
        ({"schedule": "step", "steps": 10, "milestones": [10]}, "between 0 and the 10 steps"),
        ({"schedule": "step", "epochs": 10, "milestones": [5, 3]}, "have to rise"),
        ({"milestones": [3]}, "schedule 'step' only"),
        ({"warmup": 0.5}, "schedule 'one-cycle' only"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        TrainConfig(**settings)
