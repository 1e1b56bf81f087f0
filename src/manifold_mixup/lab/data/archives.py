"""Published files: downloaded with a checksum, resumed after an interruption, unpacked without trusting the archive.

Three functions do the work, and none of them knows a data set: :func:`download` brings one file, :func:`read_verified`
and :func:`verify` refuse a file that is not the published one before anything looks into it, :func:`unpack` writes the
members that were asked for and nothing else. All that differs between data sets is data, in :class:`PublishedFile`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from filelock import FileLock

from manifold_mixup.lab.data.base import Report
from manifold_mixup.lab.errors import CorruptedFile, MissingExtra, StorageError
from manifold_mixup.lab.storage import make_folder

__all__ = ["PublishedFile", "download", "locked", "read_verified", "silent", "unpack", "verify"]

CHUNK = 1 << 20  # bytes
RETRIES = 10  # how often one place is asked again after it broke off
TIMEOUT = (10.0, 60.0)  # seconds until a server has to accept the connection, and between two pieces of an answer
GZIP = b"\x1f\x8b"

Members = Iterator[tuple[str, int, Callable[[], IO[bytes]]]]


@dataclass(frozen=True)
class PublishedFile:
    """A file as its authors published it.

    Attributes:
        name: Its name.
        md5: The md5 of its bytes; empty if ``sha256`` is what identifies it.
        urls: Where to fetch it, in the order in which they are tried.
        sha256: The sha256 of its bytes, where it is known; then it is checked too.
        unpacked_md5: For a file that was published with gzip: the md5 of what is inside. The same content may then lie
            there unpacked or packed anew, and ``md5`` and ``sha256`` hold for downloads alone.
        unpacked_size: Bytes of what is inside, or for an archive the most it may hold. A file goes no further.
    """

    name: str
    md5: str = ""
    urls: tuple[str, ...] = ()
    sha256: str = ""
    unpacked_md5: str = ""
    unpacked_size: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The names under which the same content may lie in a folder."""
        return (self.name, self.name.removesuffix(".gz")) if self.unpacked_md5 else (self.name,)


def silent(what: str, done: int, total: int) -> None:
    """A :data:`~manifold_mixup.lab.data.base.Report` that says nothing."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder of the cache and keep other processes from filling it at the same time.

    Raises:
        StorageError: The folder cannot be written.
    """
    make_folder(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire()
    except OSError as error:
        raise StorageError(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def verify(path: Path, file: PublishedFile, report: Report = silent) -> None:
    """Refuse a file whose bytes are not the published ones; it is read in pieces.

    Raises:
        CorruptedFile: Its checksum differs.
        StorageError: It cannot be read.
    """
    md5, sha256, done = hashlib.md5(usedforsecurity=False), hashlib.sha256(), 0
    try:
        total = path.stat().st_size
        with path.open("rb") as source:
            while piece := source.read(CHUNK):
                md5.update(piece)
                if file.sha256:
                    sha256.update(piece)
                done += len(piece)
                report(f"check {file.name}", done, total)
    except OSError as error:
        raise StorageError(path, error, "read") from error
    if file.md5:
        _compare(path, "md5", file.md5, md5.hexdigest())
    if file.sha256:
        _compare(path, "sha256", file.sha256, sha256.hexdigest())


def read_verified(path: Path, file: PublishedFile) -> bytes:
    """Read a file whole, and refuse it if its content is not the published one.

    What is returned is what was checked, so nothing can change in between. A file with ``unpacked_md5`` is unpacked
    if it is packed, no further than its published size.

    Raises:
        CorruptedFile: Its checksum differs, or it is no whole gzip file.
        StorageError: It cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(path, error, "read") from error
    if not file.unpacked_md5:
        kind, expected = ("md5", file.md5) if file.md5 else ("sha256", file.sha256)
        _compare(path, kind, expected, hashlib.new(kind, content, usedforsecurity=False).hexdigest())
        return content
    if content.startswith(GZIP):
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as packed:
                content = packed.read(file.unpacked_size + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise CorruptedFile(f"{path} is damaged or cut off ({error}); {_again(path)}") from error
    _compare(path, "md5", file.unpacked_md5, hashlib.md5(content, usedforsecurity=False).hexdigest())
    return content


def _compare(path: Path, kind: str, expected: str, found: str) -> None:
    if found != expected:
        raise CorruptedFile(f"{path} is not the published file: its {kind} is {found}, not {expected}; {_again(path)}")


def _again(path: Path) -> str:
    return f"delete {path.name} and fetch it again, or name another folder with --data-dir"


def download(file: PublishedFile, folder: Path, report: Report = silent, *, hint: str = "") -> Path:
    """Fetch a file into a folder, or return it if it lies there already.

    Its places are tried in turn. What has come lies in ``NAME.part``, from where an interrupted download goes on, at
    the same or at another place; the file gets its name when its checksum is right.

    Args:
        file: What to fetch.
        folder: Where to put it; created if it is missing.
        report: Is told how many bytes have come.
        hint: What else to say where no place can be reached, such as where the file was looked for.

    Returns:
        The path of the file.

    Raises:
        CorruptedFile: What came from the last place is not the published file.
        StorageError: No place could be reached, or the disk is full; the part file is kept.
    """
    path = folder / file.name
    if path.exists():
        return path
    make_folder(folder)
    failures: list[str] = []
    damaged: CorruptedFile | None = None
    for url in file.urls:
        try:
            _fetch(file, url, path, report)
        except _Unreachable as error:
            failures.append(f"{url}: {error}")
        except CorruptedFile as error:
            failures.append(f"{url}: {error}")
            damaged = error
        else:
            return path
    text = "; ".join(failures) or "no place to fetch it from is known"
    advice = f"{hint or f'it is not in {folder}'}; fetch it by hand and name its folder with --data-dir"
    if damaged is not None:
        raise CorruptedFile(f"{file.name} could not be downloaded: {text}; {advice}") from damaged
    raise StorageError(path, OSError(f"{text}; {advice}"), "download")


class _Unreachable(Exception):
    """One place does not give the file."""


def _fetch(file: PublishedFile, url: str, path: Path, report: Report) -> None:
    """Fetch a file from one place, going on after an interruption as long as something comes."""
    try:
        import pooch  # type: ignore[import-untyped]
        import requests
        import urllib3
    except ImportError as error:
        raise MissingExtra("pooch", "lab") from error

    known = f"sha256:{file.sha256}" if file.sha256 else f"md5:{file.md5}"
    part = path.with_name(f"{file.name}.part")
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("WARNING")  # progress goes to ``report``
    retries = RETRIES
    try:
        while True:
            before = _size(part)
            try:
                pooch.retrieve(url, known, path.name, path.parent, downloader=_Resuming(part, report))
                return
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                if _size(part) <= before or not retries:
                    raise _Unreachable(_reason(error)) from error
                retries -= 1
            except ValueError as error:  # the checksum differs, and what came was deleted
                if not before:
                    raise CorruptedFile(str(error).partition(". ")[0]) from error
                # it went on from a part of something else: once more from the beginning
    except OSError as error:
        raise StorageError(part, error) from error
    finally:
        logger.setLevel(level)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: BaseException) -> str:
    """What the innermost cause says, such as "404 Client Error: Not Found"."""
    inner = getattr(error, "reason", None) or (error.args[0] if error.args else None)
    if isinstance(inner, BaseException):
        return _reason(inner)
    return str(inner or type(error).__name__).partition(" for url")[0]


class _Resuming:
    """A pooch downloader that goes on where the part file ends, if the server can do that."""

    def __init__(self, part: Path, report: Report) -> None:
        self._part, self._report = part, report

    def __call__(self, url: str, output_file: str, pooch: Any, check_only: bool | None = False) -> None:
        import requests

        name = self._part.name.removesuffix(".part")
        have = _size(self._part)
        headers = {"Accept-Encoding": "identity", "User-Agent": "manifold-mixup"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            if answer.status_code != requests.codes.requested_range_not_satisfiable:  # else all of it should be there
                answer.raise_for_status()
                if not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                    have = 0  # the server sends the whole file
                total = have + int(answer.headers.get("Content-Length", -have))
                with self._part.open("ab" if have else "wb") as target:
                    # the bytes as they are: some servers declare a .tar.gz as a file that is gzipped on the way
                    for piece in answer.raw.stream(CHUNK, decode_content=False):
                        target.write(piece)
                        have += len(piece)
                        self._report(name, have, total)
                if 0 < total != have:  # older urllib3 says nothing
                    raise requests.ConnectionError(f"the connection broke off after {have:,} of {total:,} bytes")
        os.replace(self._part, output_file)


def unpack(
    archive: Path, folder: Path, wanted: Callable[[str], bool], *, limit: int, report: Report = silent
) -> list[str]:
    """Write the wanted files of an archive (tar with gzip, or zip), all of them or none.

    The archive is expected to hold one folder with the name of ``folder``; whatever lies beside it is left out.
    An archive with an absolute name, a ``..``, a link or a device is refused whole, wanted or not. Check its checksum
    first.

    Args:
        archive: The archive.
        folder: Where to put the archive's folder of this name. A folder that is there is replaced.
        wanted: From a name inside that folder, with ``/``, to whether the file is written.
        limit: How many bytes the archive may hold, unpacked.
        report: Is told how many bytes were written.

    Returns:
        The names that were written, in the archive's order.

    Raises:
        CorruptedFile: The archive is damaged, cut off, unsafe or larger than ``limit``.
        StorageError: It cannot be read, or the folder cannot be written; nothing half-written is left.
    """
    make_folder(folder.parent)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        written, done = [], 0
        for name, size, source in _members(archive, folder.name, wanted, limit):
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                shutil.copyfileobj(source, file, CHUNK)
            written.append(name)
            done += size
            report(f"unpack {archive.name}", done, 0)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise CorruptedFile(f"{archive} is damaged or cut off ({error}); {_again(archive)}") from error
    except OSError as error:
        raise StorageError(folder, error, "unpack into") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return written


def _members(
    archive: Path, top: str, wanted: Callable[[str], bool], limit: int
) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Name below the top folder, size and content of each wanted file."""
    with archive.open("rb") as file:
        packed = file.read(len(GZIP)) == GZIP
        file.seek(0)
        for name, size, opened in (_tar_members if packed else _zip_members)(archive, file, limit):
            first, _, rest = name.partition("/")
            if first == top and rest and wanted(rest):
                with opened() as source:
                    yield rest, size, source


def _tar_members(archive: Path, file: IO[bytes], limit: int) -> Members:
    # read as a stream, so that what was checked is what is written, and no further than the limit
    bounded = _Bounded(gzip.GzipFile(fileobj=file), archive, limit)
    with tarfile.open(fileobj=bounded, mode="r|") as tar:
        for member in tar:
            _check_name(archive, member.name)
            if not (member.isreg() or member.isdir()):
                raise CorruptedFile(f"{archive} holds {member.name!r}, a link or a device; it was not unpacked")
            if member.isreg():
                yield PurePosixPath(member.name).as_posix(), member.size, partial(_opened, tar, member)


def _opened(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    source = tar.extractfile(member)
    assert source is not None  # it is a regular file
    return source


def _zip_members(archive: Path, file: IO[bytes], limit: int) -> Members:
    with zipfile.ZipFile(file) as packed:
        members = packed.infolist()
        if sum(member.file_size for member in members) > limit:
            raise _too_large(archive, limit)
        for member in members:
            _check_name(archive, member.filename)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise CorruptedFile(f"{archive} holds {member.filename!r}, a link or a device; it was not unpacked")
            if member.flag_bits & 1:
                raise CorruptedFile(f"{archive} is encrypted; it was not unpacked")
        for member in members:
            if not member.is_dir():
                yield PurePosixPath(member.filename).as_posix(), member.file_size, partial(packed.open, member)


def _check_name(archive: Path, name: str) -> None:
    path = PureWindowsPath(name)  # which takes / and \ and drives for what they are on any system
    if path.anchor or ".." in path.parts:
        raise CorruptedFile(f"{archive} holds {name!r}, which would lie outside its folder; it was not unpacked")


def _too_large(archive: Path, limit: int) -> CorruptedFile:
    return CorruptedFile(f"{archive} unpacks to more than {limit:,} bytes; it was not unpacked")


class _Bounded(io.RawIOBase):
    """A stream that stops an archive which goes on and on."""

    def __init__(self, stream: gzip.GzipFile, archive: Path, limit: int) -> None:
        self._stream, self._archive, self._limit, self._left = stream, archive, limit, limit

    def read(self, size: int = -1) -> bytes:
        piece = self._stream.read(size)
        self._left -= len(piece)
        if self._left < 0:
            raise _too_large(self._archive, self._limit)
        return piece
