"""Spread over seeds, and differences between two methods seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["CONFIDENCE_LEVEL", "Difference", "Summary", "format_mean_sd", "paired_difference", "summary"]

CONFIDENCE_LEVEL = 0.95


@dataclass(frozen=True)
class Summary:
    """Several runs of one method.

    Attributes:
        n: Number of runs.
        mean: Their mean; NaN if a value is NaN.
        sd: Sample standard deviation (division by n - 1); None for one run, NaN if a value is not finite.
    """

    n: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class Difference:
    """One method minus another one, over the seeds that both have.

    Attributes:
        n: Number of common seeds.
        mean: Mean difference; NaN without common seeds.
        low: Lower end of the two-sided 95 % t interval of the mean difference, or None where there is no interval.
        high: Its upper end, or None.
        significant: Whether there is an interval and it leaves out 0.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    significant: bool


def summary(values: Iterable[float]) -> Summary:
    """Mean and standard deviation of one number per run.

    A value that is not finite belongs to a run that diverged. It is never dropped: the mean becomes NaN or infinite,
    and the standard deviation NaN.

    Args:
        values: At least one number.

    Returns:
        Number of values, mean and standard deviation.

    Raises:
        ValueError: There are no values.
    """
    numbers = [float(value) for value in values]
    if not numbers:
        raise ValueError("there are no values to summarise")
    if not all(map(math.isfinite, numbers)):
        return Summary(len(numbers), sum(numbers) / len(numbers), None if len(numbers) == 1 else math.nan)
    # The standard library works in exact fractions: equal values have a standard deviation of exactly 0.
    sd = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Summary(len(numbers), statistics.fmean(numbers), sd)


def paired_difference(a_by_seed: Mapping[int, float], b_by_seed: Mapping[int, float]) -> Difference:
    """Mean of a - b over the seeds that both have, with its two-sided 95 % t interval (Student's paired t test).

    There is no interval, and nothing is called significant, where a t interval says nothing:

    * below two common seeds;
    * where a difference is not finite, because one of the runs diverged: it is never dropped, the mean shows it;
    * where all differences are equal, to rounding. The formula would give an interval of width zero, that is,
      certainty, but equal differences mostly come from measures with few possible values, such as an error on few
      images.

    The interval is for one comparison; it is not widened for making several at once.

    Args:
        a_by_seed: Seed to value of one method.
        b_by_seed: Seed to value of the other.

    Returns:
        The mean difference and its interval.
    """
    seeds = sorted(a_by_seed.keys() & b_by_seed.keys())
    differences = [float(a_by_seed[seed]) - float(b_by_seed[seed]) for seed in seeds]
    if not differences:
        return Difference(0, math.nan, None, None, False)
    found = summary(differences)
    size = max(max(abs(a_by_seed[seed]), abs(b_by_seed[seed])) for seed in seeds)
    if found.sd is None or not math.isfinite(found.mean) or found.sd <= 1e-12 * size:
        return Difference(found.n, found.mean, None, None, False)
    from scipy import stats

    half = float(stats.t.ppf((1 + CONFIDENCE_LEVEL) / 2, found.n - 1)) * found.sd / math.sqrt(found.n)
    low, high = found.mean - half, found.mean + half
    return Difference(found.n, found.mean, low, high, not low <= 0 <= high)


def format_mean_sd(found: Summary, digits: int = 2) -> str:
    """``mean ± sd`` with ``digits`` decimals; the mean alone for a single run, which has no spread.

    >>> format_mean_sd(summary([1.0, 2.0, 3.0]))
    '2.00 ± 1.00'
    >>> format_mean_sd(summary([1.5]), digits=1)
    '1.5'
    """
    mean = f"{found.mean:.{digits}f}"
    return mean if found.sd is None else f"{mean} ± {found.sd:.{digits}f}"
