"""How long the page of 60 runs (10 methods x 6 seeds) takes to build and to open.

    python benchmarks/report_page.py [--runs FOLDER] [--seeds 6] [--steps 300] [--limits 20 3]

The runs are real, of the handwritten digits and short; with --runs they are kept and not repeated. The page is built
in a fresh process, imports included, and opened from its file in a Chromium without a window: the time until its load
event, then until the figures of one screen are drawn, plotly.js unpacked, and then until all figures are. Medians of
five pages. Exits with 1 where building or opening takes longer than the limits, in seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

INSTALL = Path(__file__).parents[1] / "tests" / "browser" / "install.py"
METHODS = (
    "none", "dropout:p=0.5", "weight_decay:strength=1e-3", "label_smoothing", "input_noise:sd=0.1",
    "hidden_noise:sd=0.1", "input_mixup:alpha=1", "last_layer_mixup", "noisy_feature_mixup", "manifold_mixup:alpha=2",
)  # fmt: skip
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
READY = "() => document.querySelectorAll('.figure[data-drawn]').length >= {count}"


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", "from manifold_mixup.lab.cli import main; main()", *words]


def make_runs(folder: Path, seeds: int, steps: int) -> None:
    chosen = [word for method in METHODS for word in ("--method", method)]
    size = ["--steps", str(steps), "--seeds", str(seeds), "--set", "train.eval_every=10"]
    subprocess.run(
        command("compare", "--recipe", "digits", "--name", "sixty", *chosen, *size, "--runs", str(folder), "-q"),
        check=True,
        stdout=subprocess.DEVNULL,
    )


def build(folder: Path, page: Path) -> float:
    start = time.perf_counter()
    subprocess.run(command("report", str(folder / "sixty"), "-o", str(page)), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def open_page(browser: object, page: Path) -> tuple[float, float, float, int]:
    """Seconds to the load event, to the figures of a screen, to all figures; and how many figures there are."""
    tab = browser.new_page(viewport={"width": 1440, "height": 900})  # type: ignore[attr-defined]
    with contextlib.closing(tab):
        start = time.perf_counter()
        tab.goto(page.as_uri(), wait_until="load")
        loaded = time.perf_counter() - start
        count = tab.locator(".figure").count()
        tab.locator(".figure").first.scroll_into_view_if_needed()
        tab.wait_for_function(READY.format(count=1))
        first = time.perf_counter() - start
        tab.evaluate("dispatchEvent(new Event('beforeprint'))")  # draws everything
        tab.wait_for_function(READY.format(count=count), timeout=120_000)
        return loaded, first, time.perf_counter() - start, count


def find_chromium() -> Path:
    found: Path | None = runpy.run_path(str(INSTALL))["find_browser"]()
    if found is None:
        raise SystemExit("no Chromium was found: make browser installs one")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: a temporary one)")
    parser.add_argument("--seeds", type=int, default=6, help="seeds of each method (default: 6)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each run (default: 300)")
    parser.add_argument("--limits", type=float, nargs=2, default=(20.0, 3.0), help="seconds to build and to open")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.runs or Path(temporary)
        page = Path(temporary) / "page.html"
        make_runs(folder, options.seeds, options.steps)
        builds = [build(folder, page) for _ in range(5)]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
            opened = [open_page(browser, page) for _ in range(5)]
            browser.close()
        size = page.stat().st_size
    loaded, first, every = (statistics.median(times[i] for times in opened) for i in range(3))
    built = statistics.median(builds)
    print(f"{len(METHODS) * options.seeds} runs, {opened[0][3]} figures, {size / 1e6:.1f} MB; medians of 5 pages")
    spread = f"{min(builds):.2f} to {max(builds):.2f}"
    print(f"build, in a fresh process  {built:6.2f} s   ({spread}; limit {options.limits[0]:g})")
    print(f"open: load event           {loaded:6.2f} s   (limit {options.limits[1]:g})")
    print(f"open: first figure drawn   {first:6.2f} s   (limit {options.limits[1]:g})")
    print(f"open: all figures drawn    {every:6.2f} s")
    return int(built > options.limits[0] or first > options.limits[1])


if __name__ == "__main__":
    sys.exit(main())
