"""One forward pass, written down as a graph of tensors: who was computed from whom, and inside which module.

Nodes are numbered in the order of their creation, so every edge points forward and a cut can be read off the numbering:
on the part of the graph that lies between inputs and outputs, a node is on every path exactly if no edge jumps over it.
(If one does, follow it: the path before it has smaller numbers, the path after it larger ones.) A module that returns
several tensors makes one block of consecutive nodes, and the same holds for the block.

Tensors are told apart as Python objects, for a skip connection may hold the very tensor that a module was given; what
is written in place is seen by every tensor object that shares the storage and existed before.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from manifold_mixup.structure import map_tensors, tensors

__all__ = ["Call", "Graph", "Leaf", "record", "shapes_by_call"]


@dataclass(frozen=True)
class Leaf:
    """One tensor that a module call returned: its node (None if no input went into it), its shape, its kind."""

    node: int | None
    shape: tuple[int, ...]
    floating: bool


@dataclass
class Call:
    """One call of a module: ``key`` is its name, with ``#2`` and so on from the second call on."""

    key: str
    leaves: list[Leaf]
    cost_before: float
    cost_after: float


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
    cost: float = 0.0
    operations: int = 0

    def add(self, parents: Iterable[int], where: str, what: str) -> int:
        """Append a node and return its number."""
        self.parents.append(tuple(parents))
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
        """How many edges between inputs and output jump over each node."""
        change = [0] * (len(self.parents) + 1)
        for start, end in self.edges():
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

    def separates(self, block: Sequence[int]) -> bool:
        """Whether every path from the inputs to the output passes through the block of consecutive siblings."""
        landing = sum(self.between[p] for node in block[1:] for p in self.parents[node])
        return self._jumps[block[0]] == landing

    def bypass(self, block: Sequence[int]) -> tuple[int, int]:
        """The nearest edge (start, end) that jumps over the block."""
        over = ((a, b) for a, b in self.edges() if a < block[0] and b > block[-1])
        return max(over, key=lambda edge: (edge[0], -edge[1]))


def _rnn_cost(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> float:
    """Recurrent kernels have no entry in torch's counter: two operations for every weight, row and time step."""
    operands = [t for t in tensors([*args, *kwargs.values()]) if t.dim() >= 2]
    rows = operands[0].numel() / max(operands[0].shape[-1], 1)
    return 2.0 * rows * sum(t.numel() for t in operands[1:] if t.dim() == 2)


def _cost(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> float:
    packet = function.overloadpacket
    name = packet.__name__
    if name.startswith(("mkldnn_rnn", "_cudnn_rnn", "miopen_rnn")):
        return _rnn_cost(args, kwargs, out)
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        packet = torch.ops.aten._scaled_dot_product_flash_attention
    count = flop_registry.get(packet)
    return float(count(*args, **kwargs, out_val=out)) if count else 0.0


@functools.cache
def _written(function: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operator writes into."""
    return tuple(
        (i, a.name)
        for i, a in enumerate(function._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    )


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without a storage
        return id(tensor)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator, below autograd, and every module call through the hooks of :func:`record`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = Graph()
        self.scope: list[str] = [""]
        self._nodes: dict[int, int] = {}  # id of a tensor object -> its node
        self._storage_nodes: dict[int, list[int]] = defaultdict(list)
        self._writes: dict[int, list[int]] = defaultdict(list)
        self._alive: list[Tensor] = []  # so that neither ids nor storages are used again
        self.escapes: list[int] = []

    def register(self, tensor: Tensor, node: int) -> None:
        self._nodes[id(tensor)] = node
        self._storage_nodes[_storage(tensor)].append(node)
        self._alive.append(tensor)

    def reads(self, tensor: Tensor) -> list[int]:
        """The nodes that the value of this tensor object depends on at this moment; empty for constants."""
        node = self._nodes.get(id(tensor))
        storage = _storage(tensor)
        if node is None:  # a constant, or an alias made where we could not see it
            return self._storage_nodes.get(storage, [])
        writes = self._writes.get(storage)
        return [node, *writes[bisect_right(writes, node) :]] if writes else [node]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parents = list(dict.fromkeys(n for t in tensors([args, kwargs]) for n in self.reads(t)))
        out = func(*args, **kwargs)
        self.graph.operations += 1
        self.graph.cost += _cost(func, args, kwargs, out)
        if not parents:
            return out
        written = [args[i] if i < len(args) else kwargs.get(name) for i, name in _written(func)]
        changed = list(tensors(written))
        for tensor in changed:
            node = self.graph.add(parents, self.scope[-1], func.__name__)
            storage = _storage(tensor)
            self._writes[storage].append(node)
            self._storage_nodes[storage].append(node)
            self._alive.append(tensor)
        for tensor in tensors(out):
            if not any(tensor is t for t in changed):
                self.register(tensor, self.graph.add(parents, self.scope[-1], func.__name__))
        return out

    def leaves(self, value: Any) -> list[Leaf]:
        return [Leaf(self._nodes.get(id(t)), tuple(t.shape), t.is_floating_point()) for t in tensors(value)]


class _Exits(TorchFunctionMode):
    """Notices values that leave PyTorch, where no graph can follow them.

    A single number (``item()``, an ``if`` on a tensor) steers the program and carries no features: it is let go.
    """

    _ways_out = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__})

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._ways_out:
            parents = [n for t in tensors(args) for n in self.recorder.reads(t)]
            if parents:
                name = getattr(func, "__name__", "numpy")
                self.recorder.escapes.append(self.recorder.graph.add(parents, self.recorder.scope[-1], f"{name}()"))
        return func(*args, **(kwargs or {}))


def _named(model: nn.Module) -> dict[int, str]:
    return {id(module): name for name, module in model.named_modules()}


class _Keys:
    """Names the calls of one forward: ``name``, then ``name#2``, ``name#3`` ..."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)

    def next(self, name: str) -> str:
        self.counts[name] += 1
        return name if self.counts[name] == 1 else f"{name}#{self.counts[name]}"


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Graph:
    """Run ``model(*args, **kwargs)`` once and write down its data flow.

    Args:
        model: called as it is: modes, grad and random state are the caller's business.
        args: positional inputs; tensors with ``rows`` rows are the sources of the graph.
        kwargs: the same by name.
        rows: the batch size.
    """
    recorder, keys, names = _Recorder(), _Keys(), _named(model)
    graph = recorder.graph
    for label, value in [*((f"input {i}" if i else "input", a) for i, a in enumerate(args)), *kwargs.items()]:
        for tensor in tensors(value):
            if tensor.dim() and tensor.shape[0] == rows:
                node = graph.add((), "", "input")
                graph.sources[node] = label
                recorder.register(tensor, node)
                graph.source_leaves.append(Leaf(node, tuple(tensor.shape), tensor.is_floating_point()))
    started: list[float] = []

    def enter(module: nn.Module, _: Any) -> None:
        recorder.scope.append(names[id(module)])
        started.append(graph.cost)

    def leave(module: nn.Module, _: Any, output: Any) -> Any:
        # A fresh alias stands for "what the module returned": mixing replaces exactly what is computed from it.
        output = map_tensors(Tensor.detach, output)
        recorder.scope.pop()
        name = names[id(module)]
        graph.calls.append(Call(keys.next(name), recorder.leaves(output), started.pop(), graph.cost))
        return output

    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    handles = [h for m in modules for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        with recorder, _Exits(recorder):
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    graph.outputs = recorder.leaves(output)
    ends = dict.fromkeys(n for t in tensors(output) for n in recorder.reads(t))
    graph.add([*ends, *recorder.escapes], "", "output")
    return graph


def shapes_by_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, list[tuple[int, ...]]]:
    """Run ``model(*args, **kwargs)`` once; the shapes of the tensors that every module call returned."""
    keys, names = _Keys(), _named(model)
    shapes: dict[str, list[tuple[int, ...]]] = {}

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        shapes[keys.next(names[id(module)])] = [tuple(t.shape) for t in tensors(output)]

    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    handles = [m.register_forward_hook(leave) for m in modules]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return shapes
