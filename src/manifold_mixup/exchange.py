"""Operators that may move information from one row of dimension 0 to another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Exchange", "Rule", "exchange_rule"]

# "index": rows are addressed one by one, by an index or a sparse matrix. "rows": all of them may be read.
Exchange = Literal["index", "rows"]
Reads = Callable[[Tensor], Sequence[str]]  # the operators that a tensor comes from; none if it is a constant
Rule = Callable[[Sequence[Any], Reads, int], Exchange | None]

# Operators that address rows: the arguments whose rows they read or write. The second argument is the dimension ...
_BY_DIMENSION = {
    **dict.fromkeys(("gather", "index_select"), (0,)),
    **{
        name + ending: (0, 3)
        for name in ("index_add", "index_copy", "index_reduce", "scatter", "scatter_add", "scatter_reduce")
        for ending in ("", "_")
    },
}
# ... or a list of indices, one for each dimension.
_BY_LIST = {
    **dict.fromkeys(("_unsafe_index", "index"), (0,)),
    **dict.fromkeys(("_index_put_impl_", "_unsafe_index_put", "index_put", "index_put_"), (0, 2)),
}
_BY_INDEX = {"embedding", "embedding_bag", "segment_reduce", "take"}
_GRAPH_LIBRARIES = {"pyg", "torch_scatter", "torch_sparse"}
_PRODUCTS = {"bmm": 0, "mm": 0, "_sparse_mm": 0, "addmm": 1, "baddbmm": 1, "_sparse_addmm": 1}  # the first factor
_SOFTMAX = {"_log_softmax", "_safe_softmax", "_softmax"}
_ALONG = {  # a dimension is read as a whole
    *("amax", "amin", "cummax", "cummin", "cumprod", "cumsum", "flip", "linalg_vector_norm", "logcumsumexp"),
    *(
        "logsumexp",
        "max",
        "mean",
        "median",
        "min",
        "norm",
        "prod",
        "roll",
        "sort",
        "std",
        "sum",
        "topk",
        "var",
        "var_mean",
    ),
}


@functools.cache
def exchange_rule(function: Any) -> Rule | None:
    """What tells how a call of this operator moves information between rows; None if it never does.

    The rule takes the arguments, what tells how a tensor depends on the inputs, and the number of rows.
    """
    name = function.overloadpacket.__name__
    if name in _BY_DIMENSION:
        return functools.partial(_indexed, _BY_DIMENSION[name])
    if name in _BY_LIST:
        return functools.partial(_listed, _BY_LIST[name])
    if name in _BY_INDEX or function.namespace in _GRAPH_LIBRARIES:
        return lambda args, reads, rows: "index" if isinstance(args[0], Tensor) and reads(args[0]) else None
    if name in _PRODUCTS:
        return functools.partial(_product, _PRODUCTS[name])
    if name.startswith("_scaled_dot_product"):
        return lambda args, reads, rows: "rows" if args[1].shape[-2] == rows else None
    if name == "convolution":  # of a single sequence, whose positions are the rows
        return lambda args, reads, rows: "rows" if args[0].shape[0] == 1 and rows in args[0].shape[1:] else None
    if name in _SOFTMAX or name in _ALONG:
        given = enumerate(function._schema.arguments)
        place, default = next(((i, a.default_value) for i, a in given if a.name in ("dim", "dims")), (99, None))
        return functools.partial(_along, place, default, name in _SOFTMAX)
    return None


def _indexed(places: Sequence[int], args: Sequence[Any], reads: Reads, rows: int) -> Exchange | None:
    if args[0].dim() == 0 or args[1] % args[0].dim() != 0:
        return None
    moved = (args[place] for place in places if place < len(args))
    return "index" if any(isinstance(value, Tensor) and reads(value) for value in moved) else None


def _listed(places: Sequence[int], args: Sequence[Any], reads: Reads, rows: int) -> Exchange | None:
    index = args[1][0] if args[1] else None
    if index is None or not any(place < len(args) and reads(args[place]) for place in places):
        return None
    size = args[0].shape[0]
    if not reads(index) and index.shape == (size,) and index.dtype != torch.bool and not index.is_meta:
        # h[arange(n), lengths] takes something from each row.
        return None if torch.equal(index, torch.arange(size, device=index.device, dtype=index.dtype)) else "index"
    return "index"


def _product(first: int, args: Sequence[Any], reads: Reads, rows: int) -> Exchange | None:
    """The second factor is summed over its rows."""
    left, right = args[first], args[first + 1]
    if not reads(right):
        return None
    if left.layout != torch.strided:
        return "index"
    return "rows" if right.shape[-2] == rows else None


def _along(place: int, default: Any, softmax: bool, args: Sequence[Any], reads: Reads, rows: int) -> Exchange | None:
    shape = args[0].shape if isinstance(args[0], Tensor) else ()
    dims = args[place] if place < len(args) else default
    if not shape:
        return None
    read = {dim % len(shape) for dim in ([dims] if isinstance(dims, int) else dims or range(len(shape)))}
    if softmax and len(shape) > 1 and len(shape) - 1 in read:  # scores of all rows for all rows
        return "rows" if shape[-1] == shape[-2] == rows else None
    if 0 not in read or shape[0] != rows:
        return None
    stacked = shape[1:2] == (rows,) and all(name.startswith("stack") for name in reads(args[0]))
    return None if stacked else "rows"  # a mean of several predictions
