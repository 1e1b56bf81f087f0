"""Training batches on the device: which examples, their augmentation, and where in them a run is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_fabric import Fabric
from torch import Tensor

from manifold_mixup.lab.augmentation import Augmentation
from manifold_mixup.lab.batches import Batches
from manifold_mixup.lab.data import Pixels
from manifold_mixup.lab.errors import UsageError

__all__ = ["Feed"]


class Feed:
    """Examples of one split, drawn and varied in batches; every process sees its share of the same batches.

    Args:
        x: Examples as they are stored.
        size: Examples per batch over all processes; 0 takes all.
        seed: Seed of the run.
        fabric: The devices.
        pixels: How uint8 images are varied and normalised; None for examples that are read as they are.
        stream: Follows the names of the streams of random numbers, so that two feeds of a run draw independently.
        replacement: Whether every batch draws from all examples.

    Raises:
        UsageError: A batch is larger than the split, or cannot be divided among the devices.
    """

    def __init__(
        self,
        x: Tensor,
        size: int,
        seed: int,
        fabric: Fabric,
        pixels: Pixels | None,
        *,
        stream: str = "",
        replacement: bool = False,
    ) -> None:
        self.fabric = fabric
        self.batches = Batches(len(x), size, seed, stream=stream, replacement=replacement)
        if self.batches.size % fabric.world_size:
            raise UsageError(
                f"train.batch_size {self.batches.size} cannot be divided among {fabric.world_size} devices"
            )
        x = x.to(fabric.device)
        self.augmentation = None if pixels is None else Augmentation(pixels, x, seed, stream=stream)
        self.x = x if pixels is None else x[:0]  # the augmentation holds the images

    def draw(self) -> tuple[Tensor, Tensor]:
        """The next batch of this process: which rows, and those examples as the network reads them."""
        rank, world = self.fabric.global_rank, self.fabric.world_size
        rows = self._send(self.batches.draw().view(world, -1)[rank])
        if self.augmentation is None:
            return rows, self.x[rows]
        draws = self._send(self.augmentation.draw(self.batches.size).view(3, world, -1)[:, rank])
        return rows, self.augmentation.batch(rows, draws)

    def _send(self, drawn: Tensor) -> Tensor:
        """Numbers that were drawn on the CPU, on the device, without waiting for it."""
        device = self.fabric.device
        if device.type == "cuda":
            return drawn.contiguous().pin_memory().to(device, non_blocking=True)
        return drawn.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Where it is, as tensors and plain values."""
        own = None if self.augmentation is None else self.augmentation.state_dict()
        return {"batches": self.batches.state_dict(), "augmentation": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.batches.load_state_dict(state["batches"])
        if self.augmentation is not None:
            self.augmentation.load_state_dict(state["augmentation"])
