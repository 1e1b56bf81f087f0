"""The example of a report: the page of the demo, and the picture of it that README.md shows.

    python docs/example-report/make.py [--runs runs]

Runs what is missing of ``manifold-mixup demo``, writes ``index.html`` beside this file, and takes the picture with a
Chromium that is on PATH or named in MANIFOLD_MIXUP_CHROMIUM.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from manifold_mixup.lab.cli import main as manifold_mixup

HERE = Path(__file__).parent
PICTURE = HERE.parent / "pictures" / "report.png"
LOOK = "() => document.querySelectorAll('#experiment-2-table ~ .plots .figure[data-drawn]').length > 2"


def command(*words: str) -> None:
    try:
        manifold_mixup(words)
    except SystemExit as end:
        if end.code:
            raise


def take_picture(page: Path, picture: Path, chromium: str) -> None:
    """The start of the digits' part: verdict, table, and the first figures."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1200, "height": 1500}, color_scheme="light")
        tab.goto(page.resolve().as_uri())
        tab.evaluate("document.querySelector('#experiment-2').scrollIntoView()")
        tab.wait_for_function(LOOK)
        tab.wait_for_timeout(1000)  # plotly.js moves its labels to their places after it has drawn
        tab.screenshot(path=picture)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default="runs", help="folder of the demo's runs (default: runs)")
    options = parser.parse_args()
    named = os.environ.get("MANIFOLD_MIXUP_CHROMIUM")
    chromium = named or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no Chromium was found: install one, or name it in MANIFOLD_MIXUP_CHROMIUM")
    page = HERE / "index.html"
    command("demo", "--runs", options.runs)
    parts = [f"{options.runs}/{name}" for name in ("spiral", "digits")]
    command("report", *parts, "-o", str(page), "--title", "Manifold Mixup: the demo")
    take_picture(page, PICTURE, chromium)


if __name__ == "__main__":
    main()
