"""Pre-activation residual networks (He et al. 2016, arXiv 1603.05027), as the authors of Manifold Mixup train them.

Their code departs from the usual recipe in two places: no batch norm follows the last stage, so that what is pooled is
the raw residual sum, and the stem is a bare 3x3 convolution without pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from manifold_mixup.lab.models.base import ModelEntry
from manifold_mixup.lab.models.blocks import StemStride, first_stride, image_shape, scaled
from manifold_mixup.lab.options import Options

__all__ = [
    "MODELS",
    "PreActBlock",
    "PreActBottleneck",
    "PreActResNet",
    "PreActResNet8Options",
    "PreActResNetOptions",
]

CHANNELS = 64  # of the first stage of the papers' networks


class PreActResNet8Options(Options):
    """Size."""

    width: int = Field(default=16, ge=1, description="channels of the first stage; doubled at each further stage")
    blocks: int = Field(default=1, ge=1, description="residual blocks in each of the three stages")


class PreActResNetOptions(Options):
    """What can be changed about the papers' networks."""

    width: float = Field(
        default=1.0, gt=0, description="factor on the 64 channels of the first stage, rounded to at least 1"
    )
    stem_stride: StemStride = Field(
        default="auto", description="stride of the first convolution; 'auto' is 2 for images of 64 pixels or more"
    )
    final_norm: bool = Field(default=False, description="batch norm and ReLU after the last stage, before the pooling")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout before the last convolution of every residual block"
    )


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU; the projection shortcut reads the normalised input.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: Stride of the first convolution and of the shortcut.
        dropout: Dropout before the second convolution.
    """

    expansion: ClassVar[int] = 1

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        project = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, inputs, h, w)`` to the raw sum ``(n, outputs, h / stride, w / stride)``."""
        active = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        h = F.relu(self.norm2(self.conv1(active)))
        if self.dropout is not None:
            h = self.dropout(h)
        branch: Tensor = self.conv2(h)
        return branch + skip


class PreActBottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1, each after batch norm and ReLU; the last one has four times the channels.

    Args:
        inputs: Channels that come in.
        outputs: Channels of the first two convolutions; four times as many go out.
        stride: Stride of the 3x3 convolution and of the shortcut.
        dropout: Dropout before the last convolution.
    """

    expansion: ClassVar[int] = 4

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        wide = self.expansion * outputs
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.conv3 = nn.Conv2d(outputs, wide, 1, bias=False)
        project = stride != 1 or inputs != wide
        self.shortcut = nn.Conv2d(inputs, wide, 1, stride=stride, bias=False) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, inputs, h, w)`` to the raw sum ``(n, 4 outputs, h / stride, w / stride)``."""
        active = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        h = self.conv2(F.relu(self.norm2(self.conv1(active))))
        h = F.relu(self.norm3(h))
        if self.dropout is not None:
            h = self.dropout(h)
        branch: Tensor = self.conv3(h)
        return branch + skip


Block = type[PreActBlock] | type[PreActBottleneck]

STAGES: dict[int, tuple[Block, tuple[int, ...]]] = {
    18: (PreActBlock, (2, 2, 2, 2)),
    34: (PreActBlock, (3, 4, 6, 3)),
    50: (PreActBottleneck, (3, 4, 6, 3)),
    101: (PreActBottleneck, (3, 4, 23, 3)),
    152: (PreActBottleneck, (3, 8, 36, 3)),
}


class PreActResNet(nn.Module):
    """A 3x3 convolution, stages of residual blocks, average pooling, a linear head.

    ``stage1``, ``stage2`` and so on return raw residual sums, before the next batch norm: where the authors mix. Every
    stage but the first halves height and width and doubles the channels.

    Args:
        block: What the stages are made of.
        depths: Blocks in each stage.
        channels: Channels of an image.
        classes: Number of classes.
        width: Channels of the first stage, before the expansion of bottlenecks.
        stem_stride: Stride of the first convolution.
        final_norm: Whether batch norm and ReLU follow the last stage.
        dropout: Dropout before the last convolution of every block.
    """

    def __init__(
        self,
        block: Block,
        depths: Sequence[int],
        channels: int,
        classes: int,
        *,
        width: int,
        stem_stride: int = 1,
        final_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, stride=stem_stride, padding=1, bias=False)
        self.stages = [f"stage{i}" for i in range(1, len(depths) + 1)]
        inputs, outputs = width, width
        for i, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            outputs = width * 2**i
            blocks: list[nn.Module] = []
            for j in range(depth):
                blocks.append(block(inputs, outputs, 2 if i and not j else 1, dropout))
                inputs = block.expansion * outputs
            self.add_module(name, nn.Sequential(*blocks))
        self.norm = nn.BatchNorm2d(inputs) if final_norm else None
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """From images ``(n, channels, h, w)`` to logits ``(n, classes)``."""
        h = self.stem(x)
        for name in self.stages:
            h = getattr(self, name)(h)
        if self.norm is not None:
            h = F.relu(self.norm(h))
        logits: Tensor = self.head(h.mean(dim=(2, 3)))
        return logits


def build8(options: PreActResNet8Options, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Build the small network of three stages for images."""
    channels, _, _ = image_shape("preact_resnet8", shape)
    return PreActResNet(PreActBlock, [options.blocks] * 3, channels, classes, width=options.width)


def build(depth: int, options: PreActResNetOptions, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Build one of the papers' networks for images.

    Args:
        depth: Its number of layers, a key of ``STAGES``.
        options: What is changed about it.
        shape: Channels, height and width.
        classes: Number of classes.

    Raises:
        UsageError: The examples are no images.
    """
    channels, height, width = image_shape(f"preact_resnet{depth}", shape)
    block, depths = STAGES[depth]
    return PreActResNet(
        block,
        depths,
        channels,
        classes,
        width=scaled(CHANNELS, options.width),
        stem_stride=first_stride(options.stem_stride, height, width),
        final_norm=options.final_norm,
        dropout=options.dropout,
    )


MODELS = (
    ModelEntry(
        name="preact_resnet8",
        title="pre-activation residual network of three stages; 8 layers with one block per stage",
        options=PreActResNet8Options,
        build=build8,
        hidden=lambda options: ["stage1", "stage2", "stage3"],
    ),
    *(
        ModelEntry(
            name=f"preact_resnet{depth}",
            title=f"pre-activation residual network of {depth} layers in four stages, as in the paper's code",
            options=PreActResNetOptions,
            build=partial(build, depth),
            hidden=lambda options: ["stage1", "stage2", "stage3", "stage4"],
            example=(3, 32, 32),
        )
        for depth in STAGES
    ),
)
