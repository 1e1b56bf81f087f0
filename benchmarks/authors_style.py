"""A training loop in the style of the Manifold Mixup authors' code, written anew from its description.

What makes the style: a `DataLoader` whose worker processes crop, flip and normalise one PIL image after the other;
float32 and contiguous NCHW throughout; one-hot targets made on the CPU; λ, the permutation and the layer drawn by numpy
and the mixing written out in the network's forward; binary cross-entropy of the softmax; SGD as its plain constructor
makes it; and loss and accuracy read after every step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from manifold_mixup.lab.data import Examples, Pixels

AHEAD = 2  # batches that each worker fetches ahead, as DataLoader does by default


def flipped(image: Image.Image, flip: bool) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def cropped(image: Image.Image, padding: int, down: int, right: int) -> Image.Image:
    """A crop of the image's own size out of the image with a black border; (0, 0) is the border's corner."""
    width, height = image.size
    return ImageOps.expand(image, border=padding, fill=0).crop((right, down, right + width, down + height))


def normalised(image: Image.Image, mean: tuple[float, ...], sd: tuple[float, ...]) -> Tensor:
    """From bytes to a contiguous (channels, height, width) tensor in [0, 1], and from there to mean 0 and sd 1."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    return x.sub_(torch.as_tensor(mean).view(-1, 1, 1)).div_(torch.as_tensor(sd).view(-1, 1, 1))


class Photos(Dataset[tuple[Tensor, int]]):
    """Images, varied and normalised one at a time, in a worker process; three random numbers an image."""

    def __init__(self, examples: Examples, pixels: Pixels) -> None:
        self.images = np.ascontiguousarray(examples.x.permute(0, 2, 3, 1).numpy())
        self.labels = examples.y.tolist()
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.pixels
        image = flipped(Image.fromarray(self.images[index]), pixels.flip and bool(torch.rand(1) < 0.5))
        span = 2 * pixels.crop_padding + 1
        down, right = (int(torch.randint(0, span, (1,)).item()) for _ in range(2))
        return normalised(cropped(image, pixels.crop_padding, down, right), pixels.mean, pixels.sd), self.labels[index]


class MixingForward(nn.Module):
    """The lab's PreActResNet with a forward that mixes: at the input, or after the first or the second stage."""

    def __init__(self, network: nn.Module, alpha: float, seed: int) -> None:
        super().__init__()
        self.network, self.alpha = network, alpha
        self.random = np.random.default_rng(seed)

    def draw(self, rows: int) -> tuple[int, float, Any]:
        """Where to mix (0 is the input), λ, and everyone's partner."""
        layer = int(self.random.integers(3))
        return layer, float(self.random.beta(self.alpha, self.alpha)), self.random.permutation(rows)

    def forward(self, x: Tensor, target: Tensor, *, mix: bool) -> tuple[Tensor, Tensor]:
        """Logits and the target that belongs to them; ``target`` is one-hot."""
        network: Any = self.network
        layer, lam, partner = self.draw(len(x)) if mix else (None, 1.0, None)
        weight = torch.from_numpy(np.array([lam])).to(x)
        if mix:
            target = target * weight + target[partner] * (1 - weight)
        if layer == 0:
            x = x * weight + x[partner] * (1 - weight)
        h = network.stage1(network.stem(x))
        if layer == 1:
            h = h * weight + h[partner] * (1 - weight)
        h = network.stage2(h)
        if layer == 2:
            h = h * weight + h[partner] * (1 - weight)
        h = network.stage4(network.stage3(h))
        return network.head(h.mean(dim=(2, 3))), target


class Meter:
    """The running mean of a number."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float, rows: int) -> None:
        self.total, self.count = self.total + value * rows, self.count + rows

    @property
    def mean(self) -> float:
        return self.total / self.count


def accuracy(logits: Tensor, labels: Tensor, most: int) -> list[float]:
    """Percent of examples whose label is the best guess, and among the best ``most``."""
    hits = logits.topk(most, dim=1).indices.t().eq(labels[None])
    return [(hits[:k].reshape(-1).float().sum() * (100.0 / len(labels))).item() for k in (1, most)]


class Twin:
    """The whole loop: it trains for a number of steps at a time, and its workers rest in between.

    Every turn is a pass of its own over the loader, whose workers live on. It reads as many batches as the turn has
    steps and, after the clock has stopped, those that the workers have fetched ahead by then: while the clock runs they
    load one batch for every batch that is trained on, as in the middle of an epoch, and once the turn is over there is
    nothing left that they could do.
    """

    def __init__(
        self,
        network: nn.Module,
        examples: Examples,
        pixels: Pixels,
        *,
        classes: int,
        device: torch.device,
        batch: int,
        steps: int,
        workers: int,
        alpha: float | None,
        lr: float,
        seed: int,
        photos: type[Photos] = Photos,
    ) -> None:
        self.device, self.classes, self.mix = device, classes, alpha is not None
        self.net = MixingForward(network.to(device), alpha or 1.0, seed).train()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
        self.loss, self.softmax = nn.BCELoss().to(device), nn.Softmax(dim=1)
        self.losses, self.top1, self.top5 = Meter(), Meter(), Meter()
        images, randomness = photos(examples, pixels), torch.Generator().manual_seed(seed)
        self.loader: DataLoader[Any] | None = DataLoader(
            images,
            batch,
            sampler=RandomSampler(images, num_samples=(steps + workers * AHEAD) * batch, generator=randomness),
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=AHEAD if workers else None,
            pin_memory=device.type == "cuda",
            generator=randomness,
        )

    def turn(self, lead: int, steps: int) -> float:
        """Mean seconds of a step, after ``lead`` steps off the clock."""
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        batches: Iterator[Any] = iter(self.loader)  # type: ignore[arg-type]
        for _ in range(lead):
            self.step(*next(batches))
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.step(*next(batches))
        self._wait()
        spent = time.perf_counter() - start
        for _ in batches:
            pass
        torch.backends.cudnn.benchmark = benchmark
        return spent / steps

    def step(self, x: Tensor, labels: Tensor) -> None:
        """One step, from a batch of the loader to the numbers that such a script prints."""
        target = torch.zeros(len(labels), self.classes).scatter_(1, labels[:, None], 1.0)
        x, labels, target = (t.to(self.device, non_blocking=True) for t in (x, labels, target))
        logits, mixed = self.net(x, target, mix=self.mix)
        loss = self.loss(self.softmax(logits), mixed)
        top1, top5 = accuracy(logits.detach(), labels, min(5, self.classes))
        self.losses.add(loss.item(), len(x))
        self.top1.add(top1, len(x))
        self.top5.add(top5, len(x))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def close(self) -> None:
        """End the worker processes."""
        self.loader = None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
