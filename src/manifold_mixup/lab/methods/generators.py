"""Random numbers drawn where they are used, with a state that can be saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["DeviceGenerators", "normal_like", "send", "truncated_normal_like", "uniform_like"]


def send(drawn: Tensor, device: torch.device) -> Tensor:
    """Numbers that were drawn on the CPU, on a device, without waiting for it."""
    if device.type == "cuda":  # a copy from memory that may be swapped out has to wait
        return drawn.contiguous().pin_memory().to(device, non_blocking=True)
    return drawn.to(device)


class DeviceGenerators:
    """One stream of random numbers for every kind of device, all from one seed.

    Drawing on the device spares the copy of a tensor as large as the activations. A kind of device has numbers of its
    own: the same seed gives other ones on a GPU than on the CPU.

    Args:
        seed: Of every stream.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[str, torch.Generator] = {}
        self._saved: dict[str, Tensor] = {}

    def on(self, device: torch.device) -> torch.Generator:
        """The generator of a device, made when it is first asked for."""
        kind = device.type
        if kind not in self._generators:
            generator = torch.Generator(device).manual_seed(self._seed)
            if kind in self._saved:
                generator.set_state(self._saved.pop(kind))
            self._generators[kind] = generator
        return self._generators[kind]

    def state_dict(self) -> dict[str, Any]:
        """The seed, and the state of every stream that was begun."""
        states = {kind: generator.get_state() for kind, generator in self._generators.items()}
        return {"seed": self._seed, "states": {**self._saved, **states}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._seed, self._saved, self._generators = state["seed"], dict(state["states"]), {}


def _drawn_like(value: Tensor, draw: Callable[..., Tensor], generators: DeviceGenerators) -> Tensor:
    """Numbers drawn in the order of memory, float32, in the shape, memory format and on the device of ``value``.

    ``draw`` is a function that makes a tensor, not a method that fills one: the compiler steps around the one without
    a word and warns of the other.
    """
    keywords = {"generator": generators.on(value.device), "dtype": torch.float32, "device": value.device}
    if value.dim() == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last):
        n, channels, height, width = value.shape
        return draw((n, height, width, channels), **keywords).permute(0, 3, 1, 2)
    return draw(value.shape, **keywords)


def normal_like(value: Tensor, generators: DeviceGenerators) -> Tensor:
    """Independent standard normal numbers, float32, in the shape and on the device of ``value``."""
    return _drawn_like(value, torch.randn, generators)


def uniform_like(value: Tensor, generators: DeviceGenerators) -> Tensor:
    """Independent numbers, uniform on [-1, 1), float32, in the shape and on the device of ``value``."""
    return 2 * _drawn_like(value, torch.rand, generators) - 1


def truncated_normal_like(value: Tensor, generators: DeviceGenerators) -> Tensor:
    """Standard normal numbers without those beyond ±2, float32, in the shape and on the device of ``value``.

    A uniform number between the probabilities of -2 and 2 is turned into the quantile that it belongs to.
    """
    inside = math.erf(2 / math.sqrt(2))  # probability of lying within ±2
    return (inside * uniform_like(value, generators)).erfinv_().mul_(math.sqrt(2)).clamp_(-2.0, 2.0)
