"""Gaussian noise on hidden states, a control of the paper's Figure 1."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from manifold_mixup.lab.methods.base import BatchTransform, LayerNames, unknown_layers
from manifold_mixup.lab.methods.noise import NoiseMethod
from manifold_mixup.lab.options import Options

__all__ = ["HiddenNoise", "HiddenNoiseOptions"]


class HiddenNoiseOptions(Options):
    """The paper states neither the strength nor the layers."""

    sd: float = Field(
        default=0.5, ge=0, description="standard deviation, in the units of the hidden states; 0 switches it off"
    )
    layers: LayerNames = Field(default="all", description="where: 'all' hidden layers, or names of modules")


class HiddenNoise(NoiseMethod[HiddenNoiseOptions]):
    """Fresh noise on the outputs of hidden layers, in training only."""

    name = "hidden_noise"
    title = "Gaussian noise on hidden states"
    source = "Verma et al. 2019, caption of Figure 1; Poole et al. 2014, arXiv 1406.1831"
    Options = HiddenNoiseOptions

    def __init__(self, options: HiddenNoiseOptions) -> None:
        super().__init__(options)
        self._handles: list[RemovableHandle] = []

    def problems(self, modules: Collection[str], hidden: Sequence[str]) -> list[str]:
        """Layers that the network does not have."""
        return unknown_layers(self.options.layers, modules, keyword="all")

    def attach(self, model: nn.Module, hidden: Sequence[str], seed: int) -> BatchTransform:
        """Hook the chosen layers; the batch itself passes unchanged."""
        self.seed_noise(seed)
        if self.options.sd > 0:
            layers = hidden if isinstance(self.options.layers, str) else self.options.layers
            for name in layers:
                self._handles.append(model.get_submodule(name).register_forward_hook(partial(_noisy, self)))
        return super().attach(model, hidden, seed)

    def detach(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()


def _noisy(method: HiddenNoise, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    return method.add_noise(output, method.options.sd) if module.training else None
