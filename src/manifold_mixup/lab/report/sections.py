"""What each section of the page holds, as plain values for its template; a section without content is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from manifold_mixup.lab.errors import CorruptedFile, StorageError
from manifold_mixup.lab.measures.catalog import describe
from manifold_mixup.lab.report.beside import claims, published_grids, published_twins
from manifold_mixup.lab.report.collect import Experiment
from manifold_mixup.lab.report.configuration import cost_table, facts, methods_table, runs_table
from manifold_mixup.lab.report.figures.confusion import Mistakes, confusion_plots, mistakes
from manifold_mixup.lab.report.figures.curves import curve_plots, part_plots
from manifold_mixup.lab.report.figures.mixing import mixing_plots
from manifold_mixup.lab.report.figures.reliability import reliability_plots
from manifold_mixup.lab.report.figures.seeds import seeds_plots
from manifold_mixup.lab.report.figures.spectra import spectra_plots
from manifold_mixup.lab.report.figures.spiral import spiral_plots
from manifold_mixup.lab.report.figures.strength import strength_plots
from manifold_mixup.lab.report.figures.style import SERIES, Plot
from manifold_mixup.lab.report.findings import Finding, findings, listed, remarks, verdict
from manifold_mixup.lab.report.pictures import chosen_runs, read_pictures
from manifold_mixup.lab.report.tables import Plain, Table, main_table, plain
from manifold_mixup.lab.results import public_command
from manifold_mixup.lab.selection import score
from manifold_mixup.lab.side_by_side import summed_up

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
    twins, best_twins = published_twins(experiment), published_twins(experiment, "best")
    best = f"the best validation score{_chosen(experiment)}"
    tables = [
        main_table(experiment, "Last weights", main, twins=twins),
        main_table(experiment, f"Weights with {best}", best_main, best=True, twins=best_twins),
        main_table(experiment, "Other measures of the last weights", others, twins=twins),
        main_table(experiment, f"Other measures: weights with {best}", best_others, best=True, twins=best_twins),
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
        remarks=[*remarks(experiment, main), *([FULL_SIZE] if twins or best_twins else [])],
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
        # a node is no picture, and its name is not known
        mistakes=[] if "node_classification" in experiment.tasks else _safely(mistakes, experiment)[0],
        cost=cost_table(experiment),
        runs=runs_table(experiment, main),
        methods=methods_table(experiment),
        facts=facts(experiment),
        commands=list(dict.fromkeys(public_command(c) for r in experiment.runs if (c := r.record.command))),
    )


def _chosen(experiment: Experiment) -> str:
    """Of which score the best weights had the least, in brackets; nothing where there are none."""
    scores = dict.fromkeys(score(run.record.train) for run in experiment.runs if run.record.best)
    return f" (lowest {listed(list(scores))})" if scores else ""


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


Group = tuple[str, str, str, Callable[[Experiment], Sequence[Plot]]]
GROUPS: tuple[Group, ...] = (  # anchor, heading, note and maker of each group of figures but the first
    (
        "curves",
        "Training",
        "Means over seeds; the bands are ± one standard deviation, where there are two seeds or more.",
        curve_plots,
    ),
    (
        "loss-parts",
        "Parts of the loss",
        "What methods that look at unlabelled examples minimise: the loss of these is multiplied by its weight.",
        part_plots,
    ),
    (
        "reliability",
        "Calibration",
        "How often a network is right against how sure it is, in 15 bins over the test examples of all seeds. "
        "Below the diagonal it is too sure. Temperature scaling divides the logits by one number, chosen on "
        "validation data.",
        reliability_plots,
    ),
    (
        "strength",
        "Robustness",
        "Test accuracy against the strength of a change of the test images; bars are ± one standard deviation.",
        strength_plots,
    ),
    (
        "spectra",
        "Singular values of hidden states",
        "Of one matrix for each class, whose rows are the hidden states of its examples: the faster they fall, the "
        "flatter the class lies.",
        spectra_plots,
    ),
    (
        "mixing",
        "Mixing log",
        "What was drawn in training: how often each layer was mixed, and λ beside the density that it should have.",
        mixing_plots,
    ),
    (
        "confusion",
        "Confusion",
        "Of the test examples of each true class, the share that was predicted as each class, in percent, over all "
        "seeds.",
        confusion_plots,
    ),
)


def _drawn(experiment: Experiment, main: Sequence[str]) -> list[Drawn]:
    first: Group = ("seeds", "Every seed", "A dot is one run; the bar is the mean.", lambda e: seeds_plots(e, main))
    found = []
    for key, title, note, make in (first, *GROUPS):
        plots, problems = _safely(make, experiment)
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
