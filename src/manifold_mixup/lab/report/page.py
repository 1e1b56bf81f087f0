"""Sources to one self-contained HTML page: nothing is fetched when it is opened."""

from __future__ import annotations

import base64
import functools
import gzip
from importlib import metadata
from pathlib import Path
from typing import Any

from manifold_mixup.lab.report.beside import bibtex
from manifold_mixup.lab.report.collect import collect
from manifold_mixup.lab.report.figures.style import Plot
from manifold_mixup.lab.report.sections import Section, section
from manifold_mixup.lab.report.sources import Sources
from manifold_mixup.lab.report.templates import FOLDER, render
from manifold_mixup.lab.storage import make_folder, write_atomically

__all__ = ["plots_of", "render_page", "write_report"]


def write_report(sources: Sources, path: Path, title: str) -> Path:
    """Write the page: what the numbers show, the tables, figures, every seed and all settings.

    The file is replaced as a whole or not at all.

    Args:
        sources: Runs; the others are compared with the method of the first one.
        path: The HTML file to write. Its folder is created.
        title: Heading of the page.

    Returns:
        ``path``.

    Raises:
        UsageError: There are no runs.
        StorageError: The file cannot be written.
    """
    page = render_page(sources, title)
    path = Path(path)
    make_folder(path.parent)
    write_atomically(path, page.encode())
    return path


def render_page(sources: Sources, title: str, *, live: bool = False) -> str:
    """The page as text.

    It holds its own style and scripts (plotly.js once, compressed), so it can be opened offline, mailed and archived.
    Whatever comes from the runs is shown as text, never read as markup.

    Args:
        sources: Runs; the others are compared with the method of the first one.
        title: Heading of the page.
        live: Whether its script asks the server that it came from for news.

    Raises:
        UsageError: There are no runs.
    """
    experiments = collect(sources.results, sources.failures, sources.going, sources.planned)
    met = {experiment.name for experiment in experiments}
    version = metadata.version("manifold-mixup")
    return render(
        "page.html",
        title=title,
        sections=[
            section(experiment, index, sources.descriptions.get(experiment.name, ""))
            for index, experiment in enumerate(experiments, 1)
        ],
        orphans=[failure for failure in sources.failures if failure.experiment not in met],
        version=version,
        bibtex=bibtex(experiments, version),
        live=live,
        styles=_asset("page.css"),
        script=_asset("page.js"),
        plotly=_plotly(),
    )


def plots_of(sources: Sources) -> dict[str, Plot]:
    """Every figure of the page, by a name that is fit for a file.

    Raises:
        UsageError: There are no runs.
    """
    experiments = collect(sources.results, sources.failures, sources.going, sources.planned)
    found: dict[str, Plot] = {}
    for index, experiment in enumerate(experiments, 1):
        for key, plot in _named(section(experiment, index)):
            name, count = key, 2
            while name in found:
                name, count = f"{key}-{count}", count + 1
            found[name] = plot
    return found


def _named(found: Section) -> list[tuple[str, Plot]]:
    plots = [*(p for part in found.drawn for p in part.plots), *(p for card in found.cards for p in card.plots)]
    return [(f"{found.name}-{plot.key}", plot) for plot in plots]


def _asset(name: str) -> Any:
    from markupsafe import Markup

    return Markup((FOLDER / name).read_text(encoding="utf-8"))  # our own file, not data


@functools.cache
def _plotly() -> str:
    """plotly.js, compressed for the page's script, which unpacks it: a quarter of its size."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(str(get_plotlyjs()).encode(), 9, mtime=0)).decode()
