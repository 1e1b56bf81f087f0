"""Cutout (DeVries and Taylor 2017, arXiv 1708.04552): a square of every image is blanked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.methods.base import BatchTransform, Method
from manifold_mixup.lab.methods.generators import send
from manifold_mixup.lab.methods.images import image_size
from manifold_mixup.lab.options import Options

__all__ = ["Cutout", "CutoutOptions", "cut_out"]


class CutoutOptions(Options):
    """The published size for CIFAR-10; 8 for CIFAR-100 and 20 for SVHN."""

    size: int = Field(default=16, ge=0, description="side of the square hole in pixels; 0 switches it off")


class Cutout(Method[CutoutOptions]):
    """Set one square of every training image to zero, which is the mean colour after the normalisation.

    The centre of the square is a pixel of the image, uniformly drawn for each image, so that the square may hang over
    the border. Labels stay as they are.
    """

    name = "cutout"
    title = "cutout: a square hole in every image"
    source = "DeVries and Taylor 2017, arXiv 1708.04552"
    Options = CutoutOptions

    _generator: torch.Generator | None = None

    def attach(self, model: nn.Module, hidden: Sequence[str], seed: int) -> BatchTransform:
        """Holes are cut before the network reads the batch."""
        if self.options.size == 0:
            return super().attach(model, hidden, seed)
        self._generator = torch.Generator().manual_seed(seed)
        return self._transform

    def _transform(self, x: Tensor, y: Any) -> tuple[Tensor, Any]:
        height, width = image_size(self.name, x)
        if (self.options.size + 1) // 2 >= max(height, width):
            raise UsageError(
                f"options.size: a hole of {self.options.size} pixels blanks images of {height} x {width} pixels whole, "
                "wherever its centre lies; a quarter to a half of the image's side is usual"
            )
        rows = torch.randint(height, (len(x),), generator=self._generator)
        columns = torch.randint(width, (len(x),), generator=self._generator)
        centres = send(torch.stack([rows, columns]), x.device)
        return cut_out(x, centres, self.options.size), y

    def state_dict(self) -> dict[str, Any]:
        """The generator's state."""
        return {} if self._generator is None else {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        if self._generator is not None:
            self._generator.set_state(state["generator"])


def cut_out(x: Tensor, centres: Tensor, size: int) -> Tensor:
    """Images with a square of zeros.

    A hole covers the rows from ``centre - size // 2`` on, ``size`` of them as far as the image reaches, and columns
    likewise. (The authors' code makes the holes of an odd size one pixel smaller.)

    Args:
        x: Images, ``(n, channels, height, width)``; they stay as they are.
        centres: Row and column of each hole's centre, whole numbers, ``(2, n)``, on the device of ``x``.
        size: Side of the holes in pixels.

    Returns:
        The shape, dtype and memory format of ``x``.
    """
    height, width = x.shape[2:]
    down, right = (centres - size // 2)[:, :, None]
    ys = torch.arange(height, device=x.device) - down  # (n, height): row of the hole that each row of the image is
    xs = torch.arange(width, device=x.device) - right
    hole = ((ys >= 0) & (ys < size))[:, :, None] & ((xs >= 0) & (xs < size))[:, None, :]
    return x.clone().masked_fill_(hole[:, None], 0.0)  # in place, for otherwise the memory format would be lost
