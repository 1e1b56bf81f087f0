"""Input mixup (Zhang et al. 2018, arXiv 1710.09412): Manifold Mixup with S = {input}."""

from __future__ import annotations

from pydantic import Field

from manifold_mixup.lab.methods.manifold_mixup import MixingMethod, MixingOptions

__all__ = ["InputMixup", "InputMixupOptions"]


class InputMixupOptions(MixingOptions):
    """The paper's comparison uses alpha = 1."""

    alpha: float = Field(
        default=1.0, ge=0, description="the mixing weight follows Beta(alpha, alpha); 0 switches mixing off"
    )


class InputMixup(MixingMethod):
    """Mix the inputs."""

    name = "input_mixup"
    title = "input mixup: interpolated inputs"
    source = "Zhang et al. 2018, arXiv 1710.09412"
    Options = InputMixupOptions

    def layers(self) -> list[str]:
        """The input alone."""
        return ["input"]
