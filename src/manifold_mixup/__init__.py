"""Manifold Mixup for PyTorch: two lines in any training loop, exact on any ``nn.Module`` or an error."""

from manifold_mixup import errors
from manifold_mixup.cutpoints import CutPoint, cut_points
from manifold_mixup.interpolation import interpolate
from manifold_mixup.mixup import Draw, ManifoldMixup
from manifold_mixup.pairing import Partner
from manifold_mixup.target import MixedTarget

__version__ = "0.1.0"
__all__ = ["CutPoint", "Draw", "ManifoldMixup", "MixedTarget", "Partner", "cut_points", "errors", "interpolate"]
