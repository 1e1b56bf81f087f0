"""The measures by name, and carrying them out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from manifold_mixup.lab.errors import UnknownName, UsageError
from manifold_mixup.lab.measures import (
    attacks,
    calibration,
    classification,
    deformations,
    geometry,
    input_margin,
    neighbours,
    noise,
    off_data,
    spectra,
)
from manifold_mixup.lab.measures.base import Measure, Subject
from manifold_mixup.lab.options import Options

__all__ = ["MEASURES", "always", "get_measure", "measure", "unmet"]

GROUPS: tuple[tuple[Measure, ...], ...] = (
    classification.MEASURES,
    calibration.MEASURES,
    deformations.MEASURES,
    attacks.MEASURES,
    noise.MEASURES,
    spectra.MEASURES,
    neighbours.MEASURES,
    geometry.MEASURES,
    off_data.MEASURES,
    input_margin.MEASURES,
)
MEASURES: dict[str, Measure] = {entry.name: entry for group in GROUPS for entry in group}


def get_measure(name: str) -> Measure:
    """The registry entry of a measure.

    Raises:
        UnknownName: There is none of this name.
    """
    if name not in MEASURES:
        raise UnknownName("measure", name, MEASURES)
    return MEASURES[name]


def unmet(entry: Measure, subject: Subject) -> str | None:
    """What a measure needs and does not find, or None."""
    there = {
        "images": subject.info.images,
        "hidden": bool(subject.hidden),
        **{part: part in subject.parts and len(subject.parts[part]) > 0 for part in ("train", "validation", "test")},
    }
    missing = [need for need in entry.needs if not there[need]]
    return missing[0] if missing else None


def always(subject: Subject) -> list[tuple[Measure, Options]]:
    """The measures of every record, as far as the subject has what they need."""
    return [(m, m.options()) for m in MEASURES.values() if m.always and unmet(m, subject) is None]


def measure(subject: Subject, requests: Iterable[tuple[Measure, Any]]) -> dict[str, float | None]:
    """Carry out measures; a value that is no finite number becomes None.

    Raises:
        UsageError: A measure needs what the subject does not have, or two of them give a number of one name.
    """
    found: dict[str, float] = {}
    for entry, options in requests:
        if (need := unmet(entry, subject)) is not None:
            what = {"images": "images", "hidden": "a network with named hidden states"}
            raise UsageError(f"measure {entry.name!r} needs {what.get(need, f'a {need} split')}, which is not there")
        numbers = entry.compute(subject, options)
        if repeated := numbers.keys() & found.keys():
            raise UsageError(f"measure {entry.name!r} gives {min(repeated)!r} a second time: ask for it once at a time")
        found |= numbers
    return finite(found)


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """The same numbers, None for those that are not finite: JSON has no word for them."""
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
