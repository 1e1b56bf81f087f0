"""Batch normalisation, a control of the paper's Figure 2: in all layers."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from manifold_mixup.lab.methods.base import Method
from manifold_mixup.lab.options import Options

__all__ = ["BatchNorm", "BatchNormOptions"]


class BatchNormOptions(Options):
    """On or off."""

    enabled: bool = Field(default=True, description="false builds the network without it")


class BatchNorm(Method[BatchNormOptions]):
    """Build the network with batch normalisation in all layers."""

    name = "batch_norm"
    title = "batch normalisation in all layers"
    source = "Verma et al. 2019, Figure 2; Ioffe and Szegedy 2015, arXiv 1502.03167"
    Options = BatchNormOptions

    def model_options(self) -> dict[str, Any]:
        """The network's own batch norm."""
        return {"batch_norm": self.options.enabled}
