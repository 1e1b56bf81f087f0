"""The commands ``manifold-mixup report`` and ``manifold-mixup board``: a page of runs, finished or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from manifold_mixup.lab.flags import (
    BaselineOption,
    FiguresOption,
    HostOption,
    OpenOption,
    OutputOption,
    PortOption,
    RunsArgument,
    TitleOption,
    WatchOption,
)

if TYPE_CHECKING:
    from manifold_mixup.lab.report.sources import Sources

__all__ = ["board", "report"]


def report(
    runs: RunsArgument,
    output: OutputOption = None,
    title: TitleOption = None,
    baseline: BaselineOption = None,
    figures: FiguresOption = None,
    watch: WatchOption = False,
) -> None:
    """Write the page of runs, finished or not: one HTML file that needs no network.

    RUNS are folders, of one run or of many, and files ending in .jsonl with one record in each line.

    Example: [bold]manifold-mixup report runs/digits[/bold]

    Example: [bold]manifold-mixup report docs/results/desk/cifar10_desk.jsonl -o cifar10.html --baseline none[/bold]

    Example: [bold]manifold-mixup report runs/spiral runs/digits -o both.html --figures figures[/bold]
    """
    from manifold_mixup.lab.report.live import follow
    from manifold_mixup.lab.report.page import write_report
    from manifold_mixup.lab.report.sources import gather

    folder = runs[0] if len(runs) == 1 and runs[0].is_dir() else Path()
    page = output or folder / "report.html"
    heading = title or _title(runs)

    def write() -> None:
        sources = gather(runs, baseline)
        typer.echo(f"page: {write_report(sources, page, heading)}")
        if figures is not None:
            _export(sources, figures)

    if watch:
        follow(runs, write, lambda text: typer.echo(f"not written: {' '.join(text.split())}", err=True))
    else:
        write()


def board(
    runs: RunsArgument,
    title: TitleOption = None,
    baseline: BaselineOption = None,
    port: PortOption = None,
    host: HostOption = "127.0.0.1",
    browser: OpenOption = False,
) -> None:
    """Show the page of runs in a browser and renew it while they go on, until Ctrl-C.

    It may be started before the runs, and reads their folders only. What it shows is served to this machine alone,
    unless --host says otherwise.

    Example: [bold]manifold-mixup board runs[/bold]

    Example: [bold]manifold-mixup board runs/digits --port 8080 --open[/bold]
    """
    import contextlib
    import webbrowser

    from manifold_mixup.lab.errors import UsageError
    from manifold_mixup.lab.report.board import Board, open_server
    from manifold_mixup.lab.report.page import render_page
    from manifold_mixup.lab.report.sources import gather

    for path in runs:
        if path.is_file() and path.suffix != ".jsonl":
            raise UsageError(f"{path} is neither a folder of runs nor a .jsonl file with records")
    heading = title or _title(runs)

    def make(paths: Sequence[Path]) -> str:
        return render_page(gather(paths, baseline), heading, live=True)

    with contextlib.suppress(KeyboardInterrupt), open_server(Board(runs, make, heading), host, port) as server:
        typer.echo(f"board: {server.url} (Ctrl-C ends it)")
        if server.everywhere:
            typer.echo("everyone who can reach this machine can read it", err=True)
        if browser:
            webbrowser.open(server.url)
        server.serve_forever()


def _title(runs: Sequence[Path]) -> str:
    """What a page is called if nobody says: after its runs, if they lie in one place."""
    if len(runs) > 1:
        return "Manifold Mixup: a report"
    return f"Manifold Mixup: {runs[0].stem if runs[0].suffix == '.jsonl' else runs[0].resolve().name}"


def _export(sources: Sources, folder: Path) -> None:
    from manifold_mixup.lab.report.export import write_figures
    from manifold_mixup.lab.report.page import plots_of

    plots = plots_of(sources)
    titles = {name: plot.title for name, plot in plots.items()}
    figures = {name: plot.figure for name, plot in plots.items()}
    written = write_figures(figures, folder, colours=_colours(), titles=titles)
    typer.echo(f"figures: {len(written)} files in {folder}")


def _colours() -> dict[str, str]:
    """The colours of the page's light theme, by the names that its figures use."""
    import re

    from manifold_mixup.lab.report.templates import FOLDER

    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    first = style.partition(":root {")[2].partition("}")[0]
    return dict(re.findall(r"--([\w-]+): *([^;]+);", first))
