"""Options that several measures have, and the examples that they measure on."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from manifold_mixup.lab.data.base import Examples
from manifold_mixup.lab.measures.base import Subject
from manifold_mixup.lab.measures.hidden import split_of
from manifold_mixup.lab.options import Options

__all__ = ["NUMBER", "FirstOptions", "Numbers", "first_of_test", "written"]

NUMBER = r"([\d.]+(?:e-?\d+)?)"
"""Matches what :func:`written` makes of a number that is not negative."""


def _numbers(value: Any) -> list[float]:
    """One number, a list of them, or ``20+40``, the form of the command line; ``none`` is no number."""
    if isinstance(value, str):
        try:
            value = [] if value == "none" else [float(part) for part in value.split("+")]
        except ValueError:
            value = [None]
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(type(n) in (int, float) and 0 <= n < math.inf for n in numbers):
        raise ValueError("should be numbers of at least 0, such as [20, 40] or 20+40, or none")
    return sorted({float(n) for n in numbers})


Numbers = Annotated[list[float], PlainValidator(_numbers)]
"""Numbers of at least 0 as a list or joined by ``+``, ascending, each once; ``none`` or ``[]`` is no number."""


class FirstOptions(Options):
    """How many of the test examples are measured on."""

    examples: int | None = Field(
        default=None, ge=1, description="only the first so many test examples, in stored order; unset takes all"
    )


def first_of_test(subject: Subject, options: FirstOptions) -> Examples:
    """The test examples that are measured on.

    Raises:
        UsageError: There are none.
    """
    test = split_of(subject, "test")
    return Examples(test.x[: options.examples], test.y[: options.examples])


def written(number: float) -> str:
    """A number as it stands in the name of a metric: ``20``, ``28.6``."""
    return str(int(number)) if number == int(number) else repr(number)
