"""What several networks share: fully connected layers around a bottleneck, image shapes, and width factors."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from manifold_mixup.lab.errors import UsageError

__all__ = ["BottleneckNet", "StemStride", "dense", "first_stride", "image_shape", "numbered", "scaled"]

StemStride = Literal["auto", 1, 2]
LARGE = 64  # pixels a side from which on the first convolution halves the image


def dense(inputs: int, outputs: int, *, activation: nn.Module, batch_norm: bool, dropout: float) -> nn.Sequential:
    """Linear, then batch norm, activation and dropout as asked for.

    What is switched off is left out, so that dropout 0 draws no random number and has no cost.
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict(linear=nn.Linear(inputs, outputs))
    if batch_norm:
        parts["norm"] = nn.BatchNorm1d(outputs)
    parts["activation"] = activation
    if dropout > 0:
        parts["dropout"] = nn.Dropout(dropout)
    return nn.Sequential(parts)


def numbered(blocks: list[nn.Sequential], first: int) -> nn.Sequential:
    """The blocks in sequence, named by number from ``first`` on, as the papers count their layers."""
    return nn.Sequential(OrderedDict((str(i), block) for i, block in enumerate(blocks, first)))


class BottleneckNet(nn.Module):
    """Wide layers, a narrow one, wide layers again, and the head, with leaky ReLU between them.

    The layers are counted through: ``encoder.1`` to ``encoder.<before>``, ``bottleneck``, then ``decoder.<before + 2>``
    and on. ``bottleneck`` returns the code itself: no activation and no dropout follow it.

    Args:
        inputs: Numbers per example.
        classes: Number of classes.
        units: Units of each wide layer.
        code: Units of the bottleneck.
        before: Wide layers before it.
        after: Wide layers after it.
        batch_norm: Batch norm after every linear layer, the bottleneck's included, except the head.
        dropout: Dropout after every wide layer.
    """

    def __init__(
        self,
        inputs: int,
        classes: int,
        *,
        units: int,
        code: int,
        before: int,
        after: int,
        batch_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__()

        def block(n_in: int) -> nn.Sequential:
            return dense(n_in, units, activation=nn.LeakyReLU(), batch_norm=batch_norm, dropout=dropout)

        self.encoder = numbered([block(units if i else inputs) for i in range(before)], first=1)
        narrow: OrderedDict[str, nn.Module] = OrderedDict(linear=nn.Linear(units, code))
        if batch_norm:
            narrow["norm"] = nn.BatchNorm1d(code)
        self.bottleneck = nn.Sequential(narrow)
        self.decoder = numbered([block(units if i else code) for i in range(after)], first=before + 2)
        self.head = nn.Linear(units if after else code, classes)

    @staticmethod
    def hidden(before: int, after: int) -> list[str]:
        """Names of the hidden layers, first to last."""
        encoder = [f"encoder.{i}" for i in range(1, before + 1)]
        return [*encoder, "bottleneck", *(f"decoder.{i}" for i in range(before + 2, before + after + 2))]

    def forward(self, x: Tensor) -> Tensor:
        """From examples ``(n, *shape)`` to logits ``(n, classes)``."""
        code = self.bottleneck(self.encoder(x.flatten(1)))
        logits: Tensor = self.head(self.decoder(code))
        return logits


def image_shape(model: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, height and width of one example.

    Raises:
        UsageError: It is no image.
    """
    if len(shape) != 3:
        raise UsageError(f"model {model!r} reads images, not examples of shape {shape}; use model 'mlp'")
    channels, height, width = shape
    return channels, height, width


def scaled(size: int, width: float) -> int:
    """A number of channels or units times a width factor: the nearest integer, at least 1.

    It is not rounded to a multiple of 8: with factors that are multiples of 1/8 the papers' networks have such
    channels anyway, and with others a user gets the width that was asked for.
    """
    return max(1, round(size * width))


def first_stride(choice: StemStride, height: int, width: int) -> int:
    """Stride of the first convolution: as chosen, or 2 for images of 64 pixels a side or more, as the authors do."""
    if choice == "auto":
        return 2 if min(height, width) >= LARGE else 1
    return choice
