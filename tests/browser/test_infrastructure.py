"""The browser tests can fail: each kind of fault, in a small page of its own, is found; and a browser is found."""

from __future__ import annotations

import asyncio
import http.server
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from browser import install
from browser.checks import (
    SCREENSHOTS,
    assert_accessible,
    assert_clean,
    assert_no_overflow,
    assert_self_contained,
    overflowing,
    run_axe,
    screenshot,
    seen,
)

CLEAN = """
<style>body { color: #222; background: #fff; margin: 16px } .wide { overflow-x: auto }</style>
<main><h1>Results</h1><img src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=" alt="A dot">
<p>Three seeds.</p><div class="wide" tabindex="0"><div style="width: 3000px">a wide table</div></div></main>
<script>console.log("loaded"); document.querySelector("p").textContent += " Done.";</script>
"""


@pytest.fixture
def shown(open_page, tmp_path):
    """Opens a page with this body."""

    def show(body, **keys):
        path = tmp_path / "page.html"
        path.write_text(f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Test</title>{body}</html>")
        return open_page(path, **keys)

    return show


# ---------------------------------------------------------------- pages


@pytest.mark.parametrize("width", [320, 1440])
@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_a_clean_page_passes_every_check(shown, width, color_scheme):
    page = shown(CLEAN, width=width, color_scheme=color_scheme)
    assert_clean(page)
    assert_self_contained(page)
    assert_accessible(page)
    assert_no_overflow(page)
    assert_clean(page)  # the checks leave no trace of their own
    assert page.inner_text("p") == "Three seeds. Done."
    assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is (color_scheme == "dark")


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        ("<script>console.error('bad news')</script>", "console", "error: bad news"),
        ("<script>console.warn('beware')</script>", "console", "warning: beware"),
        ("<script>null.x</script>", "uncaught error", "Cannot read properties of null"),
        ("<script>Promise.reject(new Error('late'))</script>", "uncaught error", "late"),
        ("<script>alert(1)</script>", "dialog", "alert: 1"),
        ("<img src='gone.png' alt='gone'>", "console", "ERR_FILE_NOT_FOUND"),
    ],
)
def test_what_a_page_says_and_does_is_recorded(shown, body, kind, text):
    page = shown(body)
    page.wait_for_function("true")
    problems = seen(page).problems()
    assert any(problem.startswith(f"{kind}: ") and text in problem for problem in problems), problems
    with pytest.raises(AssertionError, match=kind):
        assert_clean(page)


@pytest.mark.parametrize(
    "body",
    [
        "<img src='http://example.org/it' alt='x'>",
        "<link rel='stylesheet' href='http://example.org/it'>",
        "<style>@font-face { font-family: f; src: url(http://example.org/it) } p { font-family: f }</style><p>x</p>",
        "<script>fetch('http://example.org/it').catch(() => 0)</script>",
        "<script>navigator.sendBeacon('http://example.org/it', '1')</script>",
        "<script>new WebSocket('ws://example.org/it')</script>",
        "<iframe src='http://example.org/it' title='x'></iframe>",
        "<script src='http://127.0.0.1:9/it'></script>",
    ],
)
def test_a_request_that_leaves_is_refused_and_recorded(shown, body):
    page = shown(body)
    deadline = time.monotonic() + 20
    while not seen(page).left and time.monotonic() < deadline:
        page.wait_for_timeout(20)  # beacons and sockets do not hold the page up
    (left,) = seen(page).left
    assert left.split("/", 2)[2] in ("example.org/it", "127.0.0.1:9/it")
    with pytest.raises(AssertionError, match="refused request: "):
        assert_clean(page)
    if not left.startswith("SOCKET"):
        with pytest.raises(AssertionError, match="the page asks for"):
            assert_self_contained(page)


def test_a_file_beside_the_page_is_no_part_of_it(shown, tmp_path):
    (tmp_path / "style.css").write_text("p { color: black }")
    page = shown("<link rel='stylesheet' href='style.css'><p>x</p>")
    assert_clean(page)
    with pytest.raises(AssertionError, match=r"style\.css"):
        assert_self_contained(page)


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        ("<main><h1>x</h1><img src='data:,'></main>", "image-alt (critical)"),
        ("<main><h1>x</h1><p style='color: #aaa; background: #fff'>pale</p></main>", "color-contrast (serious)"),
        ("<main><h1>x</h1><button></button></main>", "button-name (critical)"),
        ("<main><h1>x</h1><table><tr><td headers='no'>1</td></tr></table></main>", "td-headers-attr (serious)"),
    ],
)
def test_axe_finds_what_a_page_keeps_from_some(shown, body, rule):
    page = shown(body)
    (violation,) = run_axe(page)
    assert violation.startswith(rule)
    assert "<" in violation
    assert "Fix" in violation
    with pytest.raises(AssertionError, match=rule.partition(" ")[0]):
        assert_accessible(page)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("<div id='d' class='a b' style='width: 500px'>long</div>", "div#d.a.b ends at 508.0 px of 390 px: long"),
        ("<p>" + "x" * 300 + "</p>", "the document is"),
        ("<style>body { overflow-x: hidden }</style><table style='width: 450px'><tr><td>1</table>", "table ends at"),
        ("<div style='overflow: hidden; width: 200px'><p style='width: 600px'>cut</p></div>", "p ends at"),
        ("<div style='overflow-x: auto; width: 600px'>a box that scrolls, itself too wide</div>", "div ends at"),
        ("<svg style='width: 700px; height: 9px'></svg>", "svg ends at"),
    ],
)
def test_what_reaches_beyond_the_window_is_found(shown, body, named):
    page = shown(body, width=390)
    found = overflowing(page)
    assert any(entry.startswith(named) for entry in found), found
    with pytest.raises(AssertionError, match="px"):
        assert_no_overflow(page)


@pytest.mark.parametrize(
    "body",
    [
        "<div style='overflow-x: auto'><table style='width: 900px'><tr><td>1</table></div>",
        "<div style='display: none; width: 900px'>x</div>",
        "<details><summary>more</summary><div style='width: 380px'>x</div></details>",
        "<svg width='300' height='20'><rect x='200' width='900' height='9'></rect></svg>",
    ],
)
def test_what_scrolls_is_hidden_or_is_cut_by_its_drawing_is_within_reach(shown, body):
    assert_no_overflow(shown(body, width=390))


def test_a_server_of_this_machine_may_be_asked_where_it_is_the_page(open_page):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if self.path == "/" else "text/plain")
            self.end_headers()
            self.wfile.write(b"<title>x</title><link rel=icon href=data:,><p>x</p>" if self.path == "/" else b"served")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = open_page(f"http://127.0.0.1:{server.server_port}/")
        assert page.evaluate("fetch('/data').then((answer) => answer.text())") == "served"
        assert_clean(page)
        assert page.evaluate("fetch('http://example.org/').catch(() => 'refused')") == "refused"
        assert seen(page).left == ["GET http://example.org/"]
        page.context.close()
        server.shutdown()


def test_the_window_the_medium_and_scripts_are_as_asked(shown):
    page = shown("<p>x</p><script>document.title = 'ran'</script>", width=500, height=700, media="print")
    assert page.evaluate("[innerWidth, innerHeight, matchMedia('print').matches, document.title]") == [
        500,
        700,
        True,
        "ran",
    ]
    assert shown("<script>document.title = 'ran'</script>", java_script=False).title() == "Test"


def test_pictures_are_kept_where_a_folder_is_named_and_nowhere_else(shown, tmp_path, monkeypatch):
    page = shown(CLEAN)
    monkeypatch.delenv(SCREENSHOTS, raising=False)
    assert screenshot(page, "clean") is None
    monkeypatch.setenv(SCREENSHOTS, str(tmp_path / "pictures"))
    kept = screenshot(page, "clean")
    assert kept == tmp_path / "pictures" / "clean.png"
    assert kept.read_bytes().startswith(b"\x89PNG")


def test_pages_share_nothing(shown):
    first = shown("<script>localStorage.setItem('theme', 'dark')</script>")
    assert first.evaluate("localStorage.getItem('theme')") == "dark"
    assert shown("").evaluate("localStorage.getItem('theme')") is None


# ---------------------------------------------------------------- finding and installing a browser


def program(path, code=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nexit {code}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def bare(tmp_path):
    """An environment without any browser, and a function that looks in it."""
    environ = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path / "home")}
    return environ, lambda: install.find_browser(environ, tmp_path / "Applications")


def test_browsers_are_found_in_their_order(bare, tmp_path):
    environ, find = bare
    assert find() is None
    cache = tmp_path / "home" / ".cache" / "ms-playwright"
    for path in (
        tmp_path / "Applications" / "Google Chrome.app" / "Contents" / "MacOS" / "Google Chrome",
        tmp_path / "bin" / "google-chrome",
        tmp_path / "bin" / "chromium-browser",
        tmp_path / "bin" / "chromium",
        cache / "chromium-999" / "chrome-linux" / "chrome",
        cache / "chromium-1255" / "chrome-linux64" / "chrome",
        tmp_path / "own",
    ):
        program(path)
        if path.name == "own":
            environ["MANIFOLD_MIXUP_CHROMIUM"] = str(path)
        assert find() == path


def test_a_browser_that_does_not_start_is_passed_over_unless_it_is_the_named_one(bare, tmp_path):
    environ, find = bare
    broken = program(tmp_path / "bin" / "chromium", code=127)
    assert find() is None
    works = program(tmp_path / "bin" / "google-chrome")
    assert find() == works
    environ["MANIFOLD_MIXUP_CHROMIUM"] = str(broken)
    with pytest.raises(install.BrowserMissing, match="MANIFOLD_MIXUP_CHROMIUM is .*chromium"):
        find()


def obtained(bare, root, succeed, arrives):
    """What ``obtain`` finds and runs, where some commands succeed and one of them brings a browser."""
    environ, find = bare
    ran = []

    def run(command, extra, limit):
        words = " ".join(Path(command[0]).name if i == 0 else word for i, word in enumerate(command))
        ran.append(words)
        if arrives in words:
            program(Path(environ["PATH"]) / "chromium")
        return any(part in words for part in succeed)

    return install.obtain(environ, root, run, find), ran


def test_a_browser_that_is_there_is_not_installed_again(bare, tmp_path):
    program(tmp_path / "bin" / "chromium")
    assert obtained(bare, True, ["install"], "nothing") == (tmp_path / "bin" / "chromium", [])


@pytest.mark.parametrize(
    ("root", "apt", "succeed", "arrives", "last"),
    [
        (True, True, ["playwright"], "playwright", "playwright"),
        (True, True, ["update", "apt-get install"], "apt-get install", "install"),
        (True, True, ["playwright", "update", "apt-get install"], "apt-get install", "install"),
        (True, True, [], "nothing", "update"),
        (False, True, [], "nothing", "playwright"),
        (True, False, [], "nothing", "playwright"),
    ],
)
def test_each_way_to_install_is_tried_once_and_in_order(bare, tmp_path, root, apt, succeed, arrives, last):
    if apt:
        program(tmp_path / "bin" / "apt-get")
    found, ran = obtained(bare, root, succeed, arrives)
    assert found == (None if arrives == "nothing" else tmp_path / "bin" / "chromium")
    kinds = [next(kind for kind in ("playwright", "update", "install") if kind in words) for words in ran]
    assert kinds == ["playwright", "update", "install"][: ["playwright", "update", "install"].index(last) + 1]


def outcome(tmp_path, ci, *, named=""):
    """How pytest ends with a test that needs a browser, in an environment without any."""
    (tmp_path / "test_it.py").write_text(
        "from browser.install import needed_browser\n\ndef test_it():\n    needed_browser()\n"
    )
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PLAYWRIGHT_"))},
        "PATH": str(tmp_path / "bin"),
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
        "CI": ci,
        "MANIFOLD_MIXUP_CHROMIUM": named,
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(tmp_path / "test_it.py")]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


needs_no_macos = pytest.mark.skipif(sys.platform == "darwin", reason="a browser in /Applications cannot be hidden")


@needs_no_macos
def test_without_a_browser_tests_are_skipped_and_say_why(tmp_path):
    code, text = outcome(tmp_path, ci="")
    assert (code, "1 skipped" in text) == (0, True), text
    assert "the browser tests need Chromium or Chrome: install Debian's package 'chromium'" in text


@needs_no_macos
def test_without_a_browser_ci_fails(tmp_path):
    code, text = outcome(tmp_path, ci="true")
    assert (code, "1 failed" in text) == (1, True), text
    assert "no browser: the browser tests need Chromium or Chrome" in text


def test_a_named_browser_that_is_none_is_an_error_everywhere(tmp_path):
    code, text = outcome(tmp_path, ci="", named=str(tmp_path / "nowhere"))
    assert (code, "1 failed" in text) == (1, True), text
    assert "which is no program that starts" in text


@pytest.mark.parametrize(
    ("value", "expected"), [("true", True), ("1", True), ("", False), ("false", False), ("0", False)]
)
def test_ci_is_what_its_variable_says(monkeypatch, value, expected):
    monkeypatch.setenv("CI", value)
    assert install.in_ci() is expected


# ---------------------------------------------------------------- other tests of the same process


def test_an_event_loop_runs_in_the_main_thread_while_the_browser_is_open(browser):
    """Why the browser is closed with the last test of this folder, and not at the end of the session."""
    assert browser.is_connected()
    assert asyncio.get_running_loop().is_running()
