"""MNIST and Fashion-MNIST: 70,000 grey images of 28x28 pixels each, in the IDX format of LeCun's page."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import Field

from manifold_mixup.lab.data.archives import PublishedFile, read_verified
from manifold_mixup.lab.data.base import DataInfo, Dataset, Examples, Pixels
from manifold_mixup.lab.data.images import ImageOptions
from manifold_mixup.lab.data.published import FileSet, Part, check_examples, from_mirrors, published_images
from manifold_mixup.lab.errors import CorruptedFile

__all__ = ["FASHION_FILES", "FASHION_MNIST", "MNIST", "MNIST_FILES", "MnistOptions", "mnist_like", "parse_idx"]

UBYTE = 8  # the IDX format's code for unsigned bytes
NAMES = {"train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")}
NAMES["test"] = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")


class MnistOptions(ImageOptions):
    """How much of the 60,000 training images is used; they are not varied."""

    validation_examples: int = Field(default=5000, ge=0, description="training images set aside to validate on")


def parse_idx(content: bytes, path: Path) -> npt.NDArray[np.uint8]:
    """An array of unsigned bytes in the IDX format: a magic number, the sizes, the values.

    Args:
        content: The file's bytes.
        path: Where they come from, for errors.

    Raises:
        CorruptedFile: They are no IDX of unsigned bytes, or not as many as the header says.
    """
    dimensions = content[3] if content[:3] == bytes((0, 0, UBYTE)) and len(content) > 3 else 0
    start = 4 + 4 * dimensions
    if not dimensions or len(content) < start:
        raise CorruptedFile(f"{path} is no IDX file of unsigned bytes")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if math.prod(shape) != len(content) - start:
        raise CorruptedFile(f"{path} should hold {shape} values, but {len(content) - start} follow its header")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def mnist_like(info: DataInfo, files: FileSet) -> Dataset:
    """The registry entry of four IDX files.

    Args:
        info: The set's facts.
        files: The four files, named as on LeCun's page.
    """
    by_name = {file.name: file for file in files.files}

    def read(paths: Mapping[str, Path], part: Part) -> Examples:
        images, labels = (parse_idx(read_verified(paths[name], by_name[name]), paths[name]) for name in NAMES[part])
        if images.ndim == 3:
            images = images[:, None]  # one channel
        return check_examples(info, part, images, labels, paths[NAMES[part][0]])

    return published_images(info, MnistOptions, files, read)


MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
    "http://yann.lecun.com/exdb/mnist",
)
FASHION_MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion",
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets",
)
TRAIN_BYTES, TEST_BYTES = 60_000 * 28 * 28 + 16, 10_000 * 28 * 28 + 16  # unpacked, with the header


def _file(
    mirrors: tuple[str, ...], name: str, md5: str, unpacked_md5: str, size: int, sha256: str = ""
) -> PublishedFile:
    return PublishedFile(name, md5, from_mirrors(mirrors, name), sha256, unpacked_md5, size)


MNIST_FILES = FileSet(
    name="mnist",
    files=(
        _file(
            MNIST_MIRRORS,
            "train-images-idx3-ubyte.gz",
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "6bbc9ace898e44ae57da46a324031adb",
            TRAIN_BYTES,
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        _file(
            MNIST_MIRRORS,
            "train-labels-idx1-ubyte.gz",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "a25bea736e30d166cdddb491f175f624",
            60_008,
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        _file(
            MNIST_MIRRORS,
            "t10k-images-idx3-ubyte.gz",
            "9fb629c4189551a2d022fa330f9573f3",
            "2646ac647ad5339dbf082846283269ea",
            TEST_BYTES,
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        _file(
            MNIST_MIRRORS,
            "t10k-labels-idx1-ubyte.gz",
            "ec29112dd5afa0611ce80d1b7f02629c",
            "27ae3e4e09519cfbb04c329615203637",
            10_008,
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    folders=("mnist", "MNIST", "MNIST/raw"),
)

FASHION_FILES = FileSet(
    name="fashion_mnist",
    files=(
        _file(
            FASHION_MIRRORS,
            "train-images-idx3-ubyte.gz",
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            TRAIN_BYTES,
        ),
        _file(
            FASHION_MIRRORS,
            "train-labels-idx1-ubyte.gz",
            "25c81989df183df01b3e8a0aad5dffbe",
            "9018921c3c673c538a1fc5bad174d6f9",
            60_008,
        ),
        _file(
            FASHION_MIRRORS,
            "t10k-images-idx3-ubyte.gz",
            "bef4ecab320f06d8554ea6380940ec79",
            "8181f5470baa50b63fa0f6fddb340f0a",
            TEST_BYTES,
        ),
        _file(
            FASHION_MIRRORS,
            "t10k-labels-idx1-ubyte.gz",
            "bb300cfdad3c16e7a12a480ee83cd310",
            "15d484375f8d13e6eb1aabb0c3f46965",
            10_008,
        ),
    ),
    folders=("fashion-mnist", "fashion_mnist", "FashionMNIST/raw"),
)

MNIST = mnist_like(
    DataInfo(
        name="mnist",
        title="MNIST: handwritten digits, grey-scale",
        shape=(1, 28, 28),
        classes=tuple(map(str, range(10))),
        features=("784 grey values",),
        source="http://yann.lecun.com/exdb/mnist",
        terms="CC BY-SA 3.0; cite LeCun, Bottou, Bengio and Haffner 1998",
        sizes=(60_000, 10_000),
        pixels=Pixels(mean=(0.1307,), sd=(0.3081,)),  # of the training pixels
    ),
    MNIST_FILES,
)

FASHION_MNIST = mnist_like(
    DataInfo(
        name="fashion_mnist",
        title="Fashion-MNIST: pictures of clothes, grey-scale",
        shape=(1, 28, 28),
        classes=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        features=("784 grey values",),
        source="https://github.com/zalandoresearch/fashion-mnist",
        terms="MIT (Zalando SE 2017); cite Xiao, Rasul and Vollgraf 2017",
        sizes=(60_000, 10_000),
        pixels=Pixels(mean=(0.2860,), sd=(0.3530,)),  # of the training pixels
    ),
    FASHION_FILES,
)
