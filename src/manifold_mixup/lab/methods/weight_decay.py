"""Weight decay, a control of the paper's Figure 2."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from manifold_mixup.lab.methods.base import Method
from manifold_mixup.lab.options import Options

__all__ = ["WeightDecay", "WeightDecayOptions"]


class WeightDecayOptions(Options):
    """The paper states no strength."""

    strength: float = Field(
        default=1e-3, ge=0, description="factor of the L2 penalty on all parameters; 0 switches it off"
    )


class WeightDecay(Method[WeightDecayOptions]):
    """An L2 penalty, as in ``weight_decay`` of torch's Adam and SGD (added to the gradient, not decoupled)."""

    name = "weight_decay"
    title = "L2 penalty on the weights"
    source = "Verma et al. 2019, Figure 2; Krogh and Hertz 1991"
    Options = WeightDecayOptions
    tasks = ("classification", "semi_supervised", "node_classification")

    def train_options(self) -> dict[str, Any]:
        """The optimiser's own penalty."""
        return {"weight_decay": self.options.strength}
