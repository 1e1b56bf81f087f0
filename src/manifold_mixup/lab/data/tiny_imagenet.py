"""TinyImageNet-200: 110,000 colour photographs of 64x64 pixels in 200 classes of ImageNet.

It was made for the course CS231n at Stanford. The labels of its test images were never published, so its validation
images serve as the test set here, as they do in the literature; what is set aside to validate on is taken from the
training images. Some of its JPEG files are grey; they are read as colour. Classes go by their WordNet numbers, as in
other sets that are made of ImageNet; ``words.txt`` says what they mean.

An unpacked copy in ``data_dir`` has no published checksums; numbers of files, names and annotations are checked.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from manifold_mixup.lab.data.archives import PublishedFile, download, locked, silent, unpack, verify
from manifold_mixup.lab.data.base import DataInfo, Dataset, DataSplits, Examples, Pixels, Places, Report
from manifold_mixup.lab.data.decode import Decoded, decode, file_sources
from manifold_mixup.lab.data.image_files import find_images
from manifold_mixup.lab.data.images import ImageOptions, image_facts, image_splits
from manifold_mixup.lab.data.pools import Part, fingerprint
from manifold_mixup.lab.errors import CorruptedFile, StorageError, UsageError

__all__ = ["ARCHIVE", "DATASET", "TinyImageNetOptions", "tiny_imagenet"]

FOLDER = "tiny-imagenet-200"  # inside the archive
SIZE = 64


class TinyImageNetOptions(ImageOptions):
    """How much of the 100,000 training images is used, and how training varies them."""

    validation_examples: int = Field(default=10_000, ge=0, description="training images set aside to validate on")
    crop_padding: int = Field(
        default=4, ge=0, description="training crops out of images padded with this many black pixels on each side"
    )
    flip: bool = Field(default=True, description="training mirrors every second image, at random")


def tiny_imagenet(info: DataInfo, archive: PublishedFile) -> Dataset:
    """The registry entry of ``tiny-imagenet-200.zip``.

    Args:
        info: The set's facts, with the classes in order, and sizes in which every class has the same share.
        archive: The archive.
    """

    def content(places: Places, report: Report = silent) -> dict[Part, tuple[Decoded, list[int]]]:
        folder = _bring(places, archive, report)
        return {"train": _train(info, folder, places, report), "test": _test(info, folder, places, report)}

    def load(options: TinyImageNetOptions, seed: int, places: Places) -> DataSplits:
        parts = content(places)
        examples = {part: _examples(*found) for part, found in parts.items()}
        marks = {part: (parts[part][0].digest, tuple(one.x.shape), one.y) for part, one in examples.items()}
        facts = replace(info, fingerprint=fingerprint(info.classes, marks))
        return image_splits(facts, options, examples["train"], examples["test"], seed)

    def test(options: TinyImageNetOptions, places: Places) -> tuple[DataInfo, Examples]:
        folder = _bring(places, archive, silent)
        return image_facts(info, options), _examples(*_test(info, folder, places, silent))

    def prepare(options: TinyImageNetOptions, places: Places, report: Report) -> None:
        content(places, report)

    return Dataset(
        info=info,
        options=TinyImageNetOptions,
        load=load,
        describe=lambda options, places: image_facts(info, options),
        test=test,
        prepare=prepare,
        present=partial(_present, archive),
    )


def _examples(decoded: Decoded, labels: list[int]) -> Examples:
    return Examples(decoded.images, torch.from_numpy(np.array(labels, dtype=np.int64)))


def _present(archive: PublishedFile, places: Places) -> bool:
    with suppress(OSError):
        return _unpacked(places) is not None or _packed(archive, places) is not None
    return False


def _unpacked(places: Places) -> Path | None:
    """The folder of the images, below ``data_dir`` or in the cache."""
    folders = [places.cache / "tiny_imagenet" / FOLDER]
    if places.data_dir is not None:
        folders = [places.data_dir / FOLDER, places.data_dir, *folders]
    return next((f for f in folders if (f / "wnids.txt").is_file() and (f / "val").is_dir()), None)


def _packed(archive: PublishedFile, places: Places) -> Path | None:
    path = None if places.data_dir is None else places.data_dir / archive.name
    return path if path is not None and path.is_file() else None


def _bring(places: Places, archive: PublishedFile, report: Report) -> Path:
    """The folder of the images; if there is none, the archive is downloaded and unpacked into the cache.

    Raises:
        UsageError: ``data_dir`` does not exist.
        CorruptedFile: The archive is damaged or not the published one.
        StorageError: It is missing and cannot be fetched, or the cache cannot be written.
    """
    if places.data_dir is not None and not places.data_dir.is_dir():
        raise UsageError(f"the data folder {places.data_dir} does not exist")
    kept = places.cache / "tiny_imagenet"
    try:
        folder = _unpacked(places)
        if folder is None:
            with locked(kept):
                folder = _unpacked(places)  # another process may have brought it
                if folder is None:
                    folder = kept / FOLDER
                    hint = f"{FOLDER} was looked for in {', '.join(map(str, filter(None, (places.data_dir, kept))))}"
                    path = _packed(archive, places) or download(archive, kept, report, hint=hint)
                    verify(path, archive, report)
                    unpack(path, folder, _wanted, limit=archive.unpacked_size, report=report)
                    if path.parent == kept:
                        path.unlink(missing_ok=True)  # its content is there now
    except PermissionError as error:
        raise StorageError(Path(error.filename or kept), error, "read") from error
    return folder


def _wanted(name: str) -> bool:
    """Everything but the test images, whose labels are unknown, and the boxes around the things in the images."""
    return name in ("wnids.txt", "words.txt") or (
        name.startswith(("train/", "val/")) and not name.endswith("_boxes.txt")
    )


def _train(info: DataInfo, folder: Path, places: Places, report: Report) -> tuple[Decoded, list[int]]:
    """``train/<class>/images/*.JPEG``.

    Raises:
        CorruptedFile: Classes or images are missing, or are others than the published ones.
    """
    assert info.sizes is not None
    listed = _lines(folder / "wnids.txt")
    if sorted(listed) != sorted(info.classes):
        raise CorruptedFile(f"{folder / 'wnids.txt'} names other classes than the published ones")
    names, labels = [], []
    for label, wnid in enumerate(info.classes):
        place = folder / "train" / wnid / "images"
        found = find_images(place) if place.is_dir() else []
        if len(found) * len(info.classes) != info.sizes[0]:
            raise CorruptedFile(
                f"{place} holds {len(found)} images, not {info.sizes[0] // len(info.classes)}; {_again(folder)}"
            )
        names += [f"{wnid}/images/{name}" for name in found]
        labels += [label] * len(found)
    return _decoded(folder / "train", names, places, report), labels


def _test(info: DataInfo, folder: Path, places: Places, report: Report) -> tuple[Decoded, list[int]]:
    """``val/images/*.JPEG``, in the order of ``val/val_annotations.txt``, which says what they show.

    Raises:
        CorruptedFile: An annotation names no class or no image, or an image has none.
    """
    assert info.sizes is not None
    path = folder / "val" / "val_annotations.txt"
    known = {wnid: label for label, wnid in enumerate(info.classes)}
    labels: dict[str, int] = {}
    for number, line in enumerate(_lines(path), 1):
        name, wnid, *_ = [*line.split("\t"), ""]
        if wnid not in known:
            raise CorruptedFile(f"{path}, line {number}: {wnid!r} is no class of wnids.txt")
        if name in labels:
            raise CorruptedFile(f"{path}, line {number}: {name!r} has two annotations")
        labels[name] = known[wnid]
    place = folder / "val" / "images"
    found = set(find_images(place))
    for names, what in (
        (labels.keys() - found, "is annotated, but missing"),
        (found - labels.keys(), "is not annotated"),
    ):
        if names:
            raise CorruptedFile(f"{place}: {min(names)} {what}; {_again(folder)}")
    if len(labels) != info.sizes[1]:
        raise CorruptedFile(f"{place} holds {len(labels):,} images, not {info.sizes[1]:,}; {_again(folder)}")
    return _decoded(place, list(labels), places, report), list(labels.values())


def _decoded(root: Path, names: list[str], places: Places, report: Report) -> Decoded:
    found = decode(file_sources(root, names, str(root)), SIZE, 3, places, report)
    if found.broken:
        raise CorruptedFile(f"{root}: images cannot be decoded: {found.summary()}; {_again(root)}")
    if found.resized is not None:
        name, width, height = found.resized
        raise CorruptedFile(f"{root}: {name} has {width}x{height} pixels, not {SIZE}x{SIZE}; {_again(root)}")
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise StorageError(path, error, "read") from error
    except UnicodeDecodeError as error:
        raise CorruptedFile(f"{path} is no text") from error


def _again(folder: Path) -> str:
    return f"delete {FOLDER} and unpack {ARCHIVE.name} again, or name another folder with --data-dir"


ARCHIVE = PublishedFile(
    "tiny-imagenet-200.zip",
    md5="90528d7ca1a48142e341f4ef8d21d0de",
    urls=("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
    unpacked_size=1_000_000_000,
)

WNIDS = """
n01443537 n01629819 n01641577 n01644900 n01698640 n01742172 n01768244 n01770393 n01774384 n01774750 n01784675
n01855672 n01882714 n01910747 n01917289 n01944390 n01945685 n01950731 n01983481 n01984695 n02002724 n02056570
n02058221 n02074367 n02085620 n02094433 n02099601 n02099712 n02106662 n02113799 n02123045 n02123394 n02124075
n02125311 n02129165 n02132136 n02165456 n02190166 n02206856 n02226429 n02231487 n02233338 n02236044 n02268443
n02279972 n02281406 n02321529 n02364673 n02395406 n02403003 n02410509 n02415577 n02423022 n02437312 n02480495
n02481823 n02486410 n02504458 n02509815 n02666196 n02669723 n02699494 n02730930 n02769748 n02788148 n02791270
n02793495 n02795169 n02802426 n02808440 n02814533 n02814860 n02815834 n02823428 n02837789 n02841315 n02843684
n02883205 n02892201 n02906734 n02909870 n02917067 n02927161 n02948072 n02950826 n02963159 n02977058 n02988304
n02999410 n03014705 n03026506 n03042490 n03085013 n03089624 n03100240 n03126707 n03160309 n03179701 n03201208
n03250847 n03255030 n03355925 n03388043 n03393912 n03400231 n03404251 n03424325 n03444034 n03447447 n03544143
n03584254 n03599486 n03617480 n03637318 n03649909 n03662601 n03670208 n03706229 n03733131 n03763968 n03770439
n03796401 n03804744 n03814639 n03837869 n03838899 n03854065 n03891332 n03902125 n03930313 n03937543 n03970156
n03976657 n03977966 n03980874 n03983396 n03992509 n04008634 n04023962 n04067472 n04070727 n04074963 n04099969
n04118538 n04133789 n04146614 n04149813 n04179913 n04251144 n04254777 n04259630 n04265275 n04275548 n04285008
n04311004 n04328186 n04356056 n04366367 n04371430 n04376876 n04398044 n04399382 n04417672 n04456115 n04465501
n04486054 n04487081 n04501370 n04507155 n04532106 n04532670 n04540053 n04560804 n04562935 n04596742 n04597913
n06596364 n07579787 n07583066 n07614500 n07615774 n07695742 n07711569 n07715103 n07720875 n07734744 n07747607
n07749582 n07753592 n07768694 n07871810 n07873807 n07875152 n07920052 n09193705 n09246464 n09256479 n09332890
n09428293 n12267677
"""

DATASET = tiny_imagenet(
    DataInfo(
        name="tiny_imagenet",
        title=(
            "TinyImageNet-200: small photographs in 200 classes of ImageNet; the test set is its validation set, since "
            "the labels of its own test set are not published"
        ),
        shape=(3, SIZE, SIZE),
        classes=tuple(WNIDS.split()),
        features=("4,096 values each of red, green and blue",),
        source="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        terms="images of ImageNet, for non-commercial research and education; cite Le and Yang 2015",
        sizes=(100_000, 10_000),
        pixels=Pixels(mean=(0.5, 0.5, 0.5), sd=(0.5, 0.5, 0.5), crop_padding=4, flip=True),  # as in the authors' code
    ),
    ARCHIVE,
)
