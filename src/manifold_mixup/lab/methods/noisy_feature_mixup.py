"""Noisy Feature Mixup (Lim et al. 2022, arXiv 2110.02180): noise on mixed hidden states."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from manifold_mixup.lab.methods.base import BatchTransform, LayerNames, unknown_layers
from manifold_mixup.lab.methods.generators import DeviceGenerators, normal_like, send, uniform_like
from manifold_mixup.lab.methods.manifold_mixup import MixerOptions, MixingMethod
from manifold_mixup.lab.streams import stream_seed
from manifold_mixup.structure import map_tensors

__all__ = ["NoisyFeatureMixup", "NoisyFeatureMixupOptions"]

STRENGTH = (2.0, 5.0)  # the Beta distribution of the factors b and b'


class NoisyFeatureMixupOptions(MixerOptions):
    """The authors' settings for CIFAR-10 and CIFAR-100."""

    alpha: float = Field(
        default=1.0,
        ge=0,
        description="the mixing weight follows Beta(alpha, alpha); 0 switches mixing and noise off",
    )
    layers: LayerNames = Field(default="auto", description="where to mix: 'auto', or names of modules and 'input'")
    additive: float = Field(
        default=0.4, ge=0, description="largest standard deviation of the noise that is added; 0: none"
    )
    multiplicative: float = Field(
        default=0.2, ge=0, description="largest relative change by the noise that multiplies; 0: none"
    )


@dataclass(frozen=True)
class _Noise:
    """The noise of one batch: at which call of which module, on how many rows, and the two factors b and b'.

    The factors are a tensor, ``(2,)``, on the device of the batch: for each new number the compiler would start anew.
    """

    layer: str
    rows: int
    factors: Tensor


class NoisyFeatureMixup(MixingMethod):
    """Manifold Mixup, and then, at the layer that was mixed, h <- (1 + s_m b U) h + s_a b' N.

    U is uniform on [-1, 1) and N standard normal, both independent for every number of every example; b and b' follow
    Beta(2, 5), one draw of each for a batch; s_m and s_a are ``multiplicative`` and ``additive``. A batch that is not
    mixed gets no noise, and evaluation never does.
    """

    name = "noisy_feature_mixup"
    title = "Noisy Feature Mixup: noise on mixed hidden states"
    source = "Lim et al. 2022, arXiv 2110.02180"
    Options = NoisyFeatureMixupOptions

    def __init__(self, options: NoisyFeatureMixupOptions) -> None:
        super().__init__(options)
        self._handles: list[RemovableHandle] = []
        self._sites: dict[str, int] = {}  # calls of each hooked module in the current forward
        self._noise: _Noise | None = None

    def layers(self) -> str | list[str]:
        """The eligible set S, or ``"auto"``."""
        return self._settings.layers

    @property
    def _settings(self) -> NoisyFeatureMixupOptions:
        assert isinstance(self.options, NoisyFeatureMixupOptions)
        return self.options

    def problems(self, modules: Collection[str], hidden: Sequence[str]) -> list[str]:
        """Layers that the network does not have."""
        return unknown_layers(self.layers(), modules, keyword="auto", extra=["input"])

    def attach(self, model: nn.Module, hidden: Sequence[str], seed: int) -> BatchTransform:
        """Attach the mixer; the hooks that add noise are put behind the mixer's own, so that they act after it."""
        mix = super().attach(model, hidden, seed)
        self._generators = DeviceGenerators(stream_seed(seed, "noise"))
        self._strengths = torch.Generator().manual_seed(stream_seed(seed, "strengths"))
        self._handles.append(model.register_forward_pre_hook(self._before, with_kwargs=True))

        def transform(x: Tensor, y: Any) -> tuple[Tensor, Any]:
            x, target = mix(x, y)
            if not self._sites:
                self._hook_layers(model)
            self._draw(len(target), x.device)
            return x, target

        return transform

    def _hook_layers(self, model: nn.Module) -> None:
        """Hook the layers of S, which are known once the first batch was drawn."""
        for name in self.mixed_names():
            self._sites[name] = 0
            if name != "input":
                self._handles.append(model.get_submodule(name).register_forward_hook(self._after(name)))

    def _draw(self, rows: int, device: torch.device) -> None:
        assert self._mixup is not None
        assert self._mixup.last is not None
        gamma = torch._standard_gamma(torch.tensor([STRENGTH, STRENGTH]), generator=self._strengths)
        factors = gamma[:, 0] / gamma.sum(dim=1)  # a ratio of Gamma variates is a Beta variate
        layer = self._mixup.last.layer
        mixed = isinstance(layer, str)
        self._noise = _Noise(str(layer), rows, send(factors, device)) if mixed else None

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        """A forward begins; the mixer's own hook has mixed the input before, if that is the layer."""
        self._sites = dict.fromkeys(self._sites, 0)
        if not model.training or self._noise is None or self._noise.layer != "input":
            return None
        args, kwargs = self._noisy([args, kwargs])
        return args, kwargs

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            self._sites[name] += 1
            call = name if self._sites[name] == 1 else f"{name}#{self._sites[name]}"
            return self._noisy(output) if module.training and self._noise and self._noise.layer == call else None

        return hook

    def _noisy(self, value: Any) -> Any:
        """``value`` with noise on every floating tensor that has a row for each example."""
        noise, settings = self._noise, self._settings
        assert noise is not None

        def one(h: Tensor) -> Tensor:
            if not h.is_floating_point() or h.dim() == 0 or len(h) != noise.rows:
                return h
            if settings.multiplicative:
                change = settings.multiplicative * noise.factors[0] * uniform_like(h, self._generators)
                h = h * (1 + change).to(h.dtype)
            if settings.additive:
                h = h + (settings.additive * noise.factors[1] * normal_like(h, self._generators)).to(h.dtype)
            return h

        return map_tensors(one, value)

    def detach(self) -> None:
        """Take all hooks off the network."""
        while self._handles:
            self._handles.pop().remove()
        super().detach()

    def state_dict(self) -> dict[str, Any]:
        """The state of the mixer, of the noise and of its strengths."""
        if self._mixup is None:
            return {}
        strengths = self._strengths.get_state()
        return {"mixer": super().state_dict(), "noise": self._generators.state_dict(), "strengths": strengths}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        if self._mixup is not None:
            super().load_state_dict(state["mixer"])
            self._generators.load_state_dict(state["noise"])
            self._strengths.set_state(state["strengths"])
