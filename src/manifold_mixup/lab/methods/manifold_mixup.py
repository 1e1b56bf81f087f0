"""Manifold Mixup (Verma et al. 2019, arXiv 1806.05236): train on interpolations of hidden states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from manifold_mixup.lab.methods.base import BatchTransform, LayerNames, Method, unknown_layers
from manifold_mixup.lab.methods.mixing_log import MixingLog
from manifold_mixup.lab.options import Options
from manifold_mixup.mixup import ManifoldMixup
from manifold_mixup.validation import Layers

__all__ = ["ManifoldMixupMethod", "ManifoldMixupOptions", "MixerOptions", "MixingMethod", "MixingOptions"]


class MixerOptions(Options):
    """What all methods with the core's mixer have in common."""

    alpha: float = Field(
        default=2.0, ge=0, description="the mixing weight follows Beta(alpha, alpha); 0 switches mixing off"
    )
    pairing: Literal["random", "halves", "two-batches"] = Field(default="random", description="how partners are found")
    probability: float = Field(default=1.0, ge=0, le=1, description="share of the batches that are mixed")


class MixingOptions(MixerOptions):
    """The same with draws for every pair."""

    per: Literal["batch", "example"] = Field(
        default="batch", description="one draw for the whole batch or one for every pair"
    )


class ManifoldMixupOptions(MixingOptions):
    """The paper's settings: alpha = 2, one draw per batch, every batch mixed."""

    layers: LayerNames = Field(default="auto", description="where to mix: 'auto', or names of modules and 'input'")


class MixingMethod(Method[MixerOptions], ABC):
    """The core's mixer, seen as a method of the lab."""

    _mixup: ManifoldMixup | None = None
    _log: MixingLog | None = None
    _resumed: list[str] | None = None  # S as a checkpoint named it

    @abstractmethod
    def layers(self) -> Layers:
        """The eligible set S, as the mixer takes it."""

    def attach(self, model: nn.Module, hidden: Sequence[str], seed: int) -> BatchTransform:
        """Attach the mixer."""
        options = self.options
        per = options.per if isinstance(options, MixingOptions) else "batch"
        self._log = MixingLog("batches" if per == "batch" else "examples")
        self._mixup = ManifoldMixup(
            model,
            alpha=options.alpha,
            layers=self.layers(),
            per=per,
            pairing=options.pairing,
            probability=options.probability,
            seed=seed,
        )
        return self._mix

    def _mix(self, x: Tensor, y: Any) -> tuple[Tensor, Any]:
        """Mix a batch and count what was drawn; in evaluation nothing is."""
        mixup, log = self._mixup, self._log
        assert mixup is not None
        assert log is not None
        before = mixup.last
        mixed = mixup(x, y)
        draw, layers = mixup.last, mixup.layers
        if draw is not None and draw is not before:
            log.know(layers or [])
            log.note(draw, len(y), certain=bool(layers) and mixup.alpha > 0 and mixup.probability == 1)
        return mixed

    def mixed_names(self) -> list[str]:
        """Modules of S, and the input, each once, whichever of their calls is mixed; known after the first batch."""
        layers = None if self._mixup is None else self._mixup.layers
        return list(dict.fromkeys(layer.partition("#")[0] for layer in layers or []))

    def detach(self) -> None:
        """Take the mixer's hooks off the network."""
        if self._mixup is not None:
            self._mixup.remove()

    def state_dict(self) -> dict[str, Any]:
        """The mixer's generator and the layers it found, and what it drew so far."""
        if self._mixup is None or self._log is None:
            return {}
        return {**self._mixup.state_dict(), "mixing": self._log.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        if self._mixup is not None and self._log is not None:
            own = dict(state)
            self._log.load_state_dict(own.pop("mixing", None))
            self._mixup.load_state_dict(own)
            self._resumed = own["layers"]

    def facts(self) -> dict[str, Any]:
        """The layers that were mixed, how often each, and with which λ: :meth:`MixingLog.facts`."""
        if self._mixup is None or self._log is None:
            return {}
        layers = self._mixup.layers
        if layers is None:
            layers = self._resumed  # the checkpoint was of the last step: no batch has come since
        return {} if layers is None else {"layers": list(layers), "mixing": self._log.facts(self._mixup.alpha)}


class ManifoldMixupMethod(MixingMethod):
    """Mix at one of several layers, drawn for each batch."""

    name = "manifold_mixup"
    title = "Manifold Mixup: interpolated hidden states"
    source = "Verma et al. 2019, arXiv 1806.05236"
    Options = ManifoldMixupOptions

    def layers(self) -> str | list[str]:
        """The eligible set S, or ``"auto"``."""
        options = self.options
        assert isinstance(options, ManifoldMixupOptions)
        return options.layers

    def problems(self, modules: Collection[str], hidden: Sequence[str]) -> list[str]:
        """Layers that the network does not have."""
        return unknown_layers(self.layers(), modules, keyword="auto", extra=["input"])
