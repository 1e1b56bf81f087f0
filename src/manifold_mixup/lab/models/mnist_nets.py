"""The networks of the paper's study of singular values on MNIST (appendices B and G): a bottleneck in wide layers.

The networks of its section 3.2, without a bottleneck, are model ``mlp`` with ``width = 1024``.
"""

from __future__ import annotations

import math

from pydantic import Field
from torch import nn

from manifold_mixup.lab.models.base import ModelEntry
from manifold_mixup.lab.models.blocks import BottleneckNet, scaled
from manifold_mixup.lab.options import Options

__all__ = ["MODEL", "MnistBottleneckOptions", "build"]


class MnistBottleneckOptions(Options):
    """Layers and regularisers; the defaults are those of Figure 9.

    Figure 10 has ``bottleneck = 30``, Figure 11 ``bottleneck = 30, before = 1`` (how many layers follow, if any, is not
    said), Figure 5 ``bottleneck = 2, before = 2, after = 2``.
    """

    bottleneck: int = Field(default=12, ge=1, description="units of the bottleneck")
    before: int = Field(default=3, ge=1, description="wide hidden layers before the bottleneck")
    after: int = Field(default=4, ge=0, description="wide hidden layers after the bottleneck")
    units: int = Field(default=1024, ge=1, description="units of each wide layer")
    width: float = Field(default=1.0, gt=0, description="factor on the units of the wide layers, rounded to at least 1")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout after every hidden layer except the bottleneck"
    )
    batch_norm: bool = Field(default=False, description="batch norm after every linear layer except the last")


def build(options: MnistBottleneckOptions, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Build the network for examples of any shape."""
    return BottleneckNet(
        math.prod(shape),
        classes,
        units=scaled(options.units, options.width),
        code=options.bottleneck,
        before=options.before,
        after=options.after,
        batch_norm=options.batch_norm,
        dropout=options.dropout,
    )


MODEL = ModelEntry(
    name="mnist_bottleneck",
    title="fully connected network with a narrow layer between wide ones, leaky ReLU",
    options=MnistBottleneckOptions,
    build=build,
    hidden=lambda options: BottleneckNet.hidden(options.before, options.after),
    example=(1, 28, 28),
)
