"""What is measured on a trained network. Every function leaves the network as it found it."""

from manifold_mixup.lab.measures.classification import evaluate
from manifold_mixup.lab.measures.margin import decision_margin
from manifold_mixup.lab.measures.spiral import spiral_measures, within_between_ratio

__all__ = ["decision_margin", "evaluate", "spiral_measures", "within_between_ratio"]
