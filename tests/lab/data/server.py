"""A tiny web server on 127.0.0.1 that can resume, break off, refuse and lie."""

from __future__ import annotations

import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` by name.

    ``ranges``: whether it can resume. ``break_after``: it closes the connection after that many bytes of an answer.
    ``status``: what it answers instead of 200. ``requests``: (name, Range header or None) of everything it was asked.
    """

    daemon_threads = True

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = dict(files)
        self.ranges = True
        self.break_after: int | None = None
        self.status = 200
        self.headers: dict[str, str] = {}
        self.requests: list[tuple[str, str | None]] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, name, wanted = self.server, self.path.strip("/"), self.headers.get("Range")
        server.requests.append((name, wanted))
        if server.status != 200 or name not in server.files:
            return self.send_error(404 if server.status == 200 else server.status)
        content, status, start = server.files[name], 200, 0
        if wanted and server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < len(content) else 416
        body = content[start:] if status != 416 else b""
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if status == 416:
            self.send_header("Content-Range", f"bytes */{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        for key, value in server.headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[: server.break_after])
        return None

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(files: Mapping[str, bytes]) -> Iterator[Server]:
    """A server that runs while the block does."""
    with Server(files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def tar_gz(members: Mapping[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    """A .tar.gz with these files, and then whatever else is given."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    return packed.getvalue()


def zipped(members: Mapping[str, bytes], *extra: zipfile.ZipInfo) -> bytes:
    """A .zip with these files, and then whatever else is given."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        for info in extra:
            archive.writestr(info, b"/etc/passwd")
    return packed.getvalue()
