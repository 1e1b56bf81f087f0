"""Tiny Hugging Face models with random weights, data for them, and a Trainer that leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

CLASSES = 4
SEED = 4  # with it the first four draws from three layers meet all of them


class Batches(list[dict[str, Tensor]]):
    """A collator that keeps every batch it makes, in the order in which the Trainer takes them."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}
        self.append({key: value.clone() for key, value in batch.items()})
        return batch


def vit(**options: Any) -> ViTForImageClassification:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    shape["initializer_range"] = 0.3  # so that outputs depend on their inputs, and on where they are mixed
    image = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": CLASSES}
    config = ViTConfig(**{**image, **shape, **options})
    return ViTForImageClassification(config)


def images(n: int = 24) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(n, 1, 8, 8, generator=generator)
    return [{"pixel_values": p, "labels": i % CLASSES} for i, p in enumerate(pixels)]


def bert_config(**options: Any) -> BertConfig:
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    shape["initializer_range"] = 0.3
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(**{"vocab_size": 30, "num_labels": CLASSES, **shape, **dropout, **options})


def bert(**options: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(bert_config(**options))


def sentences(n: int = 24, length: int = 6, *, mask: bool = True) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(n):
        row = {"input_ids": torch.randint(1, 30, (length,), generator=generator), "labels": i % CLASSES}
        if mask:
            row["attention_mask"] = (torch.arange(length) < 2 + i % (length - 1)).long()
        rows.append(row)
    return rows


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Plain SGD, so that a loop by hand is a few lines."""
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 6,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "seed": SEED,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def trainer_of(
    model: torch.nn.Module, folder: Path, callbacks: list[Any], rows: list[dict[str, Any]], **options: Any
) -> tuple[Trainer, Batches]:
    """A Trainer and the list that its batches go to; options that are no TrainingArguments go to the Trainer."""
    own = {key: options.pop(key) for key in ("compute_loss_func", "compute_metrics", "eval_dataset") if key in options}
    kind, batches = options.pop("kind", Trainer), Batches()
    args = arguments(folder, **options)
    return kind(model, args, data_collator=batches, train_dataset=rows, callbacks=callbacks, **own), batches
