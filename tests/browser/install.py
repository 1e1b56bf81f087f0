"""The browser of the tests: find a Chromium or Chrome that starts, or install one. ``make test`` calls this first.

In this order: the one that the environment variable MANIFOLD_MIXUP_CHROMIUM names, Playwright's own, one on PATH, one
where macOS keeps it. Without any, ``playwright install chromium`` is tried, and then, as root, Debian's package. Needs
nothing but Python's standard library, and Playwright to install its browser.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

__all__ = ["BrowserMissing", "commands", "find_browser", "in_ci", "needed_browser", "obtain"]

VARIABLE = "MANIFOLD_MIXUP_CHROMIUM"
ON_PATH = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ON_MACOS = ("Chromium.app/Contents/MacOS/Chromium", "Google Chrome.app/Contents/MacOS/Google Chrome")
PLAYWRIGHTS = ("chromium-*/chrome-*/chrome", "chromium-*/chrome-*/*.app/Contents/MacOS/*")
ADVICE = (
    "the browser tests need Chromium or Chrome: install Debian's package 'chromium' or Google Chrome, run "
    f"'playwright install --with-deps chromium', or name an executable in {VARIABLE}"
)

Command = tuple[list[str], dict[str, str], float]


class BrowserMissing(RuntimeError):
    """There is no browser that starts."""


def in_ci() -> bool:
    """Whether the tests run unattended, where a missing browser is an error and no reason to skip."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


@functools.cache
def starts(path: Path) -> bool:
    """Whether it is a program that can print its version: one whose libraries are missing cannot."""
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, stdin=subprocess.DEVNULL, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _playwrights(environ: Mapping[str, str]) -> Iterator[Path]:
    """What ``playwright install`` left, the newest first."""
    named = environ.get("PLAYWRIGHT_BROWSERS_PATH", "")
    home = Path(environ.get("HOME") or Path.home())
    caches = [Path(environ.get("XDG_CACHE_HOME") or home / ".cache"), home / "Library" / "Caches"]
    folders = [Path(named)] if named not in ("", "0") else [cache / "ms-playwright" for cache in caches]
    for folder in folders:
        builds = [path for pattern in PLAYWRIGHTS for path in folder.glob(pattern)]
        yield from sorted(builds, key=lambda path: path.relative_to(folder).parts[0].rpartition("-")[2].zfill(9))[::-1]


def find_browser(environ: Mapping[str, str] = os.environ, applications: Path = Path("/Applications")) -> Path | None:
    """The executable of a browser that starts, or None.

    Args:
        environ: The environment to look in.
        applications: Where macOS keeps programs.

    Raises:
        BrowserMissing: The environment names one that does not start; no other is taken in its stead.
    """
    if named := environ.get(VARIABLE):
        if starts(Path(named)):
            return Path(named)
        raise BrowserMissing(f"{VARIABLE} is {named!r}, which is no program that starts")
    on_path = (shutil.which(name, path=environ.get("PATH", os.defpath)) for name in ON_PATH)
    candidates = (
        *_playwrights(environ),
        *(Path(found) for found in on_path if found),
        *(applications / name for name in ON_MACOS),
    )
    return next((path for path in candidates if path.is_file() and starts(path)), None)


def commands(environ: Mapping[str, str], root: bool) -> Iterator[list[Command]]:
    """The ways to install a browser, best first; each is a list of commands that must all succeed.

    Args:
        environ: The environment; its PATH says whether there is ``apt-get``.
        root: Whether packages may be installed.
    """
    yield [([sys.executable, "-m", "playwright", "install", "chromium"], {}, 600.0)]
    apt = shutil.which("apt-get", path=environ.get("PATH", os.defpath))
    if root and apt:
        quiet = {"DEBIAN_FRONTEND": "noninteractive"}
        options = ["-y", "-q", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"]
        yield [
            ([apt, "update", "-q"], quiet, 300.0),
            ([apt, "install", *options, "chromium", "fonts-liberation"], quiet, 1200.0),
        ]


def call(command: Sequence[str], extra: Mapping[str, str], limit: float) -> bool:
    """Run a command, showing what it says; whether it succeeded within so many seconds."""
    print("+", *command, flush=True)
    try:
        return subprocess.run(command, env={**os.environ, **extra}, timeout=limit, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        print(error, file=sys.stderr, flush=True)
        return False


def obtain(
    environ: Mapping[str, str] = os.environ,
    root: bool | None = None,
    run: Callable[[Sequence[str], Mapping[str, str], float], bool] = call,
    find: Callable[[], Path | None] = find_browser,
) -> Path | None:
    """A browser that starts: the one that is there, or else one installed now. Each way to install is tried once.

    Args:
        environ: The environment.
        root: Whether packages may be installed; None asks the system.
        run: What runs a command with more environment variables and a limit in seconds, and says whether it succeeded.
        find: What looks for a browser.
    """
    if found := find():
        return found
    for way in commands(environ, hasattr(os, "geteuid") and os.geteuid() == 0 if root is None else root):
        if all(run(*command) for command in way) and (found := find()):
            return found
    return None


@functools.cache
def needed_browser() -> Path:
    """The browser, for a test that needs it; without any, the test is skipped, or in CI (``CI=true``) an error."""
    import pytest

    try:
        found = find_browser()
    except BrowserMissing as error:
        pytest.fail(str(error), pytrace=False)
    if found is None and in_ci():
        pytest.fail(f"no browser: {ADVICE}", pytrace=False)
    if found is None:
        pytest.skip(ADVICE)
    return found


def main() -> int:
    """Find or install; in CI, having none is a failure."""
    try:
        found = obtain()
    except BrowserMissing as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if found:
        print(f"browser for the tests: {found}")
        return 0
    print(f"{'error' if in_ci() else 'note'}: {ADVICE}", file=sys.stderr)
    return 1 if in_ci() else 0


if __name__ == "__main__":
    sys.exit(main())
