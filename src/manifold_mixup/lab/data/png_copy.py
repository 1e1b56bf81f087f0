"""A published set of images, read from a copy of it as PNG files in one folder per class.

Such a copy has the published images and labels but not their order, so a run on it draws other subsets and batches than
one on the published files. It is read only where the published files are not at hand; what was read is checked against
checksums of the decoded pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from manifold_mixup.lab.data.archives import silent
from manifold_mixup.lab.data.base import DataInfo, Dataset, DataSplits, Examples, Places, Report
from manifold_mixup.lab.data.decode import decode, file_sources
from manifold_mixup.lab.data.images import ImageOptions, image_facts, image_splits
from manifold_mixup.lab.data.published import FileSet, Part, check_examples
from manifold_mixup.lab.errors import CorruptedFile, StorageError

__all__ = ["PngCopy", "or_png_copy"]


@dataclass(frozen=True)
class PngCopy:
    """What a copy consists of.

    Attributes:
        folder: Its folder below ``data_dir``, which holds ``train/CLASS/*.png`` and ``test/CLASS/*.png``.
        source: Where it can be had.
        digests: The sha256 of the pixels of each part, images ordered by class and then by file name. It holds for
            the labels and the order too, on which the subsets and batches of a run depend.
    """

    folder: str
    source: str
    digests: tuple[tuple[Part, str], ...]

    @property
    def instead(self) -> str:
        """What an error says where the published files are not at hand."""
        return f"the copy that 'git clone {self.source}' makes is read as well"

    def found(self, places: Places) -> Path | None:
        """The copy, if it or a part of it is there."""
        with suppress(OSError):
            if places.data_dir is not None:
                folder = places.data_dir / self.folder
                return folder if any((folder / part).is_dir() for part, _ in self.digests) else None
        return None


def or_png_copy(published: Dataset, files: FileSet, copy: PngCopy) -> Dataset:
    """A set that is read from its published files, or, where they are not at hand, from a copy of it.

    Args:
        published: The set as it is read from its published files.
        files: Those files.
        copy: The copy. Its checksums go into the fingerprint of the facts, so that a run which began on the published
            files cannot go on with it, nor the other way round.
    """
    info = published.info

    def chosen(places: Places) -> Path | None:
        return None if files.present(places) else copy.found(places)

    def facts() -> DataInfo:
        marks = ",".join(digest[:16] for _, digest in copy.digests)
        return replace(info, title=f"{info.title} (PNG copy: {copy.source})", fingerprint=f"png:{marks}")

    def read(folder: Path, part: Part, places: Places, report: Report = silent) -> Examples:
        return _read(info, copy, folder, part, places, report)

    def load(options: ImageOptions, seed: int, places: Places) -> DataSplits:
        if (folder := chosen(places)) is None:
            return published.load(options, seed, places)
        return image_splits(facts(), options, read(folder, "train", places), read(folder, "test", places), seed)

    def test(options: ImageOptions, places: Places) -> tuple[DataInfo, Examples]:
        if (folder := chosen(places)) is None:
            assert published.test is not None
            return published.test(options, places)
        return image_facts(facts(), options), read(folder, "test", places)

    def prepare(options: ImageOptions, places: Places, report: Report) -> None:
        if (folder := chosen(places)) is None:
            assert published.prepare is not None
            published.prepare(options, places, report)
            return
        for part, _ in copy.digests:
            read(folder, part, places, report)

    def present(places: Places) -> bool:
        return files.present(places) or copy.found(places) is not None

    return replace(published, load=load, test=test, prepare=prepare, present=present)


def _read(info: DataInfo, copy: PngCopy, folder: Path, part: Part, places: Places, report: Report) -> Examples:
    """One part of a copy, decoded once and then kept in the cache.

    Raises:
        CorruptedFile: An image is missing, cannot be decoded or has another size, or the pixels are not the pinned
            ones.
        StorageError: A file or folder cannot be read, or the cache cannot be written.
        MissingExtra: Pillow is not installed.
    """
    assert info.sizes is not None
    each = info.sizes[part == "test"] // len(info.classes)
    again = f"delete {folder} and 'git clone {copy.source}' again, or name another folder with --data-dir"
    names, labels = [], []
    for label, name in enumerate(info.classes):
        there = sorted(_images(folder / part / name))
        if len(there) != each:
            raise CorruptedFile(
                f"{folder / part / name} should hold {each} PNG images, but holds {len(there)}; {again}"
            )
        names += [f"{name}/{image}" for image in there]
        labels += [label] * each
    root = folder / part
    found = decode(file_sources(root, names, str(root)), info.shape[-1], info.shape[0], places, report)
    if found.broken:
        raise CorruptedFile(f"{root}: images cannot be decoded: {found.summary()}; {again}")
    if found.resized is not None:
        name, width, height = found.resized
        raise CorruptedFile(
            f"{root}: {name} has {width}x{height} pixels, not {info.shape[-1]}x{info.shape[-2]}; {again}"
        )
    if found.digest != dict(copy.digests)[part]:
        raise CorruptedFile(
            f"{root}: the pixels are not the published ones: their sha256 is {found.digest}, not "
            f"{dict(copy.digests)[part]}; {again}"
        )
    return check_examples(info, part, found.images.numpy(), np.array(labels, dtype=np.int64), root)


def _images(folder: Path) -> Iterator[str]:
    try:
        yield from (path.name for path in folder.iterdir() if path.suffix == ".png")
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(folder, error, "read") from error
