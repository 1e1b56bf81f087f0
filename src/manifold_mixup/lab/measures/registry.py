"""The measures by name."""

from __future__ import annotations

from manifold_mixup.lab.errors import UnknownName
from manifold_mixup.lab.measures.base import Measure

__all__ = ["MEASURES", "get_measure"]

MEASURES: dict[str, Measure] = {measure.name: measure for group in () for measure in group}


def get_measure(name: str) -> Measure:
    """The registry entry of a measure.

    Raises:
        UnknownName: There is none of this name.
    """
    if name not in MEASURES:
        raise UnknownName("measure", name, MEASURES)
    return MEASURES[name]
