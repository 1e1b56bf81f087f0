"""The theorem of Manifold Mixup as an experiment: what it says holds, and what it does not say.

``manifold-mixup reproduce theory`` runs it. Theorem 1 and Corollary 1 of Verma et al. 2019 are checked with an affine
head, where they are exact (:mod:`manifold_mixup.lab.theory_affine`), and measured with deep heads, where they are a
tendency at most (:mod:`manifold_mixup.lab.theory_deep`, :mod:`manifold_mixup.lab.theory_counterexamples`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

from manifold_mixup.lab import theory_affine, theory_counterexamples, theory_deep
from manifold_mixup.lab.errors import CorruptedFile, UsageError
from manifold_mixup.lab.side_by_side import NOTHING, Grid
from manifold_mixup.lab.statistics import format_mean_sd, summary
from manifold_mixup.lab.theory_checks import Check

__all__ = ["Check", "TheoryResult", "run_theory"]

MEASURED = ("loss", "spread", "excess", "effective rank", "moved", "segments", "bent")
HEADINGS = {
    "loss": "loss",
    "spread": "spread of a class",
    "excess": "spread outside dim - d + 1 directions",
    "effective rank": "effective rank of a class",
    "moved": "output change within a class",
    "segments": "distance from mixed targets",
    "bent": "distance from straight",
}


@dataclass(frozen=True)
class TheoryResult:
    """All checks of all seeds, in the order in which they ran."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed that could fail."""
        return all(check.passed is not False for check in self.checks)

    def to_records(self) -> list[dict[str, Any]]:
        """One JSON object for each check; what is not finite is null."""
        return [{**asdict(check), "value": _finite(check.value)} for check in self.checks]

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]]) -> TheoryResult:
        """Read back what :meth:`to_records` wrote.

        Raises:
            CorruptedFile: A record has other keys than a check.
        """
        names = {field.name for field in fields(Check)}
        checks = []
        for i, record in enumerate(records):
            if set(record) != names:
                raise CorruptedFile(
                    f"record {i} of the theory has keys {sorted(record)}, expected {sorted(names)}: run it again"
                )
            value = record["value"]
            checks.append(Check(**{**record, "value": math.nan if value is None else value}))
        return cls(tuple(checks))

    def verdict_grid(self) -> Grid:
        """Everything that could fail, one statement a row, over seeds, classes and dimensions."""
        rows = []
        for same in self._groups("name", "statement").values():
            if same[0].passed is None:
                continue
            worst = max(same, key=lambda check: check.excess)
            shapes = list(dict.fromkeys((check.d, check.dim) for check in same))
            rows.append(
                (
                    same[0].name,
                    same[0].statement,
                    _shapes(shapes),
                    f"{sum(check.passed is True for check in same)} of {len(same)}",
                    _number(worst.value),
                    f"{worst.relation} {_number(worst.bound)}",
                )
            )
        done = sum(check.passed is True for check in self.checks)
        total = sum(check.passed is not None for check in self.checks)
        head = ("check", "statement", "(d, dim)", "passed", "worst", "its bound")
        return Grid("The theorem's consequences, checked", head, rows, [f"{done} of {total} checks passed."])

    def measured_grid(self) -> Grid:
        """What is only measured, with deep heads: one way of training a row, mean ± sd over seeds."""
        rows = []
        groups = self._groups("d", "dim", "setting")
        for (d, dim, setting), same in sorted(groups.items(), key=lambda item: item[0][:2]):
            by_name: dict[str, list[float]] = {}
            for check in same:
                if check.passed is None:
                    by_name.setdefault(check.name, []).append(check.value)
            if by_name:
                cells = [_mean(by_name.get(name, []), scientific=name == "loss") for name in MEASURED]
                rows.append((str(d), str(dim), str(setting), *cells, str(max(map(len, by_name.values())))))
        head = ("d", "dim", "training", *(HEADINGS[name] for name in MEASURED), "n")
        note = (
            "Spreads are in units of the distance between classes, changes and distances of outputs in units of the "
            "targets; root mean squares. Nothing is demanded of these numbers."
        )
        return Grid("Deep heads, measured", head, rows, [note])

    def _groups(self, *keys: str) -> dict[tuple[Any, ...], list[Check]]:
        groups: dict[tuple[Any, ...], list[Check]] = {}
        for check in self.checks:
            groups.setdefault(tuple(getattr(check, key) for key in keys), []).append(check)
        return groups


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.0f}" if value == round(value) and abs(value) < 1000 else f"{value:.2g}"


def _shapes(shapes: list[tuple[int, int]]) -> str:
    """Pairs of classes and dimension, or how many there are and between which numbers of classes."""
    if len(shapes) <= 4:
        return ", ".join(f"({d}, {dim})" for d, dim in shapes)
    classes = [d for d, _ in shapes]
    return f"{len(shapes)} pairs, d = {min(classes)} to {max(classes)}"


def _mean(values: list[float], *, scientific: bool) -> str:
    if not values:
        return NOTHING
    return f"{summary(values).mean:.1e}" if scientific else format_mean_sd(summary(values), 3)


def run_theory(
    seeds: Sequence[int], *, steps: int | None = None, progress: Callable[[int, int], None] | None = None
) -> TheoryResult:
    """Run all checks.

    The result depends on the arguments alone, on one thread to the last bit. No global random state is read or
    advanced.

    Args:
        seeds: Different seeds, each at least 0; three take about half a minute on one core.
        steps: Steps of each training, and most alternations of the exact minimisation; None takes 600 and 500. With
            few, checks fail for want of training.
        progress: Called with what is done and how much there is, before the first part and after each.

    Raises:
        UsageError: There are no seeds, a seed is negative or twice there, or steps is below 1.
    """
    seeds = list(seeds)
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds {seeds} should be one or more different numbers, 0 or above")
    if steps is not None and steps < 1:
        raise UsageError(f"steps={steps} should be at least 1")
    parts = [part for seed in seeds for part in _parts(seed, steps)]
    report = progress or (lambda done, total: None)
    report(0, len(parts))
    checks: list[Check] = []
    for done, part in enumerate(parts, 1):
        checks.extend(part())
        report(done, len(parts))
    return TheoryResult(tuple(checks))


def _parts(seed: int, steps: int | None) -> Iterator[Callable[[], Iterable[Check]]]:
    """What there is to do for one seed, in pieces of at most about a second."""
    alternations, trained = steps or theory_affine.ALTERNATIONS, steps or theory_deep.STEPS
    for d, dim in theory_affine.SHAPES:
        yield partial(theory_affine.affine_checks, d, dim, seed, alternations)
    for d, dim in theory_deep.SHAPES:
        for setting in theory_deep.SETTINGS:
            yield partial(theory_deep.deep_checks, setting, d, dim, seed, trained)
    yield partial(theory_counterexamples.plane_checks, seed, trained)
    for d, dim in theory_counterexamples.SHAPES:
        yield partial(theory_counterexamples.segment_checks, d, dim, seed)
