"""What each section of the page holds, as plain values for its template; a section without content is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manifold_mixup.lab.errors import CorruptedFile, StorageError
from manifold_mixup.lab.measures.catalog import describe
from manifold_mixup.lab.report.beside import claims, published_grids, published_twins
from manifold_mixup.lab.report.collect import Experiment, Run, settings_of
from manifold_mixup.lab.report.figures.confusion import Mistakes, confusion_plots, mistakes
from manifold_mixup.lab.report.figures.curves import curve_plots
from manifold_mixup.lab.report.figures.mixing import mixing_plots
from manifold_mixup.lab.report.figures.reliability import reliability_plots
from manifold_mixup.lab.report.figures.seeds import seeds_plots
from manifold_mixup.lab.report.figures.spectra import spectra_plots
from manifold_mixup.lab.report.figures.spiral import spiral_plots
from manifold_mixup.lab.report.figures.strength import strength_plots
from manifold_mixup.lab.report.figures.style import SERIES, Plot
from manifold_mixup.lab.report.findings import Finding, findings, number, remarks, verdict
from manifold_mixup.lab.report.pictures import chosen_runs, read_pictures
from manifold_mixup.lab.report.tables import NOTHING, Plain, Table, main_table, plain
from manifold_mixup.lab.results import public_command
from manifold_mixup.lab.side_by_side import duration, summed_up
from manifold_mixup.lab.statistics import format_mean_sd, summary

__all__ = ["Card", "Drawn", "Section", "section"]

FULL_SIZE = (
    "Published numbers are those of the papers' own networks, data and length of training; runs of scale short or desk "
    "are smaller, and stand beside them for the differences between methods."
)


@dataclass(frozen=True)
class Drawn:
    """A group of figures under one heading; ``problems`` are files that could not be drawn."""

    id: str
    title: str
    note: str
    plots: Sequence[Plot]
    problems: Sequence[str] = ()


@dataclass(frozen=True)
class Card:
    """The spiral's pictures of one method."""

    label: str
    note: str
    problem: str = ""
    plots: Sequence[Plot] = ()


@dataclass(frozen=True)
class Section:
    """One experiment of the page."""

    id: str
    name: str
    data: str
    model: str
    description: str
    first: str
    legend: Sequence[tuple[str, int, int]]
    status: Sequence[str]
    failures: Sequence[str]
    verdict: Sequence[Finding]
    findings: Sequence[Finding]
    remarks: Sequence[str]
    tables: Sequence[Table]
    meanings: Sequence[tuple[str, str]]
    published: Sequence[Plain]
    claims: Plain | None
    claims_note: str
    drawn: Sequence[Drawn]
    cards: Sequence[Card]
    shown_seed: int | None
    mistakes: Sequence[Mistakes]
    cost: Plain | None
    runs: Plain | None
    methods: Plain | None
    facts: Sequence[tuple[str, str]]
    commands: Sequence[str]

    @property
    def parts(self) -> list[tuple[str, str]]:
        """Anchor and name of everything below the heading, for the page's contents."""
        listed = [
            ("verdict", "Verdict", self.verdict or self.remarks),
            ("table", "Table", self.tables),
            ("published", "Published numbers", self.published),
            *((part.id, part.title, part.plots or part.problems) for part in self.drawn),
            ("pictures", "Decision surfaces and hidden states", self.cards),
            ("mistakes", "Most confident mistakes", self.mistakes),
            ("cost", "Cost", self.cost),
            ("configuration", "Configuration", self.facts),
        ]
        return [(f"{self.id}-{name}", title) for name, title, there in listed if there]


def section(experiment: Experiment, index: int, description: str = "") -> Section:
    """Everything that the page says and shows of one experiment.

    Args:
        experiment: The runs.
        index: Its place on the page, from 1.
        description: What it is about.
    """
    main, others = experiment.measures()
    best_main, best_others = experiment.measures(best=True)
    twins = published_twins(experiment)
    best = "Weights with the best validation score"
    tables = [
        main_table(experiment, "Last weights", main, twins=twins),
        main_table(experiment, best, best_main, best=True),
        main_table(experiment, "Other measures of the last weights", others, twins=twins),
        main_table(experiment, f"Other measures: {best[0].lower()}{best[1:]}", best_others, best=True),
    ]
    judged = claims(experiment)
    methods = [*experiment.methods, *experiment.waiting]
    return Section(
        id=f"experiment-{index}",
        name=experiment.name,
        data=experiment.data,
        model=experiment.model,
        description=description,
        first=experiment.methods[0].label if experiment.methods else "",
        legend=[(m.label, m.index, m.index % SERIES + 1) for m in methods],
        status=_status(experiment),
        failures=[f"{f.label}, seed {f.seed}: {f.error}" for f in experiment.failures],
        verdict=verdict(experiment, main),
        findings=findings(experiment, main),
        remarks=[*remarks(experiment, main), *([FULL_SIZE] if twins else [])],
        tables=[table for table in tables if table.columns],
        meanings=[(describe(name).title, describe(name).meaning) for name in main],
        published=[
            plain(f"{grid.title}. Published: {source}", grid.head, grid.rows, notes=grid.notes)
            for source, grid in published_grids(experiment)
        ],
        claims=plain(
            "Claims of the source, and what these runs say",
            ["claim", "outcome", "difference and interval"],
            [[v.claim, v.outcome, v.reason] for v in judged],
            numeric=False,
        )
        if judged
        else None,
        claims_note=summed_up(judged) if judged else "",
        drawn=_drawn(experiment, main),
        cards=_cards(experiment),
        shown_seed=experiment.methods[0].record.seed if experiment.methods else None,
        mistakes=_safely(mistakes, experiment)[0],
        cost=_cost(experiment),
        runs=_runs(experiment, main),
        methods=_methods(experiment),
        facts=_facts(experiment),
        commands=list(dict.fromkeys(public_command(c) for r in experiment.runs if (c := r.record.command))),
    )


def _status(experiment: Experiment) -> list[str]:
    """How far the experiment has come; empty if every run is finished."""
    going = experiment.going
    if not going:
        return []
    done, failed = len(experiment.runs), len(experiment.failures)
    said = [f"{done} of {done + failed + len(going)} runs are finished{f', {failed} failed' if failed else ''}."]
    for run in going:
        if run.running or run.step:
            of = f" of {run.steps}" if run.steps else ""
            state = "is at" if run.running else "was stopped at"
            said.append(f"{run.label}, seed {run.seed}, {state} step {run.step}{of}.")
    return said


# ---------------------------------------------------------------- figures


def _safely(make: Callable[..., Sequence[Any]], *arguments: Any) -> tuple[Sequence[Any], list[str]]:
    """What a maker of figures gives, or nothing and the reason: one damaged file must not cost the whole page."""
    try:
        return make(*arguments), []
    except (CorruptedFile, StorageError) as error:
        return [], [str(error)]


def _drawn(experiment: Experiment, main: Sequence[str]) -> list[Drawn]:
    groups: tuple[tuple[str, str, str, Callable[..., Sequence[Plot]], tuple[Any, ...]], ...] = (
        ("seeds", "Every seed", "A dot is one run; the bar is the mean.", seeds_plots, (main,)),
        (
            "curves",
            "Training",
            "Means over seeds; the bands are ± one standard deviation, where there are two seeds or more.",
            curve_plots,
            (),
        ),
        (
            "reliability",
            "Calibration",
            "How often a network is right against how sure it is, in 15 bins over the test examples of all seeds. "
            "Below the diagonal it is too sure. Temperature scaling divides the logits by one number, chosen on "
            "validation data.",
            reliability_plots,
            (),
        ),
        (
            "strength",
            "Robustness",
            "Test accuracy against the strength of a change of the test images; bars are ± one standard deviation.",
            strength_plots,
            (),
        ),
        (
            "spectra",
            "Singular values of hidden states",
            "Of one matrix for each class, whose rows are the hidden states of its examples: the faster they fall, the "
            "flatter the class lies.",
            spectra_plots,
            (),
        ),
        (
            "mixing",
            "Mixing log",
            "What was drawn in training: how often each layer was mixed, and λ beside the density that it should have.",
            mixing_plots,
            (),
        ),
        (
            "confusion",
            "Confusion",
            "Of the test examples of each true class, the share that was predicted as each class, in percent, over all "
            "seeds.",
            confusion_plots,
            (),
        ),
    )
    found = []
    for key, title, note, make, more in groups:
        plots, problems = _safely(make, experiment, *more)
        if plots or problems:
            found.append(Drawn(key, title, note, plots, problems))
    return found


def _cards(experiment: Experiment) -> list[Card]:
    """One card per method; none at all if no run of the experiment kept pictures."""
    if not experiment.methods:
        return []
    cards = []
    found = False
    shown = experiment.methods[0].record.seed
    for method, (label, run) in zip(experiment.methods, chosen_runs(experiment), strict=True):
        note = "" if run.seed == shown else f"seed {run.seed}; seed {shown} is missing"
        try:
            pictures = read_pictures(run.folder)
        except (CorruptedFile, StorageError) as error:
            found = True
            cards.append(Card(label, note, problem=str(error)))
            continue
        if pictures is None:
            cards.append(Card(label, note, problem="this run kept no pictures"))
        else:
            found = True
            cards.append(Card(label, note, plots=spiral_plots(label, method.index, pictures)))
    return cards if found else []


# ---------------------------------------------------------------- cost and configuration


def _cost(experiment: Experiment) -> Plain | None:
    """Time and memory, per method; they are measurements of one machine that may have done other things as well."""
    columns: list[tuple[str, Callable[[Run], float | None], Callable[[float], float], int]] = [
        ("step time (ms)", lambda run: _fact(run, "step_seconds"), lambda value: 1000 * value, 2),
        ("peak memory (MiB)", lambda run: _fact(run, "peak_memory_mib"), float, 0),
        ("wall time of a run (s)", lambda run: run.record.seconds, float, 1),
    ]
    there = [c for c in columns if any(c[1](run) is not None for run in experiment.runs)]
    if not experiment.runs:
        return None
    timed = there[0][0].startswith("step time")
    rows = []
    base: float | None = None
    for method in experiment.methods:
        cells = []
        for title, read, convert, digits in there:
            values = [convert(value) for run in method.runs.values() if (value := read(run)) is not None]
            cells.append(format_mean_sd(summary(values), digits) if values else NOTHING)
            if title.startswith("step time"):
                mean = summary(values).mean if values else None
                base = mean if method is experiment.methods[0] else base
                cells.append(NOTHING if mean is None or not base else f"{mean / base:.2f}")
        rows.append([method.label, *cells, str(len(method.runs))])
    titles = [title for title, *_ in there]
    if timed:
        titles.insert(1, f"step time, ratio to {experiment.methods[0].label}")
    devices = _distinct(str(run.record.hardware.get("device", "")) for run in experiment.runs)
    kinds = _distinct(str(run.record.train.get("peak_memory_of", "")) for run in experiment.runs)
    notes = [f"Measured while the runs were made{' on ' + ', '.join(devices) if devices else ''}, not a benchmark."]
    if kinds:
        notes.append(f"Peak memory is that of the {', '.join(kinds)}.")
    return plain("Cost", ["method", *titles, "runs"], rows, notes=notes)


def _fact(run: Run, name: str) -> float | None:
    value = run.record.train.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _runs(experiment: Experiment, names: Sequence[str]) -> Plain | None:
    metrics = [describe(name) for name in names]
    rows = []
    for method in experiment.methods:
        for seed, run in sorted(method.runs.items()):
            values = [method.values(name).get(seed) for name in names]
            cells = [NOTHING if v is None else number(v, m.digits) for v, m in zip(values, metrics, strict=True)]
            rows.append([method.label, str(seed), *cells, f"{run.record.seconds:.1f}", _place(run)])
    columns = ["method", "seed", *(m.title for m in metrics), "seconds", "folder"]
    return plain("All runs", columns, rows) if rows else None


def _place(run: Run) -> str:
    """A run's folder below that of all runs: where those lie on a machine is not for all who are sent the page."""
    return "/".join(run.folder.parts[-3:]) or NOTHING


def _methods(experiment: Experiment) -> Plain | None:
    shared = _shared(experiment)
    rows = []
    for method in experiment.methods:
        own = {**method.record.options, **{k: v for k, v in settings_of(method.record).items() if k not in shared}}
        rows.append([method.label, method.record.method, _assignments(own) or NOTHING])
    columns = ["method", "name", "options and own settings"]
    return plain("Methods", columns, rows, numeric=False) if rows else None


def _shared(experiment: Experiment) -> dict[str, Any]:
    """The settings that all runs have in common."""
    settings = [settings_of(run.record) for run in experiment.runs]
    names = list(dict.fromkeys(name for setting in settings for name in setting))
    missing = object()
    return {
        name: settings[0][name]
        for name in names
        if all(setting.get(name, missing) == settings[0].get(name, missing) for setting in settings)
    }


def _facts(experiment: Experiment) -> list[tuple[str, str]]:
    records = [run.record for run in experiment.runs]
    seconds = [record.seconds for record in records]
    dates = sorted(record.date[:10] for record in records)
    days = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else ""
    return [
        ("data", experiment.data),
        ("network", experiment.model),
        ("seeds", ", ".join(map(str, experiment.seeds))),
        ("training, all methods", _assignments(_shared(experiment)) or "not recorded"),
        ("runs", f"{len(seconds)}, {duration(sum(seconds))} in all"),
        *((("date", days),) if days else ()),
        *(("versions", text) for text in _distinct(_items(record.versions) for record in records)),
        *(("hardware", text) for text in _distinct(_items(record.hardware) for record in records)),
        ("configurations", f"{len({record.config_hash for record in records})} of different hash"),
    ]


def _assignments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items())


def _items(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _distinct(found: Iterable[str]) -> list[str]:
    return [text for text in dict.fromkeys(found) if text]
