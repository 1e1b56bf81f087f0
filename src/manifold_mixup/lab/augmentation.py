"""From stored images to training batches, as whole-batch tensor operations on the device that holds the images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manifold_mixup.lab import streams
from manifold_mixup.lab.data.base import Pixels

__all__ = ["Augmentation"]


class Augmentation:
    """Random crops out of black borders and left-right flips, then normalisation.

    It does to a batch what the usual transforms do to one image after the other (pad with black, crop, flip, scale to
    [0, 1], normalise), with one gather of pixels. The images stay where they are, as uint8 in channels-last layout;
    what comes out is channels-last float32.

    Args:
        pixels: How much is cropped and whether images are flipped, mean and standard deviation.
        images: All training images, uint8, ``(n, channels, height, width)``, on the device that trains.
        seed: Seed of the run.
        stream: Follows the name of the stream of random numbers.
    """

    def __init__(self, pixels: Pixels, images: Tensor, seed: int, *, stream: str = "") -> None:
        self.pixels, self.images = pixels, images.contiguous(memory_format=torch.channels_last)
        self.height, self.width = images.shape[2:]
        channels = images.shape[1]
        self._rows = self.images.permute(0, 2, 3, 1).reshape(-1, channels)  # a view: one row per pixel
        device = images.device
        self._scale = (1 / (255 * torch.tensor(pixels.sd, device=device)))[:, None, None]
        self._shift = (torch.tensor(pixels.mean, device=device) / torch.tensor(pixels.sd, device=device))[:, None, None]
        self._ys, self._xs = torch.arange(self.height, device=device), torch.arange(self.width, device=device)
        self._generator = streams.generator(seed, f"augmentation{stream}")

    def draw(self, size: int) -> Tensor:
        """Offsets of the crops and flips of a batch: ``(3, size)`` whole numbers, on the CPU.

        The offsets, down and right, lie in [-crop_padding, crop_padding]; a flip is 0 or 1. What is switched off draws
        nothing.
        """
        p = self.pixels.crop_padding
        draws = torch.zeros(3, size, dtype=torch.int64)
        if p:
            draws[:2] = torch.randint(-p, p + 1, (2, size), generator=self._generator)
        if self.pixels.flip:
            draws[2] = torch.randint(2, (size,), generator=self._generator)
        return draws

    def batch(self, rows: Tensor, draws: Tensor) -> Tensor:
        """Training images, ready for the network.

        Args:
            rows: Which images, ``(size,)``, on the images' device.
            draws: What :meth:`draw` returned, on the same device.

        Returns:
            ``(size, channels, height, width)``, float32, channels-last.
        """
        down, right, flip = draws
        ys = self._ys + down[:, None]  # (size, height): the row that each output row shows
        xs = torch.where(flip[:, None] == 1, self.width - 1 - self._xs, self._xs) + right[:, None]
        inside = ((ys >= 0) & (ys < self.height))[:, :, None] & ((xs >= 0) & (xs < self.width))[:, None, :]
        pixel = (rows[:, None] * self.height + ys.clamp(0, self.height - 1))[:, :, None] * self.width
        pixel = pixel + xs.clamp(0, self.width - 1)[:, None, :]
        values = self._rows.index_select(0, pixel.reshape(-1)).view(*pixel.shape, -1)
        if self.pixels.crop_padding:
            values = values * inside[..., None]
        return values.permute(0, 3, 1, 2).float().mul_(self._scale).sub_(self._shift)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._generator.set_state(state["generator"])
