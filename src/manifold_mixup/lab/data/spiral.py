"""The two spirals of the paper's Figures 1 and 2, without noise.

The points lie on the Archimedean spiral r = θ with θ = sqrt(U) · 780°, U uniform on [0, 1]; one class is the other
turned by half a turn. The paper publishes no code for it; this law was read off the published figure.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field

from manifold_mixup.lab import streams
from manifold_mixup.lab.data.base import DataInfo, Dataset, DataSplits, Examples, Places
from manifold_mixup.lab.options import Options

__all__ = ["DATASET", "SpiralOptions", "draw_spiral"]


class SpiralOptions(Options):
    """Sizes of the splits and the length of the spiral."""

    points_per_class: int = Field(default=60, ge=1, description="training points of each class")
    validation_points: int = Field(default=1000, ge=2, description="fresh points for validation, both classes together")
    test_points: int = Field(default=4000, ge=2, description="fresh points for the test, both classes together")
    degrees: float = Field(default=780.0, gt=0, description="the largest angle of the spiral")


def draw_spiral(points_per_class: int, degrees: float, generator: torch.Generator) -> Examples:
    """Fresh points of both spirals, class 0 first.

    Args:
        points_per_class: Points of each class.
        degrees: The largest angle; the radius is the angle in radians.
        generator: Where the angles come from.

    Returns:
        Inputs of shape ``(2 * points_per_class, 2)`` in units of the paper's axes (within [-15, 15] for 780°), and
        their labels.
    """
    uniform = torch.rand(2, points_per_class, generator=generator, dtype=torch.float64)
    theta = uniform.sqrt() * math.radians(degrees)
    arms = torch.stack([theta * theta.cos(), -theta * theta.sin()], dim=-1)
    arms[1].neg_()
    labels = torch.arange(2).repeat_interleave(points_per_class)
    return Examples(arms.reshape(-1, 2).float(), labels)


def load(options: SpiralOptions, seed: int, places: Places) -> DataSplits:
    """Draw the three splits, each from its own stream of the run's seed."""

    def split(stream: str, per_class: int) -> Examples:
        return draw_spiral(per_class, options.degrees, streams.generator(seed, f"data/{stream}"))

    return DataSplits(
        DATASET.info,
        split("train", options.points_per_class),
        split("validation", options.validation_points // 2),
        split("test", options.test_points // 2),
    )


DATASET = Dataset(
    info=DataInfo(
        name="spiral",
        title="two noise-free spirals in the plane, 60 points each",
        shape=(2,),
        classes=("red", "blue"),
        features=("x1", "x2"),
        source="Verma et al. 2019, Figures 1 and 2; the law was read off the published figure",
        terms="drawn by this package",
    ),
    options=SpiralOptions,
    load=load,
    measures="spiral",
)
