"""Which columns of a table hold the images or numbers and the labels, and what labels mean.

Tables are pyarrow's, their columns described by the features of Hugging Face ``datasets``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from manifold_mixup.lab.data.decode import Sources
from manifold_mixup.lab.errors import StorageError, UsageError, nearest

__all__ = ["Columns", "class_indices", "class_names", "find_columns", "image_sources", "numbers"]

LABELS = ("label", "labels", "target", "class", "y")  # what decides if several columns could be the label
MAX_CLASSES = 100_000  # whoever has more has taken the wrong column
BYTES = ("binary", "large_binary")
TEXT = ("string", "large_string")
NAMED = 12  # columns that an error names


@dataclass(frozen=True)
class Columns:
    """What is read of a table.

    Attributes:
        label: The column of the labels.
        image: The column of the images; None if examples are numbers.
        features: The columns of the numbers; empty if examples are images.
    """

    label: str
    image: str | None
    features: tuple[str, ...]


def _dtype(feature: Any) -> str:
    """``"int64"``, ``"string"``, ``"binary"``, ...; empty for what is no single value."""
    return str(getattr(feature, "dtype", ""))


def _names_classes(feature: Any) -> bool:
    return type(feature).__name__ == "ClassLabel"


def _is_image(feature: Any) -> bool:
    """An image as ``datasets`` knows it, the same without that knowledge, or its bare bytes."""
    return (
        type(feature).__name__ == "Image"
        or (isinstance(feature, Mapping) and "bytes" in feature)
        or (_dtype(feature) in BYTES)
    )


def _is_numeric(feature: Any) -> bool:
    return not _names_classes(feature) and _dtype(feature).startswith(("int", "uint", "float", "bool", "double"))


def _is_label(feature: Any) -> bool:
    dtype = _dtype(feature)
    return _names_classes(feature) or dtype.startswith(("int", "uint", "bool")) or dtype in TEXT


def find_columns(
    features: Mapping[str, Any], title: str, image: str | None, label: str | None, numeric: Sequence[str] | None
) -> Columns:
    """Find the columns that were not named.

    The image is the one column of images. The label is the one column of class labels; else the one that is called
    ``label``, ``labels``, ``target``, ``class`` or ``y``; else the one column of text or, if it is known which columns
    it is told from, of whole numbers. Without an image, all other columns of numbers are the features; columns of text
    are left out.

    Args:
        features: Of ``datasets``, by column.
        title: Whose columns they are, for errors.
        image: The column of images, if it was named.
        label: The column of labels, if it was named.
        numeric: The columns of numbers, if they were named.

    Raises:
        UsageError: A named column does not exist or holds something else, or it cannot be told which one is meant.
    """
    listed = ", ".join(f"{name!r} ({_kind(feature)})" for name, feature in list(features.items())[:NAMED])
    listed += f" and {len(features) - NAMED} more" if len(features) > NAMED else ""
    for option, name in (
        ("image_column", image),
        ("label_column", label),
        *(("feature_columns", n) for n in numeric or ()),
    ):
        if name is not None and name not in features:
            raise UsageError(f"{title}: {option}: there is no column {name!r}: {nearest(name, features)}")
    if image is not None and numeric is not None:
        raise UsageError(f"{title}: examples are images or numbers: set image_column or feature_columns")
    if image is not None and not _is_image(features[image]):
        raise UsageError(f"{title}: image_column: {image!r} holds no images; there is {listed}")
    if image is None and numeric is None:
        image = _only(features, _is_image, f"{title}: several columns hold images: set image_column; there is {listed}")
    rest = {name: feature for name, feature in features.items() if name != image and name not in (numeric or ())}
    if label is None:
        label = _label(
            rest,
            f"{title}: it is not clear which column is the label: set label_column; there is {listed}",
            whole=image is not None or numeric is not None,
        )
    elif label not in rest:
        raise UsageError(f"{title}: {label!r} is the label and what it is told from")
    if image is not None:
        return Columns(label, image, ())
    chosen = tuple(numeric or (name for name, feature in rest.items() if name != label and _is_numeric(feature)))
    wrong = [name for name in chosen if not _is_numeric(features[name])]
    if wrong or not chosen:
        what = f"column {wrong[0]!r} holds no numbers" if wrong else "no column holds images or numbers"
        raise UsageError(f"{title}: {what}; there is {listed}")
    return Columns(label, None, chosen)


def _kind(feature: Any) -> str:
    if _names_classes(feature):
        return f"{len(feature.names)} classes"
    return "image" if _is_image(feature) else _dtype(feature) or type(feature).__name__


def _only(features: Mapping[str, Any], fits: Callable[[Any], bool], several: str) -> str | None:
    found = [name for name, feature in features.items() if fits(feature)]
    if len(found) > 1:
        raise UsageError(several)
    return found[0] if found else None


def _label(features: Mapping[str, Any], unclear: str, *, whole: bool) -> str:
    name = _only(features, _names_classes, unclear)
    if name is None:
        named = [known for known in LABELS if known in features]
        name = named[0] if len(named) == 1 else None
    if name is None:
        name = _only(features, lambda f: _dtype(f) in TEXT or (whole and _is_label(f)), unclear)
    if name is None:
        raise UsageError(unclear)
    return name


def class_names(feature: Any, column: Any, where: str, *, all_of_them: bool) -> tuple[str, ...]:
    """The names of the classes: those that ``datasets`` knows, or the labels of one split.

    Text is sorted. Whole numbers are the classes 0 to C-1.

    Args:
        feature: Of ``datasets``.
        column: The labels, a chunked array of pyarrow.
        where: The column and the split, for errors.
        all_of_them: Every class has to be there, and two at least.

    Raises:
        UsageError: A label is missing or out of range.
    """
    values = _values(column, where)
    found = np.unique(values)
    if _names_classes(feature):
        names = tuple(map(str, feature.names))
    elif values.dtype.kind == "U":
        names = tuple(map(str, found))
    else:
        if found[0] < 0:
            row = int(np.flatnonzero(values == found[0])[0])
            raise UsageError(f"{where}, row {row}: {found[0]} is no class; labels that are numbers go from 0 to C-1")
        if found[-1] >= MAX_CLASSES:
            raise UsageError(f"{where}: labels go up to {found[-1]}, which is no number of classes")
        gaps = np.flatnonzero(found != np.arange(len(found)))
        if all_of_them and len(gaps):
            row = int(np.flatnonzero(values == found[gaps[0]])[0])
            raise UsageError(
                f"{where}, row {row}: the label is {found[gaps[0]]}, but none is {gaps[0]}; labels that are numbers go "
                "from 0 to C-1 and leave none out"
            )
        names = tuple(map(str, range(int(found[-1]) + 1)))
    if all_of_them and len(found) < 2:
        raise UsageError(f"{where}: all labels are {found[0]!s}: there is one class alone, and nothing to tell it from")
    return names


def class_indices(feature: Any, column: Any, classes: tuple[str, ...], where: str) -> npt.NDArray[np.int64]:
    """The class of each row.

    Args:
        feature: Of ``datasets``.
        column: The labels, a chunked array of pyarrow.
        classes: The names of the classes.
        where: The column and the split, for errors.

    Raises:
        UsageError: A label is missing or none of the classes; the first such row is named.
    """
    values = _values(column, where)
    if values.dtype.kind == "U":
        order = np.array(classes)
        by_name = np.argsort(order)
        found = by_name[np.searchsorted(order, values, sorter=by_name).clip(0, len(order) - 1)]
        wrong = np.flatnonzero(order[found] != values)
    else:
        found = values
        wrong = np.flatnonzero((values < 0) | (values >= len(classes)))
    if len(wrong):
        row, value = int(wrong[0]), values[wrong[0]]
        hint = "; -1 stands for a label that is not published: choose another split" if str(value) == "-1" else ""
        kind = "a name" if values.dtype.kind == "U" else "a number"
        known = nearest(str(value), classes) if kind == "a name" else f"there is 0 to {len(classes) - 1}"
        raise UsageError(f"{where}, row {row}: {value!s} is {kind} of no class: {known}{hint}")
    indices: npt.NDArray[np.int64] = found.astype(np.int64)
    return indices


def _values(column: Any, where: str) -> npt.NDArray[Any]:
    """Labels as int64 or text."""
    if not len(column):
        raise UsageError(f"{where}: there are no rows")
    values = column.to_pylist()
    missing = next((i for i, value in enumerate(values) if value is None or value != value), None)
    if missing is not None:
        raise UsageError(f"{where}, row {missing}: the label is missing")
    if isinstance(values[0], str):
        return np.array(values, dtype=np.str_)
    array = np.array(values)
    if array.dtype.kind == "b" or (array.dtype.kind == "f" and (array == np.floor(array)).all()):
        array = array.astype(np.int64)  # whole numbers with a gap in the column are read as floating point
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise UsageError(f"{where}: labels should be whole numbers or text, not {values[0]!r}")
    return array.astype(np.int64)


def image_sources(column: Any, title: str, identity: object) -> Sources:
    """The images of a column, called by their row.

    Args:
        column: A chunked array of pyarrow: bytes, or structures with ``bytes`` and ``path``.
        title: What they are.
        identity: What changes when they do.
    """

    def read(i: int) -> bytes:
        value = column[i].as_py()
        if isinstance(value, Mapping):
            content, path = value.get("bytes"), value.get("path")
            if content is None and path:
                try:
                    return Path(path).read_bytes()
                except OSError as error:
                    raise StorageError(Path(path), error, "read") from error
            value = content
        return b"" if value is None else bytes(value)

    names = [f"row {i}" for i in range(len(column))]
    return Sources(title, names, read, identity, {})


def numbers(table: Any, columns: Sequence[str], where: str) -> npt.NDArray[np.float32]:
    """Columns of numbers side by side: ``(rows, columns)``, float32.

    Raises:
        UsageError: A value is missing or not finite.
    """
    values = np.empty((table.num_rows, len(columns)), dtype=np.float32)
    with np.errstate(over="ignore"):
        for place, name in enumerate(columns):
            column = table.column(name)
            values[:, place] = np.array(column.to_pylist(), dtype=np.float64)  # None becomes NaN
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        row, place = map(int, wrong[0])
        value = table.column(columns[place])[row].as_py()
        raise UsageError(
            f"{where}, row {row}: {columns[place]!r} is {'missing' if value is None else value}: fill in a finite "
            "number, remove the row, or leave the column out with feature_columns"
        )
    return values
