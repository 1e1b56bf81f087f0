"""The network of the paper's Figures 1 and 2: nine fully connected layers, the middle one two numbers wide."""

from __future__ import annotations

from collections import OrderedDict

from pydantic import Field
from torch import Tensor, nn

from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.models.base import ModelEntry
from manifold_mixup.lab.models.blocks import dense, numbered
from manifold_mixup.lab.options import Options

__all__ = ["MODEL", "SpiralNet", "SpiralNetOptions"]


class SpiralNetOptions(Options):
    """Width and regularisers; the paper states neither the width nor the activation."""

    width: int = Field(default=128, ge=1, description="units of the seven wide layers")
    input_scale: float = Field(default=1.0, gt=0, description="fixed factor on the inputs, inside the network")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout after every hidden layer except the bottleneck"
    )
    batch_norm: bool = Field(default=False, description="batch norm after every linear layer except the last")


class SpiralNet(nn.Module):
    """Layers 1 to 4, the bottleneck (layer 5), layers 6 to 8, and the head (layer 9), leaky ReLU between them.

    ``bottleneck`` returns the two-dimensional code: no activation follows it, as the published figure shows negative
    values.

    Args:
        options: Width and regularisers.
        inputs: Numbers per example.
        classes: Number of classes.
    """

    def __init__(self, options: SpiralNetOptions, inputs: int, classes: int) -> None:
        super().__init__()

        def block(n_in: int) -> nn.Sequential:
            return dense(
                n_in,
                options.width,
                activation=nn.LeakyReLU(),
                batch_norm=options.batch_norm,
                dropout=options.dropout,
            )

        width = options.width
        self.input_scale = options.input_scale
        self.encoder = numbered([block(inputs), *(block(width) for _ in range(3))], first=1)
        code: OrderedDict[str, nn.Module] = OrderedDict(linear=nn.Linear(width, 2))
        if options.batch_norm:
            code["norm"] = nn.BatchNorm1d(2)
        self.bottleneck = nn.Sequential(code)
        self.decoder = numbered([block(2), *(block(width) for _ in range(2))], first=6)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """From points ``(n, inputs)`` to logits ``(n, classes)``."""
        code = self.bottleneck(self.encoder(x * self.input_scale))
        logits: Tensor = self.head(self.decoder(code))
        return logits


def build(options: SpiralNetOptions, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Build the network for vectors."""
    if len(shape) != 1:
        raise UsageError(f"model 'spiral_net' reads vectors, not examples of shape {shape}; use model 'mlp'")
    return SpiralNet(options, shape[0], classes)


MODEL = ModelEntry(
    name="spiral_net",
    title="nine fully connected layers with a two-dimensional bottleneck in the middle, leaky ReLU",
    options=SpiralNetOptions,
    build=build,
    hidden=lambda options: [
        *(f"encoder.{i}" for i in range(1, 5)),
        "bottleneck",
        *(f"decoder.{i}" for i in range(6, 9)),
    ],
)
