"""The network of the paper's Figures 1 and 2: nine fully connected layers, the middle one two numbers wide."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.models.base import ModelEntry
from manifold_mixup.lab.models.blocks import BottleneckNet
from manifold_mixup.lab.options import Options

__all__ = ["MODEL", "SpiralNet", "SpiralNetOptions"]

BEFORE, CODE, AFTER = 4, 2, 3


class SpiralNetOptions(Options):
    """Width and regularisers; the paper states neither the width nor the activation."""

    width: int = Field(default=128, ge=1, description="units of the seven wide layers")
    input_scale: float = Field(default=1.0, gt=0, description="fixed factor on the inputs, inside the network")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout after every hidden layer except the bottleneck"
    )
    batch_norm: bool = Field(default=False, description="batch norm after every linear layer except the last")


class SpiralNet(BottleneckNet):
    """Layers 1 to 4, the bottleneck (layer 5), layers 6 to 8, and the head (layer 9), leaky ReLU between them.

    ``bottleneck`` returns the two-dimensional code: no activation follows it, as the published figure shows negative
    values.

    Args:
        options: Width and regularisers.
        inputs: Numbers per example.
        classes: Number of classes.
    """

    def __init__(self, options: SpiralNetOptions, inputs: int, classes: int) -> None:
        super().__init__(
            inputs,
            classes,
            units=options.width,
            code=CODE,
            before=BEFORE,
            after=AFTER,
            batch_norm=options.batch_norm,
            dropout=options.dropout,
        )
        self.input_scale = options.input_scale

    def forward(self, x: Tensor) -> Tensor:
        """From points ``(n, inputs)`` to logits ``(n, classes)``."""
        return super().forward(x * self.input_scale)


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
    hidden=lambda options: BottleneckNet.hidden(BEFORE, AFTER),
)
