"""The board, asked over HTTP as browsers and others do."""

import contextlib
import gzip
import http.client
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from lab.report_runs import write_run
from lab.test_cli import PROCESS
from lab.test_report_live import folder_with
from manifold_mixup.lab.errors import CorruptedFile, UsageError
from manifold_mixup.lab.report import board as module
from manifold_mixup.lab.report.board import POLICY, Board, Server, open_server


class Maker:
    """Makes pages by number, and remembers of what."""

    def __init__(self):
        self.made, self.trouble, self.takes = [], None, 0.0

    def __call__(self, paths):
        self.made.append(tuple(paths))
        number = len(self.made)
        time.sleep(self.takes)
        if self.trouble is not None:
            raise self.trouble
        return f'<html lang="en"><main>page {number}, ' + 50 * "é" + "</main></html>"


@pytest.fixture
def maker():
    return Maker()


@contextlib.contextmanager
def serving(board, host="127.0.0.1"):
    """A server at work, as a function that asks it: status, headers, body."""
    before = set(threading.enumerate())
    with open_server(board, host, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def ask(path, method="GET", **headers):
            connection = http.client.HTTPConnection(*server.socket.getsockname()[:2], timeout=20)
            with contextlib.closing(connection):
                connection.request(method, path, headers=headers)
                with connection.getresponse() as answer:
                    return answer.status, answer.headers, answer.read()

        ask.server = server
        try:
            yield ask
        finally:
            server.shutdown()
            thread.join()
    assert set(threading.enumerate()) <= before, "a thread is left"


@pytest.fixture
def ask(tmp_path, maker):
    folder_with(tmp_path / "runs", "config.json")
    with serving(Board([tmp_path / "runs"], maker, "Our runs")) as asked:
        yield asked


def stamp(ask):
    status, headers, body = ask("/stamp")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    found = json.loads(body)
    assert list(found) == ["stamp"]
    return found["stamp"]


# ---------------------------------------------------------------- what it answers


def test_the_page_knows_its_stamp_and_comes_with_its_headers(ask, tmp_path, maker):
    status, headers, body = ask("/")
    assert (status, maker.made) == (200, [(tmp_path / "runs",)])
    assert body.decode().startswith(f'<html data-stamp="{stamp(ask)}" lang="en"><main>page 1, ééé')
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Content-Security-Policy"] == POLICY
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Server"].strip() == "manifold-mixup"
    assert int(headers["Content-Length"]) == len(body)
    assert not [name for name in headers if name.lower().startswith("access-control")]
    assert ask("/?x=1")[2] == body


def test_head_is_get_without_the_body(ask):
    for path in ("/", "/stamp", "/nothing"):
        (status, headers, body), (status_of_get, headers_of_get, _) = ask(path, "HEAD"), ask(path)
        assert (status, body) == (status_of_get, b"")
        assert {**headers, "Date": ""} == {**headers_of_get, "Date": ""}


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/..%2f..%2fetc/passwd", "//etc/passwd", "/stamp/", "/index.html", "/favicon.ico", "/stamps"],
)
def test_there_is_nothing_else(ask, path, maker):
    status, headers, body = ask(path)
    assert (status, body) == (404, b"there is / and /stamp\n")
    assert headers["Content-Security-Policy"] == "default-src 'none'"
    assert maker.made == []


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_nothing_but_get_and_head(ask, method):
    status, headers, _ = ask("/", method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")
    assert ask("/", "BREW")[0] == 501


@pytest.mark.parametrize(
    ("accepted", "zipped"),
    [
        ("gzip", True),
        ("deflate, GZip;q=0.5, br", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000", False),
        ("br", False),
        ("", False),
        ("gzipped", False),
    ],
)
def test_the_page_is_compressed_for_those_who_take_it(ask, accepted, zipped):
    plain = ask("/")[2]
    _, headers, body = ask("/", **{"Accept-Encoding": accepted})
    assert headers["Content-Encoding"] == ("gzip" if zipped else None)
    assert headers["Vary"] == "Accept-Encoding"
    assert (gzip.decompress(body) if zipped else body) == plain


# ---------------------------------------------------------------- when it is made


def test_it_is_made_once_however_many_ask(ask, maker):
    maker.takes = 0.3
    answers, gate = [], threading.Barrier(8)

    def browse():
        gate.wait()
        answers.append(ask("/")[2])

    threads = [threading.Thread(target=browse) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert len(set(answers)) == len(maker.made) == 1


def test_the_stamp_changes_when_a_run_ends_and_the_page_with_it(ask, tmp_path, maker):
    before = stamp(ask)
    assert (stamp(ask), ask("/")[2], len(maker.made)) == (before, ask("/")[2], 1)
    folder_with(tmp_path / "runs", "record.json")
    deadline = time.monotonic() + 10
    while stamp(ask) == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stamp(ask) != before
    body = ask("/")[2].decode()
    assert f'data-stamp="{stamp(ask)}"' in body
    assert "page 2," in body


def test_what_changes_while_a_page_is_made_is_on_the_next_one(tmp_path):
    runs = folder_with(tmp_path, "config.json")
    lengths = []

    def make(paths):
        with (runs / "log.jsonl").open("a") as file:  # right after it was read
            file.write("{}\n")
        lengths.append((runs / "log.jsonl").stat().st_size)
        return "<html lang='en'></html>"

    board = Board([tmp_path], make, "t", clock=lambda: 0.0)
    stamps = [board.answer().stamp for _ in range(3)]
    assert lengths == [3, 6, 9]
    assert len(set(stamps)) == 3


def test_making_it_takes_a_sixth_of_the_time_at_most(tmp_path):
    runs, now, made = folder_with(tmp_path, "config.json"), [0.0], []

    def make(paths):
        made.append(now[0])
        now[0] += 2.0
        return "<html lang='en'></html>"

    board = Board([tmp_path], make, "t", clock=lambda: now[0])
    while now[0] < 100:
        (runs / "log.jsonl").write_text(str(now[0]))  # something new at every moment
        stamp = board.look().stamp
        assert board.answer().stamp in (stamp, board.look().stamp)
        now[0] += 0.5
    gaps = [later - earlier for earlier, later in itertools.pairwise(made)]
    assert len(gaps) >= 6
    assert min(gaps) >= 12
    assert max(gaps) <= 13  # and no longer than that


# ---------------------------------------------------------------- what may go wrong


def test_it_waits_for_runs_that_are_not_there_yet(tmp_path, maker):
    paths = [tmp_path / "<runs>", tmp_path / "more"]
    with serving(Board(paths, maker, "Our runs")) as ask:
        status, headers, body = ask("/")
        page = body.decode()
        assert (status, maker.made) == (200, [])
        assert f"no runs yet in {tmp_path}/&lt;runs&gt;, {tmp_path}/more" in page
        assert page.startswith("<!doctype html>")
        assert f'const shown = "{stamp(ask)}"' in page
        assert 'fetch("stamp"' in page
        assert headers["Content-Security-Policy"] == POLICY
        folder_with(tmp_path / "more", "config.json")
        time.sleep(0.1)
        assert f'const shown = "{stamp(ask)}"' not in page
        assert ask("/")[2].startswith(b"<html data-stamp=")
        assert maker.made == [(tmp_path / "more",)]


@pytest.mark.parametrize(
    ("trouble", "text"),
    [
        (CorruptedFile("x.jsonl holds a <b>line</b>"), "x.jsonl holds a &lt;b&gt;line&lt;/b&gt;"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
    ],
)
def test_what_cannot_be_shown_is_said_once_a_change_and_looked_at_again_after_the_next(
    ask, maker, tmp_path, trouble, text
):
    maker.trouble = trouble
    for _ in range(2):
        status, _, body = ask("/")
        assert status == 500
        assert f"these runs cannot be shown: {text}" in body.decode()
        assert 'fetch("stamp"' in body.decode()
    assert len(maker.made) == 1
    maker.trouble = None
    folder_with(tmp_path / "runs", "log.jsonl")
    time.sleep(0.1)
    assert ask("/")[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("::1", 200),
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.", 421),
        ("192.168.1.4:8000", 421),
        ("", 421),
    ],
)
def test_requests_for_other_hosts_are_refused(ask, host, status, maker):
    for path in ("/", "/stamp"):
        found, _, body = ask(path, Host=host)
        assert found == status
        assert (b"page 1" in body or b"stamp" in body) == (status == 200)
    assert len(maker.made) == (status == 200)


def raw(ask, request):
    with socket.create_connection(ask.server.socket.getsockname()[:2], timeout=20) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_request_with_two_hosts_or_with_none_is_refused(ask):
    assert raw(ask, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 421 ")
    assert raw(ask, b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n").startswith(b"HTTP/1.0 421 ")
    assert raw(ask, b"nonsense\r\n\r\n").startswith((b"HTTP/1.0 400 ", b"<!DOCTYPE"))


def test_who_listens_everywhere_is_asked_by_address_or_by_name(tmp_path, maker):
    with serving(Board([tmp_path], maker, "t"), "0.0.0.0") as ask:
        assert ask.server.everywhere
        assert ask.server.url == f"http://localhost:{ask.server.port}/"
        for host, status in (("192.168.1.4:80", 200), (socket.gethostname(), 200), ("evil.example", 421)):
            assert ask("/stamp", Host=host)[0] == status


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_it_listens_at_ipv6_addresses(tmp_path, maker):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 here")
    with serving(Board([tmp_path], maker, "t"), "::1") as ask:
        assert ask.server.url == f"http://[::1]:{ask.server.port}/"
        assert ask("/stamp")[0] == 200


def test_connections_on_which_nothing_is_said_do_not_hold_up_the_end(tmp_path, maker, capsys):
    began = time.monotonic()
    with serving(Board([tmp_path], maker, "t")) as ask, contextlib.ExitStack() as idle:
        for _ in range(3):
            idle.enter_context(socket.create_connection(ask.server.socket.getsockname()[:2]))
        assert ask("/stamp")[0] == 200
        ask.server.shutdown()
        ask.server.server_close()
    assert time.monotonic() - began < 5
    assert capsys.readouterr() == ("", "")


def test_requests_are_not_logged(ask, capsys):
    ask("/")
    ask("/nothing")
    ask("/", "POST")
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------- ports


def test_a_port_that_is_in_use_is_passed_over_unless_it_was_asked_for(tmp_path, maker, monkeypatch):
    board = Board([tmp_path], maker, "t")
    with Server(board, "127.0.0.1", 0) as first:
        monkeypatch.setattr(module, "PORT", first.port)
        with open_server(board, "127.0.0.1", None) as second:
            assert first.port < second.port <= first.port + module.MORE_PORTS
        with pytest.raises(UsageError, match=rf"--port {first.port}: Address already in use; choose another"):
            open_server(board, "127.0.0.1", first.port)
        monkeypatch.setattr(module, "MORE_PORTS", 0)
        with pytest.raises(UsageError, match=f"the ports {first.port} to {first.port} are all in use"):
            open_server(board, "127.0.0.1", None)


def test_a_host_that_is_none_is_named(tmp_path, maker):
    board = Board([tmp_path], maker, "t")
    for host in ("no.such.host.invalid", "192.0.2.1"):
        with pytest.raises(UsageError, match=host):
            open_server(board, host, 0)


# ---------------------------------------------------------------- the command


def test_the_command_begins_before_the_runs_shows_them_and_ends_with_ctrl_c(tmp_path):
    runs = tmp_path / "runs"
    process = subprocess.Popen(
        [sys.executable, str(PROCESS), "board", str(runs), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        port = int(re.fullmatch(r"board: http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends it\)\n", line)[1])

        def ask():
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
                connection.request("GET", "/")
                with connection.getresponse() as answer:
                    assert answer.status == 200
                    return answer.read().decode()

        assert f"no runs yet in {runs}" in ask()
        result = write_run(runs)
        config = {"data": {"name": "digits"}, "model": {"name": "mlp"}, "method": {"name": "none"}, "seed": 0}
        (result.record.folder / "config.json").write_text(
            json.dumps({"config": {**config, "train": {"steps": 3}}, "hash": "0" * 16})
        )
        deadline = time.monotonic() + 60
        while "no runs yet" in (page := ask()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert "data-live" in page
        assert "3.0" in page
        assert "connect-src 'self'" in page, "without it the page's own rules would forbid it to ask"
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")
    assert sorted(os.listdir(runs)) == ["digits"], "it writes nothing"
