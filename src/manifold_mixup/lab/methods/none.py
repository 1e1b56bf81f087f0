"""Plain training: what every other method is compared with."""

from __future__ import annotations

from manifold_mixup.lab.methods.base import Method
from manifold_mixup.lab.options import NoOptions

__all__ = ["Plain"]


class Plain(Method[NoOptions]):
    """Cross-entropy on the examples as they are (empirical risk minimisation)."""

    name = "none"
    title = "plain training"
    source = "the baseline of Verma et al. 2019 (arXiv 1806.05236), S = {}"
    Options = NoOptions
    tasks = ("classification", "semi_supervised", "node_classification")
