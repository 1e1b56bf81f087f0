"""What the user's own data have in common, wherever they are read from: options, splits, statistics, facts.

Nothing but the validation split and a smaller training split depends on a run's seed. Where no test examples are set
apart, a fixed share of each class is, the same in every run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from manifold_mixup.lab import streams
from manifold_mixup.lab.data.archives import silent
from manifold_mixup.lab.data.base import DataInfo, DataSplits, Examples, Pixels, Places, Report
from manifold_mixup.lab.data.decode import Sources, check_memory, decode
from manifold_mixup.lab.data.image_files import image_size, require_pillow
from manifold_mixup.lab.data.subsets import split_training
from manifold_mixup.lab.errors import CorruptedFile, UsageError
from manifold_mixup.lab.options import Options

__all__ = [
    "Part",
    "Pool",
    "PoolOptions",
    "divide",
    "fingerprint",
    "moments",
    "pool_facts",
    "pool_splits",
    "pool_test",
    "prepare_pools",
    "read_pools",
    "splits",
]

SAMPLE = 64  # images of a pool whose headers tell the common size; decoding checks all of them
CHUNK = 1 << 22  # pixels that are added up at a time

Part = Literal["train", "validation", "test"]


class PoolOptions(Options):
    """How images are read, how they are divided, and how training varies them."""

    size: int | None = Field(
        default=None, ge=1, description="side of the images in pixels; unset takes their own, if all are equal squares"
    )
    channels: Literal[1, 3] = Field(default=3, description="3 for colour, 1 for grey")
    train_examples: int | None = Field(
        default=None, ge=1, description="training examples, drawn class-balanced; unset takes all"
    )
    validation_examples: int | None = Field(
        default=None, ge=0, description="training examples set aside to validate on; unset takes validation_share"
    )
    validation_share: float = Field(
        default=0.1, ge=0, lt=1, description="share of them, unless a validation set is there"
    )
    test_share: float = Field(default=0.2, gt=0, lt=1, description="share of all examples, unless a test set is there")
    crop_padding: int | None = Field(
        default=None,
        ge=0,
        description="training crops out of images padded with this many black pixels; unset: an eighth of size",
    )
    flip: bool = Field(default=True, description="training mirrors every second image, at random")
    max_broken: float = Field(
        default=0.01, ge=0, le=1, description="share of images that may be broken; they are left out"
    )


@dataclass(frozen=True)
class Pool:
    """Encoded images with their labels, such as those of one folder.

    Attributes:
        sources: The images.
        labels: The class of each of them, int64, ``(n,)``.
    """

    sources: Sources
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Loaded:
    """Decoded images with their labels.

    Attributes:
        examples: The images that could be decoded.
        digest: Identifies their pixels.
        note: Which images were left out; empty if none was.
    """

    examples: Examples
    digest: str
    note: str


def pool_facts(info: DataInfo, options: PoolOptions, classes: tuple[str, ...], pools: Iterable[Pool]) -> DataInfo:
    """The facts about images that nobody has decoded yet; mean and standard deviation are 0.5 in place of theirs.

    Raises:
        UsageError: The size is not told and not the same for all, or they do not fit into memory.
    """
    pools = list(pools)
    size = _size(options, pools)
    for pool in pools:
        check_memory(len(pool.sources), size, options.channels, pool.sources.title)
    half = (0.5,) * options.channels
    padding = size // 8 if options.crop_padding is None else options.crop_padding
    kinds = "red, green and blue" if options.channels == 3 else "grey"
    return replace(
        info,
        shape=(options.channels, size, size),
        classes=classes,
        features=(f"{size * size:,} values{' each' if options.channels == 3 else ''} of {kinds}",),
        pixels=Pixels(half, half, padding, options.flip),
    )


def _size(options: PoolOptions, pools: Iterable[Pool]) -> int:
    return _common_size(pool.sources for pool in pools) if options.size is None else options.size


def _common_size(pools: Iterable[Sources]) -> int:
    """The side of the square that images have in common, as the headers of some of them tell.

    Raises:
        UsageError: They have different sizes, or are no squares, or none of them can be read.
    """
    require_pillow()
    first: tuple[str, tuple[int, int]] | None = None
    for sources in pools:
        for i in range(0, len(sources), max(1, len(sources) // SAMPLE)):
            if i in sources.missing:
                continue
            content = sources.read(i)
            try:
                name, size = sources.names[i], image_size(content)
            except Exception:  # decoding will list it
                continue
            first = first or (name, size)
            if size != first[1]:
                raise _sizes_differ(sources.title, name, size, first[1])
            if size[0] != size[1]:
                raise UsageError(
                    f"{sources.title}: the images are no squares, {name} has {size[0]}x{size[1]} pixels: set size, "
                    "such as size=32, to resize them and take the central square"
                )
    if first is None:
        raise UsageError("the size of the images is not known, because none that was tried can be read: set size")
    return first[1][0]


def _sizes_differ(title: str, name: str, size: tuple[int, int], others: tuple[int, int]) -> UsageError:
    return UsageError(
        f"{title}: the images have different sizes, {name} has {size[0]}x{size[1]} pixels and others have "
        f"{others[0]}x{others[1]}: set size, such as size=32, to resize them"
    )


def read_pools(
    options: PoolOptions,
    classes: tuple[str, ...],
    pools: Mapping[Part, Pool],
    places: Places,
    report: Report = silent,
    *,
    every_class: bool = True,
) -> dict[Part, Loaded]:
    """Decode images and leave out the broken ones.

    Args:
        options: The size, the channels, and how many may be broken.
        classes: The names of the classes.
        pools: The images.
        places: Where the cache is.
        report: Is told how many images were decoded.
        every_class: Refuse a pool that lacks a class.

    Raises:
        CorruptedFile: Too many are broken, or all of a class.
        UsageError: The size is not told and not the same for all, or they do not fit into memory.
        StorageError: A file cannot be read, or the cache cannot be written.
    """
    size = _size(options, pools.values())
    loaded: dict[Part, Loaded] = {}
    for part, pool in pools.items():
        title = pool.sources.title
        found = decode(pool.sources, size, options.channels, places, report)
        found.check_broken(title, options.max_broken)
        if options.size is None and found.resized is not None:
            name, *own = found.resized
            raise _sizes_differ(title, name, (own[0], own[1]), (size, size))
        if not len(found.kept):
            raise CorruptedFile(f"{title}: no image can be decoded: {found.summary()}")
        labels = pool.labels[found.kept]
        lacking = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
        if every_class and len(lacking):
            raise CorruptedFile(f"{title}: no image of class {classes[lacking[0]]!r} can be decoded")
        note = f"broken images left out ({len(found.broken):,}): {found.summary()}" if found.broken else ""
        loaded[part] = Loaded(Examples(found.images, torch.from_numpy(labels)), found.digest, note)
    return loaded


def prepare_pools(
    options: PoolOptions, classes: tuple[str, ...], pools: Mapping[Part, Pool], places: Places, report: Report
) -> None:
    """Decode images into the cache.

    Raises:
        As :func:`read_pools`.
    """
    read_pools(options, classes, pools, places, report, every_class=False)


def pool_splits(
    info: DataInfo,
    options: PoolOptions,
    classes: tuple[str, ...],
    pools: Mapping[Part, Pool],
    seed: int,
    places: Places,
) -> DataSplits:
    """The splits of one run.

    Args:
        info: The registry's facts.
        options: How images are read and divided.
        classes: The names of the classes.
        pools: The images: training, and test and validation where they are set apart.
        seed: The run's seed.
        places: Where the cache is.

    Raises:
        UsageError: There are not that many examples.
        LabError: As :func:`read_pools`.
    """
    loaded = read_pools(options, classes, pools, places)
    parts = divide({part: one.examples for part, one in loaded.items()}, options)
    facts = pool_facts(info, options, classes, pools.values())
    assert facts.pixels is not None
    mean, sd = moments(parts["train"].x)
    facts = replace(
        facts,
        pixels=replace(facts.pixels, mean=mean, sd=sd),
        source="; ".join(filter(None, (facts.source, *(one.note for one in loaded.values())))),
        fingerprint=fingerprint(
            classes, {part: (one.digest, tuple(one.examples.x.shape), one.examples.y) for part, one in loaded.items()}
        ),
    )
    return splits(facts, options, parts, seed)


def pool_test(
    info: DataInfo, options: PoolOptions, classes: tuple[str, ...], pool: Pool, places: Places
) -> tuple[DataInfo, Examples]:
    """All images of a pool, to measure a finished network on; it may lack classes.

    Raises:
        As :func:`read_pools`.
    """
    loaded = read_pools(options, classes, {"test": pool}, places, every_class=False)["test"]
    facts = pool_facts(info, options, classes, [pool])
    assert facts.pixels is not None
    mean, sd = moments(loaded.examples.x)
    mark = fingerprint(classes, {"test": (loaded.digest, tuple(loaded.examples.x.shape), loaded.examples.y)})
    source = "; ".join(filter(None, (facts.source, loaded.note)))
    pixels = replace(facts.pixels, mean=mean, sd=sd)
    return replace(facts, pixels=pixels, source=source, fingerprint=mark), loaded.examples


def divide(parts: Mapping[Part, Examples], options: PoolOptions) -> dict[Part, Examples]:
    """Set a test split apart where there is none: a share of each class, the same whatever a run's seed.

    Raises:
        UsageError: The share leaves nothing to test or nothing to train on.
    """
    if "test" in parts:
        return dict(parts)
    whole = parts["train"]
    size = round(options.test_share * len(whole))
    if not 0 < size < len(whole):
        raise UsageError(
            f"test_share {options.test_share:g} of {len(whole):,} examples leaves none to test or to train"
        )
    rows = split_training(whole.y.numpy(), streams.stream_seed(0, "data/test"), None, size)
    train, test = (torch.from_numpy(np.sort(r)) for r in rows)
    return {**parts, "train": Examples(whole.x[train], whole.y[train]), "test": Examples(whole.x[test], whole.y[test])}


def splits(info: DataInfo, options: PoolOptions, parts: Mapping[Part, Examples], seed: int) -> DataSplits:
    """Set a validation split aside where there is none, and cut the training split to size, both by the run's seed.

    Raises:
        UsageError: There are not that many examples, or validation examples are asked for and there are some already.
    """
    train = parts["train"]
    wanted = options.validation_examples
    if "validation" in parts:
        if wanted is not None:
            raise UsageError("there is a validation set, so validation_examples has nothing to say; leave it out")
        wanted = 0
    elif wanted is None:
        wanted = round(options.validation_share * len(train))
    rows, aside = (torch.from_numpy(r) for r in split_training(train.y.numpy(), seed, options.train_examples, wanted))
    validation = parts["validation"] if "validation" in parts else Examples(train.x[aside], train.y[aside])
    info = replace(info, sizes=(len(train), len(parts["test"])))
    return DataSplits(info, Examples(train.x[rows], train.y[rows]), validation, parts["test"])


def moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in units where white is 1; from exact sums.

    Args:
        images: ``(n, channels, height, width)``, uint8. A channel that is the same everywhere gets 1 as its deviation.
    """
    channels = images.shape[1]
    total, squares = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    step = max(1, CHUNK // images[:1].numel())
    for start in range(0, len(images), step):
        values = images[start : start + step].transpose(0, 1).flatten(1).double()
        total += values.sum(dim=1)
        squares += values.square().sum(dim=1)
    n = images.numel() // channels  # sums of whole numbers below 2^53 are exact, in any order
    whole = [(int(a), int(b)) for a, b in zip(total.tolist(), squares.tolist(), strict=True)]
    variances = [(n * b - a * a) / n**2 for a, b in whole]
    return tuple(a / n / 255 for a, _ in whole), tuple(v**0.5 / 255 or 1.0 for v in variances)


def fingerprint(classes: tuple[str, ...], content: Mapping[Part, tuple[str, tuple[int, ...], Tensor]]) -> str:
    """Identifies what was loaded, wherever it was read from.

    Args:
        classes: The names of the classes.
        content: The digest of the values of each part, their shape, and the labels.
    """
    parts = [
        (part, digest, list(shape), hashlib.sha256(labels.numpy().astype("<i8").tobytes()).hexdigest())
        for part, (digest, shape, labels) in sorted(content.items())
    ]
    return hashlib.sha256(json.dumps([classes, parts]).encode()).hexdigest()[:32]
