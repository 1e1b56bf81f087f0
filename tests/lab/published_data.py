"""Small files of every published set, in their published layout, for recipes that name the real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.data import test_cifar, test_gnn_benchmark, test_mnist, test_planetoid, test_svhn, test_tiny_imagenet
from lab.data.own_images import write as write_file
from manifold_mixup.lab.data import DATASETS, Places

CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def publish(folder: Path, patch: pytest.MonkeyPatch) -> Places:
    """Write the files and make the registry expect them.

    24 to 200 training and 12 to 100 test images a set, and graphs of 52 to 60 nodes of three classes.
    """
    data = folder / "data"
    for name, files in CIFAR_FOLDERS.items():
        contents, entry, _ = test_cifar.made(name)
        test_cifar.write(data / files, contents)
        patch.setitem(DATASETS, name, entry)
    newer = {file: test_cifar.npy(array) for file, array in test_cifar.newer().items()}
    test_cifar.write(data / "cifar10_1", newer)
    patch.setitem(DATASETS, "cifar10_1", test_cifar.small_newer(newer))
    digits = {name: test_mnist.idx(array) for name, array in test_mnist.arrays().items()}
    for name, (files, info) in test_mnist.BASES.items():
        entry, packed = test_mnist.small(digits, files, info)
        test_mnist.write(data / test_mnist.FOLDERS[name][1], packed)
        patch.setitem(DATASETS, name, entry)
    houses = {name: test_svhn.mat(variables) for name, variables in test_svhn.arrays().items()}
    test_svhn.write(data / "svhn", houses)
    patch.setitem(DATASETS, "svhn", test_svhn.small(houses))
    for name, content in test_tiny_imagenet.FILES.items():
        write_file(data / test_tiny_imagenet.TOP / name, content)
    patch.setitem(DATASETS, "tiny_imagenet", test_tiny_imagenet.small())
    for name in test_planetoid.BASES:
        papers = test_planetoid.written(test_planetoid.made(), name)
        test_planetoid.write(data / "planetoid", papers)
        patch.setitem(DATASETS, name, test_planetoid.small(papers, name))
    for name, (file, _) in test_gnn_benchmark.NAMES.items():
        npz = test_gnn_benchmark.published(*test_gnn_benchmark.made())
        test_gnn_benchmark.write(data / "graphs" / file, npz)
        patch.setitem(DATASETS, name, test_gnn_benchmark.small(npz, name))
    return Places(data, folder / "cache")
