"""Dropout, a control of the paper's Figure 2: half of the units, in all layers except the bottleneck.

In residual networks it lies inside the blocks, before the last convolution of each.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from manifold_mixup.lab.methods.base import Method
from manifold_mixup.lab.options import Options

__all__ = ["Dropout", "DropoutOptions"]


class DropoutOptions(Options):
    """The paper's value is one half."""

    p: float = Field(
        default=0.5, ge=0, lt=1, description="share of the units that are set to zero; 0 switches dropout off"
    )


class Dropout(Method[DropoutOptions]):
    """Build the network with dropout; one without that option is refused.

    The masks come from torch's global generator, the only one that ``nn.Dropout`` can use; a run seeds it, saves it in
    its checkpoints and restores it for whoever runs in the same process.
    """

    name = "dropout"
    title = "dropout, where the network has it"
    source = "Verma et al. 2019, Figure 2; Srivastava et al. 2014"
    Options = DropoutOptions

    def model_options(self) -> dict[str, Any]:
        """The network's own dropout."""
        return {"dropout": self.options.p}
