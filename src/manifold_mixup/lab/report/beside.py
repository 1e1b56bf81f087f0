"""Published numbers beside ours, and what to cite."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from manifold_mixup.lab.methods import METHODS
from manifold_mixup.lab.report.collect import Experiment
from manifold_mixup.lab.report.findings import listed
from manifold_mixup.lab.results import Weights
from manifold_mixup.lab.side_by_side import Grid, panel_grid, printed, verdicts
from manifold_mixup.lab.studies import Panel, Scale, Study, load_study, study_files
from manifold_mixup.lab.verdict import Verdict

__all__ = ["bibtex", "claims", "published_grids", "published_twins"]

Part = tuple[Study, Panel, Scale]


def _panels() -> Mapping[str, tuple[Part, ...]]:
    """The parts of published tables that an experiment repeats, by the name of its recipe."""
    return _panels_of(tuple(study_files().items()))


@functools.cache
def _panels_of(files: tuple[tuple[str, Path], ...]) -> Mapping[str, tuple[Part, ...]]:
    found: dict[str, tuple[Part, ...]] = {}
    for name, _ in files:
        study = load_study(name)
        for panel in study.panels:
            for scale, recipe in panel.recipes.items():
                found[recipe] = (*found.get(recipe, ()), (study, panel, scale))
    return found


def published_twins(experiment: Experiment, weights: Weights = "last") -> dict[tuple[str, str], str]:
    """Published numbers as printed, by label of the method and name of the measure, for the same network.

    Of several published tables that hold one, the first counts; the grids of :func:`published_grids` have all, those of
    other networks among them.

    Args:
        experiment: The runs.
        weights: Which of our weights they stand beside, as the columns of the published tables say.
    """
    found: dict[tuple[str, str], str] = {}
    for _, panel, _ in _panels().get(experiment.name, ()):
        for row in panel.rows:
            for column in panel.columns:
                if column.relative or column.complement or column.weights != weights:
                    continue
                entry = panel.twin(row, column)
                if entry is not None and _plain(entry.network) == _plain(experiment.model):
                    found.setdefault((row.label, column.metric), printed(entry))
    return found


def _plain(network: str) -> str:
    """``PreActResNet18`` and ``preact_resnet18`` are one network."""
    return re.sub(r"[^a-z0-9]", "", network.lower())


def published_grids(experiment: Experiment) -> list[tuple[str, Grid]]:
    """Source and table of every published table that this experiment repeats, with ours beside it."""
    results = [run.result for run in experiment.runs]
    found = []
    for study, panel, scale in _panels().get(experiment.name, ()):
        if any(True for _ in panel.twins()):
            found.append((study.source, panel_grid(panel, results, scale, [study.note] if study.note else [])))
    return found


def claims(experiment: Experiment) -> list[Verdict]:
    """What these runs say of every claim of those tables; claims about methods that were not run are left out."""
    results = [run.result for run in experiment.runs]
    found = {v.claim: v for _, panel, _ in _panels().get(experiment.name, ()) for v in verdicts(panel, results)}
    return [verdict for verdict in found.values() if verdict.outcome != "not run"]


def bibtex(experiments: Sequence[Experiment], version: str) -> str:
    """Entries for the method, this software with what was run, and the sources of the other methods."""
    runs = [run for experiment in experiments for run in experiment.runs]
    commits = listed(list(dict.fromkeys(c for run in runs if (c := run.record.versions.get("commit")))))
    dates = sorted(run.record.date for run in runs)
    names = ", ".join(f"{experiment.name} ({len(experiment.runs)} runs)" for experiment in experiments)
    note = f"version {version}{', commit ' + commits if commits else ''}; experiments: {names}"
    year = dates[-1][:4] if dates and re.match(r"\d{4}-", dates[-1]) else ""
    entries = [
        PAPER,
        _entry(
            "misc",
            "manifold-mixup-software",
            title="{manifold-mixup}, {Manifold Mixup} for {PyTorch}",
            year=year,
            note=note,
        ),
    ]
    for name in dict.fromkeys(run.record.method for run in runs):
        method = METHODS.get(name)
        if method is None or name in ("none", "manifold_mixup") or not re.search(r"\d{4}", method.source):
            continue  # plain settings such as weight decay have no paper of their own
        entries.append(_entry("misc", f"method-{name.replace('_', '-')}", title=method.title, note=method.source))
    return "\n".join(entries)


def _entry(kind: str, key: str, **fields: str) -> str:
    lines = [f"  {name} = {{{_braced(value)}}}," for name, value in fields.items() if value]
    return "\n".join([f"@{kind}{{{key},", *lines, "}", ""])


def _braced(value: str) -> str:
    """Text as a BibTeX field: braces in pairs, and the characters that LaTeX reads."""
    depth = 0
    for character in value:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            break
    if depth:
        value = value.replace("{", "(").replace("}", ")")
    return re.sub(r"(?<!\\)([&%$#_])", r"\\\1", " ".join(value.split()))


PAPER = _entry(
    "inproceedings",
    "verma2019manifold",
    title="Manifold Mixup: Better Representations by Interpolating Hidden States",
    author="Verma, Vikas and Lamb, Alex and Beckham, Christopher and Najafi, Amir and Mitliagkas, Ioannis and "
    "Courville, Aaron and Lopez-Paz, David and Bengio, Yoshua",
    booktitle="Proceedings of the 36th International Conference on Machine Learning",
    series="Proceedings of Machine Learning Research",
    volume="97",
    pages="6438--6447",
    year="2019",
)
