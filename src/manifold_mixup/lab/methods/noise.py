"""What the two noise methods share: a generator of their own and Gaussian draws from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manifold_mixup.lab.methods.base import Method, OptionsT

__all__ = ["NoiseMethod"]


class NoiseMethod(Method[OptionsT]):
    """A method that adds Gaussian noise from its own generator."""

    _generator: torch.Generator | None = None

    def seed_noise(self, seed: int) -> None:
        """Start the stream of noise."""
        self._generator = torch.Generator().manual_seed(seed)

    def add_noise(self, value: Tensor, sd: float) -> Tensor:
        """``value`` plus noise of standard deviation ``sd``, in the dtype of ``value``."""
        # drawn on the CPU, so that a run on another device sees the same noise
        noise = torch.randn(value.shape, generator=self._generator, dtype=torch.float32)
        return value + sd * noise.to(device=value.device, dtype=value.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state."""
        return {} if self._generator is None else {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        if self._generator is not None:
            self._generator.set_state(state["generator"])
