"""The Hugging Face Trainer with the callback trains as a loop by hand does."""

from __future__ import annotations

import gc
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hf_by_hand import distance, train_both
from hf_models import CLASSES, SEED, bert, bert_config, images, sentences, trainer_of, vit
from torch import Tensor, nn
from transformers import Trainer

from manifold_mixup import ManifoldMixup, errors
from manifold_mixup.integrations.transformers import ManifoldMixupCallback

EXAMPLE = Path(__file__).parents[2] / "examples" / "hf_trainer.py"


@pytest.fixture(autouse=True, scope="module")
def _little_to_collect() -> Iterator[None]:
    """Every train() collects garbage, which takes longer than the training where much is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# ------------------------------------------------------------------------------------------------ the training


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_equals_a_loop_by_hand(tmp_path, accumulate):
    # 23 rows: the last batch of an epoch has five of them.
    options = {"gradient_accumulation_steps": accumulate, "max_steps": 5}
    assert distance(*train_both(tmp_path, vit(), images(23), **options)) < 1e-6


def test_text_with_attention_masks(tmp_path):
    model, reference = train_both(tmp_path, bert(), sentences(23))
    assert distance(model, reference) < 1e-6


def test_layers_pairing_and_probability_are_handed_on(tmp_path):
    mixing = {"alpha": 0.5, "layers": ["vit.layers.1"], "pairing": "halves", "probability": 1.0, "seed": 11}
    assert distance(*train_both(tmp_path, vit(), images(), mixing=mixing)) < 1e-6


def labelled(labels: Callable[[int], Any]) -> list[dict[str, Any]]:
    return [{**row, "labels": labels(i)} for i, row in enumerate(sentences())]


def llama() -> nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=30, initializer_range=0.3, **size))


def tokens(i: int) -> Tensor:
    return torch.where(torch.arange(6) < 2 + i % 5, (torch.arange(6) + i) % CLASSES, -100)


HEADS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[dict[str, Any]]], dict[str, Any]]] = {
    "regression": (lambda: bert(num_labels=1), lambda: labelled(lambda i: torch.tensor(i / 10)), {}),
    "multi-label": (bert, lambda: labelled(lambda i: torch.eye(CLASSES)[i % CLASSES]), {}),
    "tokens": (lambda: transformers.BertForTokenClassification(bert_config()), lambda: labelled(tokens), {}),
    "masked": (lambda: transformers.BertForMaskedLM(bert_config()), lambda: labelled(tokens), {}),
    "causal": (llama, lambda: labelled(tokens), {"shifted": True}),
}


@pytest.mark.parametrize("head", HEADS)
def test_losses_inside_the_model(tmp_path, head):
    model, rows, by_hand_options = HEADS[head]
    torch.manual_seed(0)
    assert distance(*train_both(tmp_path, model(), rows(), by_hand_options)) < 1e-6


def test_label_smoothing_smooths_both_labels(tmp_path):
    def smoothed(model: nn.Module, x: dict[str, Tensor], y: Tensor, items: Tensor) -> Tensor:
        return F.cross_entropy(model(**x).logits, y, label_smoothing=0.3, reduction="sum") / len(y)

    options = {"label_smoothing_factor": 0.3}
    model, reference = train_both(tmp_path, vit(), images(), {"loss_of": smoothed}, **options)
    assert distance(model, reference) < 1e-6
    unsmoothed = vit()
    trainer_of(unsmoothed, tmp_path, [ManifoldMixupCallback()], images())[0].train()
    assert distance(model, unsmoothed) > 1e-4


def test_label_smoothing_of_shifted_labels_counts_the_valid_ones(tmp_path):
    def smoothed(model: nn.Module, x: dict[str, Tensor], y: Tensor, items: Tensor) -> Tensor:
        logits = model(**x).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, y[:, 1:].flatten(), label_smoothing=0.3, reduction="sum") / items

    options = {"label_smoothing_factor": 0.3, "gradient_accumulation_steps": 2}
    by_hand_options = {"loss_of": smoothed, "shifted": True}
    assert distance(*train_both(tmp_path, llama(), labelled(tokens), by_hand_options, **options)) < 1e-6


def focal(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Not linear in its labels, and it reduces: λ cannot go inside."""
    nll = F.cross_entropy(outputs["logits"], labels, reduction="none")
    return ((1 - torch.exp(-nll)) ** 2 * nll).sum() / num_items_in_batch


def test_a_loss_function_of_the_user(tmp_path):
    def loss_of(model: nn.Module, x: dict[str, Tensor], y: Tensor, items: Tensor) -> Tensor:
        return focal(model(**x), y, items)

    options = {"compute_loss_func": focal, "gradient_accumulation_steps": 2}
    assert distance(*train_both(tmp_path, vit(), images(), {"loss_of": loss_of}, **options)) < 1e-6


WEIGHT = torch.tensor([1.0, 2.0, 3.0, 4.0])


class Weighted(Trainer):
    """A subclass as the documentation of the Trainer shows it, with a column that the model does not take."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, scale = inputs.pop("labels"), inputs.pop("scale")
        outputs = model(**inputs)
        loss = nn.CrossEntropyLoss(weight=WEIGHT)(outputs["logits"].view(-1, CLASSES), labels.view(-1)) * scale.mean()
        return (loss, outputs) if return_outputs else loss


class Span(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        start, end = inputs.pop("start_positions"), inputs.pop("end_positions")
        outputs = model(**inputs)
        return F.cross_entropy(outputs.start_logits, start) + 2 * F.cross_entropy(outputs.end_logits, end)


def test_two_kinds_of_labels(tmp_path):
    def loss_of(model: nn.Module, x: dict[str, Tensor], y: dict[str, Tensor], items: Any) -> Tensor:
        outputs = model(**x)
        start = F.cross_entropy(outputs.start_logits, y["start_positions"])
        return start + 2 * F.cross_entropy(outputs.end_logits, y["end_positions"])

    torch.manual_seed(0)
    model = transformers.BertForQuestionAnswering(bert_config(num_labels=2))
    ids = [row["input_ids"] for row in sentences()]
    rows = [{"input_ids": x, "start_positions": i % 6, "end_positions": i % 5} for i, x in enumerate(ids)]
    assert distance(*train_both(tmp_path, model, rows, {"loss_of": loss_of}, kind=Span)) < 1e-6


class Strict(nn.Module):
    """A model that is no Hugging Face model and takes nothing but pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.second(self.first(pixel_values.flatten(1)).relu()).relu())}


@pytest.mark.parametrize("model", [vit, Strict])
def test_a_subclass_with_a_loss_and_a_column_of_its_own(tmp_path, model):
    def loss_of(model: nn.Module, x: dict[str, Tensor], y: Tensor, items: Tensor) -> Tensor:
        return F.cross_entropy(model(**x)["logits"], y, WEIGHT) * 0.5

    rows = [{**row, "scale": 0.5} for row in images()]
    options = {"kind": Weighted, "remove_unused_columns": False, "label_names": ["labels"]}
    by_hand_options = {"loss_of": loss_of, "ignore": ("scale",)}
    mixing = {"layers": ["vit.layers.0", "vit.layers.1"] if model is vit else ["first", "second"]}
    model, reference = train_both(tmp_path, model(), rows, by_hand_options, mixing=mixing, **options)
    assert distance(model, reference) < 1e-6


def test_one_draw_per_pair_with_a_loss_that_is_not_reduced(tmp_path):
    def mean_of_each(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs["logits"], labels, reduction="none").sum() / num_items_in_batch

    model, reference = vit(), vit()
    callback = ManifoldMixupCallback(per="example", seed=5)
    trainer, batches = trainer_of(model, tmp_path, [callback], images(), compute_loss_func=mean_of_each, max_steps=1)
    trainer.train()
    mixup = ManifoldMixup(reference.train(), per="example", seed=5)
    x, target = mixup({"pixel_values": batches[0]["pixel_values"]}, batches[0]["labels"])
    logits = reference(**x).logits
    own, partner = (F.cross_entropy(logits, y, reduction="none") for y in (target.y, target.y_partner))
    (target.lam * own + (1 - target.lam) * partner).mean().backward()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    assert len(set(callback.mixup.last.layer)) > 1
    assert distance(model, reference) < 1e-6


def test_one_draw_per_pair_is_refused_by_a_loss_inside_the_model(tmp_path):
    trainer, _ = trainer_of(vit(), tmp_path, [ManifoldMixupCallback(per="example")], images())
    with pytest.raises(errors.MixedTargetMisuse, match="one λ for each"):
        trainer.train()


def test_bfloat16(tmp_path):
    model, reference, single = vit(), vit(), vit()
    trainer, batches = trainer_of(model, tmp_path, [ManifoldMixupCallback()], images(), bf16=True, max_steps=1)
    trainer.train()
    mixup = ManifoldMixup(reference.train(), seed=SEED)
    x, target = mixup({"pixel_values": batches[0]["pixel_values"]}, batches[0]["labels"])
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(reference(**x).logits, target).backward()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    trainer_of(single, tmp_path, [ManifoldMixupCallback()], images(), max_steps=1)[0].train()
    assert distance(model, reference) < 1e-6 < 1e-5 < distance(model, single)


def test_activation_checkpointing_changes_nothing(tmp_path):
    trained = []
    for options in ({}, {"activation_checkpointing": True}):
        model = vit()
        trainer_of(model, tmp_path, [ManifoldMixupCallback()], images(), **options)[0].train()
        assert model.is_activation_checkpointing == bool(options)
        trained.append(model)
    assert distance(*trained) < 1e-6


# The compiler makes an object of every autograd function that it traces, and torch warns of that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.slow
def test_compiled(tmp_path):
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    model, eager = vit(), vit()
    trainer_of(eager, tmp_path, [ManifoldMixupCallback()], images())[0].train()
    trainer, _ = trainer_of(model, tmp_path, [ManifoldMixupCallback()], images(), **options)
    trainer.train()
    assert distance(model, eager) < 1e-6
    trainer.train()  # what the first training compiled mixes no more
    trainer_of(eager, tmp_path, [ManifoldMixupCallback()], images())[0].train()
    assert distance(model, eager) < 1e-6


def test_alpha_zero_is_the_trainer_without_it(tmp_path):
    model, plain = vit(hidden_dropout_prob=0.2), vit(hidden_dropout_prob=0.2)
    trainer_of(model, tmp_path, [ManifoldMixupCallback(alpha=0)], images(), label_smoothing_factor=0.1)[0].train()
    trainer_of(plain, tmp_path, [], images(), label_smoothing_factor=0.1)[0].train()
    assert distance(model, plain) == 0


# ------------------------------------------------------------------------------------------------ the example


def test_the_example(capsys):
    main = runpy.run_path(str(EXAMPLE))["main"]
    assert main(["--epochs", "15"]) > 0.42  # the most frequent of the six descriptions has 0.31 of the sentences
    assert "mixed at ['bert.encoder" in capsys.readouterr().out


def test_the_example_has_a_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(EXAMPLE))["main"](["--help"])
    assert "--alpha" in capsys.readouterr().out
