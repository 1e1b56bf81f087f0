"""The page of runs that go on, served to browsers of this machine: it is made anew when the runs have come further."""

from __future__ import annotations

import contextlib
import errno
import gzip
import ipaddress
import json
import os
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from manifold_mixup.lab.errors import LabError, UsageError
from manifold_mixup.lab.report.live import EASE, Look, look
from manifold_mixup.lab.report.templates import render

__all__ = ["POLICY", "PORT", "Answer", "Board", "Server", "open_server"]

PORT = 8000
MORE_PORTS = 20  # tried after it

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Answer:
    """What is served at ``/`` while the runs are as they are.

    Attributes:
        stamp: Of the runs.
        status: 200, or 500 if the runs cannot be shown.
        html: The page.
    """

    stamp: str
    status: int
    html: str = field(repr=False)

    @cached_property
    def body(self) -> bytes:
        """The page as bytes."""
        return self.html.encode()

    @cached_property
    def zipped(self) -> bytes:
        """The page as bytes, compressed."""
        return gzip.compress(self.body, 5, mtime=0)


class Board:
    """The page of some runs, made once for each state that they are in, however many browsers ask for it.

    Args:
        paths: Folders of runs, and files with lines of records; they may be empty or missing yet.
        make: Makes the page, from those paths at which there is something.
        title: Heading of the pages that are shown where that cannot be.
        clock: Seconds.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        make: Callable[[Sequence[Path]], str],
        title: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = list(paths)
        self._make = make
        self._title = title
        self._clock = clock
        self._looking, self._rendering = threading.Lock(), threading.Lock()
        self._look: Look | None = None
        self._due = -float("inf")  # when the look may be taken again
        self._answer: Answer | None = None

    def look(self) -> Look:
        """What there is; not quite the latest if finding out, or showing it, takes long."""
        with self._looking:
            began = self._clock()
            if self._look is None or began >= self._due:
                self._look = look(self._paths)
                ended = self._clock()
                self._due = ended + EASE * (ended - began)
            return self._look

    def answer(self) -> Answer:
        """The page; one thread makes it, and the others wait for it."""
        with self._rendering:
            seen = self.look()  # before rendering: what changes meanwhile is for the next one
            if self._answer is None or self._answer.stamp != seen.stamp:
                began = self._clock()
                self._answer = self._render(seen)
                ended = self._clock()
                with self._looking:
                    self._due = max(self._due, ended + EASE * (ended - began))
            return self._answer

    def _render(self, seen: Look) -> Answer:
        if not seen.there:
            missing = ", ".join(map(str, self._paths))
            return Answer(seen.stamp, 200, self._waiting(seen.stamp, f"no runs yet in {missing}"))
        try:
            html = self._make(seen.there)
            # The page's script has to know which state it shows: they may change before it asks for the first time.
            return Answer(seen.stamp, 200, html.replace("<html ", f'<html data-stamp="{seen.stamp}" ', 1))
        except Exception as error:  # a damaged file, or a mistake of ours: the page says so and waits for a change
            text = str(error) if isinstance(error, LabError) else f"{type(error).__name__}: {error}"
            return Answer(seen.stamp, 500, self._waiting(seen.stamp, f"these runs cannot be shown: {text}"))

    def _waiting(self, stamp: str, text: str) -> str:
        return render("waiting.html", title=self._title, text=text, stamp=stamp)


class Server(ThreadingHTTPServer):
    """Serves one board, and nothing else.

    Args:
        board: The board.
        host: Name or address to listen at.
        port: To listen at; 0 takes a free one.

    Raises:
        OSError: It cannot listen there.
    """

    daemon_threads = False  # closing waits for them
    allow_reuse_address = os.name == "posix"  # elsewhere it would take a port from whoever listens there

    def __init__(self, board: Board, host: str, port: int) -> None:
        self.board = board
        self.host = host
        self._open: set[Any] = set()
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, address = found[0][0], found[0][4]
        super().__init__((str(address[0]), port), _Handler)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.socket.getsockname()[1])

    @property
    def url(self) -> str:
        """For a browser of this machine."""
        name = "localhost" if self.everywhere else self.host
        return f"http://{f'[{name}]' if ':' in name else name}:{self.port}/"

    @property
    def everywhere(self) -> bool:
        """Whether it listens at every address of this machine, so that others can read the page."""
        return str(self.socket.getsockname()[0]) in ("0.0.0.0", "::")

    def admits(self, host: str) -> bool:
        """Whether a request for such a host is for this server.

        A page from elsewhere can make a browser believe that its own name is 127.0.0.1 (DNS rebinding), and then read
        what is served here. Its requests carry that name.

        Args:
            host: The request's header Host.
        """
        name = _without_port(host).lower()
        if name in ("localhost", "127.0.0.1", "::1", self.host.lower()):
            return True
        if not self.everywhere:
            return False
        try:
            ipaddress.ip_address(name)  # an address is no name that could be made to mean another one
        except ValueError:
            return name == socket.gethostname().lower()
        return True

    def server_bind(self) -> None:
        """Bind the socket; without asking anybody for this machine's name, which can take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.port

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own."""
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Stop listening and end every connection: browsers keep some in reserve, on which nothing is ever sent."""
        for request in list(self._open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone, or is slow, is no error."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One request and its answer; the connection ends with it."""

    server: Server
    server_version, sys_version = "manifold-mixup", ""
    timeout = 10.0  # for a browser to say what it wants

    def do_GET(self) -> None:
        hosts = self.headers.get_all("Host") or []
        path = self.path.partition("?")[0]
        if len(hosts) != 1 or not self.server.admits(hosts[0]):
            self._send(421, "text/plain; charset=utf-8", b"this is not the host that was asked for\n")
        elif path == "/":
            answer = self.server.board.answer()
            if _takes_gzip(self.headers.get("Accept-Encoding", "")):
                self._send(answer.status, "text/html; charset=utf-8", answer.zipped, ("Content-Encoding", "gzip"))
            else:
                self._send(answer.status, "text/html; charset=utf-8", answer.body)
        elif path == "/stamp":
            body = json.dumps({"stamp": self.server.board.look().stamp}).encode()
            self._send(200, "application/json", body)
        else:
            self._send(404, "text/plain; charset=utf-8", b"there is / and /stamp\n")

    do_HEAD = do_GET  # noqa: N815

    def _refuse(self) -> None:
        self._send(405, "text/plain; charset=utf-8", b"only GET and HEAD\n", ("Allow", "GET, HEAD"))

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse  # noqa: N815

    def _send(self, status: int, kind: str, body: bytes, *more: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
            ("Vary", "Accept-Encoding"),
            ("Content-Security-Policy", POLICY if kind.startswith("text/html") else "default-src 'none'"),
            *more,
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class calls it so
        """Say nothing: the terminal is for people."""


def _without_port(host: str) -> str:
    """The name or address in a header Host, without brackets."""
    host = host.strip()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _takes_gzip(accepted: str) -> bool:
    for item in accepted.lower().split(","):
        name, _, weight = item.partition(";")
        if name.strip() == "gzip":
            quality = weight.strip().removeprefix("q=").strip()
            return not quality or quality.strip("0.") != ""
    return False


def open_server(board: Board, host: str, port: int | None) -> Server:
    """A server that listens, but does not answer yet.

    Args:
        board: What it serves.
        host: Name or address to listen at.
        port: To listen at, 0 for a free one; None takes 8000, or one of the 20 after it if that is in use.

    Raises:
        UsageError: It cannot listen there.
    """
    ports = range(PORT, PORT + MORE_PORTS + 1) if port is None else [port]
    for number in ports:
        try:
            return Server(board, host, number)
        except socket.gaierror as error:
            raise UsageError(f"--host {host!r} is no name or address of this machine: {error.strerror}") from error
        except OSError as error:
            if port is None and error.errno in (errno.EADDRINUSE, errno.EACCES):
                continue
            reason = error.strerror or str(error)
            raise UsageError(f"cannot listen at --host {host} --port {number}: {reason}; choose another one") from error
    raise UsageError(f"the ports {PORT} to {PORT + MORE_PORTS} are all in use; choose another one with --port")
