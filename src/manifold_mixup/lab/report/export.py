"""The page's figures as files for papers and slides: SVG, PNG and PDF, drawn by plotly.js in a browser of this machine.

kaleido draws them, in a Chrome or Chromium that it starts without a window. Nothing is fetched: plotly.js is the one
inside Python's plotly, there is no MathJax, and the browser can resolve no address.
"""

from __future__ import annotations

import asyncio
import errno
import html
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifold_mixup.lab.errors import LabError, MissingExtra, StorageError, UsageError
from manifold_mixup.lab.report.figures.style import Figure, literal
from manifold_mixup.lab.storage import make_folder

__all__ = ["FONT", "FORMATS", "file_stem", "still", "write_figures"]

FORMATS = ("svg", "png", "pdf")
FONT = "Helvetica, Arial, sans-serif"  # there is one of these, or one as wide, on every system that shows the files
WIDTH, SCALE = 700, 3.0  # 700 px drawn at three times the size: 300 dots per inch on 7 inches, the width of a page
SECONDS = 60.0  # for one image; a browser that hangs is given up
LONGEST = 60  # characters of a file's name without its ending: at most 240 bytes, of 255
VARIABLE = re.compile(r"var\(--([\w-]+)\)")
BROWSER_ADVICE = (
    "figures are drawn in Chrome or Chromium: install your system's package (Debian: apt-get install chromium), "
    "or run plotly_get_chrome, or name an executable in the environment variable BROWSER_PATH"
)


def write_figures(
    figures: Mapping[str, Figure],
    folder: Path,
    formats: Sequence[str] = ("svg", "png"),
    *,
    colours: Mapping[str, str] | None = None,
    titles: Mapping[str, str] | None = None,
    width: int = WIDTH,
    scale: float = SCALE,
) -> list[Path]:
    """Write every figure in every format, or nothing at all.

    Args:
        figures: Specifications for plotly.js by name. A figure's height is that of its layout.
        folder: Where the files go; it is created. Files of the same names are replaced.
        formats: Of ``FORMATS``: svg, png, pdf.
        colours: What ``var(--NAME)`` stands for, by NAME.
        titles: A title for figures of these names, as plain text; it is drawn above the figure.
        width: In pixels, as on the page.
        scale: Dots of a PNG for each pixel.

    Returns:
        The files, figure by figure: ``NAME.FORMAT``, with letters, digits, ``.``, ``=``, ``+`` and ``-`` of the name.

    Raises:
        MissingExtra: kaleido is not installed.
        LabError: There is no browser, it does not start, or plotly.js cannot draw a figure.
        UsageError: An unknown format, a colour without a value, or a specification without data.
        StorageError: The folder or a file cannot be written.
    """
    _check(formats, width, scale)
    stems = _stems(figures)
    jobs = []
    for name, figure in figures.items():
        spec = still(name, figure, colours or {}, (titles or {}).get(name, ""), width)
        for form in formats:
            size = {"width": width, "height": spec["layout"]["height"], "scale": scale if form == "png" else 1}
            jobs.append(_Job(name, f"{stems[name]}.{form}", spec, {"format": form, **size}))
    if not jobs:
        return []
    return _keep(dict(zip([job.file for job in jobs], _draw(jobs), strict=True)), folder)


def still(name: str, figure: Figure, colours: Mapping[str, str], title: str = "", width: int = WIDTH) -> Figure:
    """A figure of the page as one that stands alone: on white, with a title and a legend, without the page's styles.

    Args:
        name: How errors call it.
        figure: Its specification, which is left as it is.
        colours: What ``var(--NAME)`` stands for, by NAME.
        title: Plain text; none if empty.
        width: In pixels: what decides into how many rows the legend breaks.

    Raises:
        UsageError: A colour has no value, or there is no data.
    """
    traces = figure.get("data")
    if not isinstance(traces, (list, tuple)) or not all(isinstance(trace, Mapping) for trace in traces):
        raise UsageError(f"figure {name!r} is no specification for plotly.js: its 'data' is no list of traces")
    values = {key.removeprefix("--"): value for key, value in colours.items()}
    spec: Figure = _resolved(name, {"layout": {}, **figure}, "", values)
    layout = spec["layout"]
    layout.update(paper_bgcolor="#ffffff", plot_bgcolor="#ffffff", width=width, height=layout.get("height", 400))
    layout["font"] = {"size": 12, **layout.get("font", {}), "family": FONT}
    _add_head(layout, title, [str(t.get("name", "")) for t in spec["data"] if t.get("showlegend") is True])
    return spec


def file_stem(name: str) -> str:
    """A figure's name as that of a file, without an ending: it names no folder and nothing hidden."""
    return re.sub(r"[^\w.=+-]+", "-", name).strip("-.")[:LONGEST].rstrip("-.") or "figure"


# ---------------------------------------------------------------- from the page's figure to one that stands alone


def _check(formats: Sequence[str], width: int, scale: float) -> None:
    if isinstance(formats, str) or not formats or not set(formats) <= set(FORMATS):
        raise UsageError(f"figures are written as {', '.join(FORMATS)}, one or more of them, and not as {formats!r}")
    if len(set(formats)) != len(formats):
        raise UsageError(f"a format is named twice in {list(formats)}")
    if not 100 <= width <= 4000:
        raise UsageError(f"a figure's width is 100 to 4000 px, and not {width}")
    if not 0.5 <= scale <= 10:
        raise UsageError(f"a figure's scale is 0.5 to 10, and not {scale}")


def _stems(names: Iterable[str]) -> dict[str, str]:
    """File names by figure; where two would be the same, also on systems that ignore case, the later gets a number."""
    stems: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        stem, count = file_stem(name), 1
        while stem.lower() in taken:
            count += 1
            stem = f"{file_stem(name)}-{count}"
        taken.add(stem.lower())
        stems[name] = stem
    return stems


def _resolved(name: str, value: Any, key: str, colours: Mapping[str, str]) -> Any:
    """A copy of part of a specification, its colours looked up and its fonts replaced.

    Only what stands under a key for colours is looked up: a label that reads ``var(--x)`` is a label.
    """
    if isinstance(value, Mapping):
        return {k: _resolved(name, v, k, colours) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_resolved(name, v, key, colours) for v in value]
    if key == "family":
        return FONT
    if isinstance(value, str) and "color" in key and value.startswith("var("):
        found = VARIABLE.fullmatch(value.strip())
        if found is None or found[1] not in colours:
            known = ", ".join(f"--{known}" for known in sorted(colours)) or "none"
            raise UsageError(f"figure {name!r} uses the colour {value!r}, which has no value; there is {known}")
        return colours[found[1]]
    return value


def _add_head(layout: Figure, title: str, entries: Sequence[str]) -> None:
    """Make room above the figure for its title and for the legend that the page draws itself."""
    margin = {"l": 8, "r": 16, "t": 8, "b": 8, **layout.get("margin", {})}
    head = 0
    if title:
        head = 34
        text = {"text": f"<b>{literal(title)}</b>", "font": {"size": 14}}
        layout["title"] = {**text, "x": 0, "xref": "container", "xanchor": "left", "yref": "container"}
        layout["title"] |= {"y": 1, "yanchor": "top", "pad": {"l": 10, "t": 10}}
    if entries:
        rows = _rows(entries, layout["width"] - margin["l"] - margin["r"])
        top = 1 - head / (layout["height"] + head + 20 * rows + 6)
        layout["legend"] = {"orientation": "h", "xref": "container", "x": 0.01, "xanchor": "left"}
        layout["legend"] |= {"yref": "container", "y": top, "yanchor": "top", "tracegroupgap": 0}
        layout["showlegend"] = True
        head += 20 * rows + 6
    layout["margin"] = {**margin, "t": margin["t"] + head}
    layout["height"] += head


def _rows(entries: Sequence[str], room: int) -> int:
    """Into how many rows a legend breaks: plotly.js makes equal columns where one row is too narrow."""
    widths = [48 + 6.2 * len(html.unescape(entry)) for entry in entries]
    return 1 if sum(widths) <= room else math.ceil(len(entries) / max(1, int(room / max(widths))))


# ---------------------------------------------------------------- drawing


@dataclass(frozen=True)
class _Job:
    """One file: the figure's name for errors, the file's name, the specification, and what kaleido is told."""

    name: str
    file: str
    spec: Figure
    options: Figure


def _draw(jobs: Sequence[_Job]) -> list[bytes]:
    """The images, drawn one after another in one browser."""
    try:
        import kaleido
        from choreographer.browsers import BrowserFailedError, ChromeNotFoundError, Chromium
    except ModuleNotFoundError as error:
        raise MissingExtra("kaleido", "figures") from error

    class Offline(Chromium):
        """A browser that can resolve no address, so that no figure can fetch anything."""

        def get_cli(self) -> Sequence[str]:
            return [*super().get_cli(), "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking"]

    async def draw() -> list[bytes]:
        images = []
        options = {"n": 1, "timeout": SECONDS, "mathjax": False, "browser_cls": Offline}
        async with kaleido.Kaleido(path=_named_browser(), **options) as browser:
            for job in jobs:
                try:
                    images.append(await browser.calc_fig(job.spec, opts=job.options))
                except TimeoutError as error:
                    raise LabError(f"{job.file} was not drawn within {SECONDS:.0f} seconds") from error
                except Exception as error:  # kaleido's, plotly.js' and the protocol's have no base in common
                    raise LabError(f"figure {job.name!r} cannot be drawn as {job.file}: {error}") from error
        return images

    try:
        return _run(draw)
    except ChromeNotFoundError as error:
        raise LabError(f"there is no browser: {BROWSER_ADVICE}") from error
    except (BrowserFailedError, OSError) as error:
        named = f" {_named_browser()}" if _named_browser() else ""
        raise LabError(f"the browser{named} does not start; {BROWSER_ADVICE}") from error


def _named_browser() -> str | None:
    """The browser that BROWSER_PATH names; None leaves the search to kaleido."""
    named = os.environ.get("BROWSER_PATH")
    if named and not Path(named).is_file():
        raise LabError(f"BROWSER_PATH is {named!r}, which is no file; {BROWSER_ADVICE}")
    return named or None


def _run(job: Callable[[], Coroutine[Any, Any, list[bytes]]]) -> list[bytes]:
    """Run a coroutine to its end, in a thread of its own where this one has an event loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(job())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, job()).result()


# ---------------------------------------------------------------- keeping


def _keep(files: Mapping[str, bytes], folder: Path) -> list[Path]:
    """Write files beside their places first, and move them when all are whole."""
    folder = Path(folder)
    make_folder(folder)
    path = folder
    try:
        beside = Path(tempfile.mkdtemp(prefix=".figures-", dir=folder))
        try:
            for name, content in files.items():
                path = folder / name
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                (beside / name).write_bytes(content)
            for name in files:
                path = folder / name
                (beside / name).replace(path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise StorageError(path, error) from error
    return [folder / name for name in files]
