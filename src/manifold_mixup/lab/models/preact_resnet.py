"""A small pre-activation residual network (He et al. 2016, arXiv 1603.05027) for small images, in three stages."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.models.base import ModelEntry
from manifold_mixup.lab.options import Options

__all__ = ["MODEL", "PreActBlock", "PreActResNet", "PreActResNetOptions"]


class PreActResNetOptions(Options):
    """Size."""

    width: int = Field(default=16, ge=1, description="channels of the first stage; doubled at each further stage")
    blocks: int = Field(default=1, ge=1, description="residual blocks in each of the three stages")


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU; the projection shortcut reads the normalised input.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        project = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, inputs, h, w)`` to the raw sum ``(n, outputs, h / stride, w / stride)``."""
        active = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        branch: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return branch + skip


class PreActResNet(nn.Module):
    """A 3x3 convolution, three stages, average pooling of the raw sum, a linear head.

    ``stage1`` to ``stage3`` return raw residual sums, before the next batch norm: where the authors mix. As in their
    code no batch norm follows the last stage.

    Args:
        options: Size.
        channels: Channels of an image.
        classes: Number of classes.
    """

    def __init__(self, options: PreActResNetOptions, channels: int, classes: int) -> None:
        super().__init__()
        width = options.width
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.stage1 = self._stage(width, width, 1, options.blocks)
        self.stage2 = self._stage(width, 2 * width, 2, options.blocks)
        self.stage3 = self._stage(2 * width, 4 * width, 2, options.blocks)
        self.head = nn.Linear(4 * width, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
        rest = (PreActBlock(outputs, outputs, 1) for _ in range(blocks - 1))
        return nn.Sequential(PreActBlock(inputs, outputs, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """From images ``(n, channels, h, w)`` to logits ``(n, classes)``."""
        h = self.stage3(self.stage2(self.stage1(self.stem(x))))
        logits: Tensor = self.head(h.mean(dim=(2, 3)))
        return logits


def build(options: PreActResNetOptions, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Build the network for images."""
    if len(shape) != 3:
        raise UsageError(f"model 'preact_resnet8' reads images, not examples of shape {shape}; use model 'mlp'")
    return PreActResNet(options, shape[0], classes)


MODEL = ModelEntry(
    name="preact_resnet8",
    title="pre-activation residual network of three stages; 8 layers with one block per stage",
    options=PreActResNetOptions,
    build=build,
    hidden=lambda options: ["stage1", "stage2", "stage3"],
)
