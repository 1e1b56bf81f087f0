"""Structures of tensors: tuples, lists, named tuples and mappings, nested at will."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from manifold_mixup.errors import BatchMismatch

__all__ = ["check_pair", "leaves_of", "map_leaves", "summary"]


def map_leaves(fn: Callable[[Any], Any], tree: Any) -> Any:
    """``fn`` on every leaf of a structure of tuples, lists and mappings, which keeps its types."""
    if isinstance(tree, tuple | list):
        entries = [map_leaves(fn, entry) for entry in tree]
        return type(tree)(*entries) if hasattr(tree, "_fields") else type(tree)(entries)
    if isinstance(tree, Mapping):
        new: Any = copy.copy(tree) if isinstance(tree, MutableMapping) else dict(tree)
        for key in tree:
            new[key] = map_leaves(fn, tree[key])
        return new
    return fn(tree)


def leaves_of(tree: Any) -> list[Any]:
    leaves: list[Any] = []
    map_leaves(leaves.append, tree)
    return leaves


def check_pair(y: Any, y_partner: Any) -> int:
    """The number of rows."""
    one, other = leaves_of(y), leaves_of(y_partner)
    for leaf in one + other:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"Targets are tensors, or tuples, lists and mappings of tensors, not {type(leaf).__name__}."
            )
    if not one:
        raise TypeError("The targets hold no tensor.")
    if map_leaves(lambda _: None, y) != map_leaves(lambda _: None, y_partner):
        raise TypeError("The targets and their partners' targets differ in structure.")
    for a, b in zip(one, other, strict=True):
        if a.shape != b.shape or a.shape[:1] != one[0].shape[:1] or not a.dim():
            raise BatchMismatch(
                "The targets, their partners' and all entries need one batch dimension, the first: got shapes "
                f"{[tuple(t.shape) for t in one]} and {[tuple(t.shape) for t in other]}."
            )
    return len(one[0])


def summary(tree: Any) -> str:
    shapes = map_leaves(lambda t: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}", tree)
    return str(shapes).replace("'", "") if not isinstance(tree, Mapping) else f"{dict(shapes)}"
