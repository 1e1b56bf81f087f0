"""Encoded images become one array of bytes, once: decoded in parallel, kept in the cache, read back from there.

An image is turned upright as its EXIF orientation says, brought to eight bits and to red, green and blue (or to grey),
and its largest central square is resized to the wanted size with Pillow's bilinear filter, which smooths what it
shrinks. That is the usual "resize the shorter side, then crop the centre", in one step. What is transparent becomes
white; of 16 bits the upper eight are kept; colour profiles are not applied; of an animation the first picture counts.

An image that cannot be decoded (empty, cut off, something else, or of absurdly many pixels) is left out and listed.

Threads decode, not processes: Pillow lets other threads run while it decodes and resizes, nothing has to be copied
between processes, and processes were not faster.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manifold_mixup.lab.data.archives import locked, silent
from manifold_mixup.lab.data.base import Places, Report
from manifold_mixup.lab.errors import CorruptedFile, MissingExtra, StorageError, UsageError
from manifold_mixup.lab.storage import read_json, write_json

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "SUFFIXES",
    "Decoded",
    "Sources",
    "available_memory",
    "check_memory",
    "common_size",
    "decode",
    "decode_image",
    "file_sources",
]

VERSION = 1  # of what decoding does; another one makes all caches anew
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # no other decoder of Pillow sees the files
MAX_PIXELS = 178_956_970  # where Pillow too takes an image for an attack on memory
BLOCK = 16  # images per task of a thread
NAMED = 5  # broken images that an error names
SAMPLE = 64  # images whose headers tell the common size; decoding checks all of them
ORIENTATION = 0x0112  # EXIF tag


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
                f"{title}: {len(self.broken)} of {total} images cannot be decoded, more than max_broken={limit:g} "
                f"allows: {self.summary()}; all of them are listed in {self.listing}; replace them or set max_broken"
            )

    def summary(self) -> str:
        """The first broken images, with what is wrong with them; empty if there is none."""
        named = ", ".join(f"{name} ({reason})" for name, reason in self.broken[:NAMED])
        return named + (f" and {len(self.broken) - NAMED} more" if len(self.broken) > NAMED else "")


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
            missing[i] = "a link to nothing"
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


def decode_image(content: bytes, size: int, channels: int) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
    """One image as pixels.

    Args:
        content: The bytes of an image file.
        size: Side of the square to make of it.
        channels: 3 for red, green and blue, 1 for grey (Pillow's weights of ITU-R 601).

    Returns:
        Pixels ``(channels, size, size)``, and the image's own width and height, upright.

    Raises:
        Exception: It is no image; Pillow raises whatever its parsers ran into.
    """
    from PIL.Image import Resampling

    with _open(content) as image:
        image.load()
        picture = _colours(_upright(image), channels)
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    square = picture.crop(box) if side == size else picture.resize((size, size), Resampling.BILINEAR, box)
    pixels: npt.NDArray[np.uint8] = np.asarray(square)
    return (pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)), (width, height)


def _open(content: bytes) -> Image:
    """An image of which only the header was read."""
    from PIL import Image as pillow

    image = pillow.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are too many")
    return image


def _upright(image: Image) -> Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged notes about an image are no damaged image
        turn = None
    return image if turn is None else image.transpose(turn)


def _colours(image: Image, channels: int) -> Image:
    """Eight bits for each of red, green and blue, or for grey."""
    from PIL import Image as pillow

    mode, kind = image.mode, getattr(image, "format", None)
    if mode.startswith("I;16") or (mode == "I" and kind in ("PNG", "PPM")):
        image = pillow.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif mode in ("I", "F"):
        raise ValueError("32-bit values, of which none is known to be white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if channels == 3 else image.convert("L")


def common_size(pools: Iterable[Sources]) -> int:
    """The side of the square that images have in common, as the headers of some of them tell.

    :attr:`Decoded.resized` tells it of all of them.

    Raises:
        UsageError: They have different sizes, or are no squares, or none of them can be read.
    """
    first: tuple[str, tuple[int, int]] | None = None
    for sources in pools:
        step = max(1, len(sources) // SAMPLE)
        for i in range(0, len(sources), step):
            name = sources.names[i]
            try:
                if i in sources.missing:
                    continue
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    size = _open(sources.read(i)).size
            except (StorageError, MissingExtra):
                raise
            except Exception:  # decoding will list it
                continue
            if size[0] != size[1]:
                raise UsageError(f"{sources.title}: {name} has {size[0]}x{size[1]} pixels and is no square: set size")
            first = first or (name, size)
            if size != first[1]:
                raise _different(sources.title, *first, name, size)
    if first is None:
        raise UsageError("the size of the images is not known, since none that was tried can be read: set size")
    return first[1][0]


def _different(title: str, one: str, size: tuple[int, int], other: str, its: tuple[int, int]) -> UsageError:
    return UsageError(
        f"{title}: the images have different sizes, {one} {size[0]}x{size[1]} and {other} {its[0]}x{its[1]} pixels: "
        "set size"
    )


def available_memory() -> int | None:
    """Bytes of memory that are free, or could be freed; the machine's memory where that is not told; None if unknown."""
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
        side = math.isqrt(free // (2 * channels * count))  # the training split is copied once
        fitting = max(1, side - side % 8 if side > 8 else side)
        raise UsageError(
            f"{title}: {count:,} images of {size}x{size} pixels take {needed / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB "
            f"of memory are free: set size to {fitting} or less"
        )


def decode(
    sources: Sources, size: int, channels: int, places: Places, report: Report = silent, *, own_size: bool = False
) -> Decoded:
    """All images of some sources; from the cache if they were decoded before.

    Args:
        sources: The encoded images.
        size: Side of the squares to make of them.
        channels: 3 or 1.
        places: Where the cache is.
        report: Is told how many images were decoded.
        own_size: Refuse images of another size.

    Raises:
        UsageError: They do not fit into memory, or have another size than they should.
        StorageError: A file cannot be read, or the cache cannot be written; nothing half-written is left.
        MissingExtra: Pillow is not installed.
    """
    try:
        import PIL
        from PIL import Image as pillow
    except ImportError as error:
        raise MissingExtra("pillow", "lab") from error

    check_memory(len(sources), size, channels, sources.title)
    text = json.dumps([VERSION, PIL.__version__, size, channels, sources.identity])
    folder = places.cache / "decoded" / hashlib.sha256(text.encode()).hexdigest()[:32]
    found = _read(folder, size, channels)
    if found is None:
        with locked(folder):
            found = _read(folder, size, channels)  # another process may have decoded them
            if found is None:
                pillow.init()  # once, before the threads ask for decoders
                _write(folder, sources, size, channels, report)
                found = _read(folder, size, channels)
    if found is None:
        raise StorageError(folder, OSError("what was written could not be read back"))
    if own_size and found.resized is not None:
        name, width, height = found.resized
        other = sources.names[found.kept[0]]
        raise _different(sources.title, other, (size, size), name, (width, height))
    return found


def _read(folder: Path, size: int, channels: int) -> Decoded | None:
    """What :func:`_write` wrote; None if it is missing, cut off or changed."""
    path, listing = folder / "images.npy", folder / "images.json"
    try:
        facts = read_json(listing)
        broken = {int(i): (str(name), str(reason)) for i, name, reason in facts["broken"]}
        kept = np.array([i for i in range(facts["count"]) if i not in broken], dtype=np.int64)
        shape = (len(kept), channels, size, size)
        if len(kept):
            # copy-on-write, because torch takes writable arrays only
            array = np.load(path, mmap_mode="c", allow_pickle=False)
        else:
            array = np.zeros(shape, dtype=np.uint8)
        resized = facts["resized"] and (str(facts["resized"][0]), int(facts["resized"][1]), int(facts["resized"][2]))
        digest = hashlib.sha256(array.reshape(-1)).hexdigest()
        if array.shape != shape or array.dtype != np.uint8 or digest != facts["sha256"]:
            return None
    except (StorageError, CorruptedFile, OSError, ValueError, EOFError, KeyError, TypeError, IndexError):
        return None
    return Decoded(torch.from_numpy(array), kept, tuple(broken.values()), resized or None, digest, listing)


def _write(folder: Path, sources: Sources, size: int, channels: int, report: Report) -> None:
    """Decode into a file beside the final one, which then gets its name; the lock keeps others away."""
    path, temporary = folder / "images.npy", folder / ".images.npy.tmp"
    broken: list[tuple[int, str, str]] = []
    resized: tuple[str, int, int] | None = None
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as file:
            start = _write_header(file, (len(sources), channels, size, size))
            for i, (pixels, reason, own) in enumerate(_outcomes(sources, size, channels)):
                if pixels is None:
                    broken.append((i, _printable(sources.names[i]), reason))
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
        temporary.replace(path)
    except OSError as error:
        raise StorageError(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    facts = {"count": len(sources), "broken": broken, "resized": resized, "sha256": digest.hexdigest()}
    write_json(folder / "images.json", facts)


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> int:
    """Write the header of an array in numpy's own format, and return where it ends; numpy leaves room in it."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.tell()


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


Outcome = tuple[bytes | None, str, tuple[int, int]]
"""Pixels of an image or None, what is wrong with it, and its own width and height."""


def _outcomes(sources: Sources, size: int, channels: int) -> Iterator[Outcome]:
    """What becomes of each image, in order. At most a few blocks per thread are held at a time."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: deque[Future[list[Outcome]]] = deque()
    work = partial(_decode_block, sources, size, channels)
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # what Pillow thinks of files that it can decode
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
        return None, "0 bytes", (0, 0)
    try:
        pixels, own = decode_image(content, size, channels)
    except MemoryError as error:
        raise StorageError(Path(sources.names[i]), OSError("there is not enough memory"), "decode") from error
    except Exception as error:
        return None, _reason(error), (0, 0)
    return pixels.tobytes(), "", own


def _reason(error: Exception) -> str:
    """What is wrong with an image, in one short line."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return f"no image that is known here: {', '.join(FORMATS)}"
    return " ".join(str(error).split())[:100] or type(error).__name__
