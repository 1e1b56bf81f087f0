"""A forward pass as a graph of tensors: who was computed from whom, and what every module call returned.

Nodes are numbered in the order of their creation, so every edge points forward and a cut can be read off the numbering:
on the part of the graph that lies between inputs and outputs, a node is on every path exactly if no edge jumps over it.
(If one does, follow it: the path before it has smaller numbers, the path after it larger ones.) A module that returns
several tensors makes one block of consecutive nodes, and the same holds for the block.

Masks (which positions of an example are padding) are followed apart from the features: a node is a *mask* if nothing
but masks went into it. Where a mask, or the token ids that it is read off, enters a module call, an alias of its own
stands for it, since that is where another mask can be put in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from manifold_mixup.exchange import Exchange
from manifold_mixup.structure import Path

__all__ = ["Call", "Entry", "Graph", "Leaf"]


@dataclass(frozen=True)
class Leaf:
    """One tensor that a module call returned: its node (None if no input went into it), its shape, its kind."""

    node: int | None
    shape: tuple[int, ...]
    floating: bool


@dataclass
class Call:
    """One call of a module: ``key`` is its name, with ``#2`` and so on from the second call on.

    Its nodes, and those of the calls inside it, are numbered from ``start`` on, and what it returned ends before
    ``end``.
    """

    key: str
    leaves: list[Leaf]
    cost_before: float
    cost_after: float
    start: int = 0
    end: int = 0
    packed: bool = False  # it returned a PackedSequence


@dataclass(frozen=True, eq=False)
class Entry:
    """A mask, or integers that came in as an input, given to a module call at ``path`` of its (args, kwargs).

    ``key`` names the call as it begins (a module that calls itself ends in another order).
    """

    node: int
    key: str
    call: Call
    path: Path
    shape: tuple[int, ...]


@dataclass
class Graph:
    """The recorded forward. ``parents[i]`` are the nodes that node i was computed from."""

    parents: list[tuple[int, ...]] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    what: list[str] = field(default_factory=list)
    sources: dict[int, str] = field(default_factory=dict)
    source_leaves: list[Leaf] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    outputs: list[Leaf] = field(default_factory=list)
    masks: set[int] = field(default_factory=set)  # nodes that nothing but masks went into
    carried: dict[int, int] = field(default_factory=dict)  # integers as they came in: node -> its source
    tests: dict[int, float] = field(default_factory=dict)  # comparisons of such integers with a number (padding)
    entries: list[Entry] = field(default_factory=list)
    exchanges: dict[int, Exchange] = field(default_factory=dict)  # nodes of operators that may move rows
    results: list[Tensor] = field(default_factory=list)  # the outputs themselves
    cost: float = 0.0
    operations: int = 0

    def add(self, parents: Iterable[int], where: str, what: str) -> int:
        """Append a node and return its number."""
        parents = tuple(parents)
        if self.masks and parents and all(p in self.masks for p in parents):
            self.masks.add(len(self.parents))
        self.parents.append(parents)
        self.where.append(where)
        self.what.append(what)
        return len(self.parents) - 1

    @functools.cached_property
    def between(self) -> list[bool]:
        """Which nodes lie on a path from an input to the output. The last node is the output."""
        size = len(self.parents)
        reached, used = [False] * size, [False] * size
        for node, parents in enumerate(self.parents):
            reached[node] = node in self.sources or any(reached[p] for p in parents)
        used[-1] = True
        for node in range(size - 1, -1, -1):
            if used[node]:
                for parent in self.parents[node]:
                    used[parent] = True
        return [a and b for a, b in zip(reached, used, strict=True)]

    @functools.cached_property
    def _jumps(self) -> list[int]:
        """How many edges of features between inputs and output jump over each node."""
        change = [0] * (len(self.parents) + 1)
        for start, end in self.edges():
            if not self.auxiliary(start):
                change[start + 1] += 1
                change[end] -= 1
        total, jumps = 0, []
        for step in change[:-1]:
            total += step
            jumps.append(total)
        return jumps

    def edges(self) -> Iterable[tuple[int, int]]:
        """All edges on paths from the inputs to the output."""
        for end, parents in enumerate(self.parents):
            if self.between[end]:
                for start in parents:
                    if self.between[start]:
                        yield start, end

    @functools.cached_property
    def _children(self) -> dict[int, list[int]]:
        children: dict[int, list[int]] = {}
        for start, end in self.edges():
            children.setdefault(start, []).append(end)
        return children

    def exchanges_after(self, block: Iterable[int]) -> list[int]:
        """The operators between the block and the output that may move what is in it from row to row, in order."""
        if not self.exchanges:
            return []
        seen: set[int] = set()
        ahead = list(block)
        while ahead:
            fresh = [child for child in self._children.get(ahead.pop(), ()) if child not in seen]
            seen.update(fresh)
            ahead += fresh
        return sorted(seen & self.exchanges.keys())

    def keep_sources(self, rows: Collection[int]) -> None:
        """Take inputs with other numbers of rows for constants: they are the same for every row."""
        kept = [leaf for leaf in self.source_leaves if leaf.shape[0] in rows]
        nodes = {leaf.node for leaf in kept}
        self.sources = {node: label for node, label in self.sources.items() if node in nodes}
        self.carried = {node: source for node, source in self.carried.items() if source in nodes}
        self.source_leaves = kept

    def auxiliary(self, node: int) -> bool:
        """Whether the node is a mask, or holds integers as they came in: it may reach past a cut if it is united."""
        return node in self.masks or node in self.carried

    def separates(self, block: Sequence[int]) -> bool:
        """Whether every path of features from the inputs to the output passes through the block of siblings.

        The block is what one call returned: consecutive nodes, but for masks between them.
        """
        landing = sum(
            self.between[p] and not self.auxiliary(p) for node in block[1:] for p in self.parents[node] if p < block[0]
        )
        return self._jumps[block[0]] == landing

    def over(self, block: Sequence[int]) -> list[tuple[int, int]]:
        """All edges (start, end) from before what comes after the block that do not start in it."""
        inside = set(block)
        return [(a, b) for a, b in self.edges() if a <= block[-1] < b and a not in inside]

    def bypass(self, block: Sequence[int]) -> tuple[int, int]:
        """The nearest edge (start, end) of features that jumps over the block."""
        over = (edge for edge in self.over(block) if not self.auxiliary(edge[0]))
        return max(over, key=lambda edge: (edge[0], -edge[1]))
