"""Rows that read each other: where mixing would leave the labels of others out.

Behind a cut point every row of the output has to depend on its own row of the mixed state. Where it reads others as
well (messages along the edges of a graph, attention over nodes), it depends on their mixtures, whose labels the mixed
target does not hold. Two things tell:

* The data flow. An operator that addresses the rows of dimension 0 by an index or a sparse matrix moves them, whatever
  this batch's edges are, be there none. In a graph network that decides.
* A probe, for what moves rows without an index (a dense adjacency, attention, a sum over rows): some rows of the state
  become NaN, and no other row of the output may. Unlike a small change, NaN is not hidden by weights that are zero at
  the start, for 0 · NaN is NaN: it follows the data flow, row by row. The rows are a random half, and then the others;
  what moves rows without an index moves all of them, so that some cross over. An ordinary network is probed only if an
  operator that could move rows lies on its data flow.

The statistics of batch norm are no exchange: a network that has to read them in evaluation (``track_running_stats``
off) is the same network as one that keeps them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from manifold_mixup.dataflow import Keys, named
from manifold_mixup.structure import map_tensors, tensors

__all__ = ["first_without", "probe"]


class _BatchNorm(TorchFunctionMode):
    """Batch statistics that a few NaN do not reach: those of the other rows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.batch_norm, torch.batch_norm) and (args[5] if len(args) > 5 else kwargs.get("training")):
            return func(args[0].nan_to_num(), *args[1:], **kwargs) + 0 * args[0]
        return func(*args, **kwargs)


def _taint(value: Any, chosen: Tensor) -> Any:
    """NaN in the chosen rows of every floating tensor that has as many."""

    def fill(tensor: Tensor) -> Tensor:
        if not _counts(tensor, len(chosen)):
            return tensor
        return tensor.masked_fill(chosen.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1)), torch.nan)

    return map_tensors(fill, value)


def _counts(tensor: Tensor, rows: int) -> bool:
    plain = tensor.layout == torch.strided and tensor.is_floating_point()
    return plain and tensor.dim() > 0 and tensor.shape[0] == rows


def _filled(value: Any, chosen: Tensor) -> bool:
    """Whether all numbers of the chosen rows are NaN, and none of the others is."""
    found = [t for t in tensors(value) if _counts(t, len(chosen))]
    nan = [t.isnan().flatten(1) if t.dim() > 1 else t.isnan().unsqueeze(1) for t in found]
    rows = chosen.to(found[0].device) if found else chosen
    return bool(found) and all(bool(n[rows].all()) and not bool(n[~rows].any()) for n in nan)


def _leaks(output: Sequence[Tensor], plain: Sequence[Tensor], chosen: Tensor) -> bool:
    """Whether NaN arrived in other rows of the output, where it was none before."""
    return any(
        bool((one.isnan() & ~other.isnan())[~chosen.to(one.device)].any())
        for one, other in zip(output, plain, strict=True)
        if _counts(one, len(chosen)) and one.shape == other.shape
    )


def probe(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    key: str,
    rows: int,
    plain: Sequence[Tensor],
    others: Collection[str],
) -> set[str] | None:
    """Whether the rows of the output read no other rows of the state at ``key``.

    Args:
        model: called as it is: modes, grad and random state are the caller's business.
        args: positional inputs.
        kwargs: the same by name.
        key: the module call, or "input".
        rows: of the state there.
        plain: the tensors of the model's output without NaN.
        others: later calls, of which the same may be shown on the way.

    Returns:
        None if they do; otherwise those of ``others`` for which it was shown as well.
    """
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))
    shown = set(others)
    for chosen in (order < (rows + 1) // 2, order >= (rows + 1) // 2):
        output, seen = _tainted(model, args, kwargs, key, chosen, others)
        if _leaks(output, plain, chosen):
            return None
        shown &= seen
    return shown


def _tainted(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    key: str,
    chosen: Tensor,
    others: Collection[str],
) -> tuple[list[Tensor], set[str]]:
    """One forward with NaN at ``key``: its output, and the later calls whose chosen rows, and no others, are NaN."""
    seen: set[str] = set()
    keys = Keys()

    def leave(name: str, module: nn.Module, _: Any, output: Any) -> Any:
        call = keys.next(name)
        if call == key:
            return _taint(output, chosen)
        if call in others and _filled(output, chosen):
            seen.add(call)
        return None

    wanted = {call.partition("#")[0] for call in (key, *others)}
    handles = [
        m.register_forward_hook(functools.partial(leave, name)) for m, name in named(model).items() if name in wanted
    ]
    try:
        if key == "input":
            args, kwargs = _taint((args, kwargs), chosen)
        with _BatchNorm():
            return list(tensors(model(*args, **kwargs))), seen
    finally:
        for handle in handles:
            handle.remove()


def first_without(keys: Sequence[str], shows: Callable[[str], set[str] | None]) -> set[str]:
    """Those of the keys, in the order of the forward, behind which no rows read each other.

    Rows that do so behind a place do so behind every place before it, so the last of these is searched by halving.
    Whatever is accepted has been shown, by a probe of its own or on the way of one that began before.
    """
    sure: set[str] = set()
    low, high = 0, len(keys)
    while low < high:
        middle = 0 if (low, high) == (0, len(keys)) else (low + high) // 2  # mostly the first will do
        shown = shows(keys[middle])
        if shown is None:
            low = middle + 1
        else:
            high, sure = middle, sure | shown | {keys[middle]}
    return {key for key in keys[high:] if key in sure or shows(key) is not None}
