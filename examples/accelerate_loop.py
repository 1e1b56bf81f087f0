"""Manifold Mixup in a loop of Hugging Face Accelerate: handwritten digits, gradient accumulation, checkpoints.

python examples/accelerate_loop.py --epochs 20
python examples/accelerate_loop.py --epochs 20 --checkpoint states/digits  # run it again: it goes on
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from manifold_mixup import ManifoldMixup


class Epochs:
    """How many epochs are done; Accelerate saves it with the rest."""

    done = 0

    def state_dict(self) -> dict[str, int]:
        """For Accelerate."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """For Accelerate."""
        self.done = state["done"]


def main(arguments: list[str] | None = None) -> float:
    """Train, print and return the accuracy on the images held out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--alpha", type=float, default=2.0, help="λ ~ Beta(alpha, alpha); 0 is training without mixing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="folder to save to after every epoch, and to go on from")
    options = parser.parse_args(arguments)

    set_seed(options.seed)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    train, held_out = random_split(data, [0.8, 0.2])
    model = nn.Sequential(
        nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    model, optimizer, loader, test = accelerator.prepare(model, optimizer, loader, DataLoader(held_out, batch_size=256))
    mixup = ManifoldMixup(model, alpha=options.alpha, seed=options.seed)
    epochs = Epochs()
    accelerator.register_for_checkpointing(mixup, epochs)
    if options.checkpoint and options.checkpoint.exists():
        accelerator.load_state(options.checkpoint)

    while epochs.done < options.epochs:
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                x, y = mixup(*batch)
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
        epochs.done += 1
        if options.checkpoint:
            accelerator.save_state(options.checkpoint)

    model.eval()
    with torch.inference_mode():
        hits = [accelerator.gather_for_metrics(model(x).argmax(1) == y) for x, y in test]
    accuracy = torch.cat(hits).float().mean().item()
    accelerator.print(f"validation accuracy after {epochs.done} epochs: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
