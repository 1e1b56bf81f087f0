"""Data sets by name: ``load_data("digits", options, seed)`` gives the splits of one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manifold_mixup.lab.data import (
    cifar,
    digits,
    folder,
    gnn_benchmark,
    hub,
    mnist,
    planetoid,
    spiral,
    svhn,
    tiny_imagenet,
)
from manifold_mixup.lab.data.base import (
    DataInfo,
    Dataset,
    DataSplits,
    Examples,
    Graph,
    Pixels,
    Places,
    Report,
    Unlabelled,
)
from manifold_mixup.lab.errors import UnknownName

__all__ = [
    "DATASETS",
    "DataInfo",
    "DataSplits",
    "Dataset",
    "Examples",
    "Graph",
    "Pixels",
    "Places",
    "Report",
    "Unlabelled",
    "describe_data",
    "get_dataset",
    "load_data",
    "load_test",
    "prepare_data",
]

DATASETS: dict[str, Dataset] = {
    entry.info.name: entry
    for entry in (
        spiral.DATASET,
        digits.DATASET,
        mnist.MNIST,
        mnist.FASHION_MNIST,
        cifar.CIFAR10,
        cifar.CIFAR100,
        cifar.CIFAR10_1,
        svhn.DATASET,
        tiny_imagenet.DATASET,
        planetoid.CORA,
        planetoid.CITESEER,
        planetoid.PUBMED,
        gnn_benchmark.COAUTHOR_CS,
        gnn_benchmark.AMAZON_PHOTO,
        folder.DATASET,
        hub.DATASET,
    )
}


def get_dataset(name: str) -> Dataset:
    """The registry entry of a data set.

    Raises:
        UnknownName: There is none of this name.
    """
    if name not in DATASETS:
        raise UnknownName("data set", name, DATASETS)
    return DATASETS[name]


def load_data(name: str, options: Mapping[str, Any], seed: int, places: Places | None = None) -> DataSplits:
    """The splits of one run; the same name, options and seed give the same splits.

    Raises:
        UnknownName: There is no such data set.
        LabError: A file is missing, damaged or not the published one.
        pydantic.ValidationError: The options are not the data set's.
    """
    dataset = get_dataset(name)
    return dataset.load(dataset.options.model_validate(dict(options)), seed, places or Places())


def load_test(name: str, options: Mapping[str, Any], places: Places | None = None) -> tuple[DataInfo, Examples]:
    """The examples to measure a finished network on, and their facts.

    Raises:
        As :func:`load_data`.
    """
    dataset = get_dataset(name)
    if dataset.test is None:
        splits = load_data(name, options, 0, places)
        return splits.info, splits.hand_out_test()
    return dataset.test(dataset.options.model_validate(dict(options)), places or Places())


def describe_data(name: str, options: Mapping[str, Any], places: Places | None = None) -> DataInfo:
    """Shape, classes and the other facts, as these options make them.

    Raises:
        As :func:`load_data`.
    """
    dataset = get_dataset(name)
    if dataset.describe is None:
        return dataset.info
    return dataset.describe(dataset.options.model_validate(dict(options)), places or Places())


def prepare_data(name: str, options: Mapping[str, Any], places: Places, report: Report) -> None:
    """Bring what :func:`load_data` will read: download, check, unpack, decode. What is there already is kept.

    Raises:
        As :func:`load_data`.
    """
    dataset = get_dataset(name)
    if dataset.prepare is not None:
        dataset.prepare(dataset.options.model_validate(dict(options)), places, report)
