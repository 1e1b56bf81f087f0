"""Tensors inside what a module takes and returns: tuples, lists, mappings, named tuples and dataclasses of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["Path", "arguments", "at", "batch_size", "map_tensors", "opened", "packed", "paths", "replace_at", "tensors"]

Path = tuple[Any, ...]  # indices, keys and field names that lead to a tensor


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Rebuild ``value`` with ``function`` applied to every tensor in it; the original is left as it was.

    Containers of other kinds, and leaves that are no tensors, come back as they are.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        return [map_tensors(function, item) for item in value]
    if isinstance(value, dict) and type(value) is dict:
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, Mapping):
        # A copy keeps the class and its extra attributes (the outputs of Hugging Face models are such mappings).
        rebuilt: Any = copy.copy(value)
        for key, item in value.items():
            rebuilt[key] = map_tensors(function, item)
        return rebuilt
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        rebuilt = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(rebuilt, field.name, map_tensors(function, getattr(value, field.name)))
        return rebuilt
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in ``value``, in the order in which :func:`map_tensors` visits them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))


def paths(value: Any, prefix: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor in tuples, lists and mappings, with the way to it."""
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from paths(item, (*prefix, i))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from paths(item, (*prefix, key))


def at(value: Any, path: Path) -> Any:
    """What lies at ``path`` of nested tuples, lists and mappings; None where the way ends before."""
    for step in path:
        if isinstance(value, (tuple, list)):
            value = value[step] if isinstance(step, int) and step < len(value) else None
        else:
            value = value.get(step) if isinstance(value, Mapping) else None
    return value


def replace_at(value: Any, path: Path, new: Any) -> Any:
    """``value`` with another thing at ``path``; the original is left as it was."""
    if not path:
        return new
    step, rest = path[0], path[1:]
    inner = replace_at(value[step], rest, new)
    if isinstance(value, tuple):
        items = [*value[:step], inner, *value[step + 1 :]]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    rebuilt = {**value} if type(value) is dict else copy.copy(value)  # torch.compile cannot follow copy of a dict
    rebuilt[step] = inner
    return rebuilt


def arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called with x: positional arguments, keyword arguments, or one argument."""
    if isinstance(x, Tensor):
        return (x,), {}
    if isinstance(x, (tuple, list)):
        return tuple(x), {}
    if _holds_graph(x):
        return (x,), {}
    if hasattr(x, "keys"):
        return (), dict(x)
    return (x,), {}


def _holds_graph(value: Any) -> bool:
    """Whether this is a graph, or a batch of them, of PyTorch Geometric, which is not imported to find out."""
    return any(kind.__name__ == "BaseData" for kind in type(value).__mro__)


def opened(x: Any) -> Any:
    """The tensors of a graph of PyTorch Geometric by name, states of nodes first, targets last; all else as it is."""
    if not _holds_graph(x):
        return x
    content = x.to_dict()
    return {key: content[key] for key in sorted(content, key=lambda key: (key in ("y", "_global_store"), key != "x"))}


def packed(value: Any) -> bool:
    """Whether this is what a recurrent layer returns for packed sequences."""
    return any(isinstance(v, PackedSequence) for v in (value if type(value) in (tuple, list) else (value,)))


def batch_size(value: Any) -> int | None:
    """Rows of the first tensor that has a first dimension; None where there is none."""
    return next((t.shape[0] for t in tensors(opened(value)) if t.dim()), None)
