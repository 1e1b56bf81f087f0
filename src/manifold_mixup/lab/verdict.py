"""Whether our runs bear out what a paper claims.

The rule. A claim says that one method is better than another in one number. Of our runs, the seeds that both methods
have give paired differences, and these a two-sided 95 % t interval of the mean difference:

* the interval lies on the claimed side of zero: the claim **holds** in our runs;
* it lies on the other side: the claim **does not hold**;
* it contains zero, or there is none (fewer than two common seeds, a run that diverged, equal differences): our runs
  **cannot decide**;
* one of the methods has no runs: **not run**.

The intervals are not widened for the number of claims: of twenty claims without substance one is expected to come out
decided by chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from manifold_mixup.lab.statistics import Difference, paired_difference

__all__ = ["OUTCOMES", "Outcome", "Verdict", "judge"]

Outcome = Literal["holds", "does not hold", "undecided", "not run"]
OUTCOMES: tuple[Outcome, ...] = ("holds", "does not hold", "undecided", "not run")


@dataclass(frozen=True)
class Verdict:
    """What our runs say of one claim.

    Attributes:
        claim: The claim in words.
        outcome: What our runs say.
        reason: Why, with the numbers.
        difference: The paired difference, the claimed better method minus the other; None without runs.
    """

    claim: str
    outcome: Outcome
    reason: str
    difference: Difference | None


def judge(
    claim: str,
    better: Mapping[int, float],
    than: Mapping[int, float],
    *,
    lower_is_better: bool,
    digits: int = 2,
) -> Verdict:
    """Apply the rule above to one claim.

    Args:
        claim: The claim in words.
        better: Seed to number of the method that is claimed to be better.
        than: Seed to number of the other; a run that diverged has NaN.
        lower_is_better: Whether the smaller number is the better one.
        digits: Decimals of the reason.
    """
    if not better or not than:
        return Verdict(claim, "not run", "no runs of " + ("either" if not better and not than else "one of them"), None)
    found = paired_difference(better, than)
    if found.low is None or found.high is None:
        return Verdict(claim, "undecided", _no_interval(found, digits), found)
    interval = f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}], n = {found.n}"
    if found.low <= 0 <= found.high:
        return Verdict(claim, "undecided", interval, found)
    return Verdict(claim, "holds" if (found.high < 0) == lower_is_better else "does not hold", interval, found)


def _no_interval(found: Difference, digits: int) -> str:
    if found.n == 0:
        return "no seed in common"
    if found.n == 1:
        return f"{found.mean:+.{digits}f}, one seed: no interval"
    if found.mean != found.mean:
        return "a run diverged"
    return f"{found.mean:+.{digits}f}, n = {found.n}, equal differences: no interval"
