"""The user's own images, ``folder:PATH``: one folder for each class, alone or below ``train`` and ``test``.

``PATH/cat/*.png, PATH/dog/*.png`` are images that are divided here; ``PATH/train/cat/*.png, PATH/test/cat/*.png`` are
divided already, and ``PATH/val`` may hold images to validate on. Inside the folder of a class images may lie in
further folders. The folder of a class may be a link; links to folders inside it are not followed, so nothing is read
twice and nothing from elsewhere. Images in no folder of a class are not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import Field

from manifold_mixup.lab.data.base import DataInfo, Dataset, DataSplits, Examples, Places, Report
from manifold_mixup.lab.data.decode import file_sources
from manifold_mixup.lab.data.image_files import SUFFIXES, find_images
from manifold_mixup.lab.data.pools import (
    Part,
    Pool,
    PoolOptions,
    pool_facts,
    pool_splits,
    pool_test,
    prepare_pools,
)
from manifold_mixup.lab.errors import StorageError, UsageError

__all__ = ["DATASET", "FolderOptions"]

PARTS: Mapping[str, Part] = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}
NAMED = 5  # classes that an error names


class FolderOptions(PoolOptions):
    """Which images, and how they are read, divided and varied."""

    path: str = Field(
        default="", description="the folder: PATH/<class>/*.png, or PATH/train/<class> and PATH/test/<class>"
    )


def _path(options: FolderOptions) -> Path:
    if not options.path:
        raise UsageError("data 'folder' needs a path: folder:PATH on the command line, path in a recipe")
    return Path(options.path).expanduser()


def _parts(path: Path) -> dict[Part, Path]:
    """The folders of images that are divided already; empty if they are not.

    Raises:
        UsageError: There is no such folder, or it cannot be told which of both it is.
        StorageError: It cannot be read.
    """
    if not path.is_dir():
        raise UsageError(f"folder:{path}: {'it is no folder' if path.exists() else 'there is no such folder'}")
    folders = _folders(path)
    named = [folder for folder in folders if folder.name.lower() in PARTS]
    others = [folder for folder in folders if folder not in named]
    if not named or (others and all(_holds_images(folder) for folder in named)):  # a class of the name "train"
        return {}
    if others:
        raise UsageError(
            f"{path} holds {_names(f.name for f in named)} with folders inside, and beside them "
            f"{_names(f.name for f in others)}: either it holds the folders of the classes, or train, test and val"
        )
    parts: dict[Part, Path] = {}
    for folder in named:
        part = PARTS[folder.name.lower()]
        if part in parts:
            raise UsageError(f"{path} holds both {parts[part].name!r} and {folder.name!r}, which mean the same")
        parts[part] = folder
    return parts


def _folders(path: Path) -> list[Path]:
    """The folders in a folder, by name, without hidden ones and what macOS leaves in archives."""
    try:
        found = [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name != "__MACOSX"]
    except OSError as error:
        raise StorageError(path, error, "read") from error
    return sorted(found, key=lambda p: p.name)


def _holds_images(path: Path) -> bool:
    try:
        return any(p.suffix.lower() in SUFFIXES and not p.name.startswith(".") for p in path.iterdir())
    except OSError as error:
        raise StorageError(path, error, "read") from error


def _names(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(map(repr, listed[:NAMED])) + (" and more" if len(listed) > NAMED else "")


def _pool(path: Path) -> tuple[tuple[str, ...], Pool]:
    """The classes in a folder, sorted by name, and their images, sorted by path.

    Raises:
        UsageError: It holds no classes, or one without images.
        StorageError: It cannot be read.
    """
    classes = tuple(folder.name for folder in _folders(path))
    if not classes:
        found = "images, but no folders of them" if _holds_images(path) else "no folders of images"
        raise UsageError(f"{path} holds {found}: put the images of each class into a folder with its name")
    images = [[f"{name}/{image}" for image in find_images(path / name)] for name in classes]
    empty = [name for name, of_class in zip(classes, images, strict=True) if not of_class]
    if empty:
        raise UsageError(
            f"{path} holds folders without images: {_names(empty)}; fill or remove them (images end in "
            f"{', '.join(SUFFIXES)}; hidden files and links to folders are left out)"
        )
    for name in classes:
        if not name.isprintable():
            raise UsageError(f"{path}: {name!r} cannot be the name of a class; rename the folder")
    labels = np.repeat(np.arange(len(classes)), [len(of_class) for of_class in images]).astype(np.int64)
    names = [image for of_class in images for image in of_class]
    return classes, Pool(file_sources(path, names, str(path)), labels)


def _pools(options: FolderOptions) -> tuple[tuple[str, ...], dict[Part, Pool]]:
    """The classes and the images to train, to validate and to test on, as far as they are divided.

    Raises:
        UsageError: The folder is not laid out as it should be.
        StorageError: It cannot be read.
    """
    path = _path(options)
    parts = _parts(path) or {"train": path}
    if "train" not in parts:
        raise UsageError(f"{path} holds {_names(p.name for p in parts.values())}, but no 'train' to train on")
    found = {part: _pool(folder) for part, folder in parts.items()}
    classes, _ = found["train"]
    for part, (others, _) in found.items():
        only = [sorted(set(classes) - set(others)), sorted(set(others) - set(classes))]
        texts = [f"{_names(c)} only in {parts[p].name}" for c, p in zip(only, ("train", part), strict=True) if c]
        if texts:
            raise UsageError(f"{path}: the classes in {parts[part].name} are others: {'; '.join(texts)}")
    if len(classes) < 2:
        raise UsageError(f"{parts['train']} holds one class alone, {classes[0]!r}: there is nothing to tell it from")
    return classes, {part: pool for part, (_, pool) in found.items()}


def _info(options: FolderOptions) -> DataInfo:
    return replace(DATASET.info, title=f"images in {options.path}", source=options.path)


def load(options: FolderOptions, seed: int, places: Places) -> DataSplits:
    """The splits of one run.

    Raises:
        UsageError: The folder is not laid out as it should be, the images differ in size, do not fit into memory, ...
        CorruptedFile: Too many images are broken.
        StorageError: A file cannot be read, or the cache cannot be written.
    """
    classes, pools = _pools(options)
    return pool_splits(_info(options), options, classes, pools, seed, places)


def describe(options: FolderOptions, places: Places) -> DataInfo:
    """Shape and classes, from the names of the files and, unless ``size`` is set, the headers of some.

    Raises:
        As :func:`load`.
    """
    classes, pools = _pools(options)
    return pool_facts(_info(options), options, classes, pools.values())


def test(options: FolderOptions, places: Places) -> tuple[DataInfo, Examples]:
    """All images of folders of classes, or those below ``test``, sorted by path; there may be one class alone.

    Raises:
        As :func:`load`.
    """
    path = _path(options)
    parts = _parts(path)
    if parts and "test" not in parts:
        raise UsageError(
            f"{path} holds {_names(p.name for p in parts.values())}, but no 'test': name the folder of images to "
            "measure on, such as " + str(next(iter(parts.values())))
        )
    classes, pool = _pool(parts.get("test", path))
    return pool_test(_info(options), options, classes, pool, places)


def prepare(options: FolderOptions, places: Places, report: Report) -> None:
    """Decode all images into the cache.

    Raises:
        As :func:`load`.
    """
    classes, pools = _pools(options)
    prepare_pools(options, classes, pools, places, report)


DATASET = Dataset(
    info=DataInfo(
        name="folder",
        title="your own images, in one folder for each class; or below train and test",
        shape=(),
        classes=(),
        features=(),
        source="your own files",
        terms="your own",
    ),
    options=FolderOptions,
    load=load,
    describe=describe,
    test=test,
    prepare=prepare,
    positional="path",
)
