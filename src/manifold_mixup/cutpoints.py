"""Where a network may be mixed: cut points, found by following the data flow, and the eligible set S.

A module call is a cut point when every path from the inputs to the outputs goes through what it returns: take those
tensors away and no path is left. Then, and only then, mixing them mixes all that the rest of the network sees. And
behind it every row has to go its own way (``rows.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from manifold_mixup.eligible import INPUT, CutPoint, stage_ends
from manifold_mixup.errors import (
    PACKED,
    BatchMismatch,
    DataFlowLost,
    DiscoveryFailed,
    LayerNotReached,
    NotACutPoint,
    RowsExchange,
)
from manifold_mixup.graph import Graph, Leaf
from manifold_mixup.look import ROWS, Look, look_at
from manifold_mixup.masks import MaskPlan, Place, Rule, features, judge
from manifold_mixup.rows import first_without, probe
from manifold_mixup.structure import Path, batch_size, opened, paths
from manifold_mixup.undisturbed import undisturbed

__all__ = ["CutPoint", "Discovery", "cut_points", "discover"]


@dataclass(frozen=True)
class Discovery:
    """What one look at a model tells."""

    cut_points: list[CutPoint]
    outputs: list[tuple[int, ...]]  # shapes of the model's outputs, without the batch where they have it
    heads: int  # how many of them have it
    mixable: dict[str, tuple[bool, ...]]  # for calls that may be mixed: which tensors are floating and per example
    plans: dict[str, MaskPlan]  # for every cut point: what happens to masks
    rules: dict[Place, Rule]
    given: frozenset[Path]  # the inputs with a row per example
    regroups: bool  # the output has other rows than the input: graphs, and not nodes
    exchanges: bool  # rows read each other before the first cut point
    _look: Look
    _unmasked: dict[str, str]  # why masks forbid a cut
    _refused: frozenset[str]  # cut points behind which rows read each other

    @property
    def _graph(self) -> Graph:
        return self._look.graph

    def middle(self) -> list[str]:
        """The module call in the middle of the compute that does most of it, the model itself apart; or none."""
        half = self._graph.cost / 2
        around = [c for c in self._graph.calls if c.key and c.cost_before <= half < c.cost_after]
        return [max(around, key=lambda c: c.cost_after - c.cost_before).key] if around else []

    def explain(self, name: str) -> NotACutPoint | LayerNotReached:
        """Why ``name`` is no cut point: the error to raise."""
        graph = self._graph
        if name == INPUT:
            if (found := self._exchange(name, list(graph.sources), graph.source_leaves)) is not None:
                return found
            kinds = {
                label
                for leaf, label in zip(graph.source_leaves, graph.sources.values(), strict=True)
                if not leaf.floating and leaf.node not in graph.masks
            }
            return NotACutPoint(
                name,
                f"{_list(kinds)} {'holds' if len(kinds) == 1 else 'hold'} integers, which cannot be interpolated.",
                None,
            )
        call = next((c for c in graph.calls if c.key == name), None)
        if call is None:
            base = name.partition("#")[0]
            calls = sum(c.key.partition("#")[0] == base for c in graph.calls)
            times = "never called" if not calls else f"called {calls} time{'s' if calls > 1 else ''} only"
            return LayerNotReached(
                f"The module {base!r} is {times} in a forward of the model, so {name!r} cannot be mixed."
            )
        block = [leaf.node for leaf in features(graph, call) if leaf.node is not None]
        if not block:
            return NotACutPoint(name, "what it returns does not depend on the input, or does not reach the output.")
        if (found := self._exchange(name, block, call.leaves)) is not None:
            return found
        if not graph.separates(block):
            start, end = graph.bypass(block)
            source, target = _origin(graph, start), _place(graph, end)
            return NotACutPoint(
                name, f"{source} reaches {target} without passing through it.", graph.where[start] or None
            )
        if call.packed:
            return NotACutPoint(
                name,
                PACKED,
            )
        if name in self._unmasked:
            return NotACutPoint(name, self._unmasked[name], None)
        return NotACutPoint(
            name,
            f"it returns a tensor that does not hold one row per example in dimension 0, or holds integers "
            f"(shapes {', '.join(str(leaf.shape) for leaf in call.leaves)} for a batch of {ROWS}).",
        )

    def _exchange(self, name: str, block: Sequence[int], leaves: Sequence[Leaf]) -> RowsExchange | None:
        """The error to raise if rows read each other behind a call."""
        graph, look = self._graph, self._look
        nodes = graph.exchanges_after(block)
        if name not in self._refused and not (nodes and look.grown is None):
            return None
        if not nodes:
            return RowsExchange(name, "rows of the output depend on other rows than their own of what it returns.")
        rows = next((leaf.shape[0] for leaf in leaves if leaf.floating and leaf.shape), 0)
        if look.grown is None and look.returned and rows not in look.returned:
            into = " and ".join(map(str, sorted(look.returned)))
            doer = _doers(graph, nodes[-1:], block[-1])
            return RowsExchange(
                name, f"its {rows} rows are joined into the {into} of the output by {doer}, so that they share labels."
            )
        doers = _doers(graph, [nodes[0], nodes[-1]], block[-1])
        if all(graph.exchanges[node] == "rows" for node in nodes):
            return RowsExchange(name, f"its rows read each other behind it, in {doers}.")
        return RowsExchange(name, f"its {rows} rows are nodes that exchange messages behind it, in {doers}.")


def _origin(graph: Graph, node: int) -> str:
    while graph.what[node].startswith("detach") and not graph.where[node] and graph.parents[node]:
        node = graph.parents[node][0]  # our own alias of what the model was given
    if node in graph.sources:
        label = graph.sources[node]
        return "the input" if label == INPUT else f"the input {label!r}"
    where = graph.where[node]
    return f"what {where!r} computes" if where else f"what the model itself computes ({_operation(graph, node)})"


def _place(graph: Graph, node: int) -> str:
    while graph.what[node].startswith("detach"):  # our own alias of what a module returned or was given
        after = next((end for start, end in graph.edges() if start == node), None)
        if after is None:
            break
        node = after
    if node == len(graph.parents) - 1:
        return "the output"
    where = graph.where[node]
    return f"{where!r} ({_operation(graph, node)})" if where else f"the model's own forward ({_operation(graph, node)})"


def _doers(graph: Graph, nodes: Sequence[int], after: int) -> str:
    """The outermost modules that are called behind a cut and hold these nodes, the first and the last, by operator."""
    found: dict[str, list[str]] = {}
    for node in nodes:
        around = [call for call in graph.calls if call.key and after < call.start <= node < call.end]
        name = min(around, key=lambda call: call.start).key if around else graph.where[node]
        operators = found.setdefault(repr(name) if name else "the model's own forward", [])
        if _operation(graph, node) not in operators:
            operators.append(_operation(graph, node))
    return " and last in ".join(f"{name} ({', '.join(operators)})" for name, operators in found.items())


def _operation(graph: Graph, node: int) -> str:
    return graph.what[node].partition(".")[0]


def _list(names: set[str]) -> str:
    return " and ".join(repr(n) for n in sorted(names)) or "the input"


def discover(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], labels: int | None = None) -> Discovery:
    """Follow the data flow of ``model(*args, **kwargs)`` on two rows of the batch, and its shapes on three.

    A graph network (with layers of PyTorch Geometric, or one that cannot run on two rows because they read others by
    number) is run on all of them. Its cut points have as many rows as one of its outputs.

    Args:
        model: the network.
        args: its positional inputs.
        kwargs: its inputs by name.
        labels: how many targets there are; None where that is not known.

    Raises:
        BatchMismatch: no input has a first dimension, the batch is empty, no output follows its size, or none has as
            many rows as there are targets.
        DiscoveryFailed: the model's forward raised.
        DataFlowLost: no path leads from the inputs to the outputs.
    """
    size = batch_size([*map(opened, args), {key: opened(value) for key, value in kwargs.items()}])
    if not size:
        raise BatchMismatch(
            "Cut points are found on a batch, but the inputs hold " + ("no rows." if size == 0 else "no tensor.")
        )
    with undisturbed(model):
        look = _look(model, args, kwargs, size, size if labels is None else labels)
    graph = look.graph
    look.check_labels(model, labels)
    _check_flow(graph, model)
    look.check_outputs(model)
    rules, reasons = judge(graph, look.plans, look.grown.arguments if look.grown else {})
    # "input" is k = 0, also where a module has that name: such a module cannot be in S.
    mixable = {c.key: look.per_example(c) for c in graph.calls if c.key != INPUT}
    heads = [look.has_rows(leaf) for leaf in graph.outputs]
    sound = {key: plan for key, plan in look.plans.items() if isinstance(plan, MaskPlan) and key not in reasons}
    points = _cut_points(look, mixable, sound)
    with undisturbed(model):
        refused = _exchanging(model, look, points)
    ahead = graph.exchanges_after(graph.sources)
    return Discovery(
        cut_points=[point for point in points if point.name not in refused],
        outputs=[leaf.shape[1:] if head else leaf.shape for leaf, head in zip(graph.outputs, heads, strict=True)],
        heads=sum(heads) if look.grown is not None else sum(bool(leaf.shape) for leaf in graph.outputs),
        mixable=mixable,
        plans=sound,
        rules=rules,
        given=frozenset(
            path
            for path, tensor in paths((args, kwargs))
            if tensor.dim() and (look.grown is None or tensor.shape[0] == size)
        ),
        regroups=look.grown is None and any(graph.exchanges[node] == "index" for node in ahead),
        exchanges=look.grown is None and bool(ahead),
        _look=look,
        _unmasked=reasons,
        _refused=frozenset(refused),
    )


def _look(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], size: int, labels: int) -> Look:
    """What the forwards show; DiscoveryFailed where one of them raises."""
    try:
        return look_at(model, args, kwargs, size, labels)
    except Exception as error:
        raise DiscoveryFailed(
            f"The forward that looks for the cut points, on {ROWS} and on {ROWS + 1} rows of the batch, raised "
            f"{type(error).__name__}: {str(error).rstrip('.')}. Call mixup(x, y) with x as the model takes it "
            "(device, dtype, preprocessing); x may be a tuple of positional or a dict of keyword arguments. Or "
            "name S yourself: layers=[...], check=False."
        ) from error


def _check_flow(graph: Graph, model: nn.Module) -> None:
    """DataFlowLost where no path leads from the inputs to the outputs."""
    if any(leaf.node is not None and graph.between[leaf.node] for leaf in graph.outputs):
        return
    lost = next((graph.where[n] for n in graph.parents[-1] if graph.what[n].endswith("()")), None)
    where = repr(lost) if lost else "the model's own forward"
    place = f" It leaves PyTorch in {where}." if lost is not None else ""
    raise DataFlowLost(
        f"No path of tensors leads from the inputs to the outputs of {type(model).__name__}, so no cut point can "
        f"be proven.{place} If you know where it may be mixed, name S yourself: layers=[...], check=False."
    )


def _point(name: str, leaves: Sequence[Leaf], compute: float, own: float) -> CutPoint:
    shapes = tuple(leaf.shape[1:] for leaf in leaves)
    features = sum(torch.Size(s).numel() for s in shapes)
    return CutPoint(name, shapes[0] if len(shapes) == 1 else shapes, features, compute, own)


def _exchanging(model: nn.Module, look: Look, points: Sequence[CutPoint]) -> set[str]:
    """The cut points behind which rows read each other, by the data flow or by a probe."""
    graph, whole = look.graph, look.grown is None
    if not (whole or graph.exchanges):
        return set()
    leaves = {call.key: features(graph, call) for call in graph.calls}
    leaves[INPUT] = [leaf for leaf in graph.source_leaves if leaf.node not in graph.masks]
    behind = {p.name: graph.exchanges_after(n.node for n in leaves[p.name] if n.node is not None) for p in points}
    refused = {name for name, nodes in behind.items() if whole and any(graph.exchanges[n] == "index" for n in nodes)}
    rows = {name: look.rows_of(leaves[name]) or 0 for name in behind}
    unsure = [name for name, nodes in behind.items() if name not in refused and rows[name] > 1 and (whole or nodes)]

    def shows(name: str) -> set[str] | None:
        later = unsure[unsure.index(name) + 1 :]
        try:
            return probe(model, look.args, look.kwargs, name, rows[name], graph.results, later)
        except Exception:  # a model that refuses NaN: the operators have to tell
            return None if whole and behind[name] else set()

    return refused | set(unsure) - first_without(unsure, shows)


def _cut_points(look: Look, mixable: dict[str, tuple[bool, ...]], plans: dict[str, MaskPlan]) -> list[CutPoint]:
    found, graph = [], look.graph
    sources = [leaf for leaf in graph.source_leaves if leaf.node not in graph.masks]
    if sources and all(leaf.floating for leaf in sources) and look.rows_of(sources) is not None:
        point = _point(INPUT, sources, 0.0, 0.0)
        found.append(dataclasses.replace(point, masks=INPUT in plans))
    total = graph.cost or 1.0
    for call in graph.calls:
        leaves = features(graph, call)
        known = dict(zip(map(id, call.leaves), mixable.get(call.key, ()), strict=False))
        if call.key in plans and all(known.get(id(leaf)) for leaf in leaves):
            own = (call.cost_after - call.cost_before) / total
            point = _point(call.key, leaves, call.cost_after / total, own)
            found.append(dataclasses.replace(point, masks=bool(plans[call.key].unite)))
    ends = {stage_end.name for stage_end in stage_ends(found)}
    return [dataclasses.replace(p, stage_end=p.name in ends) for p in found]


def cut_points(model: nn.Module, /, *inputs: Any, **kwargs: Any) -> list[CutPoint]:
    """List the places where ``model`` may be mixed, in the order of its forward.

    Runs ``model(*inputs, **kwargs)`` on two and on three rows of the batch, in eval mode, without grad; buffers, modes
    and random states are left as they were. Auxiliary inputs with a row per example (attention masks) count as inputs:
    where one bypasses a module, that module is no cut point. A graph network runs on the whole batch; its cut points
    are where rows no longer read each other, be they nodes or, behind the readout, graphs.

    Args:
        model: any module; wrappers (DDP, ``torch.compile``) are looked through by :class:`ManifoldMixup`, not here.
        *inputs: a batch as the model takes it, rows in dimension 0.
        **kwargs: the same by name.

    Returns:
        One :class:`CutPoint` for every module call that is one, "input" first where it can be mixed.

    Raises:
        BatchMismatch, DiscoveryFailed, DataFlowLost: see :func:`discover`.
    """
    return discover(model, inputs, kwargs).cut_points
