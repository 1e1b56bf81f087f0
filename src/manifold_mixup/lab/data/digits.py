"""scikit-learn's bundled handwritten digits: 1,797 real images of 8x8 pixels, no download."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import Field

from manifold_mixup.lab import streams
from manifold_mixup.lab.data.base import DataInfo, Dataset, DataSplits, Examples, Places
from manifold_mixup.lab.data.subsets import balanced
from manifold_mixup.lab.errors import MissingExtra
from manifold_mixup.lab.options import Options

__all__ = ["DATASET", "DigitsOptions"]

TEST, VALIDATION, TRAIN = 597, 200, 1000


class DigitsOptions(Options):
    """How many of the 1,000 training images are used."""

    train_examples: int = Field(
        default=TRAIN, ge=10, le=TRAIN, description="training images; fewer are drawn class-balanced"
    )


def load(options: DigitsOptions, seed: int, places: Places) -> DataSplits:
    """Split the images by the run's seed, stratified by class: 597 to test, 200 to validate, 1,000 to train.

    The test and validation images do not depend on ``train_examples``.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingExtra("scikit-learn", "lab") from error

    images, labels = load_digits(return_X_y=True)

    def cut(indices: Any, size: int, stream: str) -> Any:
        state = streams.stream_seed(seed, f"data/{stream}") % 2**32
        return train_test_split(indices, test_size=size, random_state=state, stratify=labels[indices])

    rest, test = cut(np.arange(len(labels)), TEST, "test")
    train, validation = cut(rest, VALIDATION, "validation")
    if options.train_examples < len(train):
        train = balanced(labels[train], options.train_examples, train)

    def examples(indices: Any) -> Examples:
        x = torch.from_numpy(images[indices] / 16.0).float().reshape(-1, 1, 8, 8)  # pixels are counts from 0 to 16
        return Examples(x, torch.from_numpy(labels[indices]).long())

    return DataSplits(DATASET.info, examples(train), examples(validation), examples(test))


DATASET = Dataset(
    info=DataInfo(
        name="digits",
        title="handwritten digits, 8x8 grey-scale images: 1,000 to train, 200 to validate, 597 to test",
        shape=(1, 8, 8),
        classes=tuple(map(str, range(10))),
        features=("64 grey values in [0, 1]",),
        source="UCI optical recognition of handwritten digits (test part), as bundled with scikit-learn",
        terms="CC BY 4.0 (Alpaydin and Kaynak 1998)",
        sizes=(TRAIN + VALIDATION, TEST),
        unit_range=True,
    ),
    options=DigitsOptions,
    load=load,
)
