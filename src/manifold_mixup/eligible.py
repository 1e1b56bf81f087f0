"""The eligible set S: which of the cut points a mixer draws from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from manifold_mixup.errors import LayerNotFound, NotACutPoint, RowsExchange

if TYPE_CHECKING:
    from manifold_mixup.cutpoints import Discovery

__all__ = [
    "INPUT",
    "CutPoint",
    "auto_layers",
    "canonical",
    "choose_layers",
    "readout_layers",
    "resolve_name",
    "stage_ends",
    "too_few_features",
]

INPUT = "input"


@dataclass(frozen=True)
class CutPoint:
    """A place where mixing is exact.

    Attributes:
        name: the module's name in ``model.named_modules()``; ``name#2`` is its second call; "input" is the input.
        shape: of one example's hidden state, without the batch; a tuple of shapes where several tensors form the cut.
        features: numbers per example, over all tensors of the cut.
        compute: share of the forward's FLOPs spent up to and with this call, in [0, 1].
        own_compute: share of the forward's FLOPs spent inside this call.
        stage_end: whether it closes a run of cut points of one shape (the paper's "resblock").
        masks: whether masks reach past it, so that mixing here unites those of the two examples.
    """

    name: str
    shape: tuple[Any, ...]
    features: int
    compute: float
    own_compute: float
    stage_end: bool = False
    masks: bool = False


def _candidates(points: Sequence[CutPoint]) -> list[CutPoint]:
    """Cut points that do work of their own (no norms, activations, stems) and leave some work to do."""
    return [p for p in points if p.own_compute >= 0.01 and p.compute < 0.95]


def stage_ends(points: Sequence[CutPoint]) -> list[CutPoint]:
    """The module with the most compute of its own in every run of candidates of one shape; the last of equals."""
    runs: list[list[CutPoint]] = []
    for point in _candidates(points):
        if runs and runs[-1][-1].shape == point.shape:
            runs[-1].append(point)
        else:
            runs.append([point])
    return [max(reversed(run), key=lambda p: round(p.own_compute, 6)) for run in runs]


def auto_layers(points: Sequence[CutPoint]) -> list[str]:
    """S = {input} and two inner cut points, as the paper's choice generalises: the ends of the first two stages.

    A stage end counts with a tenth of the compute of its own, before three quarters of the whole, and a tenth after
    the one before. What is missing (networks of one stage) is filled with the candidates nearest to a quarter and to a
    half. The input is left out where it cannot be mixed; if nothing is left then, the last cut point before the
    head is taken.
    """
    chosen: list[CutPoint] = []
    for end in stage_ends(points):
        apart = not chosen or end.compute - chosen[-1].compute >= 0.1
        if len(chosen) < 2 and end.own_compute >= 0.1 and end.compute < 0.75 and apart:
            chosen.append(end)
    for target in (0.25, 0.5):
        free = [p for p in _candidates(points) if all(abs(p.compute - c.compute) >= 0.1 for c in chosen)]
        if len(chosen) < 2 and free:
            # Of a container and its last child, which are equally far, take the container.
            chosen.append(min(reversed(free), key=lambda p: round(abs(p.compute - target), 6)))
    if not chosen and not any(p.name == INPUT for p in points):
        chosen = [p for p in points if p.compute < 0.95][-1:]  # an embedding, say: better than nothing
    order = {p.name: i for i, p in enumerate(points)}
    names = sorted((p.name for p in chosen), key=order.__getitem__)
    return [INPUT, *names] if any(p.name == INPUT for p in points) else names


def readout_layers(points: Sequence[CutPoint]) -> list[str]:
    """S of a graph network: what the readout returns, and inner cut points of the head, as of a network of its own.

    The first cut point behind all message passing (and behind the pooling, where there is one) takes the part of the
    input; of modules that end together there, it is the outermost.
    """
    points = [p for p in points if p.compute < 1.0]  # the others have nothing behind them to learn
    if not points:
        return []
    around = [p for p in points if points[0].name.startswith(f"{p.name}.") and p.compute == points[0].compute]
    first = [points[0], *around][-1]
    left = 1.0 - first.compute
    head = [
        replace(p, compute=(p.compute - first.compute) / left, own_compute=p.own_compute / left)
        for p in points[points.index(first) + 1 :]
    ]
    chosen = auto_layers([replace(first, name=INPUT, compute=0.0, own_compute=0.0), *head])
    return [first.name, *chosen[1:]]


def resolve_name(model: nn.Module, name: str) -> tuple[str, int]:
    """The module's name as ``model.named_modules()`` has it, and which of its calls is meant (from 1 on).

    Raises:
        LayerNotFound: no module has this name.
    """
    base, _, number = name.partition("#")
    if not base or (number and not number.isdigit()) or number == "0":
        raise LayerNotFound(name, dict(model.named_modules()))
    try:
        module = model.get_submodule(base)
    except AttributeError:
        raise LayerNotFound(name, dict(model.named_modules())) from None
    canonical = next(n for n, m in model.named_modules() if m is module)
    return canonical, int(number or 1)


def canonical(model: nn.Module, name: str) -> str:
    """The name by which hooks know a call; LayerNotFound if no module has it."""
    base, number = resolve_name(model, name)
    return base if number == 1 else f"{base}#{number}"


def choose_layers(
    model: nn.Module, layers: str | Sequence[str] | Callable[[list[CutPoint]], Sequence[str]], discovery: Discovery
) -> list[str]:
    """The eligible set S, in the order given (or of the forward, for "auto").

    Raises:
        LayerNotFound, NotACutPoint, LayerNotReached: for a name that cannot be in S.
        NotACutPoint: "auto" found nothing to mix.
    """
    if isinstance(layers, str):
        at_the_end = discovery.exchanges and not any(p.name == INPUT for p in discovery.cut_points)
        chosen = (readout_layers if at_the_end else auto_layers)(discovery.cut_points)
        if not chosen:
            raise _no_choice(discovery)
        return chosen
    names = layers(list(discovery.cut_points)) if callable(layers) else layers
    points = {p.name for p in discovery.cut_points}
    chosen = []
    for name in names:
        if name != INPUT:
            name = canonical(model, name)
        if name not in points:
            raise discovery.explain(name)
        chosen.append(name)
    return list(dict.fromkeys(chosen))


def _no_choice(discovery: Discovery) -> NotACutPoint:
    """Why layers="auto" has nothing to offer, by the example of the call in the middle of the network."""
    names = [repr(p.name) for p in discovery.cut_points]
    only = f"the only cut point is {names[0]}" if len(names) == 1 else f"the only cut points are {', '.join(names)}"
    few = f"{only}, behind which there is nothing left to learn." if names else ""
    parts = [few or "neither the input nor any module of this model is a cut point."]
    for name in (INPUT, *discovery.middle()):
        why = discovery.explain(name)
        if isinstance(why, NotACutPoint) and name not in discovery.plans:
            parts.append(f"{name!r} is none: {why.reason}")
        if isinstance(why, RowsExchange):
            return RowsExchange("auto", f"{' '.join(parts)} {why.advice}")
    if names:
        parts.append(f"To mix there all the same, name them: layers=[{names[-1]}].")
    return NotACutPoint("auto", " ".join(parts))


def too_few_features(name: str, features: int, classes: int) -> str:
    """What to warn of where the classes cannot become linearly separable."""
    return (
        f"The layer {name!r} has {features} features for {classes} classes. Manifold mixup can make the classes "
        "linearly separable only with dim(H) >= d - 1 (Verma et al. 2019, Theorem 1)."
    )
