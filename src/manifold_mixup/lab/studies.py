"""Studies: a published table, the experiments that repeat it at three scales, and the claims it makes.

A study is a TOML file in ``lab/studies``. Its panels name a recipe for each scale; several studies read the runs of one
recipe.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, ValidationError

from manifold_mixup.lab.errors import RecipeError, StorageError, UnknownName
from manifold_mixup.lab.measures.catalog import describe
from manifold_mixup.lab.options import Options
from manifold_mixup.lab.parsing import explain
from manifold_mixup.lab.published import Published, find_published
from manifold_mixup.lab.results import Weights

__all__ = ["SCALES", "STUDIES", "Claim", "Column", "Panel", "Row", "Scale", "Study", "load_study", "study_files"]

STUDIES = Path(__file__).parent / "studies"
Scale = Literal["full", "short", "desk"]
SCALES: tuple[Scale, ...] = get_args(Scale)


def _one_line(text: str) -> str:
    """Text without the line breaks of its file."""
    return " ".join(text.split())


class Column(Options):
    """One number of a panel."""

    metric: str = Field(description="its name in our records and evaluations")
    published: str | None = Field(default=None, description="its name among the published numbers, if there are any")
    complement: bool = Field(default=False, description="show 100 minus ours: accuracy where we record an error")
    relative: bool = Field(default=False, description="show the ratio to the panel's first row, seed by seed")
    title: str | None = Field(default=None, description="its name in the table; unset: what the measure calls it")
    weights: Weights = Field(default="last", description="of the last weights, or of those best on validation data")

    @property
    def suffix(self) -> str:
        """What its name says of the weights; nothing of the last ones."""
        return "" if self.weights == "last" else ", best on validation"

    @property
    def lower_is_better(self) -> bool:
        """Whether less of the recorded number is better; errors, likelihoods and spreads are, accuracies are not."""
        return "accuracy" not in self.metric

    @property
    def heading(self) -> str:
        """Its name with its unit."""
        metric = describe(self.metric)
        title = self.title or metric.title
        if self.relative:
            return f"{title}{self.suffix}, ratio to the first row"
        if self.complement and not self.title:
            title = title.replace("error", "accuracy")
        return f"{title}{self.suffix} ({metric.unit})" if metric.unit else f"{title}{self.suffix}"


class Row(Options):
    """One method of a panel."""

    label: str = Field(description="label of the method in the recipes, or of a published number alone")
    published: dict[str, Any] | None = Field(default=None, description="keys of its published numbers; unset: none")


class Claim(Options):
    """That one method is better than another in one number."""

    better: str = Field(description="label of the method that is claimed to be better")
    than: str = Field(description="label of the other")
    metrics: list[str] = Field(min_length=1, description="in which numbers; each is a claim of its own")
    weights: Weights = Field(default="last", description="of the last weights, or of those best on validation data")


class Panel(Options):
    """One network on one data set."""

    title: str
    recipes: Annotated[dict[Scale, str], Field(min_length=1)]
    published: dict[str, Any] = Field(default_factory=dict, description="keys that all its published numbers share")
    measures: dict[Scale, list[str]] = Field(
        default_factory=dict, description="measured beside those of every record, as on the command line"
    )
    columns: list[Column] = Field(min_length=1)
    rows: list[Row] = Field(min_length=1)
    claims: list[Claim] = Field(default_factory=list)
    transpose: bool = Field(default=False, description="numbers in rows and methods in columns, for many numbers")
    note: str = ""

    def twin(self, row: Row, column: Column) -> Published | None:
        """The published number that stands beside ours."""
        if row.published is None or column.published is None:
            return None
        return find_published({**self.published, **row.published, "metric": column.published})

    def column(self, metric: str, weights: Weights = "last") -> Column:
        """The column of a number of ours.

        Raises:
            KeyError: There is none.
        """
        for column in self.columns:
            if (column.metric, column.weights, column.relative) == (metric, weights, False):
                return column
        raise KeyError(metric)

    def twins(self) -> Iterator[Published]:
        """All published numbers of the panel."""
        for row in self.rows:
            for column in self.columns:
                if (found := self.twin(row, column)) is not None:
                    yield found


class Study(Options):
    """One published table."""

    name: str
    title: str
    source: str
    note: Annotated[str, AfterValidator(_one_line)] = Field(
        default="", description="what is ambiguous, and what we chose"
    )
    panels: list[Panel] = Field(min_length=1)


def study_files() -> dict[str, Path]:
    """The studies that come with the package, by name."""
    return {path.stem: path for path in sorted(STUDIES.glob("*.toml"))}


def load_study(name: str) -> Study:
    """Read and check a study.

    Raises:
        UnknownName: There is no such study.
        RecipeError: The file has mistakes.
    """
    known = study_files()
    if name not in known:
        raise UnknownName("study", name, [*known, "theory"])
    source = f"study {name}"
    try:
        tree = tomllib.loads(known[name].read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(known[name], error, "read the study") from error
    except ValueError as error:
        raise RecipeError(source, [f"it is no TOML: {error}"]) from error
    try:
        study = Study.model_validate({**tree, "name": name})
    except ValidationError as error:
        raise RecipeError(source, explain(error, Study)) from error
    if mistakes := list(_mistakes(study)):
        raise RecipeError(source, mistakes)
    return study


def _mistakes(study: Study) -> Iterator[str]:
    """Rows and columns that claims name and the panel lacks, and published numbers that are asked for in vain."""
    for i, panel in enumerate(study.panels):
        labels = [row.label for row in panel.rows]
        metrics = [(column.metric, column.weights) for column in panel.columns]
        for claim in panel.claims:
            for label in (claim.better, claim.than):
                if label not in labels:
                    yield f"panels.{i}.claims: no row is labelled {label!r}"
            yield from (
                f"panels.{i}.claims: no column shows {m!r} of the {claim.weights} weights"
                for m in claim.metrics
                if (m, claim.weights) not in metrics
            )
        for row in panel.rows:
            if row.published is not None and not any(panel.twin(row, column) for column in panel.columns):
                yield f"panels.{i}.rows: no published number has {row.published} of {row.label!r}"
