"""What the two noise methods share: a generator of their own and Gaussian draws from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from manifold_mixup.lab.methods.base import Method, OptionsT
from manifold_mixup.lab.methods.generators import DeviceGenerators, normal_like

__all__ = ["NoiseMethod"]


class NoiseMethod(Method[OptionsT]):
    """A method that adds Gaussian noise from its own generator, drawn on the device of what it is added to."""

    _generators: DeviceGenerators | None = None

    def seed_noise(self, seed: int) -> None:
        """Start the stream of noise."""
        self._generators = DeviceGenerators(seed)

    def add_noise(self, value: Tensor, sd: float) -> Tensor:
        """``value`` plus noise of standard deviation ``sd``, in the dtype of ``value``."""
        assert self._generators is not None, "seed_noise() comes first"
        return value + sd * normal_like(value, self._generators).to(value.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The state of the noise."""
        return {} if self._generators is None else {"noise": self._generators.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        if self._generators is not None:
            self._generators.load_state_dict(state["noise"])
