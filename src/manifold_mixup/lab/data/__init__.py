"""Data sets by name: ``load_data("digits", options, seed)`` gives the splits of one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manifold_mixup.lab.data import digits, spiral
from manifold_mixup.lab.data.base import DataInfo, Dataset, DataSplits, Examples
from manifold_mixup.lab.errors import UnknownName

__all__ = ["DATASETS", "DataInfo", "DataSplits", "Dataset", "Examples", "get_dataset", "load_data"]

DATASETS: dict[str, Dataset] = {entry.info.name: entry for entry in (spiral.DATASET, digits.DATASET)}


def get_dataset(name: str) -> Dataset:
    """The registry entry of a data set.

    Raises:
        UnknownName: There is none of this name.
    """
    if name not in DATASETS:
        raise UnknownName("data set", name, DATASETS)
    return DATASETS[name]


def load_data(name: str, options: Mapping[str, Any], seed: int) -> DataSplits:
    """The splits of one run; the same name, options and seed give the same splits.

    Raises:
        UnknownName: There is no such data set.
        pydantic.ValidationError: The options are not the data set's.
    """
    dataset = get_dataset(name)
    return dataset.load(dataset.options.model_validate(dict(options)), seed)
