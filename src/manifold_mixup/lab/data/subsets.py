"""Validation splits and smaller training sets, both balanced by class and drawn from a run's seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from manifold_mixup.lab import streams
from manifold_mixup.lab.errors import UsageError

__all__ = ["balanced", "split_training"]

Indices = npt.NDArray[np.int64]


def split_training(
    labels: npt.NDArray[np.integer], seed: int, train_examples: int | None, validation_examples: int
) -> tuple[Indices, Indices]:
    """Divide published training examples into a training and a validation split.

    The validation split keeps the class shares of the whole, to one example, and does not depend on
    ``train_examples``. A smaller training set has as many examples of every class, to one; a class that runs out leaves
    its share to the others.

    Args:
        labels: Class indices of all examples, shape ``(n,)``.
        seed: The run's seed.
        train_examples: Size of the training split, or None for all that the validation split leaves.
        validation_examples: Size of the validation split, at least 0.

    Returns:
        Indices of the training split and of the validation split, without common elements, each in random order.

    Raises:
        UsageError: There are not that many examples.
    """
    left = len(labels) - validation_examples
    wanted = left if train_examples is None else train_examples
    if wanted > left or left < 1:
        raise UsageError(
            f"train_examples {wanted} and validation_examples {validation_examples} are more than the {len(labels)} "
            "published training examples"
        )
    order = _shuffled(len(labels), seed, "data/validation")
    rank, count = _ranks(labels[order])
    quantile = np.argsort((rank + 0.5) / count, kind="stable")  # the first of every class, in proportion to its size
    validation, rest = order[np.sort(quantile[:validation_examples])], order[np.sort(quantile[validation_examples:])]
    rest = rest[_shuffled(len(rest), seed, "data/train")]
    return (rest if wanted == left else balanced(labels[rest], wanted, rest)), validation


def balanced(labels: npt.NDArray[np.integer], size: int, indices: Indices) -> Indices:
    """The first ``size`` of ``indices``, which are in random order, with class counts that differ by at most one.

    Args:
        labels: The class of each of ``indices``.
        size: How many to keep.
        indices: Whatever is chosen from.
    """
    rank, _ = _ranks(labels)
    return indices[np.sort(np.argsort(rank, kind="stable")[:size])]


def _ranks(labels: npt.NDArray[np.integer]) -> tuple[Indices, Indices]:
    """The place of each example among those of its class, from 0, and how many its class has."""
    rank = np.empty(len(labels), dtype=np.int64)
    count = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        of_class = labels == label
        count[of_class] = of_class.sum()
        rank[of_class] = np.arange(of_class.sum())
    return rank, count


def _shuffled(size: int, seed: int, stream: str) -> Indices:
    return np.random.default_rng(streams.stream_seed(seed, stream)).permutation(size)
