"""SVHN, cropped digits: house numbers from street views, 32x32 colour images in MATLAB files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import Field

from manifold_mixup.lab.data.archives import PublishedFile, read_verified
from manifold_mixup.lab.data.base import DataInfo, Dataset, Examples, Pixels
from manifold_mixup.lab.data.images import ImageOptions
from manifold_mixup.lab.data.published import FileSet, Part, check_examples, from_mirrors, published_images
from manifold_mixup.lab.errors import CorruptedFile, MissingExtra

__all__ = ["DATASET", "FILES", "SvhnOptions", "svhn"]

MIRRORS = ("http://ufldl.stanford.edu/housenumbers",)
ZERO = 10  # the published label of the digit 0


class SvhnOptions(ImageOptions):
    """How much of the 73,257 training images is used, and how training varies them: a mirrored digit is no digit."""

    validation_examples: int = Field(default=5000, ge=0, description="training images set aside to validate on")
    crop_padding: int = Field(
        default=4, ge=0, description="training crops out of images padded with this many black pixels on each side"
    )


def svhn(info: DataInfo, files: FileSet) -> Dataset:
    """The registry entry of ``train_32x32.mat`` and ``test_32x32.mat``.

    Args:
        info: The set's facts.
        files: The two files.
    """
    by_name = {file.name: file for file in files.files}

    def read(paths: Mapping[str, Path], part: Part) -> Examples:
        try:
            from scipy.io import loadmat
        except ImportError as error:
            raise MissingExtra("scipy", "lab") from error

        name = f"{part}_32x32.mat"
        path = paths[name]
        content = read_verified(path, by_name[name])
        try:
            arrays = loadmat(io.BytesIO(content), variable_names=("X", "y"))
            x, y = arrays["X"], arrays["y"]
        except Exception as error:  # scipy raises whatever its parsers ran into
            raise CorruptedFile(f"{path} is no MATLAB file with X and y: {error}") from error
        if x.ndim != 4 or y.ndim != 2 or y.dtype.kind not in "iu":
            raise CorruptedFile(f"{path} holds X of shape {x.shape} and y of shape {y.shape}, not 32x32x3xn and nx1")
        labels = y[:, 0].astype(np.int64)
        if (labels == 0).any():
            raise CorruptedFile(f"{path} holds the label 0, but the digit 0 is published as label {ZERO}")
        return check_examples(info, part, x.transpose(3, 2, 0, 1), np.where(labels == ZERO, 0, labels), path)

    return published_images(info, SvhnOptions, files, read)


FILES = FileSet(
    name="svhn",
    files=(
        PublishedFile(
            "train_32x32.mat",
            md5="e26dedcc434d2e4c54c9b2d4a06d8373",
            urls=from_mirrors(MIRRORS, "train_32x32.mat"),
            sha256="435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        ),
        PublishedFile(
            "test_32x32.mat",
            md5="eb5a983be6a315427106f1b164d9cef3",
            urls=from_mirrors(MIRRORS, "test_32x32.mat"),
            sha256="cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
        ),
    ),
    folders=("svhn", "SVHN"),
)

DATASET = svhn(
    DataInfo(
        name="svhn",
        title="SVHN: digits cropped from photographs of house numbers",
        shape=(3, 32, 32),
        classes=tuple(map(str, range(10))),
        features=("1,024 values each of red, green and blue",),
        source="http://ufldl.stanford.edu/housenumbers",
        terms="for non-commercial use only; cite Netzer, Wang, Coates, Bissacco, Wu and Ng 2011",
        sizes=(73_257, 26_032),
        pixels=Pixels(mean=(0.5, 0.5, 0.5), sd=(0.5, 0.5, 0.5), crop_padding=4),
    ),
    FILES,
)
