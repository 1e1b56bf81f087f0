"""Pickles of plain values and byte arrays, read without running anything that they name.

The CIFAR files are Python-2 pickles: a dictionary of numbers, byte strings, lists and one numpy array. A pickle can
call whatever its loader lets it import, so this one imports nothing: the three names that a numpy array needs stand
for two classes of this file, which can hold an array of bytes and do nothing else.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from manifold_mixup.lab.errors import CorruptedFile

__all__ = ["Names", "load_pickle", "read_pickle"]

T = TypeVar("T")

Names = Mapping[tuple[str, str], Any]
"""From the module and name that a pickle asks for to the class that stands for it."""


class _DType:
    """Stands for ``numpy.dtype``; of all types only the unsigned byte is let through."""

    __slots__ = ()

    def __init__(self, code: bytes | str, *rest: object) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"it holds an array of type {code!r}, not of bytes")

    def __setstate__(self, state: object) -> None:
        pass  # byte order and alignment, which mean nothing for single bytes


class _Array:
    """Stands for ``numpy.ndarray`` and for the function that makes an empty one."""

    __slots__ = ("value",)

    def __init__(self, *rest: object) -> None:
        self.value = np.empty(0, dtype=np.uint8)

    def __setstate__(self, state: tuple[int, tuple[int, ...], _DType, bool, bytes]) -> None:
        _, shape, dtype, columns_first, content = state
        if not isinstance(dtype, _DType) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("it holds an array of something else than bytes")
        self.value = np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if columns_first else "C")


NAMES: Names = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, names: Names) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no published file does")
        return self._names[module, name]


def load_pickle(content: bytes, path: Path, names: Names, finish: Callable[[Any], T]) -> T:
    """Read a pickle; nothing that it names is imported or called, but what stands for it.

    Args:
        content: The pickle.
        path: Where it comes from, for errors.
        names: What may stand in it. Python-2 strings are bytes.
        finish: From what was read, stand-ins included, to the result; what it raises is the pickle's fault.

    Raises:
        CorruptedFile: It is no whole pickle, or it asks for something else.
    """
    try:
        return finish(_Unpickler(content, names).load())
    except (
        pickle.UnpicklingError,
        AttributeError,
        EOFError,
        IndexError,
        KeyError,
        MemoryError,
        OverflowError,
        TypeError,
        ValueError,
    ) as error:
        raise CorruptedFile(f"{path} is not a pickle that is read here: {error}") from error


def read_pickle(content: bytes, path: Path) -> dict[str, Any]:
    """Read a pickled dictionary; nothing that the pickle names is imported or called.

    Args:
        content: The pickle.
        path: Where it comes from, for errors.

    Returns:
        The dictionary, with text as keys; Python-2 strings among its values are bytes, arrays are uint8.

    Raises:
        CorruptedFile: It is no whole pickle, it is no dictionary, or it asks for something that it does not need.
    """
    return load_pickle(content, path, NAMES, _dictionary)


def _dictionary(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__}, not a dictionary")
    return {_text(key): item.value if isinstance(item, _Array) else item for key, item in value.items()}


def _text(key: object) -> str:
    return key.decode() if isinstance(key, bytes) else str(key)
