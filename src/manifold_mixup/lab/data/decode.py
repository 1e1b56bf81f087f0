"""Encoded images become one array of bytes, once: decoded in parallel, kept in the cache, read back from there.

What decoding does to one image is in :mod:`~manifold_mixup.lab.data.image_files`. An image that cannot be decoded
(empty, cut off, something else, or of absurdly many pixels) is left out and listed.

Threads decode, not processes: Pillow lets other threads run while it decodes and resizes, nothing has to be copied
between processes, and on two cores processes were not clearly faster.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manifold_mixup.lab.data.archives import locked, silent
from manifold_mixup.lab.data.base import Places, Report
from manifold_mixup.lab.data.image_files import decode_image, reason, require_pillow
from manifold_mixup.lab.errors import CorruptedFile, StorageError, UsageError
from manifold_mixup.lab.storage import read_json, write_json

__all__ = ["Decoded", "Sources", "available_memory", "check_memory", "decode", "file_sources"]

VERSION = 1  # of what decoding does; another one makes all caches anew
BLOCK = 16  # images per task of a thread
NAMED = 5  # broken images that an error names


@dataclass(frozen=True)
class Sources:
    """Encoded images that belong together.

    Attributes:
        title: What they are, for progress and errors.
        names: What each of them is called.
        read: From an index to the bytes of that image. It is called by several threads.
        identity: Changes whenever an image does; plain values that JSON takes.
        missing: Indices of images that are known not to exist, and why.
    """

    title: str
    names: Sequence[str]
    read: Callable[[int], bytes]
    identity: object
    missing: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Decoded:
    """What became of some sources.

    Attributes:
        images: ``(n, channels, size, size)``, uint8, in the order of the sources without the broken ones; mapped from
            the cache, so only what is touched takes memory.
        kept: Which sources they are, ``(n,)``.
        broken: Name and reason of each image that was left out.
        resized: The first image that had another size, and its width and height; None if there is none.
        digest: The sha256 of the pixels.
        listing: The JSON file that lists all broken images.
    """

    images: Tensor
    kept: npt.NDArray[np.int64]
    broken: tuple[tuple[str, str], ...]
    resized: tuple[str, int, int] | None
    digest: str
    listing: Path

    def check_broken(self, title: str, limit: float) -> None:
        """Refuse images of which too many are broken.

        Args:
            title: What they are.
            limit: Which share of them may be broken.

        Raises:
            CorruptedFile: It is more.
        """
        total = len(self.kept) + len(self.broken)
        if len(self.broken) > limit * total:
            raise CorruptedFile(
                f"{title}: {len(self.broken):,} of {total:,} images cannot be decoded, more than max_broken={limit:g} "
                f"allows: {self.summary()}; {self.listing} lists them all; replace them or set max_broken"
            )

    def summary(self) -> str:
        """The first broken images, with what is wrong with them; empty if there is none."""
        named = ", ".join(f"{name} ({why})" for name, why in self.broken[:NAMED])
        return named + (f" and {len(self.broken) - NAMED:,} more" if len(self.broken) > NAMED else "")


def file_sources(root: Path, names: Sequence[str], title: str) -> Sources:
    """Files below a folder. A link to a file is read like a file; one that leads nowhere is a broken image.

    Args:
        root: The folder.
        names: Their paths below it.
        title: What they are.

    Raises:
        StorageError: A file cannot be looked at.
    """
    marks: list[tuple[str, int, int]] = []
    missing: dict[int, str] = {}
    for i, name in enumerate(names):
        try:
            found = (root / name).stat()
        except FileNotFoundError:
            missing[i] = "it does not exist"
            marks.append((name, -1, 0))
        except OSError as error:
            raise StorageError(root / name, error, "read") from error
        else:
            marks.append((name, found.st_size, found.st_mtime_ns))

    def read(i: int) -> bytes:
        path = root / names[i]
        try:
            return path.read_bytes()
        except OSError as error:
            raise StorageError(path, error, "read") from error

    return Sources(title, names, read, [str(root.resolve()), marks], missing)


def available_memory() -> int | None:
    """Bytes of memory that are free or can be freed, or all that there are, or None; whatever the system tells."""
    limits = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with suppress(OSError, ValueError):  # what a container may take
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    if not limits:
        with suppress(AttributeError, OSError, ValueError):
            limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits, default=None)


def check_memory(count: int, size: int, channels: int, title: str) -> None:
    """Refuse images that do not fit into memory.

    Raises:
        UsageError: They take more than is free, before any copy of them.
    """
    needed, free = count * channels * size**2, available_memory()
    if free is not None and needed > free:
        side = math.isqrt(free // (2 * channels * count))  # the splits are copies
        fitting = max(1, side - side % 8 if side > 8 else side)
        raise UsageError(
            f"{title}: {count:,} images of {size}x{size} pixels take {needed / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB "
            f"of memory are free: set size to {fitting} or less"
        )


def decode(sources: Sources, size: int, channels: int, places: Places, report: Report = silent) -> Decoded:
    """All images of some sources; from the cache if they were decoded before.

    The cache is found by the sources' identity, the size, the channels and the version of Pillow. What is read from
    there is checked; a cache that was cut off or changed is made anew.

    Args:
        sources: The encoded images.
        size: Side of the squares to make of them.
        channels: 3 or 1.
        places: Where the cache is.
        report: Is told how many images were decoded.

    Raises:
        UsageError: They do not fit into memory.
        StorageError: A file cannot be read, or the cache cannot be written; nothing half-written is left.
        MissingExtra: Pillow is not installed.
    """
    pillow = require_pillow()
    check_memory(len(sources), size, channels, sources.title)
    text = json.dumps([VERSION, pillow, size, channels, sources.identity])
    folder = places.cache / "decoded" / hashlib.sha256(text.encode()).hexdigest()[:32]
    found = _read(folder, size, channels)
    if found is None:
        with locked(folder):
            found = _read(folder, size, channels)  # another process may have decoded them
            if found is None:
                _write(folder, sources, size, channels, report)
                found = _read(folder, size, channels)
    if found is None:
        raise StorageError(folder, OSError("what was just written there is something else"), "read")
    return found


def _read(folder: Path, size: int, channels: int) -> Decoded | None:
    """What :func:`_write` wrote; None if it is missing, cut off or changed."""
    listing = folder / "images.json"
    try:
        facts = read_json(listing)
        broken = {int(i): (str(name), str(why)) for i, name, why in facts["broken"]}
        kept = np.array([i for i in range(facts["count"]) if i not in broken], dtype=np.int64)
        array = np.zeros((0, channels, size, size), dtype=np.uint8)
        if len(kept):  # mapped copy-on-write, because torch takes writable arrays only
            array = np.load(folder / "images.npy", mmap_mode="c", allow_pickle=False)
        resized = facts["resized"]
        if resized is not None:
            resized = str(resized[0]), int(resized[1]), int(resized[2])
        digest = hashlib.sha256(array.reshape(-1).data).hexdigest()
        if array.shape != (len(kept), channels, size, size) or array.dtype != np.uint8 or digest != facts["sha256"]:
            return None
    except (StorageError, CorruptedFile, OSError, ValueError, EOFError, KeyError, TypeError, IndexError):
        return None
    return Decoded(torch.from_numpy(array), kept, tuple(broken.values()), resized, digest, listing)


def _write(folder: Path, sources: Sources, size: int, channels: int, report: Report) -> None:
    """Decode into a file beside the final one, which gets its name at the end; the lock keeps others away."""
    path, temporary = folder / "images.npy", folder / ".images.npy.tmp"
    broken: list[tuple[int, str, str]] = []
    resized: tuple[str, int, int] | None = None
    digest = hashlib.sha256()
    outcomes = closing(_outcomes(sources, size, channels))
    try:
        with temporary.open("wb") as file, warnings.catch_warnings(), outcomes as found:
            warnings.simplefilter("ignore")  # what Pillow thinks of files that it can decode
            start = _write_header(file, (len(sources), channels, size, size))
            for i, (pixels, why, own) in enumerate(found):
                if pixels is None:
                    broken.append((i, _printable(sources.names[i]), why))
                else:
                    file.write(pixels)
                    digest.update(pixels)
                    if own != (size, size) and resized is None:
                        resized = _printable(sources.names[i]), *own
                if (i + 1) % BLOCK == 0 or i + 1 == len(sources):
                    report(f"decode {sources.title}", i + 1, len(sources))
            file.seek(0)
            if _write_header(file, (len(sources) - len(broken), channels, size, size)) != start:
                raise OSError("the header of the array has changed its length")
            file.flush()
            os.fsync(file.fileno())
        facts = {"count": len(sources), "broken": broken, "resized": resized, "sha256": digest.hexdigest()}
        write_json(folder / "images.json", facts)
        temporary.replace(path)
    except OSError as error:
        raise StorageError(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> int:
    """Write the header of an array in numpy's own format, and return where it ends; numpy leaves room in it."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.tell()


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


Outcome = tuple[bytes | None, str, tuple[int, int]]
"""Pixels of an image or None, what is wrong with it, and its own width and height."""


def _outcomes(sources: Sources, size: int, channels: int) -> Generator[Outcome, None, None]:
    """What becomes of each image, in order. At most a few blocks per thread are held at a time."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: deque[Future[list[Outcome]]] = deque()
    work = partial(_decode_block, sources, size, channels)
    with ThreadPoolExecutor(threads) as pool:
        try:
            for start in range(0, len(sources), BLOCK):
                waiting.append(pool.submit(work, range(start, min(start + BLOCK, len(sources)))))
                if len(waiting) > 4 * threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _decode_block(sources: Sources, size: int, channels: int, block: range) -> list[Outcome]:
    return [_outcome(sources, i, size, channels) for i in block]


def _outcome(sources: Sources, i: int, size: int, channels: int) -> Outcome:
    if i in sources.missing:
        return None, sources.missing[i], (0, 0)
    content = sources.read(i)
    if not content:
        return None, "it has 0 bytes", (0, 0)
    try:
        pixels, own = decode_image(content, size, channels)
    except MemoryError as error:
        raise StorageError(Path(sources.names[i]), OSError("there is not enough memory"), "decode") from error
    except Exception as error:
        return None, reason(error), (0, 0)
    return pixels.tobytes(), "", own
