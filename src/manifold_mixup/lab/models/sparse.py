"""Products of a constant sparse matrix with a dense one, whose backward costs as much as their forward.

A matrix is kept row by row. Such a product is a sum of weighted rows for every row of the matrix, which is what
``embedding_bag`` computes. Its own backward, and that of ``torch.sparse.mm``, sort or transpose the matrix anew each
time, which takes ten times as long as the product on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manifold_mixup.lab.errors import UsageError

__all__ = ["Dropout", "FeatureLinear", "SparseMatrix", "product"]

_LEVELS = 2**16  # of the random numbers that dropout compares its rate with


def _weighted_sums(dense: Tensor, start: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Row i is the sum of ``values[k] * dense[index[k]]`` over k from ``start[i]`` to ``start[i + 1] - 1``."""
    return F.embedding_bag(
        index, dense, start, mode="sum", per_sample_weights=values.to(dense.dtype), include_last_offset=True
    )


class _Product(torch.autograd.Function):
    """The product, differentiable in the dense matrix alone."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, rows: tuple[Tensor, ...], columns: tuple[Tensor, ...]) -> Tensor:
        # not save_for_backward, which guards against changes in place: nothing ever changes these
        ctx.columns, ctx.values = columns, rows[2]
        return _weighted_sums(dense.contiguous(), *rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        start, index, *order = ctx.columns
        values = ctx.values[order[0]] if order else ctx.values
        return _weighted_sums(gradient.contiguous(), start, index, values), None, None


def product(dense: Tensor, rows: tuple[Tensor, Tensor, Tensor], columns: tuple[Tensor, ...]) -> Tensor:
    """A constant sparse matrix times a dense one.

    Args:
        dense: ``(m, k)``.
        rows: The sparse matrix ``(n, m)`` row by row: where each row starts ``(n + 1,)``, the columns of its entries
            and the entries, ``(nnz,)``.
        columns: The same column by column: where each column starts ``(m + 1,)``, the rows of its entries ``(nnz,)``,
            and which entry of ``rows`` each one is ``(nnz,)``. Without the last one they are in the same order, as
            for a symmetric matrix.

    Returns:
        ``(n, k)``, with a gradient for ``dense`` alone.
    """
    result: Tensor = _Product.apply(dense, rows, columns)  # type: ignore[no-untyped-call]
    return result


class SparseMatrix(nn.Module):
    """A sparse matrix that moves between devices with the module that holds it and is no part of its state.

    Args:
        matrix: A coalesced sparse COO tensor, ``(n, m)``.

    Attributes:
        start: Where each row starts, ``(n + 1,)``.
        index: The column of every entry, row by row, ``(nnz,)``.
        values: The entries, ``(nnz,)``.
    """

    start: Tensor
    index: Tensor
    values: Tensor
    _column_start: Tensor
    _column_index: Tensor
    _order: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        row, column = matrix.indices()
        order = torch.argsort(column, stable=True)
        parts = {
            "start": _starts(row, matrix.shape[0]),
            "index": column,
            "values": matrix.values(),
            "_column_start": _starts(column, matrix.shape[1]),
            "_column_index": row[order],
            "_order": order,
        }
        for name, part in parts.items():
            self.register_buffer(name, part.contiguous(), persistent=False)

    def forward(self, dense: Tensor, values: Tensor | None = None) -> Tensor:
        """The product with a dense matrix.

        Args:
            dense: ``(m, k)``.
            values: Stand for the matrix's own entries, ``(nnz,)``.

        Returns:
            ``(n, k)``, with a gradient for ``dense`` alone.
        """
        rows = (self.start, self.index, self.values if values is None else values)
        return product(dense, rows, (self._column_start, self._column_index, self._order))

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Some rows, each as often as it is named: where each one starts, the columns of its entries, the entries."""
        first = self.start[rows]
        count = self.start[rows + 1] - first
        start = F.pad(count.cumsum(0), (1, 0))
        entries = (first - start[:-1]).repeat_interleave(count)
        entries = entries + torch.arange(len(entries), device=entries.device)
        return start, self.index[entries], self.values[entries]


def _starts(sorted_by: Tensor, size: int) -> Tensor:
    """Where each of ``size`` groups starts, once the entries are sorted by the number of their group."""
    return F.pad(torch.bincount(sorted_by, minlength=size).cumsum(0), (1, 0))


class Dropout(nn.Module):
    """Dropout whose mask is made of 16 random bits per number: on a CPU it takes a tenth of the time of torch's own.

    The rate is rounded to a multiple of 2^-16, and what is kept is scaled by just that rate, so the mean is exact.

    Args:
        p: Share of the numbers that are set to zero; 0 draws nothing.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def extra_repr(self) -> str:
        """The share, as torch's own modules show it."""
        return f"p={self.p}"

    def forward(self, x: Tensor) -> Tensor:
        """Set numbers to zero and scale the others, in training; else ``x`` itself."""
        if not self.training or self.p == 0:
            return x
        dropped = min(round(self.p * _LEVELS), _LEVELS - 1)
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
        drawn = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform from -2^15 to 2^15 - 1
        return drawn.to(x.dtype).ge_(dropped - _LEVELS // 2).mul_(_LEVELS / (_LEVELS - dropped)).mul(x)


class FeatureLinear(nn.Module):
    """The linear map of a first layer, without bias, which holds the sparse features of all nodes itself.

    Args:
        weight: ``(outputs, features)``, the layer's own.

    Attributes:
        features: ``(nodes, features)``; None before the network is given a graph.
    """

    features: SparseMatrix | None

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.features = None

    def matrix(self) -> SparseMatrix:
        """The features.

        Raises:
            UsageError: There are none yet.
        """
        if self.features is None:
            raise UsageError("a network on a graph has to be given the graph before it is called: model.place(graph)")
        return self.features

    def forward(self, entries: Tensor) -> Tensor:
        """The map of all nodes.

        Args:
            entries: Those of the feature matrix, ``(nnz, 1)``, perhaps with dropout. Zeros stay zero under dropout,
                so dropping entries is dropout of the whole matrix.

        Returns:
            ``(nodes, outputs)``.
        """
        result: Tensor = self.matrix()(self.weight.t(), entries.flatten())
        return result

    def rows(self, nodes: Tensor, dropout: Callable[[Tensor], Tensor]) -> Tensor:
        """The map of some nodes, each with a dropout mask of its own, also where one is named twice.

        Args:
            nodes: Their numbers, ``(n,)``.
            dropout: Is given the entries of their features.

        Returns:
            ``(n, outputs)``.
        """
        start, index, entries = self.matrix().take(nodes)
        return _weighted_sums(self.weight.t(), start, index, dropout(entries))
