"""The callback in the life of a Trainer: evaluation, checkpoints, exceptions; and what it refuses."""

from __future__ import annotations

import gc
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_by_hand import Draws, by_hand, distance, hooks
from hf_models import Batches, arguments, bert, images, sentences, trainer_of, vit
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback

from manifold_mixup import ManifoldMixup, errors
from manifold_mixup.integrations.transformers import ManifoldMixupCallback


@pytest.fixture(autouse=True, scope="module")
def _little_to_collect() -> Iterator[None]:
    """Every train() collects garbage, which takes longer than the training where much is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# ------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_sees_ordinary_labels_and_features(tmp_path):
    model, undisturbed, held_out = vit(), vit(), images(10)
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.label_ids)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    options = {"eval_strategy": "steps", "eval_steps": 2, "compute_metrics": metrics, "eval_dataset": held_out}
    trainer, _ = trainer_of(model, tmp_path, [ManifoldMixupCallback()], images(), **options)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert all(ids.tolist() == [row["labels"] for row in held_out] for ids in seen)
    model.eval()
    with torch.no_grad():
        logits = model(torch.stack([row["pixel_values"] for row in held_out])).logits
    labels = torch.tensor([row["labels"] for row in held_out])
    assert logged[-1]["eval_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-6)
    assert logged[-1]["eval_accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    trainer_of(undisturbed, tmp_path, [ManifoldMixupCallback()], images())[0].train()
    assert distance(model, undisturbed) == 0


# ------------------------------------------------------------------------------------------------ resuming


def resumed(folder: Path, checkpoint: Path | None, **mixing: Any) -> tuple[nn.Module, list[Any]]:
    """Seven steps of two micro-batches, four batches an epoch: step 3 lies in the middle of the second epoch."""
    # A ViT of transformers 5.23 is saved under other names than the Trainer looks for when it resumes.
    model = bert(hidden_dropout_prob=0.2)
    callback = ManifoldMixupCallback(**mixing)
    draws = Draws(callback)
    options = {"max_steps": 7, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    trainer, _ = trainer_of(model, folder, [callback, draws], sentences(23), **options)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return model, draws.drawn


def test_a_resumed_training_ends_in_the_same_weights(tmp_path):
    whole, drawn = resumed(tmp_path / "whole", None)
    assert len(drawn) == 14
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert load_file(checkpoint / "manifold_mixup.safetensors")["generator"].dtype == torch.uint8
    part, again = resumed(tmp_path / "part", checkpoint)
    assert again == drawn[6:]
    assert distance(part, whole) == 0
    # With S named, the names that are given count.
    _, again = resumed(tmp_path / "other", checkpoint, layers=["bert.encoder.layer.1"])
    assert {layer for layer, *_ in again} == {"bert.encoder.layer.1"}
    assert [lam for _, lam, _ in again] == [lam for _, lam, _ in drawn[6:]]


def test_a_checkpoint_without_the_state_is_said_to_begin_anew(tmp_path):
    _, drawn = resumed(tmp_path / "whole", None)
    checkpoint = shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "checkpoint-3")
    (checkpoint / "manifold_mixup.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"manifold_mixup\.safetensors does not exist.*begin anew"):
        _, again = resumed(tmp_path / "part", checkpoint)
    assert again != drawn[6:]


@pytest.mark.slow
def test_two_processes_draw_and_resume_on_their_own(tmp_path):
    script = Path(__file__).with_name("hf_distributed.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    here = {**os.environ, "PYTHONPATH": str(script.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, str(tmp_path)], capture_output=True, text=True, timeout=280, env=here)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall("the ranks drew differently and resumed alike", done.stdout)) == 2


# ------------------------------------------------------------------------------------------------ nothing stays


def test_afterwards_model_and_trainer_are_what_they_were(tmp_path):
    model, callback = vit(), ManifoldMixupCallback()
    trainer, batches = trainer_of(model, tmp_path, [callback], images(), label_smoothing_factor=0.1)
    smoother, before = trainer.label_smoother, set(vars(trainer))
    trainer.train()
    assert hooks(model) == 0
    assert trainer.label_smoother is smoother
    own = set(vars(trainer)) - before
    assert not {name for name in own if callable(vars(trainer)[name]) and hasattr(Trainer, name)}
    model.train()
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, model.eval()(**batches[0]).logits)
    ManifoldMixup(model).remove()  # no mixer is left on it


def test_every_training_begins_with_the_seed(tmp_path):
    callback = ManifoldMixupCallback()
    draws = Draws(callback)
    trainer, _ = trainer_of(vit(), tmp_path, [callback, draws], images())
    trainer.train()
    trainer.train()
    assert draws.drawn[:4] == draws.drawn[4:]
    assert draws.drawn[0] != draws.drawn[1]


def interrupt(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["loader", "loss", "optimizer", "metrics", "first evaluation"])
def test_a_training_that_raises_leaves_nothing_either(tmp_path, where, monkeypatch):
    model, callback = vit(), ManifoldMixupCallback()
    options: dict[str, Any] = {"eval_dataset": images(6)}
    if where in ("metrics", "first evaluation"):
        options |= {"compute_metrics": interrupt, "eval_strategy": "epoch", "eval_on_start": where != "metrics"}
    trainer, _ = trainer_of(model, tmp_path, [callback], images(), **options)
    before = {name for name in vars(trainer) if hasattr(Trainer, name)}
    if where == "loader":
        monkeypatch.setattr(Batches, "__call__", interrupt)
    elif where == "loss":
        model.classifier.forward = interrupt
    elif where == "optimizer":
        trainer.create_optimizer()
        trainer.optimizer.step = interrupt
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert hooks(model) == 0
    assert {name for name in vars(trainer) if hasattr(Trainer, name)} == before
    with pytest.raises(errors.MixerRemoved):
        callback.mixup(torch.zeros(2, 1, 8, 8), torch.zeros(2).long())


def test_the_next_training_cleans_up_after_one_that_raised_elsewhere(tmp_path):
    class Once(TrainerCallback):
        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            self.on_epoch_begin = lambda *args, **kwargs: None
            raise KeyboardInterrupt

    model, undisturbed = vit(), vit()
    trainer, _ = trainer_of(model, tmp_path, [ManifoldMixupCallback(), Once()], images())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert hooks(model) == 0
    trainer_of(undisturbed, tmp_path, [ManifoldMixupCallback()], images())[0].train()
    assert distance(model, undisturbed) == 0


def test_a_smaller_batch_after_running_out_of_memory(tmp_path):
    model, reference = vit(), vit()
    callback = ManifoldMixupCallback()
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 8}
    trainer, batches = trainer_of(model, tmp_path, [callback], images(), **options)
    forward, failures = model.vit.forward, itertools.count()

    def out_of_memory_once(*args: Any, **kwargs: Any) -> Any:
        if len(batches[-1]["labels"]) == 8 and next(failures) > 1:  # not where cut points are looked for
            raise RuntimeError("CUDA out of memory.")
        return forward(*args, **kwargs)

    model.vit.forward = out_of_memory_once
    trainer.train()
    sizes = [len(batch["labels"]) for batch in batches]
    assert sizes[0] == 8 > sizes[-1]
    assert len(callback.mixup.last.partner) == sizes[-1]
    first = next(i for i, size in enumerate(sizes) if size < 8)
    by_hand(reference, batches[first:])
    assert distance(model, reference) < 1e-6


# ------------------------------------------------------------------------------------------------ what is refused


def test_batches_without_labels(tmp_path):
    class Unlabelled(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).logits.square().mean()

    rows = [{"pixel_values": row["pixel_values"]} for row in images()]
    trainer, _ = trainer_of(vit(), tmp_path, [ManifoldMixupCallback()], rows, kind=Unlabelled)
    with pytest.raises(ValueError, match=r"the labels \['labels'\] \(it holds \['pixel_values'\]\).*label_names"):
        trainer.train()


@pytest.mark.parametrize("first", [0, 2])
def test_a_training_step_that_goes_past_the_loss(tmp_path, first):
    class Past(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.state.global_step < first:
                return super().training_step(model, inputs, num_items_in_batch)
            loss = model.train()(**inputs).loss
            loss.backward()
            return loss.detach()

    trainer, _ = trainer_of(vit(), tmp_path, [ManifoldMixupCallback()], images(), kind=Past)
    with pytest.raises(errors.LayerNotReached, match="did not call compute_loss"):
        trainer.train()
    assert trainer.state.global_step == first + 1


def test_a_loss_that_takes_labels_for_a_tensor(tmp_path):
    class Counting(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            self.hits = (outputs.logits.argmax(-1) == inputs["labels"]).sum()
            return outputs.loss

    trainer, _ = trainer_of(vit(), tmp_path, [ManifoldMixupCallback()], images(), kind=Counting)
    with pytest.raises(errors.MixedTargetMisuse, match="target.accuracy"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pairing": "two-batches"}, "half of the rows"), ({"alpha": -1}, "alpha"), ({"layers": "encoder"}, "layers=")],
)
def test_arguments_are_checked_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        ManifoldMixupCallback(**options)


def test_one_batch_on_several_devices(tmp_path, monkeypatch):
    trainer, _ = trainer_of(vit(), tmp_path, [ManifoldMixupCallback()], images())
    monkeypatch.setattr(trainer, "get_cp_size", lambda: 2)
    with pytest.raises(errors.UnsupportedModel, match="context parallelism 2 processes share one batch"):
        trainer.train()
    monkeypatch.undo()
    trainer.args._n_gpu = 2
    with pytest.raises(errors.UnsupportedModel, match="torchrun"):
        trainer.train()


def test_outside_of_a_trainer(tmp_path):
    with pytest.raises(RuntimeError, match="inside the train\\(\\) of a transformers.Trainer"):
        ManifoldMixupCallback().on_train_begin(arguments(tmp_path), SimpleNamespace(), SimpleNamespace(), model=vit())


def test_a_model_with_a_mixer_already(tmp_path):
    model = vit()
    mixup = ManifoldMixup(model)
    trainer, _ = trainer_of(model, tmp_path, [ManifoldMixupCallback()], images())
    with pytest.raises(errors.AlreadyAttached):
        trainer.train()
    mixup.remove()


def test_repr_shows_the_arguments():
    assert repr(ManifoldMixupCallback(alpha=0.5)).startswith("ManifoldMixupCallback(alpha=0.5, layers='auto', per=")
