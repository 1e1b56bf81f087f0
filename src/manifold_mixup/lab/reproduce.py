"""Carrying out a study: run what is missing, measure what is missing, and gather what there is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manifold_mixup.lab.config import ExperimentConfig
from manifold_mixup.lab.data import Places, prepare_data
from manifold_mixup.lab.errors import ConfigMismatch, FolderBusy, Interrupted, LabError, StorageError, UsageError
from manifold_mixup.lab.experiment import Settings, Watcher, run_experiments
from manifold_mixup.lab.measuring import Progress, measure_runs
from manifold_mixup.lab.recipe import Overrides, load_recipe, read_recipe, recipe_files
from manifold_mixup.lab.records import Failure, RunFolder
from manifold_mixup.lab.results import Result, read_folder, read_lines
from manifold_mixup.lab.side_by_side import Grid, panel_grid, provenance
from manifold_mixup.lab.studies import SCALES, Panel, Scale, Study

__all__ = ["Piece", "cost_of", "gather", "grids_of", "plan", "reproduce", "results_of", "stand"]


@dataclass
class Piece:
    """One panel of a study at one scale, and what we have of it.

    Attributes:
        panel: The panel, with the rows that were asked for.
        config: Its experiment; None if the panel has no recipe of this scale.
        results: Our finished runs.
        failures: Runs that failed.
        unmeasured: Finished runs that could not be measured with all that the panel shows.
        trouble: Why there are no runs, or fewer; empty if all is well.
    """

    panel: Panel
    config: ExperimentConfig | None
    results: list[Result] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    unmeasured: list[Failure] = field(default_factory=list)
    trouble: str = ""


def plan(
    study: Study,
    scale: Scale,
    *,
    only: Sequence[str] = (),
    seeds: str | None = None,
    settings: Sequence[str] = (),
    places: Places | None = None,
) -> list[Piece]:
    """What a study consists of at a scale.

    Args:
        study: The study.
        scale: The scale.
        only: Words that choose: labels of methods, recipes, or parts of a panel's title; all if empty.
        seeds: In place of the recipes'.
        settings: Changes of the recipes, ``key.path=value`` each.
        places: Where data lie.

    Raises:
        UsageError: A word of ``only`` fits nothing.
        LabError: A recipe has mistakes.
    """
    labels = {row.label for panel in study.panels for row in panel.rows}
    methods = [word for word in only if word in labels]
    words = [word for word in only if word not in labels]
    for word in words:
        if not any(_named(panel, scale, word) for panel in study.panels):
            known = [*sorted(labels), *(panel.title for panel in study.panels)]
            raise UsageError(f"--only {word!r} fits nothing in study {study.name!r}; there is {', '.join(known)}")
    pieces = []
    for panel in study.panels:
        if words and not any(_named(panel, scale, word) for word in words):
            continue
        rows = [row for row in panel.rows if not methods or row.label in methods]
        shown = panel.model_copy(update={"rows": rows, "claims": _claims(panel, {row.label for row in rows})})
        pieces.append(Piece(shown, _config(shown, scale, seeds, settings, places)))
    return pieces


def _named(panel: Panel, scale: Scale, word: str) -> bool:
    return word == panel.recipes.get(scale) or word.lower() in panel.title.lower()


def _claims(panel: Panel, labels: set[str]) -> list[Any]:
    return [claim for claim in panel.claims if {claim.better, claim.than} <= labels]


def _config(
    panel: Panel, scale: Scale, seeds: str | None, settings: Sequence[str], places: Places | None
) -> ExperimentConfig | None:
    """The panel's experiment with the methods of its rows; None without a recipe, or if it has none of them."""
    if scale not in panel.recipes:
        return None
    config = load_recipe(panel.recipes[scale], Overrides(seeds=seeds, settings=settings), places)
    labels = {row.label for row in panel.rows}
    methods = [method for method in config.methods if method.label in labels]
    return config.model_copy(update={"methods": methods}) if methods else None


def reproduce(
    pieces: Sequence[Piece],
    scale: Scale,
    settings: Settings,
    watcher: Watcher | None = None,
    progress: Progress | None = None,
) -> None:
    """Carry out the runs of a study and measure them; what is there already is only read. Fills the pieces in place.

    Data that cannot be had, and a run that fails or cannot be measured, are noted with their piece; the others go on.

    Args:
        pieces: From :func:`plan`.
        scale: Their scale.
        settings: How runs are carried out.
        watcher: Is told about the runs.
        progress: Is told about the measuring.

    Raises:
        Interrupted, StorageError, FolderBusy, ConfigMismatch: As :func:`run_experiments`; nothing else would go well.
    """
    for piece in pieces:
        if piece.config is None:
            continue
        if (trouble := _without_data(piece.config, settings)) is not None:
            piece.trouble = trouble
            gather(piece, settings.runs)
            continue
        try:
            outcome = run_experiments([piece.config], settings, watcher)
            piece.failures = outcome.failures
            if settings.devices.first:
                measures = piece.panel.measures.get(scale, [])
                piece.unmeasured = measure_runs(outcome.records, measures, settings, progress)
        except (Interrupted, StorageError, FolderBusy, ConfigMismatch):
            raise
        except LabError as error:
            if settings.devices.several:  # the other processes cannot know what to leave out
                raise
            piece.trouble = str(error)
        for failures, what in ((piece.failures, "failed"), (piece.unmeasured, "could not be measured")):
            if failures and not piece.trouble:
                first = failures[0]
                piece.trouble = (
                    f"{len(failures)} runs {what}; the first: {first.label}, seed {first.seed}: {first.error}"
                )
        gather(piece, settings.runs)


def _without_data(config: ExperimentConfig, settings: Settings) -> str | None:
    """Why the data of runs that are still to be made cannot be had; None if they can, or if nothing is to be made."""
    if settings.devices.several:  # all processes have to do the same: the error ends all of them
        return None
    if all(RunFolder(settings.runs, run).read() is not None for run in config.runs()):
        return None
    try:
        prepare_data(config.data.name, config.data.options, settings.places, settings.report)
    except LabError as error:
        return str(error)
    return None


def gather(piece: Piece, runs: Path) -> None:
    """Read the finished runs of a piece that belong to its experiment as it is configured; run nothing.

    Args:
        piece: The piece, filled in place.
        runs: A folder of runs, or one with lines of records, one file for each recipe.
    """
    if piece.config is None:
        return
    wanted = {run.config.hash for run in piece.config.runs()}
    found = [result for result in results_of(runs, piece.config.name) if result.record.config_hash in wanted]
    order = [method.label for method in piece.config.methods]
    piece.results = sorted(found, key=lambda r: (order.index(r.record.label), r.record.seed))


def results_of(runs: Path, recipe: str) -> list[Result]:
    """The finished runs of a recipe in a folder of runs, or in a folder with lines of records."""
    lines = runs / f"{recipe}.jsonl"
    return read_lines(lines) if lines.is_file() else read_folder(runs, recipe)


def grids_of(pieces: Sequence[Piece], scale: Scale) -> list[Grid]:
    """The tables of a study, each with what is missing and where its numbers come from."""
    return [
        panel_grid(p.panel, p.results, scale, [*_what(p, scale), *filter(None, [provenance(p.results)])])
        for p in pieces
    ]


def _what(piece: Piece, scale: Scale) -> list[str]:
    """What ours are, and why there are fewer of them than there could be."""
    if piece.config is None:
        return [f"No recipe of scale {scale} belongs to this part."]
    planned = len(piece.config.methods) * len(piece.config.seeds)
    notes = [f"{scale.capitalize()}: {piece.config.description}.", *([piece.trouble] if piece.trouble else [])]
    return notes if len(piece.results) == planned else [*notes, f"{len(piece.results)} of {planned} runs are there."]


def cost_of(recipe: str) -> str:
    """What the header of a packaged recipe says of its cost, in one line; empty if it says nothing."""
    text = recipe_files()[recipe].read_text(encoding="utf-8")
    header = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    match = re.search(r"^# Cost: (.*?)(?=\n#\s*\n|\n# [A-Z]|\Z)", header, flags=re.MULTILINE | re.DOTALL)
    return " ".join(match[1].replace("\n#", " ").split()) if match else ""


def stand(study: Study, runs: Path) -> list[tuple[Scale, int, int, float, str]]:
    """How far a study has come: for each scale the finished runs, all runs, their seconds, and the recipes' cost."""
    found = []
    for scale in SCALES:
        planned = done = 0
        seconds = 0.0
        costs = []
        for panel in study.panels:
            if scale not in panel.recipes or (config := _listed(panel, scale)) is None:
                continue
            labels, seeds = config
            planned += len(labels) * len(seeds)
            costs.append(cost_of(panel.recipes[scale]).partition(";")[0])
            for result in results_of(runs, panel.recipes[scale]):
                if result.record.label in labels and result.record.seed in seeds:
                    done += 1
                    seconds += result.record.seconds
        if planned:
            found.append((scale, done, planned, seconds, " ".join(dict.fromkeys(costs))))
    return found


def _listed(panel: Panel, scale: Scale) -> tuple[set[str], set[int]] | None:
    """Labels and seeds of a panel's runs, from the recipe's text alone: a list should not build networks."""
    tree, _ = read_recipe(panel.recipes[scale])
    labels = {row.label for row in panel.rows} & {method.get("label", method["name"]) for method in tree["methods"]}
    return (labels, set(tree["seeds"])) if labels else None
