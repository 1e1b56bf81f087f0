"""Manifold Mixup in timm's training step: handwritten digits, a small vision transformer, one class exchanged.

The loop is the one of timm's training script: soft targets, autocast, gradient accumulation, a loss scaler, an average
of the weights, and no mixing in the last epochs. Where it says ``Mixup(model, **mixup_args)`` that script says
``Mixup(**mixup_args)``, with the class of timm.

python examples/timm_training.py --epochs 10
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, NativeScaler, accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from manifold_mixup.integrations.timm import Mixup

ACCUMULATE = 2


def digits(seed: int) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """The digits that come with scikit-learn, images of 8x8 pixels, four fifths of them for training."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    data = TensorDataset(x, torch.tensor(labels))
    train, held_out = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(seed))
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(held_out, batch_size=256)


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]]) -> float:
    """Top-1 accuracy in percent, on images and labels as they are."""
    model.eval()
    hits = [(accuracy(model(x), y)[0] * len(y), len(y)) for x, y in loader]
    return float(sum(hit for hit, _ in hits) / sum(n for _, n in hits))


def main(arguments: list[str] | None = None) -> float:
    """Train, print and return the accuracy (in percent) of the averaged weights on the images held out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--mixup", type=float, default=0.8, help="λ ~ Beta(mixup, mixup); 0 is training without mixing")
    parser.add_argument("--mixup-off-epoch", type=int, default=8, help="from this epoch on, nothing is mixed")
    parser.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    train, held_out = digits(options.seed)
    model = VisionTransformer(8, 4, 1, num_classes=10, embed_dim=48, depth=4, num_heads=4)
    average = ModelEmaV3(model, decay=0.95)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
    scheduler = CosineLRScheduler(optimizer, options.epochs)
    scaler, criterion = NativeScaler("cpu"), SoftTargetCrossEntropy()
    mixup_args = {"mixup_alpha": options.mixup, "label_smoothing": options.smoothing, "num_classes": 10}
    mixup_fn = Mixup(model, **mixup_args, seed=options.seed)

    updates = 0
    for epoch in range(options.epochs):
        model.train()
        if epoch >= options.mixup_off_epoch:
            mixup_fn.mixup_enabled = False
        for i, (x, y) in enumerate(train, start=1):
            x, y = mixup_fn(x, y)
            with torch.autocast("cpu", torch.bfloat16, enabled=options.amp):
                loss = criterion(model(x), y)
            update = i % ACCUMULATE == 0 or i == len(train)
            scaler(loss / ACCUMULATE, optimizer, clip_grad=1.0, parameters=model.parameters(), need_update=update)
            if update:
                optimizer.zero_grad()
                updates += 1
                average.update(model, step=updates)
        scheduler.step(epoch + 1)
    top1 = evaluate(average.module, held_out)
    print(f"mixed at {mixup_fn.mixup.layers} until epoch {options.mixup_off_epoch}")
    print(f"top-1 accuracy after {options.epochs} epochs: {top1:.1f} %")
    return top1


if __name__ == "__main__":
    main()
