"""Label smoothing (Szegedy et al. 2016, arXiv 1512.00567): a share of every target is spread over all classes."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from manifold_mixup.lab.methods.base import Method
from manifold_mixup.lab.options import Options

__all__ = ["LabelSmoothing", "LabelSmoothingOptions"]


class LabelSmoothingOptions(Options):
    """The published value, on ImageNet."""

    epsilon: float = Field(
        default=0.1, ge=0, lt=1, description="share of the target that is spread over all classes; 0 switches it off"
    )


class LabelSmoothing(Method[LabelSmoothingOptions]):
    """Train on (1 - ε) y + ε / C in place of y, without any mixing.

    The smoothing is that of the loss, so it takes the place of ``train.label_smoothing`` and never adds to it.
    """

    name = "label_smoothing"
    title = "label smoothing"
    source = "Szegedy et al. 2016, arXiv 1512.00567, section 7"
    Options = LabelSmoothingOptions
    tasks = ("classification", "semi_supervised", "node_classification")

    def train_options(self) -> dict[str, Any]:
        """The loss's own smoothing."""
        return {"label_smoothing": self.options.epsilon}
