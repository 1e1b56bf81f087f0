"""Tables of images or numbers through Hugging Face ``datasets``: ``hf:NAME``.

NAME is a data set of the Hub, or a local copy, which needs no network: a parquet, arrow or CSV file, a folder of such
files (those with train, test or validation in their names are these splits), or a folder that ``save_to_disk`` left.
A file on disk comes before a name on the Hub. Code that comes with a data set is never run.

Images are decoded like those of :mod:`~manifold_mixup.lab.data.folder`. Numbers become float32 and are standardised
with the mean and standard deviation of the training rows, before any are set aside to validate on. Rows are counted
from 0.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BeforeValidator, Field

from manifold_mixup.lab.data.base import DataInfo, Dataset, DataSplits, Examples, Places, Report
from manifold_mixup.lab.data.columns import Columns, class_indices, class_names, find_columns, image_sources, numbers
from manifold_mixup.lab.data.pools import (
    Part,
    Pool,
    PoolOptions,
    divide,
    fingerprint,
    pool_facts,
    pool_splits,
    pool_test,
    prepare_pools,
    splits,
)
from manifold_mixup.lab.errors import CorruptedFile, LabError, MissingExtra, StorageError, UsageError, nearest

__all__ = ["DATASET", "HubOptions"]

READERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
}
VALIDATION = ("validation", "val", "valid", "dev")  # what the split is called


def _names(value: Any) -> Any:
    """Names joined by ``+``, the form of the command line, as a list."""
    return value.split("+") if isinstance(value, str) else value


class HubOptions(PoolOptions):
    """Which table and columns, and how examples are read, divided and varied."""

    name: str = Field(default="", description="name on the Hub, or path of a file or folder")
    config: str | None = Field(default=None, description="which configuration, if the data set has several")
    train_split: str | None = Field(default=None, description="unset: train, or the only split")
    validation_split: str | None = Field(default=None, description="unset: validation, if there is a test split too")
    test_split: str | None = Field(default=None, description="unset: test, else validation, else test_share of train")
    image_column: str | None = Field(default=None, description="unset: the only column of images")
    label_column: str | None = Field(default=None, description="unset: the only column that can be the label")
    feature_columns: Annotated[list[str] | None, BeforeValidator(_names)] = Field(
        default=None, description="columns of numbers, in place of images, joined by +; unset: all but the label"
    )
    standardise: bool = Field(default=True, description="numbers: subtract the training mean, divide by its deviation")


@dataclass(frozen=True)
class Table:
    """One split.

    Attributes:
        rows: A table of pyarrow.
        features: What ``datasets`` knows of its columns.
        title: What it is called in errors.
        identity: Changes when its content does.
    """

    rows: Any
    features: Mapping[str, Any]
    title: str
    identity: object


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No bars, messages and warnings of ``datasets`` and of the hub's client; afterwards all is as it was."""
    from huggingface_hub import utils

    shown = [library for library in (datasets, utils) if not library.are_progress_bars_disabled()]
    levels = [(library.logging, library.logging.get_verbosity()) for library in (datasets, utils)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for library in shown:
                library.disable_progress_bars()
            for logs, _ in levels:
                logs.set_verbosity(logs.CRITICAL)
            yield
        finally:
            for library in shown:
                library.enable_progress_bars()
            for logs, level in levels:
                logs.set_verbosity(level)


def _open(options: HubOptions, places: Places) -> dict[str, Any]:
    """All splits, by name.

    Raises:
        UsageError: There is no such file, folder or data set.
        CorruptedFile: A file is no such table.
        StorageError: A file cannot be read, or the cache cannot be written.
        MissingExtra: ``datasets`` is not installed.
    """
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtra("datasets", "lab") from error
    try:
        with _quiet(datasets):
            found = _load(datasets, options, str(places.cache / "hf"))
    except LabError:
        raise
    except Exception as error:  # datasets raises its own, the client's and whatever its parsers ran into
        raise _explained(error, options) from error
    return dict(found) if isinstance(found, Mapping) else {"train": found}


def _load(datasets: Any, options: HubOptions, cache: str) -> Any:
    if not options.name:
        raise UsageError("data 'hf' needs a name or a path: hf:NAME on the command line, name in a recipe")
    path = Path(options.name).expanduser()
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise UsageError(f"hf:{path}: the file should end in {', '.join(READERS)}")
        if options.config is not None:
            raise UsageError(f"hf:{path}: a file has no configurations, so config has nothing to say; leave it out")
        builder, keywords = READERS[path.suffix.lower()]
        files = glob.escape(str(path.absolute()))
        return datasets.load_dataset(builder, data_files=files, cache_dir=cache, **keywords)
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(path.absolute()))
        kinds = sorted({p.suffix.lower() for p in path.rglob("*") if p.suffix.lower() in READERS})
        if len(kinds) > 1:
            raise UsageError(f"hf:{path} holds files of several kinds, {' and '.join(kinds)}: name one of them")
        return datasets.load_dataset(str(path.absolute()), options.config, cache_dir=cache)
    if path.is_absolute() or options.name.startswith((".", "~")) or path.suffix.lower() in READERS:
        raise UsageError(f"hf:{options.name}: there is no such file or folder")
    if hasattr(datasets.packaged_modules, options.name):
        raise UsageError(f"hf:{options.name} is a reader of datasets, no data set: name the file or folder to read")
    return datasets.load_dataset(options.name, options.config, cache_dir=cache)


def _explained(error: Exception, options: HubOptions) -> LabError:
    """What went wrong, in one line."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EFBIG):
            return StorageError(Path(cause.filename or options.name), cause)
    text = " ".join(str(causes[-1] if type(error).__name__ == "DatasetGenerationError" else error).split())[:300]
    if Path(options.name).expanduser().exists():
        return CorruptedFile(f"hf:{options.name} cannot be read: {text or type(error).__name__}")
    return UsageError(
        f"hf:{options.name} is no file or folder here, and cannot be had from the Hub: {text or type(error).__name__}"
    )


def _table(split: Any, options: HubOptions, name: str) -> Table:
    marks = []
    for file in split.cache_files:
        found = Path(file["filename"]).stat()
        marks.append([file["filename"], found.st_size, found.st_mtime_ns])
    rows = split.with_format("arrow")[:]
    return Table(
        rows, dict(split.features), f"hf:{options.name}, {name}", [marks, name, getattr(split, "_fingerprint", "")]
    )


def _chosen(options: HubOptions, names: list[str], *, training: bool = True) -> dict[Part, str]:
    """Which split is which.

    Raises:
        UsageError: There is no such split, or it cannot be told.
    """
    for option in ("train_split", "validation_split", "test_split"):
        name = getattr(options, option)
        if name is not None and name not in names:
            raise UsageError(f"hf:{options.name}: {option}: there is no split {name!r}: {nearest(name, names)}")
    free = [name for name in names if name not in (options.train_split, options.validation_split, options.test_split)]
    validation = next((name for name in VALIDATION if name in free), None)
    test = options.test_split or ("test" if "test" in free else None)
    if test is None and options.validation_split is None:
        test, validation = validation, None  # as for data whose test labels are not published
    chosen: dict[Part, str] = {}
    only = names[0] if len(names) == 1 and names[0] not in ("test", *VALIDATION) else None
    train = options.train_split or ("train" if "train" in free else only)
    if train is not None:
        chosen["train"] = train
    elif training:
        raise UsageError(f"hf:{options.name} has no split 'train': set train_split; {nearest('', names)}")
    if test is not None and test != train:
        chosen["test"] = test
    if (validation := options.validation_split or validation) is not None and validation != train:
        chosen["validation"] = validation
    if len(set(chosen.values())) < len(chosen):
        raise UsageError(f"hf:{options.name}: one split is taken for two: {', '.join(map(repr, chosen.values()))}")
    return chosen


@dataclass(frozen=True)
class Content:
    """What is read of a data set: its columns, its classes, and a table and labels for each part."""

    columns: Columns
    classes: tuple[str, ...]
    tables: Mapping[Part, Table]
    labels: Mapping[Part, npt.NDArray[np.int64]]

    def pools(self) -> dict[Part, Pool]:
        """The images of each part."""
        found: dict[Part, Pool] = {}
        for part, table in self.tables.items():
            column = table.rows.column(self.columns.image)
            found[part] = Pool(
                image_sources(column, table.title, [table.identity, self.columns.image]), self.labels[part]
            )
        return found

    def numbers(self) -> dict[Part, Examples]:
        """The numbers of each part, as they are stored."""
        found: dict[Part, Examples] = {}
        for part, table in self.tables.items():
            x = torch.from_numpy(numbers(table.rows, self.columns.features, table.title))
            found[part] = Examples(x, torch.from_numpy(self.labels[part]))
        return found


def _content(options: HubOptions, tables: Mapping[Part, Table], *, training: bool = True) -> Content:
    first = tables["train"] if training else tables["test"]
    columns = find_columns(
        first.features, first.title, options.image_column, options.label_column, options.feature_columns
    )
    if columns.image is None and options.size is not None:
        raise UsageError(f"{first.title} holds no images, so size has nothing to say; leave it out")
    needed = {columns.label, *columns.features, *((columns.image,) if columns.image else ())}
    for table in tables.values():
        if lacking := sorted(needed - set(table.features)):
            raise UsageError(f"{table.title} lacks the column {lacking[0]!r}")
    where = {part: f"{table.title}, {columns.label!r}" for part, table in tables.items()}
    part: Part = "train" if training else "test"
    feature = first.features[columns.label]
    classes = class_names(feature, first.rows.column(columns.label), where[part], all_of_them=training)
    labels = {
        part: class_indices(feature, table.rows.column(columns.label), classes, where[part])
        for part, table in tables.items()
    }
    return Content(columns, classes, tables, labels)


def _all(options: HubOptions, places: Places) -> Content:
    """All parts of a data set to train on."""
    found = _open(options, places)
    tables = {part: _table(found[name], options, name) for part, name in _chosen(options, list(found)).items()}
    return _content(options, tables)


def _info(options: HubOptions) -> DataInfo:
    return replace(DATASET.info, title=options.name, source=options.name)


def load(options: HubOptions, seed: int, places: Places) -> DataSplits:
    """The splits of one run.

    Raises:
        UsageError: There is no such data set, split or column, a label is missing or out of range, ...
        CorruptedFile: A file is damaged, or too many images are.
        StorageError: A file cannot be read, or the cache cannot be written.
    """
    content = _all(options, places)
    if content.columns.image is not None:
        return pool_splits(_info(options), options, content.classes, content.pools(), seed, places)
    stored = content.numbers()
    mark = fingerprint(content.classes, {part: _digest(one) for part, one in stored.items()})
    parts = divide(stored, options)
    if options.standardise:
        mean, sd = _moments(parts["train"].x)
        parts = {part: Examples((one.x - mean) / sd, one.y) for part, one in parts.items()}
    return splits(replace(_number_facts(options, content), fingerprint=mark), options, parts, seed)


def _digest(examples: Examples) -> tuple[str, tuple[int, ...], torch.Tensor]:
    digest = hashlib.sha256(examples.x.numpy().astype("<f4").tobytes()).hexdigest()
    return digest, tuple(examples.x.shape), examples.y


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each column, float32; 1 is the deviation of a column that is always the same."""
    sd = x.double().std(dim=0, correction=0)
    varies = x.amax(dim=0) > x.amin(dim=0)
    return x.double().mean(dim=0).float(), torch.where(varies, sd, 1.0).float()


def _number_facts(options: HubOptions, content: Content) -> DataInfo:
    columns = content.columns.features
    return replace(_info(options), shape=(len(columns),), classes=content.classes, features=columns)


def describe(options: HubOptions, places: Places) -> DataInfo:
    """Shape and classes. A data set of the Hub is downloaded for that; no image is decoded.

    Raises:
        As :func:`load`.
    """
    content = _all(options, places)
    if content.columns.image is None:
        return _number_facts(options, content)
    return pool_facts(_info(options), options, content.classes, content.pools().values())


def test(options: HubOptions, places: Places) -> tuple[DataInfo, Examples]:
    """The rows of the test split, or all rows of data that have one split alone, in their order.

    Raises:
        As :func:`load`.
    """
    found = _open(options, places)
    chosen = _chosen(options, list(found), training=False)
    if "test" not in chosen and len(found) > 1:
        raise UsageError(f"hf:{options.name} has no split 'test': set test_split; {nearest('', found)}")
    name = chosen.get("test", next(iter(found)))
    content = _content(options, {"test": _table(found[name], options, name)}, training=False)
    if content.columns.image is not None:
        return pool_test(_info(options), options, content.classes, content.pools()["test"], places)
    examples = content.numbers()["test"]
    info = replace(
        _number_facts(options, content), fingerprint=fingerprint(content.classes, {"test": _digest(examples)})
    )
    if options.standardise:
        if chosen.get("train", name) == name:
            raise UsageError(
                f"hf:{options.name} has no training rows to standardise by: put it beside the training data as "
                "test.csv and train.csv and name the folder, or train and measure with standardise=false"
            )
        train = _table(found[chosen["train"]], options, chosen["train"])
        mean, sd = _moments(torch.from_numpy(numbers(train.rows, content.columns.features, train.title)))
        examples = Examples((examples.x - mean) / sd, examples.y)
    return info, examples


def prepare(options: HubOptions, places: Places, report: Report) -> None:
    """Download and convert the tables, and decode their images into the cache.

    Raises:
        As :func:`load`.
    """
    report(f"read {options.name}", 0, 1)
    content = _all(options, places)
    report(f"read {options.name}", 1, 1)
    if content.columns.image is not None:
        prepare_pools(options, content.classes, content.pools(), places, report)


DATASET = Dataset(
    info=DataInfo(
        name="hf",
        title="a data set of the Hugging Face Hub, or a parquet, arrow or CSV file or folder of them",
        shape=(),
        classes=(),
        features=(),
        source="huggingface.co/datasets, or your own files",
        terms="the data set's own",
    ),
    options=HubOptions,
    load=load,
    describe=describe,
    test=test,
    prepare=prepare,
    positional="name",
)
