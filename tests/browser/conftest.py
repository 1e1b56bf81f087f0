"""A headless browser for the tests of this folder, and pages in it that are watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import pytest

from browser.install import needed_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FLAGS = (
    "--no-sandbox",  # root has none, as in containers; the pages are our own
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # a second wall behind the watched requests
)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """One browser for all tests of this folder, in each process of pytest-xdist.

    It lives as long as the folder's tests and not as the session: Playwright keeps an event loop running in the main
    thread, in which no other test could call ``asyncio.run``.
    """
    executable = needed_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages that are watched and cannot reach the network; they are closed after the test."""
    from browser.checks import watch

    contexts = []

    def open_one(
        target: Path | str,
        width: int = 1440,
        height: int = 900,
        color_scheme: Literal["light", "dark", "no-preference"] = "light",
        *,
        media: Literal["screen", "print"] = "screen",
        reduced_motion: Literal["reduce", "no-preference"] = "reduce",
        java_script: bool = True,
        origins: tuple[str, ...] = (),
    ) -> Page:
        """Open a page in a context of its own, and wait until it has loaded.

        Args:
            target: A file, or an address; that of a server on 127.0.0.1 is then the one origin that may be asked.
            width: Of the window, in pixels.
            height: Of the window, in pixels.
            color_scheme: What the reader's system prefers.
            media: For which medium the page is laid out.
            reduced_motion: What the reader's system asks of animations.
            java_script: Whether scripts run.
            origins: More origins that may be asked. Without any, the browser is offline.
        """
        address = target.resolve().as_uri() if isinstance(target, Path) else target
        parts = urlsplit(address)
        if parts.hostname == "127.0.0.1":
            origins = (*origins, f"{parts.scheme}://{parts.netloc}")
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=color_scheme,
            reduced_motion=reduced_motion,
            java_script_enabled=java_script,
            service_workers="block",  # their requests could not be watched
            offline=not origins,
        )
        contexts.append(context)
        context.set_default_timeout(60_000)
        page = watch(context, origins)
        page.emulate_media(media=media)
        page.goto(address, wait_until="load")
        return page

    yield open_one
    for context in contexts:
        context.close()
