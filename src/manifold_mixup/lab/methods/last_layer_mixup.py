"""Mixup of the last features (Verma et al. 2019, arXiv 1806.05236): Manifold Mixup with S = {the last layer}."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pydantic import Field
from torch import nn

from manifold_mixup.cutpoints import CutPoint
from manifold_mixup.lab.methods.base import BatchTransform, LayerNames, unknown_layers
from manifold_mixup.lab.methods.head import check_head, find_head
from manifold_mixup.lab.methods.manifold_mixup import MixingMethod, MixingOptions
from manifold_mixup.validation import Layers

__all__ = ["LastLayerMixup", "LastLayerMixupOptions"]


class LastLayerMixupOptions(MixingOptions):
    """alpha as in input mixup on CIFAR."""

    alpha: float = Field(
        default=1.0, ge=0, description="the mixing weight follows Beta(alpha, alpha); 0 switches mixing off"
    )
    layers: LayerNames = Field(
        default="auto", description="where to mix: 'auto' is the head's input, or names of modules"
    )


class LastLayerMixup(MixingMethod):
    """Mix the features that the classifier's head reads.

    Many networks pool their last features with a function and not a module, so that no module returns them. But the
    head is affine, and λ·(W h + b) + (1 - λ)·(W h' + b) = W (λ·h + (1 - λ)·h') + b: mixing what it returns is mixing
    what it is given, in the forward and in every gradient, up to rounding. So the layer that is hooked is the head.
    """

    name = "last_layer_mixup"
    title = "mixup of the last features"
    source = "Verma et al. 2019, arXiv 1806.05236, with S = {last layer}; Venkataramanan et al. 2022, arXiv 2206.14868"
    Options = LastLayerMixupOptions

    _head = ""

    def problems(self, modules: Collection[str], hidden: Sequence[str]) -> list[str]:
        """Layers that the network does not have."""
        assert isinstance(self.options, LastLayerMixupOptions)
        return unknown_layers(self.options.layers, modules, keyword="auto")

    def attach(self, model: nn.Module, hidden: Sequence[str], seed: int) -> BatchTransform:
        """Find the head and attach the mixer."""
        assert isinstance(self.options, LastLayerMixupOptions)
        if isinstance(self.options.layers, str):
            self._head = find_head(model, "layers")
        return super().attach(model, hidden, seed)

    def layers(self) -> Layers:
        """The head, which the mixer proves to be a cut point, or the layers that were named."""
        assert isinstance(self.options, LastLayerMixupOptions)
        return self._choose if isinstance(self.options.layers, str) else self.options.layers

    def _choose(self, points: list[CutPoint]) -> list[str]:
        check_head(self._head, points, "layers")
        return [self._head]  # where it is no cut point, the mixer says why
