"""What all sets of images have in common: their options, and how two arrays become three splits."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field

from manifold_mixup.lab.data.base import DataInfo, DataSplits, Examples
from manifold_mixup.lab.data.subsets import split_training
from manifold_mixup.lab.options import Options

__all__ = ["ImageOptions", "image_facts", "image_splits"]


class ImageOptions(Options):
    """How much of a set of images is used, and how training varies them. Each set has defaults of its own."""

    train_examples: int | None = Field(
        default=None, ge=1, description="training images, drawn class-balanced; unset takes all"
    )
    validation_examples: int = Field(default=0, ge=0, description="training images set aside to validate on")
    crop_padding: int = Field(
        default=0, ge=0, description="training crops out of images padded with this many black pixels on each side"
    )
    flip: bool = Field(default=False, description="training mirrors every second image, at random")


def image_facts(info: DataInfo, options: ImageOptions) -> DataInfo:
    """The facts about a set of images as its options make them."""
    assert info.pixels is not None
    return replace(info, pixels=replace(info.pixels, crop_padding=options.crop_padding, flip=options.flip))


def image_splits(info: DataInfo, options: ImageOptions, train: Examples, test: Examples, seed: int) -> DataSplits:
    """Set aside a validation split and cut the training split to size.

    Args:
        info: The set's facts, with ``pixels``.
        options: How much of it is used.
        train: All published training images, uint8.
        test: All published test images, uint8.
        seed: The run's seed.

    Raises:
        UsageError: There are not that many images.
    """
    rows = split_training(train.y.numpy(), seed, options.train_examples, options.validation_examples)
    training, validation = (Examples(train.x[r], train.y[r]) for r in map(torch.from_numpy, rows))
    return DataSplits(image_facts(info, options), training, validation, test)
