"""Sets of images that are read from published files: where the files lie, and what such sets have in common.

A set's files are looked for below ``data_dir``, in their published layout, and then in the cache, into which whatever
is missing is downloaded. ``data_dir`` is never written to. Every file's checksum is verified before it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from manifold_mixup.lab.data.archives import PublishedFile, download, locked, silent, unpack, verify
from manifold_mixup.lab.data.base import DataInfo, Dataset, DataSplits, Examples, Places, Report
from manifold_mixup.lab.data.images import ImageOptions, image_facts, image_splits
from manifold_mixup.lab.errors import CorruptedFile, StorageError, UsageError

__all__ = ["FileSet", "Part", "Reader", "check_examples", "from_mirrors", "published_images"]

Part = Literal["train", "test"]

Reader = Callable[[Mapping[str, Path], Part], Examples]
"""From the paths of the files, by published name, to the images of one part as they are stored."""


@dataclass(frozen=True)
class FileSet:
    """The published files of one data set.

    Attributes:
        name: The data set's name, which is also its folder in the cache.
        files: What is read.
        folders: Where below ``data_dir`` the files may lie, besides ``data_dir`` itself.
        archive: The archive in which they were published; None if they were published one by one.
        folder: The folder inside the archive.
        otherwise: What else is read where the files are not at hand, for errors; empty if there is nothing.
    """

    name: str
    files: tuple[PublishedFile, ...]
    folders: tuple[str, ...] = ()
    archive: PublishedFile | None = None
    folder: str = ""
    otherwise: str = ""

    def present(self, places: Places) -> bool:
        """Whether everything is at hand, packed or unpacked; no file is read."""
        with suppress(OSError):
            found = map(self._found, (*self._data_folders(places), self._cache(places)))
            return any(len(paths) == len(self.files) for paths in found) or self._data_archive(places) is not None
        return False

    def bring(self, places: Places, report: Report = silent) -> dict[str, Path]:
        """The path of every file, by published name; what is missing is unpacked or downloaded into the cache.

        Raises:
            UsageError: ``data_dir`` does not exist.
            CorruptedFile: An archive is damaged or not the published one.
            StorageError: A file is missing and cannot be fetched, or the cache cannot be written.
        """
        if places.data_dir is not None and not places.data_dir.is_dir():
            raise UsageError(f"the data folder {places.data_dir} does not exist")
        try:
            return self._bring(places, report)
        except PermissionError as error:
            raise StorageError(Path(error.filename or self._cache(places)), error, "read") from error

    def _bring(self, places: Places, report: Report) -> dict[str, Path]:
        incomplete: tuple[Path, dict[str, Path]] | None = None
        for folder in self._data_folders(places):
            found = self._found(folder)
            if len(found) == len(self.files):
                return found
            if found and incomplete is None:
                incomplete = folder, found
        if incomplete is not None and self._data_archive(places) is None:
            raise self._missing(*incomplete)
        cache = self._cache(places)
        found = self._found(cache)
        if len(found) < len(self.files):
            with locked(places.cache / self.name):
                found = self._found(cache)  # another process may have brought them
                if len(found) < len(self.files):
                    self._fetch(places, found, report)
                    found = self._found(cache)
        return found

    def _fetch(self, places: Places, found: Mapping[str, Path], report: Report) -> None:
        cache, kept = self._cache(places), places.cache / self.name
        hint = f"it was looked for in {', '.join(map(str, (*self._data_folders(places), cache)))}"
        hint += f"; {self.otherwise}" if self.otherwise else ""
        if self.archive is None:
            for file in self.files:
                if file.name not in found:
                    download(file, cache, report, hint=hint)
            return
        archive = self._data_archive(places) or download(self.archive, kept, report, hint=hint)
        verify(archive, self.archive, report)
        names = {file.name for file in self.files}
        written = unpack(archive, cache, names.__contains__, limit=self.archive.unpacked_size, report=report)
        if missing := names - set(written):
            raise CorruptedFile(f"{archive} lacks {', '.join(sorted(missing))}")
        if archive.parent == kept:
            archive.unlink(missing_ok=True)  # its content is there now

    def _data_folders(self, places: Places) -> list[Path]:
        """The set's own folders first: the files of two sets may have the same names."""
        return [] if places.data_dir is None else [*(places.data_dir / name for name in self.folders), places.data_dir]

    def _data_archive(self, places: Places) -> Path | None:
        if places.data_dir is None or self.archive is None:
            return None
        path = places.data_dir / self.archive.name
        return path if path.is_file() else None

    def _cache(self, places: Places) -> Path:
        return places.cache / self.name / self.folder

    def _found(self, folder: Path) -> dict[str, Path]:
        paths = ((file.name, folder / name) for file in self.files for name in reversed(file.names))
        return {name: path for name, path in paths if path.is_file()}

    def _missing(self, folder: Path, found: Mapping[str, Path]) -> StorageError:
        missing = [file for file in self.files if file.name not in found]
        sources = [self.archive] if self.archive is not None else missing
        places = ", ".join(file.urls[0] for file in sources if file.urls)
        names = ", ".join(file.name for file in missing)
        text = f"it lacks {names}, to be had from {places}; complete it or name another folder with --data-dir"
        text += f"; {self.otherwise}" if self.otherwise else ""
        return StorageError(folder, OSError(text), f"read {self.name} from")


def from_mirrors(mirrors: Iterable[str], name: str) -> tuple[str, ...]:
    """The addresses of a file that lies at several places under the same name."""
    return tuple(f"{mirror}/{name}" for mirror in mirrors)


def check_examples(
    info: DataInfo, part: Part, images: npt.NDArray[Any], labels: npt.NDArray[Any], path: Path
) -> Examples:
    """Turn arrays into examples, and refuse arrays that cannot be the published ones.

    Args:
        info: The data set's facts.
        part: Which part of it this is.
        images: ``(n, *info.shape)``, uint8.
        labels: ``(n,)``, whole numbers from 0.
        path: Where they come from, for errors.

    Raises:
        CorruptedFile: A shape, a type, a number of examples or a label is not as published.
    """
    assert info.sizes is not None
    size = info.sizes[part == "test"]
    if images.shape != (size, *info.shape) or images.dtype != np.uint8:
        raise CorruptedFile(
            f"{path}: the {part} images are {images.dtype} of shape {images.shape}, not uint8 of {(size, *info.shape)}"
        )
    if labels.shape != (size,) or labels.dtype.kind not in "iu":
        raise CorruptedFile(f"{path}: the {part} labels are {labels.dtype} of shape {labels.shape}, not {size} numbers")
    if size and not 0 <= labels.min() <= labels.max() < len(info.classes):
        raise CorruptedFile(
            f"{path}: the {part} labels go from {labels.min()} to {labels.max()}, but there are {len(info.classes)} "
            "classes, from 0"
        )
    writable = np.require(images, requirements=["C", "W"])
    return Examples(torch.from_numpy(writable), torch.from_numpy(labels.astype(np.int64)))


def published_images(info: DataInfo, options: type[ImageOptions], files: FileSet, read: Reader) -> Dataset:
    """The registry entry of a set with published training and test images.

    Args:
        info: Its facts, with ``sizes`` and ``pixels``.
        options: Its options.
        files: Its files.
        read: Reads one part of them, verifying their checksums.
    """

    def load(chosen: ImageOptions, seed: int, places: Places) -> DataSplits:
        paths = files.bring(places)
        return image_splits(info, chosen, read(paths, "train"), read(paths, "test"), seed)

    def test(chosen: ImageOptions, places: Places) -> tuple[DataInfo, Examples]:
        return image_facts(info, chosen), read(files.bring(places), "test")

    def prepare(chosen: ImageOptions, places: Places, report: Report) -> None:
        files.bring(places, report)

    return Dataset(
        info=info,
        options=options,
        load=load,
        describe=lambda chosen, places: image_facts(info, chosen),
        test=test,
        prepare=prepare,
        present=files.present,
    )
