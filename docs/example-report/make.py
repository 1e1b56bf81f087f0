"""The example of a report: the page of the demo, and the picture of it that README.md shows.

    python docs/example-report/make.py [--runs runs]

Runs what is missing of ``manifold-mixup demo``, writes ``index.html`` beside this file, and takes the picture with
the Chromium that the tests of the page use.
"""

from __future__ import annotations

import argparse
import io
import runpy
import subprocess
import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
INSTALL = HERE.parents[1] / "tests" / "browser" / "install.py"
PICTURE = HERE.parent / "pictures" / "report.png"
PLACES = ("experiment-2", "experiment-2-curves", "experiment-1-pictures")
SIZE = (1000, 1300)
DRAWN = """() => [...document.querySelectorAll('.figure')].every((figure) => {
  const { top, bottom } = figure.getBoundingClientRect();
  return bottom < 0 || top > innerHeight || 'drawn' in figure.dataset;
})"""


def command(*words: str) -> None:
    """In a process of its own, so that records and page name the command as it is typed."""
    subprocess.run([Path(sys.executable).with_name("manifold-mixup"), *words], check=True)


def take_picture(page: Path, picture: Path, chromium: Path) -> None:
    """Three places of the page side by side: verdict and table, curves and calibration, decision surfaces."""
    from playwright.sync_api import sync_playwright

    width, height = SIZE
    whole = Image.new("RGB", (width * len(PLACES), height))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
        tab.goto(page.resolve().as_uri())
        tab.add_style_tag(content=".legend { position: static }")
        for column, place in enumerate(PLACES):
            tab.evaluate(f"document.getElementById('{place}').scrollIntoView()")
            tab.wait_for_function(DRAWN)
            tab.wait_for_timeout(1000)  # plotly.js moves its labels to their places after it has drawn
            tab.evaluate(f"document.getElementById('{place}').scrollIntoView()")
            whole.paste(Image.open(io.BytesIO(tab.screenshot())), (column * width, 0))
        browser.close()
    whole.resize((1800, 1800 * height // whole.width), Image.Resampling.LANCZOS).save(picture, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default="runs", help="folder of the demo's runs (default: runs)")
    options = parser.parse_args()
    chromium: Path | None = runpy.run_path(str(INSTALL))["find_browser"]()
    if chromium is None:
        raise SystemExit("no Chromium was found: make browser installs one")
    page = HERE / "index.html"
    command("demo", "--runs", options.runs)
    parts = [f"{options.runs}/{name}" for name in ("spiral", "digits")]
    command("report", *parts, "-o", str(page), "--title", "Manifold Mixup: the demo")
    take_picture(page, PICTURE, chromium)


if __name__ == "__main__":
    main()
