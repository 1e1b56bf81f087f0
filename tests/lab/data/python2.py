"""Writes pickles as Python 2's cPickle wrote the files of CIFAR and Planetoid.

Protocol 2, strings of bytes, the old modules of numpy and scipy.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix


class _Writer:
    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.memos = 0

    def memo(self) -> None:
        """Remember the object on top of the stack; cPickle numbers them from 1."""
        self.memos += 1
        self.out += b"q" + bytes([self.memos]) if self.memos < 256 else b"r" + struct.pack("<I", self.memos)

    def string(self, value: bytes) -> None:
        self.out += b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))
        self.out += value
        self.memo()

    def number(self, value: int) -> None:
        if 0 <= value < 256:
            self.out += b"K" + bytes([value])
        elif 0 <= value < 65536:
            self.out += b"M" + struct.pack("<H", value)
        else:
            self.out += b"J" + struct.pack("<i", value)

    def array(self, value: np.ndarray) -> None:
        code = f"{value.dtype.kind}{value.dtype.itemsize}".encode()
        self.out += b"cnumpy.core.multiarray\n_reconstruct\n"
        self.memo()
        self.out += b"cnumpy\nndarray\n"
        self.memo()
        self.out += b"K\x00\x85U\x01b\x87R"
        self.memo()
        self.out += b"(K\x01"
        for size in value.shape:
            self.number(size)
        self.out += {1: b"\x85", 2: b"\x86", 3: b"\x87"}[value.ndim] + b"cnumpy\ndtype\n"
        self.memo()
        self.out += b"U" + bytes([len(code)]) + code + b"K\x00K\x01\x87R"
        self.memo()
        order = b"|" if value.dtype.itemsize == 1 else b"<"
        self.out += b"(K\x03U\x01" + order + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb\x89"
        content = value.tobytes()
        self.out += b"T" + struct.pack("<i", len(content)) + content + b"tb"

    def items(self, value: dict[Any, Any]) -> None:
        self.out += b"("
        for key, item in value.items():
            self.write(key)
            self.write(item)
        self.out += b"u"

    def matrix(self, value: csr_matrix) -> None:
        self.out += b"cscipy.sparse.csr\ncsr_matrix\n"
        self.memo()
        self.out += b")\x81"
        self.memo()
        state = {"format": "csr", "_shape": value.shape, "maxprint": 50}
        self.write(state | {key: getattr(value, key) for key in ("indptr", "indices", "data")})
        self.out += b"b"

    def write(self, value: Any) -> None:
        if isinstance(value, csr_matrix):
            self.matrix(value)
        elif isinstance(value, tuple):
            for item in value:
                self.write(item)
            self.out += {1: b"\x85", 2: b"\x86", 3: b"\x87"}[len(value)]
        elif isinstance(value, defaultdict):
            self.out += b"ccollections\ndefaultdict\n"
            self.memo()
            self.out += b"c__builtin__\nlist\n"
            self.memo()
            self.out += b"\x85R"
            self.memo()
            self.items(value)
        elif isinstance(value, dict):
            self.out += b"}"
            self.memo()
            self.items(value)
        elif isinstance(value, list):
            self.out += b"]"
            self.memo()
            for start in range(0, len(value), 1000):
                self.out += b"("
                for item in value[start : start + 1000]:
                    self.write(item)
                self.out += b"e"
        elif isinstance(value, np.ndarray):
            self.array(value)
        elif isinstance(value, int):
            self.number(value)
        else:
            self.string(value.encode() if isinstance(value, str) else value)


def dumps(value: Any) -> bytes:
    """The pickle of a dictionary of numbers, strings, lists, arrays and sparse matrices, or of one of these."""
    writer = _Writer()
    writer.write(value)
    return bytes(writer.out) + b"."
