"""One forward pass, recorded as a :class:`Graph` of tensors.

Tensors are told apart as Python objects, for a skip connection may hold the very tensor that a module was given; what
is written in place is seen by every tensor object that shares the storage and existed before.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from manifold_mixup.exchange import exchange_rule
from manifold_mixup.graph import Call, Entry, Graph, Leaf
from manifold_mixup.structure import Path, at, map_tensors, opened, packed, paths, replace_at, tensors

__all__ = ["Keys", "Shapes", "named", "record", "shapes_by_call"]


def _rnn_cost(*args: Any, out_val: Any, **kwargs: Any) -> float:
    """Recurrent kernels have no entry in torch's counter: two operations for every weight, row and time step."""
    operands = [t for t in _flat([*args, *kwargs.values()]) if t.dim() >= 2]
    rows = operands[0].numel() / max(operands[0].shape[-1], 1)
    return 2.0 * rows * sum(t.numel() for t in operands[1:] if t.dim() == 2)


@functools.cache
def _counter(function: Any) -> Callable[..., Any] | None:
    """What counts the operations of an operator, from its arguments and ``out_val``; None if it does not count."""
    packet = function.overloadpacket
    name = packet.__name__
    if name.startswith(("mkldnn_rnn", "_cudnn_rnn", "miopen_rnn")):
        return _rnn_cost
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        packet = torch.ops.aten._scaled_dot_product_flash_attention
    count = flop_registry.get(packet)
    formula = getattr(count, "__wrapped__", None)
    if formula is None or getattr(count, "_get_raw", False):
        return count

    def by_shape(*args: Any, out_val: Any, **kwargs: Any) -> Any:
        # What torch's own wrapper does with a walk through a general tree, which takes ten times as long.
        return formula(*map(_shape, args), out_shape=_shape(out_val), **{k: _shape(v) for k, v in kwargs.items()})

    return by_shape


def _shape(value: Any) -> Any:
    """Every tensor replaced by its shape, as torch's formulas take them."""
    if isinstance(value, Tensor):
        return value.shape
    return type(value)(map(_shape, value)) if type(value) in (tuple, list) else value


@functools.cache
def _written(function: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operator writes into."""
    return tuple(
        (i, a.name)
        for i, a in enumerate(function._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    )


def _flat(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results, which are nested in tuples and lists at most."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _flat(value)


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without a storage
        return id(tensor)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator, below autograd, and every module call through the hooks of :func:`record`."""

    def __init__(self, pads: Collection[float], rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = Graph()
        self.pads = pads
        self.rows = rows
        self.scope: list[str] = [""]
        self._nodes: dict[int, int] = {}  # id of a tensor object -> its node
        self._storage_nodes: dict[int, list[int]] = defaultdict(list)
        self._writes: dict[int, list[int]] = defaultdict(list)
        self._alive: list[Tensor] = []  # so that neither ids nor storages are used again
        self.escapes: list[int] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Do not wrap ``__torch_dispatch__`` for the compiler: the wrapper imports it, which takes a second."""
        return False

    def source(self, tensor: Tensor, label: str, *, mask: bool) -> None:
        """Begin at an input with a row per example."""
        graph = self.graph
        node = graph.add((), "", "input")
        graph.sources[node] = label
        if mask:
            graph.masks.add(node)
        elif not tensor.is_floating_point():
            graph.carried[node] = node
        self.register(tensor, node)
        graph.source_leaves.append(Leaf(node, tuple(tensor.shape), tensor.is_floating_point()))

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
        graph = self.graph
        parents = dict.fromkeys(n for t in _flat((*args, *kwargs.values())) for n in self.reads(t))
        out = func(*args, **kwargs)
        graph.operations += 1
        count = _counter(func)
        if count is not None:
            graph.cost += float(count(*args, **kwargs, out_val=out))
        if not parents:
            return out
        name, scope, first = func.__name__, self.scope[-1], len(graph.parents)
        changed: list[Tensor] = []
        if written := _written(func):
            changed = list(_flat(args[i] if i < len(args) else kwargs.get(key) for i, key in written))
        for tensor in changed:
            node = graph.add(parents, scope, name)
            storage = _storage(tensor)
            self._writes[storage].append(node)
            self._storage_nodes[storage].append(node)
            self._alive.append(tensor)
        for tensor in _flat((out,)):
            if not any(tensor is t for t in changed):
                self.register(tensor, graph.add(parents, scope, name))
        rule = exchange_rule(func)
        exchange = rule and rule(args, lambda tensor: [graph.what[n] for n in self.reads(tensor)], self.rows)
        if exchange:
            graph.exchanges.update(dict.fromkeys(range(first, len(graph.parents)), exchange))
        if graph.carried and len(parents) == 1 and next(iter(parents)) in graph.carried:
            self._padding_test(func, args)
        return out

    def _padding_test(self, func: Any, args: Any) -> None:
        """Token ids that are compared with a number tell which positions are padding: that is a mask."""
        if func.overloadpacket in (torch.ops.aten.ne, torch.ops.aten.eq) and len(args) > 1:
            other = args[1]
            if (not isinstance(other, Tensor) or other.numel() == 1) and float(other) in self.pads:
                node = len(self.graph.parents) - 1
                self.graph.tests[node] = float(other)
                self.graph.masks.add(node)

    def enter(self, key: str, call: Call, args: Any, kwargs: Any) -> Any:
        """Put an alias in the place of every mask, and of integers as they came in, that a module call is given."""
        graph, arguments, found = self.graph, (args, kwargs), []
        for path, tensor in paths(arguments):
            node = self._nodes.get(id(tensor))
            if node is not None and all(map(graph.auxiliary, self.reads(tensor))):
                found.append((path, tensor, node))
        for path, tensor, node in found:
            alias = tensor.detach()  # recorded as an operator: the last node is its
            entry = len(graph.parents) - 1
            if graph.parents[entry] == (node,) and node in graph.carried:
                graph.carried[entry] = graph.carried[node]
            graph.entries.append(Entry(entry, key, call, path, tuple(tensor.shape)))
            arguments = replace_at(arguments, path, alias)
        return arguments if found else None

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


def named(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that hooks can be put on."""
    return {module: name for name, module in model.named_modules() if not isinstance(module, torch.jit.ScriptModule)}


class Keys:
    """Names the calls of one forward: ``name``, then ``name#2``, ``name#3`` ..."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)

    def next(self, name: str) -> str:
        """The key of the call of this module that is next."""
        self.counts[name] += 1
        return name if self.counts[name] == 1 else f"{name}#{self.counts[name]}"


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors with a first dimension, each with what the argument that holds it is called."""
    for label, value in [*((f"input {i}" if i else "input", a) for i, a in enumerate(args)), *kwargs.items()]:
        yield from ((label, tensor) for tensor in tensors(opened(value)) if tensor.dim())


def record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rows: int,
    masks: Sequence[Tensor] = (),
    pads: Collection[float] = (),
    *,
    everything: bool = False,
) -> Graph:
    """Run ``model(*args, **kwargs)`` once and write down its data flow.

    Args:
        model: called as it is: modes, grad and random state are the caller's business.
        args: positional inputs; tensors with ``rows`` rows are the sources of the graph.
        kwargs: the same by name.
        rows: the batch size.
        masks: those of the inputs that are masks.
        pads: token ids that mean padding.
        everything: tensors with other numbers of rows are sources as well.
    """
    recorder, begun, keys, modules = _Recorder(pads, rows), Keys(), Keys(), named(model)
    graph = recorder.graph
    for label, tensor in _inputs(args, kwargs):
        if everything or tensor.shape[0] == rows:
            recorder.source(tensor, label, mask=any(tensor is mask for mask in masks))
    started: list[Call] = []
    auxiliary = bool(graph.masks or graph.carried)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        name = modules[module]
        recorder.scope.append(name)
        started.append(Call("", [], graph.cost, 0.0, len(graph.parents)))
        return recorder.enter(begun.next(name), started[-1], args, kwargs) if auxiliary else None

    def leave(module: nn.Module, _: Any, output: Any) -> Any:
        # A fresh alias stands for "what the module returned": mixing replaces exactly what is computed from it.
        output = map_tensors(Tensor.detach, output)
        recorder.scope.pop()
        call = started.pop()
        call.key = keys.next(modules[module])
        call.packed = packed(output)
        call.leaves, call.cost_after, call.end = recorder.leaves(output), graph.cost, len(graph.parents)
        graph.calls.append(call)
        return output

    handles = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in modules]
    handles += [m.register_forward_hook(leave) for m in modules]
    try:
        with recorder, _Exits(recorder):
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    graph.outputs, graph.results = recorder.leaves(output), list(tensors(output))
    ends = dict.fromkeys(n for t in tensors(output) for n in recorder.reads(t))
    graph.add([*ends, *recorder.escapes], "", "output")
    return graph


@dataclass
class Shapes:
    """The shapes of the tensors that every module call returned, and the arguments that were asked for."""

    by_call: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    arguments: dict[tuple[str, Path], Any] = field(default_factory=dict)


def shapes_by_call(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    of: Collection[str],
    watch: Collection[tuple[str, Path]] = (),
) -> Shapes:
    """Run ``model(*args, **kwargs)`` once: what the calls in ``of`` returned, and what those to watch were given."""
    found, begun, keys = Shapes(), Keys(), Keys()
    wanted: dict[str, list[Path]] = defaultdict(list)
    for key, path in watch:
        wanted[key].append(path)

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        key = begun.next(name)
        for path in wanted.get(key, ()):
            found.arguments[key, path] = at((args, kwargs), path)

    def leave(name: str, module: nn.Module, _: Any, output: Any) -> None:
        found.by_call[keys.next(name)] = [tuple(t.shape) for t in tensors(output)]

    modules = named(model)
    called, given = ({key.partition("#")[0] for key in calls} for calls in (of, wanted))
    handles = [m.register_forward_hook(functools.partial(leave, n)) for m, n in modules.items() if n in called]
    handles += [
        m.register_forward_pre_hook(functools.partial(enter, n), with_kwargs=True)
        for m, n in modules.items()
        if n in given
    ]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found
