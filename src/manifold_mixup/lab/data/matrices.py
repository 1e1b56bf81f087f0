"""Sparse matrices as published graphs hold them, and the pickles of numbers in which some of them lie.

The files of Planetoid are Python-2 pickles of scipy's matrices, of numpy's arrays and of a dictionary of lists. They
are read as :mod:`~manifold_mixup.lab.data.pickles` reads those of CIFAR: what a pickle names is not imported; a class
of this file stands for it, which holds numbers and does nothing else.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from manifold_mixup.lab.data.pickles import Names, load_pickle

__all__ = ["CsrMatrix", "Lists", "read_number_pickle"]

Indices = npt.NDArray[np.int64]
Lists = dict[int, list[int]]
NUMBERS = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8")
OBJECT = "O8"


@dataclass(frozen=True)
class CsrMatrix:
    """A matrix in compressed rows: row ``i`` has ``data[j]`` in column ``indices[j]`` for j from ``indptr[i]`` on.

    Attributes:
        shape: Rows and columns.
        data: The values, ``(k,)``. Zeros may be among them, and values of one place are added up.
        indices: The column of each value, ``(k,)``, in any order within a row.
        indptr: Where each row begins, and the end of the last, ``(rows + 1,)``.
    """

    shape: tuple[int, int]
    data: npt.NDArray[Any]
    indices: npt.NDArray[Any]
    indptr: npt.NDArray[Any]

    def __post_init__(self) -> None:
        """Refuse what is no such matrix.

        Raises:
            ValueError: The arrays do not fit each other or the shape.
        """
        rows, columns = self.shape
        arrays = (self.data, self.indices, self.indptr)
        if any(array.ndim != 1 for array in arrays):
            raise ValueError("the arrays of a sparse matrix should have one dimension")
        if any(array.dtype.kind not in kinds for array, kinds in zip(arrays, ("iuf", "iu", "iu"), strict=True)):
            raise ValueError("a sparse matrix should hold numbers, at places that are whole numbers")
        count = len(self.data)
        bounds = self.indptr.astype(np.int64)
        fits = len(bounds) == rows + 1 and bounds[0] == 0 and bounds[-1] == count and (np.diff(bounds) >= 0).all()
        if not fits or len(self.indices) != count:
            raise ValueError(f"the rows of a sparse matrix of shape {self.shape} do not fit its {count} values")
        if count and not 0 <= int(self.indices.min()) <= int(self.indices.max()) < columns:
            raise ValueError(f"a sparse matrix of shape {self.shape} has values outside its columns")
        if not np.isfinite(self.data).all():
            raise ValueError("a sparse matrix holds a value that is not finite")

    @property
    def rows(self) -> Indices:
        """The row of each value, ``(k,)``."""
        ends = self.indptr.astype(np.int64)
        return np.repeat(np.arange(self.shape[0]), ends[1:] - ends[:-1])

    @property
    def places(self) -> Indices:
        """Row and column of each value, ``(2, k)``."""
        return np.stack([self.rows, self.indices.astype(np.int64)])


class _DType:
    """Stands for ``numpy.dtype``; numbers are let through, and the object that numpy puts around a matrix."""

    __slots__ = ("code", "order")

    def __init__(self, code: bytes | str, *rest: object) -> None:
        self.code, self.order = _text(code), "|"
        if self.code not in (*NUMBERS, OBJECT):
            raise pickle.UnpicklingError(f"it holds an array of type {code!r}, not of numbers")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = _text(state[1])
        if self.order not in "<>|":
            raise pickle.UnpicklingError(f"it holds numbers in byte order {self.order!r}")


class _Array:
    """Stands for ``numpy.ndarray`` and for the function that makes an empty one."""

    __slots__ = ("value",)

    def __init__(self, *rest: object) -> None:
        self.value: Any = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], _DType, bool, bytes | list[Any]]) -> None:
        _, shape, dtype, columns_first, content = state
        if not isinstance(dtype, _DType):
            raise pickle.UnpicklingError("it holds an array of something else than numbers")
        if dtype.code == OBJECT:
            if shape != () or not isinstance(content, list):
                raise pickle.UnpicklingError("it holds an array of objects")
            (self.value,) = content
        else:
            if not isinstance(content, bytes):
                raise pickle.UnpicklingError("it holds an array of something else than numbers")
            array = np.frombuffer(content, dtype=np.dtype(dtype.order + dtype.code))
            self.value = array.reshape(shape, order="F" if columns_first else "C")


class _Csr:
    """Stands for scipy's ``csr_matrix``."""

    __slots__ = ("state",)

    def __setstate__(self, state: dict[Any, Any]) -> None:
        self.state = {_text(key): value for key, value in state.items()}

    def finish(self) -> CsrMatrix:
        rows, columns = self.state["_shape"]
        data, indices, indptr = (_numbers(self.state[key]) for key in ("data", "indices", "indptr"))
        return CsrMatrix((int(rows), int(columns)), data, indices, indptr)


class _Lists(dict[Any, Any]):
    """Stands for ``collections.defaultdict``, whatever it would make of a key that is missing."""

    __slots__ = ()

    def __init__(self, *rest: object) -> None:
        super().__init__()


class _List:
    """Stands for ``list``, which such a dictionary would make."""

    __slots__ = ()


NAMES: Names = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("scipy.sparse.csr", "csr_matrix"): _Csr,
    ("scipy.sparse._csr", "csr_matrix"): _Csr,
    ("collections", "defaultdict"): _Lists,
    ("__builtin__", "list"): _List,
}


def read_number_pickle(content: bytes, path: Path) -> CsrMatrix | npt.NDArray[Any] | Lists:
    """Read a pickled matrix, array or dictionary of lists of numbers; nothing that it names is imported or called.

    Args:
        content: The pickle.
        path: Where it comes from, for errors.

    Raises:
        CorruptedFile: It is no whole pickle, holds something else, or asks for something that it does not need.
    """
    return load_pickle(content, path, NAMES, _finished)


def _finished(value: Any) -> CsrMatrix | npt.NDArray[Any] | Lists:
    if isinstance(value, _Array) and not isinstance(value.value, np.ndarray):
        value = value.value  # the object inside an array of one object
    if isinstance(value, _Csr):
        return value.finish()
    if isinstance(value, _Array):
        return _numbers(value)
    if isinstance(value, dict):
        for key, items in value.items():
            if type(key) is not int or not isinstance(items, list) or any(type(item) is not int for item in items):
                raise pickle.UnpicklingError(f"under {key!r} it holds something else than a list of whole numbers")
        return dict(value)
    raise pickle.UnpicklingError(f"it holds a {type(value).__name__}, no matrix, array or dictionary of lists")


def _numbers(value: object) -> npt.NDArray[Any]:
    if not isinstance(value, _Array) or not isinstance(value.value, np.ndarray):
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__} where an array of numbers should be")
    return value.value


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
