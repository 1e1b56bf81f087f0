"""Manifold Mixup under TorchUncertainty's ClassificationRoutine, which then measures accuracy and calibration.

python examples/torch_uncertainty_routine.py --epochs 20
"""

from __future__ import annotations

import argparse

import lightning.pytorch as lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torch_uncertainty.routines import ClassificationRoutine

from manifold_mixup.integrations.lightning import ManifoldMixupCallback


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, test, print and return the routine's metrics on the images held out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--alpha", type=float, default=2.0, help="λ ~ Beta(alpha, alpha); 0 is training without mixing")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    train, validation, held_out = random_split(data, [0.7, 0.1, 0.2])
    model = nn.Sequential(
        nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    # mixup_params stays None: the routine's own mixup would mix a second time.
    routine = ClassificationRoutine(
        model=model, num_classes=10, loss=nn.CrossEntropyLoss(), optim_recipe=optimizer, eval_ood=False
    )
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        callbacks=[ManifoldMixupCallback(alpha=options.alpha, seed=options.seed)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(routine, DataLoader(train, batch_size=64, shuffle=True), DataLoader(validation, batch_size=256))
    [metrics] = trainer.test(routine, DataLoader(held_out, batch_size=256), verbose=False)
    for name in ("test/cls/Acc", "test/cls/NLL", "test/cal/ECE"):
        print(f"{name} after {options.epochs} epochs: {metrics[name]:.3f}")
    return metrics


if __name__ == "__main__":
    main()
