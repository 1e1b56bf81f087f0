"""The forwards that discovery makes: on two rows of the batch and on three, or on all where rows are nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manifold_mixup.dataflow import Shapes, record, shapes_by_call
from manifold_mixup.errors import BatchMismatch
from manifold_mixup.graph import Call, Graph, Leaf
from manifold_mixup.masks import MaskPlan, features, find_masks, mask_plans, padding_values, probed, tested
from manifold_mixup.structure import at, map_tensors, opened

__all__ = ["ROWS", "Look", "is_graph_network", "look_at"]

ROWS = 2  # the recorded forward; a second one with one row more shows which dimensions are the batch


def _rows(value: Any, size: int, rows: int) -> Any:
    """The first ``rows`` examples of a batch, the first one repeated where there are too few."""
    index = torch.arange(rows).sub_(max(rows - size, 0)).clamp_(min=0)

    def take(tensor: Tensor) -> Tensor:
        if tensor.dim() and tensor.shape[0] == size:
            return tensor.detach()[index.to(tensor.device)]  # keeps the memory format, as index_select does not
        return tensor

    return map_tensors(take, value)


@dataclass
class Look:
    """What forwards of a model showed: one recorded, and one on a row more where rows can be cut out."""

    args: tuple[Any, ...]  # of the forward that was recorded
    kwargs: dict[str, Any]
    rows: int
    graph: Graph
    plans: dict[str, MaskPlan | str]
    grown: Shapes | None  # None: rows cannot be cut out, the forward is that of the whole batch
    returned: Collection[int] = ()  # of the whole batch: numbers of rows of the outputs

    def per_example(self, call: Call) -> tuple[bool, ...]:
        """Which tensors are floating and have the batch as dimension 0: it grows with the batch and no other does."""
        same = [leaf.shape for leaf in call.leaves]
        grown = same if self.grown is None else self.grown.by_call.get(call.key, [])
        if len(grown) != len(call.leaves):
            return (False,) * len(call.leaves)
        rows, more = self.rows_of(features(self.graph, call)), 0 if self.grown is None else 1
        if rows is None:
            return (False,) * len(call.leaves)
        return tuple(
            leaf.floating
            and leaf.node not in self.graph.masks
            and leaf.shape[:1] == (rows,)
            and shape == (rows + more, *leaf.shape[1:])
            for leaf, shape in zip(call.leaves, grown, strict=True)
        )

    def rows_of(self, leaves: Sequence[Leaf]) -> int | None:
        """How many rows the tensors of a cut have; None where they are not those of an output."""
        if self.grown is not None:
            return self.rows
        sizes = {leaf.shape[:1] for leaf in leaves}
        rows = next(iter(sizes)) if len(sizes) == 1 else ()
        return rows[0] if rows and (rows[0] in self.returned or not self.returned) else None

    def has_rows(self, leaf: Leaf) -> bool:
        """Whether this output has a row for every example."""
        if self.grown is not None:
            return leaf.shape[:1] == (self.rows,)
        return bool(leaf.shape) and self.rows_of([leaf]) is not None

    def check_labels(self, model: nn.Module, labels: int | None) -> None:
        """Refuse targets that are neither those of the nodes nor those of the graphs; count on those that are given."""
        if labels is None or self.grown is not None:
            return
        if self.returned and labels not in self.returned:
            rows = " and ".join(map(str, sorted(self.returned)))
            raise BatchMismatch(
                f"x has {self.rows} rows and {type(model).__name__} returns {rows}, but the targets have {labels}. "
                "Give one target for every row of what it returns: of every graph, or of every node."
            )
        self.returned = {labels}

    def check_outputs(self, model: nn.Module) -> None:
        """Refuse a model in whose outputs no dimension is the batch: what was taken for examples are none."""
        if self.grown is None:
            return
        sizes = [(leaf.shape, shape) for leaf, shape in zip(self.graph.outputs, self.grown.by_call[""], strict=True)]
        if any(one for one, _ in sizes) and all(one == more for one, more in sizes):
            raise BatchMismatch(
                f"No dimension of what {type(model).__name__} returns (shapes {[one for one, _ in sizes]}) follows the "
                "number of rows of its inputs, so these are no examples. The batch has to be dimension 0: "
                "batch_first=True in recurrent layers, or a wrapper that transposes."
            )


def look_at(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], size: int, labels: int) -> Look:
    """Run the model as far as it takes to tell where it may be mixed.

    Args:
        model: called as it is: modes, grad and random state are the caller's business.
        args: positional inputs.
        kwargs: the same by name.
        size: rows of the inputs.
        labels: rows of the targets.

    Raises:
        Exception: what the forward raised.
    """
    if labels != size or is_graph_network(model) or _hold_graphs(args, kwargs):
        return _look_at_all(model, args, kwargs, size)
    try:
        return _look_at_two(model, args, kwargs, size)
    except Exception:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            look = _look_at_all(model, args, kwargs, size)
            if look.graph.exchanges_after(look.graph.sources):
                return look  # rows that read each other by number: two of them alone lack the others
        raise


def _look_at_two(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> Look:
    pads = padding_values(model)
    masks = find_masks(model, args, kwargs, size)
    two = probed((_rows(args, size, ROWS), _rows(kwargs, size, ROWS)), masks)
    graph = record(model, two[0], two[1], ROWS, [at(two, path) for path in masks], pads)
    plans = mask_plans(graph, masks)
    three = probed((_rows(args, size, ROWS + 1), _rows(kwargs, size, ROWS + 1)), masks, list(tested(graph)))
    watch = {place for plan in plans.values() if isinstance(plan, MaskPlan) for place in plan.places}
    grown = shapes_by_call(model, three[0], three[1], {"", *plans}, watch)
    return Look(two[0], two[1], ROWS, graph, plans, grown)


def _look_at_all(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> Look:
    graph = record(model, args, kwargs, size, (), padding_values(model), everything=True)
    returned = {leaf.shape[0] for leaf in graph.outputs if leaf.shape}
    if size in returned and not _hold_graphs(args, kwargs):
        # What has other rows (edges) is shared by all. Where rows are joined, any input may reach past the joint.
        graph.keep_sources(returned)
    return Look(args, kwargs, size, graph, mask_plans(graph, ()), None, returned)


def _hold_graphs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(opened(value) is not value for value in (*args, *kwargs.values()))


def is_graph_network(model: nn.Module) -> bool:
    """Whether the rows are nodes: some of them, taken alone, would leave the edges without ends."""
    return any(kind.__name__ == "MessagePassing" for module in model.modules() for kind in type(module).__mro__)
