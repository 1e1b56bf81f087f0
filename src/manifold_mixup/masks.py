"""Masks: what a network is told about padding, and how two examples' masks become one.

A mixed example has a token wherever one of its two parts has one, so from the layer of the mixing on it has to attend
to the union of both masks, and before it every part to its own. A mask goes around the layers that it steers, so no
layer of a text model is a cut point in the strict sense. It becomes one if every way around it is a mask's, and leads
through a module call where a hook can put the union in its place:

* calls that begin after the cut are given the union;
* a module that the cut lies in, and whose own code reads a mask after the cut (a mean over the valid positions, the
  last token's position), is given the union, and the calls inside it that begin before the cut are given its own again.

Padded positions hold no information: their states count as zero in the mixture.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manifold_mixup.graph import Call, Entry, Graph, Leaf
from manifold_mixup.structure import Path, paths, replace_at

__all__ = [
    "MaskPlan",
    "Place",
    "Rule",
    "features",
    "find_masks",
    "judge",
    "kept",
    "mask_plans",
    "padding_values",
    "probed",
    "tested",
    "unite",
]

Place = tuple[str, Path]  # a module call and the way to one of its arguments, (args, kwargs)


@dataclass(frozen=True)
class Rule:
    """How the two values of a mask at one place are united.

    ``high``: larger values mean "attend". ``bound``: what lies beyond it (on the side of ``high``) is attended to.
    ``pad``: the tensor holds token ids, and this one is the padding. ``nested``: the union is right only where one of
    the two masks holds the other (all padding on one side), as positions are counted.
    """

    high: bool = True
    bound: float = 0.5
    pad: float | None = None
    nested: bool = False


@dataclass(frozen=True)
class MaskPlan:
    """What has to happen to masks if a certain cut is mixed.

    ``unite``: places that are given the union. ``restore``: places that are given their own again. ``keep``: for each
    tensor of the hidden state, the place that tells which positions of which dimension are padding, or None.
    """

    unite: frozenset[Place] = frozenset()
    restore: frozenset[Place] = frozenset()
    keep: tuple[tuple[Place, int] | None, ...] = ()

    @property
    def places(self) -> set[Place]:
        """All places where a hook is needed."""
        return {*self.unite, *self.restore, *(k[0] for k in self.keep if k is not None)}


def find_masks(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int) -> dict[Path, bool]:
    """Which inputs are masks, and whether their larger values mean "attend".

    Those whose name has "mask" in it. A name with "pad" in it marks what is ignored, as
    ``key_padding_mask`` in PyTorch; all others mark what is attended to, as ``attention_mask`` in transformers.
    Integers of shape (n,) with "length" in their name are a mask too, of as many first positions.
    """
    try:
        names = list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        names = []
    found: dict[Path, bool] = {}
    for path, tensor in paths((args, dict(kwargs))):
        if not tensor.dim() or tensor.shape[0] != size:
            continue
        keys = [step for step in path if isinstance(step, str)]
        place = path[1]
        name = keys[-1] if keys else names[place] if isinstance(place, int) and place < len(names) else ""
        if tensor.dim() == 1:
            if "length" in name.lower() and not tensor.is_floating_point():
                found[path] = True
        elif tensor.shape[-1] > 1 and "mask" in name.lower():
            found[path] = "pad" not in name.lower()
    return found


def padding_values(model: nn.Module) -> set[float]:
    """The token ids that mean padding, as far as the model itself says so."""
    found = {m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding)}
    found.add(getattr(getattr(model, "config", None), "pad_token_id", None))
    return {float(v) for v in found if isinstance(v, int)}


def probed(arguments: Any, masks: Mapping[Path, bool], ids: Iterable[tuple[Path, float]] = ()) -> Any:
    """Arguments whose first example has no padding, the second in its second half, and all others in their first."""
    for path, high in masks.items():
        arguments = _edit(arguments, path, lambda mask, high=high: _probe(mask, high))
    for path, pad in ids:
        arguments = _edit(arguments, path, lambda tokens, pad=pad: _pad_ids(tokens, pad))
    return arguments


def _edit(arguments: Any, path: Path, change: Any) -> Any:
    value = arguments
    for step in path:
        value = value[step]
    return replace_at(arguments, path, change(value))


def _probe(mask: Tensor, high: bool) -> Tensor:
    if mask.dim() == 1:  # lengths
        probe = torch.full_like(mask, int(mask.max()))
        probe[1:2] = (probe[1:2] + 1) // 2
        return probe
    attended, ignored = (1.0, 0.0) if high else (0.0, 1.0)
    if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all() and bool((mask != 0).any())):
        attended, ignored = (0.0, torch.finfo(mask.dtype).min) if high else (0.0, 1.0)  # added to attention scores
    probe = torch.full_like(mask, attended)
    half = math.ceil(mask.shape[-1] / 2)
    probe[1:2, ..., half:] = ignored
    probe[2:, ..., :half] = ignored
    return probe


def _pad_ids(tokens: Tensor, pad: float) -> Tensor:
    other = torch.where(tokens == pad, torch.full_like(tokens, 1 if pad != 1 else 0), tokens)
    half = math.ceil(tokens.shape[-1] / 2)
    other[1:2, ..., half:] = int(pad)
    other[2:, ..., :half] = int(pad)
    return other


def _rule(value: Tensor, pad: float | None) -> Rule | None:
    """How to unite what came through at a place under :func:`probed`; None where its values do not tell."""
    if value.shape[0] != 3:
        return None
    if pad is not None:
        return Rule(pad=pad)
    full, part = value[0].to(torch.float64), value[1].to(torch.float64)
    difference = torch.nan_to_num(full - part, nan=0.0)
    up, down = bool((difference > 0).any()), bool((difference < 0).any())
    if up == down:
        return None
    changed = difference != 0
    attended, ignored = full[changed], part[changed]
    a, b = (attended.min(), ignored.max()) if up else (attended.max(), ignored.min())
    middle = float(a + b) / 2
    found = Rule(up, middle if math.isfinite(middle) else float(a) - math.copysign(1.0, float(a - b)))
    if not torch.equal(unite(value[0], value[1], 0.5, found), value[0]):
        return None
    halves = torch.equal(unite(value[1], value[2], 0.5, found), value[0])
    return found if halves else dataclasses.replace(found, nested=True)


def unite(own: Tensor, other: Tensor, lam: float | Tensor, how: Rule) -> Tensor:
    """The union of two masks: what either part attends to. A part with weight 0 does not count.

    Args:
        own: the masks of the parts with weight λ, one row per example.
        other: the masks of the parts with weight 1 - λ, of the same shape.
        lam: λ, or one value for every row.
        how: what the values mean.
    """
    if how.pad is not None:
        both = torch.where(own == how.pad, other, own)
    elif own.dtype == torch.bool:
        both = own | other if how.high else own & other
    else:
        both = torch.maximum(own, other) if how.high else torch.minimum(own, other)
    if not isinstance(lam, Tensor):
        return other if lam == 0.0 else both
    lam = lam.view(-1, *[1] * (own.dim() - 1)) if lam.dim() else lam
    return torch.where(lam == 1.0, own, torch.where(lam == 0.0, other, both))


def kept(mask: Tensor, how: Rule, positions: int) -> Tensor:
    """Which positions are no padding: bool, shape (n, positions). A larger mask tells it by its last dimension."""
    if mask.dim() == 1:
        return torch.arange(positions, device=mask.device) < mask.unsqueeze(1)
    if how.pad is not None:
        return mask != how.pad
    keep = mask if mask.dtype == torch.bool else mask > how.bound if how.high else mask < how.bound
    if mask.dtype == torch.bool and not how.high:
        keep = ~mask
    return keep if keep.dim() == 2 else keep.flatten(1, -2).any(1)


def _plan(graph: Graph, call: Call, leaves: Sequence[Leaf]) -> MaskPlan | str:
    """What has to happen to masks if ``call`` is mixed, or why no hook can do it.

    Args:
        graph: the recorded forward, in which the leaves separate all features.
        call: the module call.
        leaves: the floating tensors that it returned and that reach the output.
    """
    entries = {entry.node: entry for entry in graph.entries}
    block, end = {leaf.node for leaf in leaves}, call.end
    over = [(a, b) for a, b in graph.edges() if a < end <= b and a not in block]
    hides = bool(over) or any(node in graph.masks for node in graph.sources)
    keep = [_aligned(graph, leaf, end) if hides and len(leaf.shape) > 2 else None for leaf in leaves]
    if not over:
        return MaskPlan(keep=tuple(keep))
    children: dict[int, list[int]] = {}
    for a, b in graph.edges():
        if graph.auxiliary(a):
            children.setdefault(a, []).append(b)
    late: set[Entry] = set()  # calls that begin after the cut
    around: set[Entry] = set()  # calls that the cut lies in
    for a, b in over:
        source = entries.get(a)
        if b in entries:
            if not _readable(graph, b, entries, children):
                return _said(graph, a, b, "it is read as features there")
            late.add(entries[b])
        elif source is None or source.call.end <= end:
            return _said(graph, a, b, "it was computed before, and is read in code that no hook can reach")
        elif a in graph.carried and b not in graph.tests:
            return _said(graph, a, b, "it is read as features there")
        elif any(child < end and child not in entries for child in children[a]):
            return _said(graph, a, b, "the same code reads it before and after")
        else:
            around.add(source)
    nodes = {entry.node for entry in around}
    restore = {
        e
        for e in graph.entries
        if e.call.start < end and e not in around and not nodes.isdisjoint(graph.parents[e.node])
    }
    for leaf, found in zip(leaves, keep, strict=True):
        if hides and len(leaf.shape) > 2 and found is None:
            return (
                f"a mask reaches what follows, and no dimension of the hidden state {leaf.shape[1:]} is as long as a "
                "mask known there, so its padded positions cannot be told."
            )
    return MaskPlan(_places(late | around), _places(restore), tuple(keep))


def _places(entries: Iterable[Entry]) -> frozenset[Place]:
    return frozenset((entry.key, entry.path) for entry in entries)


def _readable(graph: Graph, node: int, entries: Mapping[int, Entry], children: Mapping[int, list[int]]) -> bool:
    """Whether what enters here is used as a mask alone: it is one, or ids that are only compared with the padding."""
    if node in graph.masks:
        return True
    return all(
        child in graph.tests or (child in entries and _readable(graph, child, entries, children))
        for child in children.get(node, ())
    )


def _said(graph: Graph, start: int, end: int, why: str) -> str:
    """Why masks forbid a cut: what goes around it where."""
    source, seen = start, set()
    while graph.parents[source] and source not in seen:
        seen.add(source)
        source = graph.parents[source][0]
    label = graph.sources.get(source, "input")
    name = "the input" if label == "input" else f"the input {label!r}"
    where = repr(graph.where[end]) if graph.where[end] else "the model's own forward"
    if source in graph.carried and not graph.tests:
        return f"{name} reaches {where} without passing through it, and integers cannot be interpolated."
    return (
        f"{name} reaches {where} without passing through it, and {why}, so the two examples' masks cannot be united. "
        "Let that step be a module that is given the mask as an argument (a pooling module, for instance)."
    )


def _aligned(graph: Graph, leaf: Leaf, end: int) -> tuple[Place, int] | None:
    """A mask that is known at the cut and has one value for every position of the hidden state."""
    sources = {graph.carried[p] for test in graph.tests for p in graph.parents[test]}
    known = [
        e
        for e in graph.entries
        if e.call.start < end and (e.node in graph.masks or graph.carried.get(e.node) in sources)
    ]
    known.sort(key=lambda e: (len(e.shape) != 2, e.node in graph.carried, e.node))
    lengths = {s.shape[1] for s in graph.source_leaves if len(s.shape) > 1 and s.node not in graph.masks}
    for dim in range(1, len(leaf.shape)):
        for entry in known:
            if len(entry.shape) >= 2 and entry.shape[-1] == leaf.shape[dim] and entry.shape[0] == leaf.shape[0]:
                return (entry.key, entry.path), dim
    for entry in known:
        if len(entry.shape) == 1 and leaf.shape[1] in lengths:
            return (entry.key, entry.path), 1
    return None


def tested(graph: Graph) -> Iterator[tuple[Path, float]]:
    """The inputs that are token ids, as far as they are compared with the padding, and the padding."""
    for test, pad in graph.tests.items():
        source = graph.carried[graph.parents[test][0]]
        entry = next(e for e in graph.entries if not e.key and graph.carried.get(e.node) == source)
        yield entry.path, pad


def mask_plans(graph: Graph, masks: Collection[Path]) -> dict[str, MaskPlan | str]:
    """For every call that all features pass through, what has to happen to masks, or why it cannot."""
    plans: dict[str, MaskPlan | str] = {}
    plain = not (graph.masks or graph.carried)
    if masks:
        root = frozenset(("", path) for path in masks)
        sources = [leaf for leaf in graph.source_leaves if leaf.node not in graph.masks]
        plans["input"] = MaskPlan(root, keep=tuple(_input_keep(leaf, graph) for leaf in sources))
    for call in graph.calls:
        leaves = features(graph, call)
        nodes = [leaf.node for leaf in leaves if leaf.node is not None]
        if call.key not in ("", "input") and nodes and graph.separates(nodes):
            plans[call.key] = MaskPlan() if plain else _plan(graph, call, leaves)
    return plans


def _input_keep(leaf: Leaf, graph: Graph) -> tuple[Place, int] | None:
    for entry in graph.entries:
        if not entry.key and entry.node in graph.masks and len(entry.shape) == 2 and len(leaf.shape) > 1:
            dims = [d for d in range(1, len(leaf.shape)) if leaf.shape[d] == entry.shape[1]]
            if dims:
                return ("", entry.path), dims[0]
    for entry in graph.entries:
        if not entry.key and entry.node in graph.masks and len(entry.shape) == 1 and len(leaf.shape) > 1:
            return ("", entry.path), 1
    return None


def features(graph: Graph, call: Call) -> list[Leaf]:
    """What a call returned that reaches the output, without masks."""
    return [
        leaf
        for leaf in call.leaves
        if leaf.node is not None and graph.between[leaf.node] and not graph.auxiliary(leaf.node)
    ]


def judge(
    graph: Graph, plans: Mapping[str, MaskPlan | str], values: Mapping[Place, Any]
) -> tuple[dict[Place, Rule], dict[str, str]]:
    """How masks are united at every place, and which cuts are lost because that cannot be told."""
    carried = {(e.key, e.path): e for e in graph.entries if e.node in graph.carried}
    pads = _pads(graph)
    rules: dict[Place, Rule] = {}
    reasons = {key: plan for key, plan in plans.items() if isinstance(plan, str)}
    for key, plan in plans.items():
        for place in plan.places if isinstance(plan, MaskPlan) else ():
            value = values.get(place)
            entry = carried.get(place)
            found = _rule(value, pads.get(graph.carried[entry.node]) if entry else None) if value is not None else None
            if found is None and place not in rules:
                reasons[key] = (
                    f"what {place[0] or 'the model'!r} is given is computed from the masks in a way that their union "
                    "does not follow (weights, or other rows than the examples'), so two of them cannot be united."
                )
            elif found is not None:
                rules[place] = found
    return rules, reasons


def _pads(graph: Graph) -> dict[int, float]:
    """The padding of every input that is compared with it."""
    return {graph.carried[graph.parents[test][0]]: pad for test, pad in graph.tests.items()}
