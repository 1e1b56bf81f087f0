"""Manifold Mixup in the Hugging Face Trainer: which data set is a sentence about? BERT from scratch, one callback.

The text is real but small: the descriptions of the data sets that come with scikit-learn, cut into sentences of one to
twelve words. Nothing is downloaded.

python examples/hf_trainer.py --epochs 15
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter

import numpy as np
import torch
from sklearn import datasets
from transformers import BertConfig, BertForSequenceClassification, EvalPrediction, Trainer, TrainingArguments

from manifold_mixup.integrations.transformers import ManifoldMixupCallback

SOURCES = ["breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine"]
WORDS = 12


def sentences() -> list[tuple[list[str], int]]:
    """Sentences of at most twelve words, each with the number of the description it is from."""
    found = []
    for label, name in enumerate(SOURCES):
        description = getattr(datasets, f"load_{name}")().DESCR.lower()
        for part in re.split(r"[.:;|]\s|\n\s*\n", description):
            words = re.findall(r"[a-z]+", part)
            found += [(words[i : i + WORDS], label) for i in range(0, len(words), WORDS)]
    return found


def rows(pairs: list[tuple[list[str], int]], vocabulary: dict[str, int]) -> list[dict[str, torch.Tensor]]:
    """Token ids, padded with 0 behind the last word, and the mask that says so; 1 is an unknown word."""
    encoded = []
    for words, label in pairs:
        ids = torch.zeros(WORDS, dtype=torch.long)
        ids[: len(words)] = torch.tensor([vocabulary.get(word, 1) for word in words])
        encoded.append({"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor(label)})
    return encoded


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of hits; the labels are ordinary ones, as in any evaluation."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main(arguments: list[str] | None = None) -> float:
    """Train, print and return the accuracy on the sentences held out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--alpha", type=float, default=1.0, help="λ ~ Beta(alpha, alpha); 0 is training without mixing")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    everything = sentences()
    order = np.random.default_rng(options.seed).permutation(len(everything))
    train = [everything[i] for i in order[len(order) // 5 :]]
    held_out = [everything[i] for i in order[: len(order) // 5]]
    counts = Counter(word for words, _ in train for word in words)
    vocabulary = {word: i for i, (word, _) in enumerate(counts.most_common(), start=2)}

    torch.manual_seed(options.seed)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(vocabulary) + 2,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=WORDS,
            num_labels=len(SOURCES),
        )
    )
    callback = ManifoldMixupCallback(alpha=options.alpha)  # the one line that is new
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=folder,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=32,
                learning_rate=2e-3,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
                seed=options.seed,
            ),
            train_dataset=rows(train, vocabulary),
            eval_dataset=rows(held_out, vocabulary),
            compute_metrics=accuracy,
            callbacks=[callback],
        )
        trainer.train()
        result = trainer.evaluate()
    print(f"mixed at {callback.mixup.layers}, with λ = {callback.mixup.last.lam:.2f} in the last batch")
    print(f"accuracy on {len(held_out)} sentences held out: {result['eval_accuracy']:.3f}")
    return float(result["eval_accuracy"])


if __name__ == "__main__":
    main()
