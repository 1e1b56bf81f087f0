"""What a test asks of a page: that it was silent, kept to this machine, is accessible, and fits its window."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from playwright.sync_api import BrowserContext, ConsoleMessage, Dialog, Page, Request, Route, WebSocketRoute

__all__ = [
    "SCREENSHOTS",
    "Seen",
    "assert_accessible",
    "assert_clean",
    "assert_drawn",
    "assert_no_overflow",
    "assert_self_contained",
    "draw_all",
    "overflowing",
    "run_axe",
    "screenshot",
    "seen",
    "watch",
]

SCREENSHOTS = "MANIFOLD_MIXUP_SCREENSHOTS"
LOCAL = ("file", "data", "blob", "about")
GRAVE = ("serious", "critical")


@dataclass
class Seen:
    """What happened on a page since it was opened.

    Attributes:
        console: Warnings and errors of the console, each with its place.
        errors: Exceptions that no script caught, and crashes.
        dialogs: What ``alert``, ``confirm`` and ``prompt`` said; each was closed at once.
        left: Addresses that the page asked for and was refused, as ``METHOD address``; sockets as ``SOCKET address``.
        requests: Every address that it asked for, its own included.
    """

    console: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """All that a clean page does not do, in words."""
        named = {
            "console": self.console,
            "uncaught error": self.errors,
            "dialog": self.dialogs,
            "refused request": self.left,
        }
        return [f"{name}: {entry}" for name, entries in named.items() for entry in entries]


_seen: WeakKeyDictionary[Page, Seen] = WeakKeyDictionary()


def seen(page: Page) -> Seen:
    """What was recorded of a page that ``open_page`` opened."""
    return _seen[page]


def watch(context: BrowserContext, origins: tuple[str, ...]) -> Page:
    """A new page, of which all is recorded and from which no request leaves this machine.

    Args:
        context: A fresh context; its rules become those of the page.
        origins: Origins that may be asked, such as ``http://127.0.0.1:8000``.
    """
    record = Seen()

    def allowed(address: str) -> bool:
        parts = urlsplit(address)
        origin = f"{parts.scheme.replace('ws', 'http')}://{parts.netloc}"
        return parts.scheme in LOCAL or origin in origins

    def answer(route: Route) -> None:
        if allowed(route.request.url):
            route.continue_()
            return
        record.left.append(f"{route.request.method} {route.request.url}")
        route.abort()

    def close(socket: WebSocketRoute) -> None:
        record.left.append(f"SOCKET {socket.url}")
        socket.close()

    def asked(request: Request) -> None:
        record.requests.append(request.url)

    def said(dialog: Dialog) -> None:
        record.dialogs.append(f"{dialog.type}: {dialog.message}")
        dialog.dismiss()

    context.route("**/*", answer)
    context.route_web_socket(lambda address: not allowed(address), close)
    context.on("request", asked)
    page = context.new_page()
    page.on("console", lambda message: _note(record, message))
    page.on("pageerror", lambda error: record.errors.append(str(error)))
    page.on("crash", lambda _: record.errors.append("the page crashed"))
    page.on("dialog", said)
    _seen[page] = record
    return page


def _note(record: Seen, message: ConsoleMessage) -> None:
    if message.type in ("error", "warning", "assert"):
        place = message.location
        record.console.append(f"{message.type}: {message.text} ({place['url']}:{place['lineNumber']})")


def assert_clean(page: Page) -> None:
    """Nothing in the console, no uncaught error, no dialog, and no request that left this machine."""
    problems = seen(page).problems()
    assert not problems, "\n".join(problems)


def assert_self_contained(page: Page) -> None:
    """The page asked for nothing but itself; what it needs lies within it, as text, ``data:`` or ``blob:``."""
    own = page.url.partition("#")[0]
    others = [url for url in seen(page).requests if urlsplit(url).scheme not in ("data", "blob") and url != own]
    assert not others, f"the page asks for {others}"


def run_axe(page: Page, context: str | list[Any] | dict[str, Any] | None = None) -> list[str]:
    """Scan a page with axe-core.

    Args:
        page: The page.
        context: What part of it, in axe-core's words; None is all.

    Returns:
        Every violation that axe-core calls serious or critical: what is wrong, where, why.
    """
    from axe_playwright_python.sync_playwright import Axe

    # Without preload axe-core fetches no style sheets, which would be recorded as the page's own requests.
    results = Axe().run(page, context, {"resultTypes": ["violations"], "preload": False})
    found = []
    for violation in results.response["violations"]:
        if violation["impact"] in GRAVE:
            places = [_place(node) for node in violation["nodes"]]
            found.append(f"{violation['id']} ({violation['impact']}): {violation['help']}\n  " + "\n  ".join(places))
    return found


def _place(node: dict[str, Any]) -> str:
    target = " ".join(str(part) for part in node["target"])
    source = " ".join(node["html"].split())[:160]
    why = re.sub(r"\s+", " ", node.get("failureSummary", ""))
    return f"{target}: {source} | {why}"


def assert_accessible(page: Page, context: str | list[Any] | dict[str, Any] | None = None) -> None:
    """axe-core finds nothing serious or critical."""
    violations = run_axe(page, context)
    assert not violations, "\n".join(violations)


# Elements that reach beyond the window's right edge. What lies in a box that scrolls sideways is within reach, and what
# lies in a drawing is cut by the drawing, which is itself looked at. A pixel is left to rounding.
OVERFLOWING = """
(width) => {
  const scrolls = (box) => ["auto", "scroll"].includes(getComputedStyle(box).overflowX);
  const withinReach = (element) => {
    for (let box = element.parentElement; box && box !== document.body; box = box.parentElement) {
      if (scrolls(box) || box.localName === "svg") return true;
    }
    return false;
  };
  const name = (element) => {
    const classes = (element.getAttribute("class") || "").trim().split(/\\s+/).filter(Boolean);
    return [element.localName + (element.id ? "#" + element.id : ""), ...classes].join(".");
  };
  const found = [];
  const content = document.scrollingElement.scrollWidth;
  if (content > width) found.push(`the document is ${content} px wide, its window ${width} px`);
  for (const element of document.body.querySelectorAll("*")) {
    if (!element.checkVisibility({ visibilityProperty: true })) continue;
    const box = element.getBoundingClientRect();
    if (box.width > 0 && box.height > 0 && box.right > width + 1 && !withinReach(element)) {
      const text = (element.textContent || "").trim().replace(/\\s+/g, " ").slice(0, 60);
      found.push(`${name(element)} ends at ${box.right.toFixed(1)} px of ${width} px: ${text}`);
    }
  }
  return found;
}
"""


def overflowing(page: Page) -> list[str]:
    """What reaches beyond the right edge of the window, outermost first, without what can be scrolled to in a box."""
    size = page.viewport_size
    assert size is not None
    return [str(entry) for entry in page.evaluate(OVERFLOWING, size["width"])]


def assert_no_overflow(page: Page) -> None:
    """Nothing reaches beyond the right edge of the window: the page scrolls down, and never sideways."""
    found = overflowing(page)
    assert not found, "\n".join(found[:20])


# Opens every part, and brings one figure after the other into view, as a reader who scrolls would.
DRAW_ALL = """
async () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
  for (const figure of document.querySelectorAll(".figure:not([hidden])")) {
    figure.scrollIntoView();
    for (let tries = 0; !("drawn" in figure.dataset) && tries < 300; tries++) {
      await new Promise((done) => setTimeout(done, 20));
    }
  }
  scrollTo(0, 0);
}
"""

# For each figure: its id, whether it counts as drawn, and how many of its marks can be seen.
MARKS = """
() => [...document.querySelectorAll(".figure:not([hidden])")].map((figure) => {
  const marks = [...figure.querySelectorAll(".plot svg .trace path, .plot svg .heatmaplayer image")];
  const seen = marks.filter((mark) => {
    const box = mark.getBoundingClientRect();
    return Math.max(box.width, box.height) > 1;
  });
  return [figure.id, "drawn" in figure.dataset, seen.length];
})
"""


def draw_all(page: Page) -> None:
    """Open everything that can be opened and scroll through a report until each of its figures is drawn."""
    page.evaluate(DRAW_ALL)


def assert_drawn(page: Page) -> list[str]:
    """Every figure of a report is drawn and shows at least one mark; their ids, of those that are not hidden."""
    figures = page.evaluate(MARKS)
    empty = [name for name, drawn, marks in figures if not (drawn and marks)]
    assert figures, "there are no figures"
    assert not empty, f"these figures show nothing: {', '.join(empty)}"
    return [name for name, *_ in figures]


def screenshot(page: Page, name: str) -> Path | None:
    """Keep a picture of the whole page as NAME.png, if the environment names a folder for that.

    Args:
        page: The page.
        name: The name of the file, without its ending.

    Returns:
        The file; None where MANIFOLD_MIXUP_SCREENSHOTS is not set.
    """
    folder = os.environ.get(SCREENSHOTS)
    if not folder:
        return None
    path = Path(folder) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=path, full_page=True, animations="disabled")
    return path
