"""A multi-layer perceptron for examples of any shape."""

from __future__ import annotations

import math
from itertools import pairwise

from pydantic import Field
from torch import Tensor, nn

from manifold_mixup.lab.models.base import ModelEntry
from manifold_mixup.lab.models.blocks import dense, numbered
from manifold_mixup.lab.options import Options

__all__ = ["MLP", "MODEL", "MLPOptions"]


class MLPOptions(Options):
    """Size and regularisers."""

    width: int = Field(default=256, ge=1, description="units of each hidden layer")
    depth: int = Field(default=3, ge=1, description="hidden layers")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout after every hidden layer")
    batch_norm: bool = Field(default=False, description="batch norm before every activation")


class MLP(nn.Module):
    """Hidden layers with ReLU, then a linear head.

    The hidden layers are ``hidden.1`` to ``hidden.<depth>``, numbered as the paper numbers its cut points: 0 is the
    input.

    Args:
        options: Size and regularisers.
        inputs: Numbers per example.
        classes: Number of classes.
    """

    def __init__(self, options: MLPOptions, inputs: int, classes: int) -> None:
        super().__init__()
        widths = [inputs, *[options.width] * options.depth]
        blocks = [
            dense(n_in, n_out, activation=nn.ReLU(), batch_norm=options.batch_norm, dropout=options.dropout)
            for n_in, n_out in pairwise(widths)
        ]
        self.hidden = numbered(blocks, first=1)
        self.head = nn.Linear(options.width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """From examples ``(n, *shape)`` to logits ``(n, classes)``."""
        logits: Tensor = self.head(self.hidden(x.flatten(1)))
        return logits


MODEL = ModelEntry(
    name="mlp",
    title="fully connected network with ReLU",
    options=MLPOptions,
    build=lambda options, shape, classes: MLP(options, math.prod(shape), classes),
    hidden=lambda options: [f"hidden.{i}" for i in range(1, options.depth + 1)],
)
