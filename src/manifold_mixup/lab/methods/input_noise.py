"""Gaussian noise on the inputs, a control of the paper's Figure 2."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import nn

from manifold_mixup.lab.methods.base import BatchTransform
from manifold_mixup.lab.methods.noise import NoiseMethod
from manifold_mixup.lab.options import Options

__all__ = ["InputNoise", "InputNoiseOptions"]


class InputNoiseOptions(Options):
    """The paper states no strength."""

    sd: float = Field(
        default=0.5, ge=0, description="standard deviation, in the units of the inputs; 0 switches the noise off"
    )


class InputNoise(NoiseMethod[InputNoiseOptions]):
    """Fresh noise on every training batch."""

    name = "input_noise"
    title = "Gaussian noise on the inputs"
    source = "Verma et al. 2019, Figure 2; Bishop 1995"
    Options = InputNoiseOptions

    def attach(self, model: nn.Module, hidden: Sequence[str], seed: int) -> BatchTransform:
        """Noise is added to the batch before the network reads it."""
        self.seed_noise(seed)
        if self.options.sd == 0:
            return super().attach(model, hidden, seed)
        return lambda x, y: (self.add_noise(x, self.options.sd), y)
