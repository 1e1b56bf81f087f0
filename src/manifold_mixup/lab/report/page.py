"""Records to one self-contained HTML page: nothing is fetched when it is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from manifold_mixup.lab.errors import CorruptedFile, LabError, StorageError
from manifold_mixup.lab.measures.catalog import describe
from manifold_mixup.lab.report.collect import Experiment, FailedRun, RunRecord, collect, settings_of
from manifold_mixup.lab.report.figures import Figure, hidden_figure, seeds_figure, surface_figure
from manifold_mixup.lab.report.findings import NOTHING, findings, number, remarks, table
from manifold_mixup.lab.report.pictures import chosen_runs, read_pictures
from manifold_mixup.lab.report.templates import FOLDER, render
from manifold_mixup.lab.storage import make_folder, write_atomically

__all__ = ["write_report"]


def write_report(
    records: Sequence[RunRecord], path: Path, title: str, failures: Sequence[FailedRun] = (), description: str = ""
) -> Path:
    """Write the page: what the numbers show, the table, pictures, every seed and all settings.

    The page holds its own style and scripts (plotly.js, once), so it can be opened offline, mailed and archived.
    Whatever comes from the records is shown as text, never read as markup. The file is replaced as a whole or not at
    all.

    Args:
        records: Finished runs; the others are compared with the method of the first record.
        path: The HTML file to write. Its folder is created.
        title: Heading of the page.
        failures: Runs that ended with an error, which the page says.
        description: A sentence or two below the heading.

    Returns:
        ``path``.

    Raises:
        UsageError: There are no records.
        StorageError: The file cannot be written.
    """
    experiments = collect(records, failures)
    met = {experiment.name for experiment in experiments}
    page = render(
        "page.html",
        title=title,
        description=description,
        sections=[_section(experiment, index) for index, experiment in enumerate(experiments, 1)],
        orphans=[failure for failure in failures if failure.experiment not in met],
        version=metadata.version("manifold-mixup"),
        styles=_asset("page.css"),
        script=_asset("page.js"),
        plotly=_plotly(),
    )
    path = Path(path)
    make_folder(path.parent)
    write_atomically(path, page.encode())
    return path


def _asset(name: str) -> Any:
    from markupsafe import Markup

    return Markup((FOLDER / name).read_text(encoding="utf-8"))  # our own file, not data


def _plotly() -> Any:
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    source = str(get_plotlyjs())
    if "</script" in source.lower() or "<!--" in source:
        raise LabError("this version of plotly cannot be embedded in a page; install the one in constraints.txt")
    return Markup(source)


@dataclass(frozen=True)
class _Card:
    """The spiral's pictures of one method."""

    label: str
    note: str
    problem: str = ""
    surface: Figure | None = None
    hidden: Figure | None = None


def _section(experiment: Experiment, index: int) -> dict[str, Any]:
    main, others = experiment.measures()
    best_main, best_others = experiment.measures(best=True)
    return {
        "id": f"experiment-{index}",
        "name": experiment.name,
        "data": experiment.data,
        "model": experiment.model,
        "first": experiment.methods[0].label,
        "findings": findings(experiment, main),
        "remarks": remarks(experiment, main),
        "failures": experiment.failures,
        "tables": [
            part
            for part in (
                _table(experiment, "Last weights", main),
                _table(experiment, "Weights with the best validation score", best_main, best=True),
                _table(experiment, "Other measures of the last weights", others),
                _table(
                    experiment, "Other measures of the weights with the best validation score", best_others, best=True
                ),
            )
            if part["columns"]
        ],
        "meanings": [(describe(name).title, describe(name).meaning) for name in main],
        "plots": [(describe(name).title, seeds_figure(experiment, name)) for name in main],
        "cards": _cards(experiment),
        "shown_seed": experiment.methods[0].record.seed,
        "runs": _runs(experiment, main),
        "setup": _setup(experiment),
    }


def _table(experiment: Experiment, caption: str, names: Sequence[str], *, best: bool = False) -> dict[str, Any]:
    metrics = [describe(name) for name in names]
    columns = [f"{metric.title} ({metric.unit})" if metric.unit else metric.title for metric in metrics]
    return {"caption": caption, "columns": columns, "rows": table(experiment, names, best=best)}


def _cards(experiment: Experiment) -> list[_Card]:
    """One card per method; none at all if no run of the experiment kept pictures."""
    cards = []
    found = False
    shown = experiment.methods[0].record.seed
    for label, run in chosen_runs(experiment):
        note = "" if run.seed == shown else f"seed {run.seed}; seed {shown} is missing"
        try:
            pictures = read_pictures(run.folder)
        except (CorruptedFile, StorageError) as error:
            found = True
            cards.append(_Card(label, note, problem=str(error)))
            continue
        if pictures is None:
            cards.append(_Card(label, note, problem="this run kept no pictures"))
        else:
            found = True
            cards.append(_Card(label, note, surface=surface_figure(pictures), hidden=hidden_figure(pictures)))
    return cards if found else []


def _runs(experiment: Experiment, names: Sequence[str]) -> dict[str, Any]:
    metrics = [describe(name) for name in names]
    rows = []
    for method in experiment.methods:
        for seed, run in sorted(method.runs.items()):
            values = [method.values(name).get(seed) for name in names]
            cells = [NOTHING if v is None else number(v, m.digits) for v, m in zip(values, metrics, strict=True)]
            rows.append([method.label, str(seed), *cells, f"{run.seconds:.1f}", str(run.folder)])
    return {"columns": ["method", "seed", *(m.title for m in metrics), "seconds", "folder"], "rows": rows}


def _setup(experiment: Experiment) -> dict[str, Any]:
    """What was set: what all runs share, and per method what differs."""
    settings = [settings_of(run) for run in experiment.runs]
    names = list(dict.fromkeys(name for setting in settings for name in setting))
    shared = [name for name in names if all(setting.get(name) == settings[0].get(name) for setting in settings)]
    methods = []
    for method in experiment.methods:
        own = {**method.record.options, **{k: v for k, v in settings_of(method.record).items() if k not in shared}}
        methods.append((method.label, method.record.method, _assignments(own) or NOTHING))
    seconds = [run.seconds for run in experiment.runs]
    return {
        "methods": methods,
        "facts": [
            ("data", experiment.data),
            ("network", experiment.model),
            ("seeds", ", ".join(map(str, experiment.seeds))),
            ("training, all methods", _assignments({name: settings[0].get(name) for name in shared}) or "not recorded"),
            ("runs", f"{len(seconds)}, {sum(seconds):.0f} seconds in all"),
            *(("versions", text) for text in _distinct(run.versions for run in experiment.runs)),
            *(("hardware", text) for text in _distinct(run.hardware for run in experiment.runs)),
        ],
        "commands": list(dict.fromkeys(str(run.command) for run in experiment.runs if run.command)),
    }


def _assignments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items())


def _distinct(found: Any) -> list[str]:
    return list(dict.fromkeys(", ".join(f"{name} {value}" for name, value in item.items()) for item in found))
