"""Wide residual networks (Zagoruyko & Komodakis 2016, arXiv 1605.07146), in two variants.

``"code"`` is what the authors of Manifold Mixup trained, so what their tables hold; ``"standard"`` is the network of
the Wide ResNet paper. They differ in four places:

==========================  ===================  ======================
..                          code                 standard
==========================  ===================  ======================
biases of convolutions      yes                  no
stride of a block           second convolution   first convolution
projection shortcut reads   the raw input        the normalised input
last batch norm, momentum   0.9                  0.1
weights drawn as            PyTorch's default    He normal, head bias 0
==========================  ===================  ======================

Their numbers of parameters round to the same published figures: with 10 classes, WRN-28-10 has 36,489,290 parameters
("code") or 36,479,194 ("standard"), published as 36.5 M.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from manifold_mixup.lab.models.base import ModelEntry
from manifold_mixup.lab.models.blocks import StemStride, first_stride, image_shape, scaled
from manifold_mixup.lab.options import Options

__all__ = ["MODELS", "WideBlock", "WideResNet", "WideResNetOptions", "rectified"]

Variant = Literal["code", "standard"]
STEM = 16  # channels of the first convolution, and of the first stage for a widening factor of 1


class WideResNetOptions(Options):
    """What can be changed about the papers' networks."""

    variant: Variant = Field(
        default="code",
        description="'code': as the authors of Manifold Mixup train it; 'standard': as in the Wide ResNet paper",
    )
    width: float = Field(
        default=1.0, gt=0, description="factor on the channels of the stages, rounded to at least 1; the stem keeps 16"
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout before the second convolution of every residual block"
    )
    negative_slope: float = Field(
        default=0.0, ge=0, lt=1, description="slope of the activations below 0; 0 is ReLU, above it they are leaky"
    )
    stem_stride: StemStride = Field(
        default="auto", description="stride of the first convolution; 'auto' is 2 for images of 64 pixels or more"
    )


def rectified(x: Tensor, slope: float) -> Tensor:
    """``x`` where it is positive, else ``slope`` times ``x``; a slope of 0 is ReLU, without its negative zeros."""
    return F.leaky_relu(x, slope) if slope else F.relu(x)


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and activation, with dropout between them.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: Stride of the block.
        variant: Where the stride is, what the projection shortcut reads, and whether convolutions have biases.
        dropout: Dropout before the second convolution.
        slope: Slope of the activations below 0.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, *, variant: Variant, dropout: float, slope: float
    ) -> None:
        super().__init__()
        self.slope = slope
        self.raw_shortcut = bias = variant == "code"
        first, second = (1, stride) if variant == "code" else (stride, 1)
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=first, padding=1, bias=bias)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride=second, padding=1, bias=bias)
        project = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=bias) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, inputs, h, w)`` to the raw sum ``(n, outputs, h / stride, w / stride)``."""
        active = rectified(self.norm1(x), self.slope)
        skip = x if self.shortcut is None else self.shortcut(x if self.raw_shortcut else active)
        h = rectified(self.norm2(self.conv1(active)), self.slope)
        if self.dropout is not None:
            h = self.dropout(h)
        branch: Tensor = self.conv2(h)
        return branch + skip


class WideResNet(nn.Module):
    """A 3x3 convolution, three stages, batch norm, activation, average pooling, a linear head.

    ``stage1`` to ``stage3`` return raw residual sums; the papers call them blocks 1 to 3.

    Args:
        depth: Number of convolutions, those of the projections included: 6 n + 4 for n blocks in each stage.
        channels: Channels of an image.
        classes: Number of classes.
        width: Channels of the first stage; each further one has twice as many.
        variant: As in the module's table.
        dropout: Dropout in every block.
        slope: Slope of the activations below 0.
        stem_stride: Stride of the first convolution.
    """

    def __init__(
        self,
        depth: int,
        channels: int,
        classes: int,
        *,
        width: int,
        variant: Variant = "code",
        dropout: float = 0.0,
        slope: float = 0.0,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        if blocks < 1 or depth != 6 * blocks + 4:
            raise ValueError(f"depth should be 6 n + 4 with n blocks in each stage, such as 28, not {depth}")
        code = variant == "code"
        block = partial(WideBlock, variant=variant, dropout=dropout, slope=slope)

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            sizes = [(inputs, stride)] + [(outputs, 1)] * (blocks - 1)
            return nn.Sequential(*(block(n, outputs, s) for n, s in sizes))

        self.slope = slope
        self.stem = nn.Conv2d(channels, STEM, 3, stride=stem_stride, padding=1, bias=code)
        self.stage1 = stage(STEM, width, 1)
        self.stage2 = stage(width, 2 * width, 2)
        self.stage3 = stage(2 * width, 4 * width, 2)
        self.norm = nn.BatchNorm2d(4 * width, momentum=0.9 if code else 0.1)
        self.head = nn.Linear(4 * width, classes)
        if not code:
            self._initialise()

    def _initialise(self) -> None:
        """He et al. 2015, arXiv 1502.01852, for the numbers that go out of a convolution; batch norms are 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, self.slope, mode="fan_out", nonlinearity="leaky_relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """From images ``(n, channels, h, w)`` to logits ``(n, classes)``."""
        h = self.stage3(self.stage2(self.stage1(self.stem(x))))
        logits: Tensor = self.head(rectified(self.norm(h), self.slope).mean(dim=(2, 3)))
        return logits


def build(depth: int, widen: int, options: WideResNetOptions, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Build a network for images.

    Args:
        depth: Its number of layers.
        widen: Its widening factor.
        options: What is changed about it.
        shape: Channels, height and width.
        classes: Number of classes.

    Raises:
        UsageError: The examples are no images.
    """
    channels, height, width = image_shape(f"wrn_{depth}_{widen}", shape)
    return WideResNet(
        depth,
        channels,
        classes,
        width=scaled(STEM * widen, options.width),
        variant=options.variant,
        dropout=options.dropout,
        slope=options.negative_slope,
        stem_stride=first_stride(options.stem_stride, height, width),
    )


MODELS = tuple(
    ModelEntry(
        name=f"wrn_{depth}_{widen}",
        title=f"wide residual network of {depth} layers, {widen} times as wide as a plain one",
        options=WideResNetOptions,
        build=partial(build, depth, widen),
        hidden=lambda options: ["stage1", "stage2", "stage3"],
        example=(3, 32, 32),
    )
    for depth, widen in ((28, 10), (28, 2))
)
