"""A look at a network: its cut points, the eligible set S, and why every other layer is none."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from manifold_mixup.cutpoints import CutPoint, Discovery, discover
from manifold_mixup.eligible import choose_layers
from manifold_mixup.errors import DataFlowLost, DiscoveryFailed, NotACutPoint
from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.networks.base import Network

__all__ = ["Refusal", "Survey", "survey"]

INPUT, OUTPUT = "input", "output"
LATE = 0.95  # share of the compute from which on little is left to do for a mixed state
WIDE = 0.5  # share of the compute between two cut points from which on it is said what goes past the layers there
SHOWN = 3  # reasons


@dataclass(frozen=True)
class Refusal:
    """A module call that is no cut point.

    Attributes:
        name: As the cut points' names.
        reason: What goes past it, or why what it returns cannot be mixed.
        bypass: The module where the path that goes past it starts, if it starts in one.
    """

    name: str
    reason: str
    bypass: str | None


@dataclass(frozen=True)
class Survey:
    """What there is to know about where a network may be mixed.

    Attributes:
        points: The cut points, in the order of the forward.
        layers: S.
        refusals: Every other module call, in the order in which the calls end.
        notes: Sentences about what would be missed in a table.
    """

    points: list[CutPoint]
    layers: list[str]
    refusals: list[Refusal]
    notes: list[str]

    def entries(self, everything: bool = False) -> Iterator[dict[str, Any]]:
        """Plain values for each cut point and, with ``everything``, then for each other call."""
        for point in self.points:
            yield {**dataclasses.asdict(point), "cut_point": True, "chosen": point.name in self.layers}
        for refusal in self.refusals if everything else ():
            yield {**dataclasses.asdict(refusal), "cut_point": False, "chosen": False}


def survey(network: Network, layers: Sequence[str] = ()) -> Survey:
    """Find the cut points and S.

    Args:
        network: With its examples.
        layers: The user's own S; empty is ``layers="auto"``.

    Raises:
        LayerNotFound, NotACutPoint, LayerNotReached: For a layer that cannot be in S.
        UsageError: The network does not take the examples.
        DataFlowLost, BatchMismatch: As :func:`manifold_mixup.cut_points`.
    """
    found = _discover(network)
    refusals = _refusals(found)
    return Survey(found.cut_points, _choose(network, layers, found), refusals, list(_notes(found, refusals)))


def _discover(network: Network) -> Discovery:
    kind = type(network.model).__name__
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
            return discover(network.model, network.args, network.kwargs)
    except RuntimeError as error:
        cause = error.__cause__ if isinstance(error, DiscoveryFailed) else error
        text = f"{type(cause).__name__}: {str(cause).rstrip('. ')}"
        if any(parameter.is_meta for parameter in network.model.parameters()) and not isinstance(error, DataFlowLost):
            raise UsageError(
                f"with --meta there are no values, but the forward of {kind} seems to need some ({text}): "
                "leave --meta out, and make the network smaller by its options"
            ) from error
        if not isinstance(error, DiscoveryFailed):
            raise
        raise UsageError(
            f"the forward of {kind} raised {text}; it was given {network.described()}: say what it reads with --input, "
            "such as --input 3,224,224 (the shape of one example), --input 128:int (integers), --input NAME=128 (by "
            "keyword)"
        ) from error


def _choose(network: Network, layers: Sequence[str], found: Discovery) -> list[str]:
    if layers:
        return choose_layers(network.model, layers, found)
    try:
        return choose_layers(network.model, "auto", found)
    except NotACutPoint:  # there is nothing to mix, which is an answer too
        return []


def _refusals(found: Discovery) -> list[Refusal]:
    points = {point.name for point in found.cut_points}
    refused = []
    for name in found.mixable:
        if name and name not in points:
            error = found.explain(name)
            if isinstance(error, NotACutPoint):
                refused.append(Refusal(name, error.reason, error.bypass))
            else:
                refused.append(Refusal(name, str(error), None))
    return refused


def _notes(found: Discovery, refusals: Sequence[Refusal]) -> Iterator[str]:
    """Why there is nothing to mix, or nothing in a large part of the network."""
    early = [point.name for point in found.cut_points if point.compute < LATE]
    if not set(early) - {INPUT}:
        place = "at the input alone, which is input mixup" if early else "nowhere"
        yield f"Before the last {1 - LATE:.0%} of its compute this network can be mixed {place}."
    for start, end, inside in _stretches(found, refusals):
        if inside and end.compute - start.compute >= WIDE:
            yield (
                f"Between {_place(start)} and {_place(end)} none of {len(inside)} module calls is a cut point: mixing "
                "there would leave part of the features unmixed."
            )
            groups: dict[str, list[str]] = {}
            for refusal in inside:
                groups.setdefault(refusal.reason, []).append(refusal.name)
            largest = sorted(groups.items(), key=lambda group: -len(group[1]))
            for reason, names in largest[:SHOWN]:
                more = f" and {len(names) - 2} more" if len(names) > 2 else ""
                yield f"  {', '.join(names[:2])}{more}: {reason}"
            if rest := sum(len(names) for _, names in largest[SHOWN:]):
                yield f"  and {rest} more; --all gives every reason"


def _stretches(found: Discovery, refusals: Sequence[Refusal]) -> Iterator[tuple[CutPoint, CutPoint, list[Refusal]]]:
    """Two cut points one after the other, and the other calls that end between them."""
    points = {point.name: point for point in found.cut_points}
    refused = {refusal.name: refusal for refusal in refusals}
    last = points.get(INPUT, CutPoint(INPUT, (), 0, 0.0, 0.0))
    inside: list[Refusal] = []
    for name in found.mixable:
        if name in points:
            yield last, points[name], inside
            last, inside = points[name], []
        elif name in refused:
            inside.append(refused[name])
    yield last, CutPoint(OUTPUT, (), 0, 1.0, 0.0), inside


def _place(point: CutPoint) -> str:
    if point.name in (INPUT, OUTPUT):
        return f"the {point.name}"
    return f"{point.name!r} ({point.compute:.0%} of the compute)"
