"""Manifold Mixup in the Lightning Trainer: handwritten digits, a network that knows nothing of it, one callback.

python examples/lightning_callback.py --epochs 20
"""

from __future__ import annotations

import argparse

import lightning.pytorch as lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from manifold_mixup.integrations.lightning import ManifoldMixupCallback


class Digits(lightning.LightningModule):
    """An ordinary LightningModule: nothing in it is there for the sake of mixing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (n, 10) for images of shape (n, 64)."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean cross-entropy of a batch."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The accuracy, on images and labels as they are."""
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean(), batch_size=len(y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def main(arguments: list[str] | None = None) -> float:
    """Train, print and return the accuracy on the images held out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--alpha", type=float, default=2.0, help="λ ~ Beta(alpha, alpha); 0 is training without mixing")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    data = TensorDataset(x, torch.tensor(labels))
    train, held_out = random_split(data, [0.8, 0.2])
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        callbacks=[ManifoldMixupCallback(alpha=options.alpha, seed=options.seed)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(), DataLoader(train, batch_size=64, shuffle=True), DataLoader(held_out, batch_size=256))
    accuracy = float(trainer.callback_metrics["accuracy"])
    print(f"validation accuracy after {options.epochs} epochs: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
