"""The command ``manifold-mixup reproduce``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from manifold_mixup.lab.flags import (
    AcceleratorOption,
    CheckpointOption,
    DataDirOption,
    DevicesOption,
    ExecutorOption,
    GpusPerRunOption,
    JobsOption,
    JsonOption,
    ListOption,
    LoggerOption,
    MarkdownOption,
    NodesOption,
    OnlyOption,
    QuietOption,
    RayAddressOption,
    RunsOption,
    ScaleOption,
    SeedsOption,
    SetOption,
    ShowOption,
    StudyArgument,
)
from manifold_mixup.lab.invocation import ExperimentPage, make_settings, shown
from manifold_mixup.lab.listings import print_json

if TYPE_CHECKING:
    from manifold_mixup.lab.config import ExperimentConfig
    from manifold_mixup.lab.experiment import Settings
    from manifold_mixup.lab.reproduce import Piece
    from manifold_mixup.lab.side_by_side import Grid
    from manifold_mixup.lab.studies import Scale, Study
    from manifold_mixup.lab.verdict import Verdict

__all__ = ["reproduce"]

THEORY = "theory"


def reproduce(
    name: StudyArgument = None,
    scale: ScaleOption = "full",
    only: OnlyOption = None,
    seeds: SeedsOption = None,
    settings: SetOption = None,
    runs: RunsOption = Path("runs"),
    data_dir: DataDirOption = None,
    show: ShowOption = False,
    listing: ListOption = False,
    markdown: MarkdownOption = False,
    jobs: JobsOption = 0,
    executor: ExecutorOption = "local",
    ray_address: RayAddressOption = None,
    gpus_per_run: GpusPerRunOption = None,
    accelerator: AcceleratorOption = "auto",
    devices: DevicesOption = 1,
    nodes: NodesOption = 1,
    logger: LoggerOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    checkpoint_every: CheckpointOption = 15.0,
) -> None:
    """Repeat a published table: run and measure what is missing, and print ours beside the published.

    Several studies share runs, and what has run is never run again. The same command goes on where it was cut.

    Example: [bold]manifold-mixup reproduce table1 --scale desk[/bold]

    Example: [bold]manifold-mixup reproduce table5 --scale short --only 'CIFAR-100;S = 0+1+2;S = none' --seeds 3[/bold]

    Example: [bold]manifold-mixup reproduce table1 --scale desk --show --runs docs/results/desk[/bold]

    Example: [bold]manifold-mixup reproduce --list[/bold]
    """
    from manifold_mixup.lab.data import Places
    from manifold_mixup.lab.reproduce import gather, plan

    if listing:
        _list(runs, as_json)
        return
    ray = (executor, ray_address, gpus_per_run)
    how = make_settings(runs, jobs, checkpoint_every, data_dir, (accelerator, devices, nodes), ray, logger)
    if name == THEORY:
        _theory(runs, seeds, how.command, show=show, markdown=markdown, as_json=as_json, quiet=quiet)
        return
    study, size = _load(name, scale)
    words = [word.strip() for word in (only or "").split(";") if word.strip()]
    pieces = plan(study, size, only=words, seeds=seeds, settings=settings or (), places=Places(data_dir))
    page = None
    if show:
        for piece in pieces:
            gather(piece, runs)
    elif configs := _configs(pieces):
        _check_machine(pieces, size, accelerator)
        page = ExperimentPage(configs, runs, runs / f"{name}-{size}.html", f"{study.title} ({size})")
        _carry_out(pieces, size, how, quiet, page)
    if how.devices.first:
        _print(study, pieces, size, page, markdown=markdown, as_json=as_json)


def _load(name: str | None, scale: str) -> tuple[Study, Scale]:
    """A study, and the scale, at which it has to have something."""
    from manifold_mixup.lab.errors import UsageError
    from manifold_mixup.lab.studies import SCALES, load_study

    if name is None:
        raise UsageError("say what to reproduce, such as table1; manifold-mixup reproduce --list shows all studies")
    study = load_study(name)
    size = next((known for known in SCALES if known == scale), None)
    if size is None:
        raise UsageError(f"--scale {scale!r} should be {', '.join(SCALES)}")
    if not any(size in panel.recipes for panel in study.panels):
        raise UsageError(f"study {name!r} has nothing of scale {scale!r}; see manifold-mixup reproduce --list")
    return study, size


def _check_machine(pieces: Sequence[Piece], scale: Scale, accelerator: str) -> None:
    """Refuse to start weeks of work where a desk's would do, unless it is asked for by name."""
    import torch

    from manifold_mixup.lab.errors import UsageError
    from manifold_mixup.lab.reproduce import cost_of

    if scale == "desk" or accelerator != "auto" or torch.cuda.is_available() or torch.backends.mps.is_available():
        return
    long = [p.config.name for p in pieces if p.config is not None and p.panel.recipes.get("desk") != p.config.name]
    if not long:  # small enough for a desk at every scale
        return
    cost = cost_of(long[0])
    raise UsageError(
        f"scale {scale!r} is for a GPU, and here is none ({cost}); take --scale desk, or insist with --accelerator cpu"
    )


def _configs(pieces: Sequence[Piece]) -> list[ExperimentConfig]:
    """The experiments of some pieces; those of one name are parts of one."""
    found: dict[str, ExperimentConfig] = {}
    for config in (piece.config for piece in pieces if piece.config is not None):
        earlier = found.get(config.name)
        methods = [*(earlier.methods if earlier else ()), *config.methods]
        distinct = list({method.label: method for method in methods}.values())
        found[config.name] = config.model_copy(update={"methods": distinct})
    return list(found.values())


def _carry_out(pieces: Sequence[Piece], scale: Scale, settings: Settings, quiet: bool, page: ExperimentPage) -> None:
    from manifold_mixup.lab.reproduce import reproduce as carry_out

    configs = [piece.config for piece in pieces if piece.config is not None]
    with shown(configs, settings, quiet, page) as (how, watcher, progress):
        carry_out(pieces, scale, how, watcher, progress)


def _print(
    study: Study,
    pieces: Sequence[Piece],
    scale: Scale,
    page: ExperimentPage | None,
    *,
    markdown: bool,
    as_json: bool,
) -> None:
    from manifold_mixup.lab.errors import RunsFailed
    from manifold_mixup.lab.reproduce import grids_of
    from manifold_mixup.lab.side_by_side import as_page, verdicts

    found = [v for piece in pieces if piece.config is not None for v in verdicts(piece.panel, piece.results)]
    if as_json:
        for piece in pieces:
            for result in piece.results:
                print_json({**result.record.summary(), "measured": dict(result.measured)})
        for verdict in found:
            print_json({"claim": verdict.claim, "outcome": verdict.outcome, "reason": verdict.reason})
    elif markdown:
        typer.echo(as_page(study.title, study.note, grids_of(pieces, scale), found), nl=False)
    else:
        _show(study.title, study.note, grids_of(pieces, scale), found)
    if page is not None:
        written = page.write()
        if not (as_json or markdown):
            typer.echo(f"page: {written}")
    troubles = [piece.trouble for piece in pieces if piece.trouble]
    if troubles:
        raise RunsFailed(f"{len(troubles)} of {len(pieces)} parts are not complete; the first: {troubles[0]}")


def _show(title: str, note: str, grids: Sequence[Grid], found: Sequence[Verdict]) -> None:
    from rich.markup import escape

    from manifold_mixup.lab import display
    from manifold_mixup.lab.side_by_side import summed_up

    out = display.console()
    out.print(escape(title), style="bold")
    if note:
        out.print(escape(note))
    for grid in grids:
        table = display.listing(grid.title, grid.head, grid.rows)
        table.caption, table.caption_justify = escape("\n".join(grid.notes)), "left"
        out.print(table)
    if found:
        rows = [(v.claim, v.outcome, v.reason) for v in found]
        out.print(display.listing("claims, and what our runs say of them", ("claim", "ours", "why"), rows))
        out.print(escape(summed_up(found)))


def _list(runs: Path, as_json: bool) -> None:
    from manifold_mixup.lab import display
    from manifold_mixup.lab.reproduce import stand
    from manifold_mixup.lab.side_by_side import duration
    from manifold_mixup.lab.studies import load_study, study_files

    rows: list[tuple[str, str, str, str, str]] = []
    for name in study_files():
        study = load_study(name)
        for scale, done, planned, seconds, cost in stand(study, runs):
            if as_json:
                print_json({"study": name, "scale": scale, "done": done, "planned": planned, "seconds": seconds})
            spent = f"{done} of {planned} runs" + (f", {duration(seconds)}" if done else "")
            rows.append((name, study.title, scale, spent, cost))
    if not as_json:
        there = any((runs / place / "theory.jsonl").exists() for place in ("", THEORY))
        rows.append((THEORY, "The theorem's consequences, checked", "", "done" if there else "not run", "1 minute"))
        columns = ("study", "what it is", "scale", f"in {runs}", "cost")
        display.console().print(display.listing("studies", columns, rows))


def _theory(
    runs: Path, seeds: str | None, command: str, *, show: bool, markdown: bool, as_json: bool, quiet: bool
) -> None:
    """The checks of the theory: they have no scale, no data and no published numbers."""
    from manifold_mixup.lab import display
    from manifold_mixup.lab.errors import RunsFailed
    from manifold_mixup.lab.recipe import parse_seeds
    from manifold_mixup.lab.side_by_side import as_page
    from manifold_mixup.lab.theory_runs import NOTE, TITLE, read_theory, run_and_keep, theory_grids

    if show:
        result, made = read_theory(runs)
    else:
        with display.Bars(1, quiet=quiet) as bars:
            listed = parse_seeds(seeds or "3")
            result, made = run_and_keep(runs, listed, command, lambda done, of: bars.prepared("theory", done, of))
    if as_json:
        for record in result.to_records():
            print_json(record)
    elif markdown:
        typer.echo(as_page(TITLE, NOTE, theory_grids(result, made), []), nl=False)
    else:
        _show(TITLE, NOTE, theory_grids(result, made), [])
    if not result.passed:
        failed = next(check for check in result.checks if check.passed is False)
        raise RunsFailed(
            f"a check failed: {failed.name}, {failed.d} classes, {failed.dim} dimensions, seed {failed.seed}"
        )
