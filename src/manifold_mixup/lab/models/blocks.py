"""The fully connected block that the spiral's network and the MLP are made of."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

__all__ = ["dense", "numbered"]


def dense(inputs: int, outputs: int, *, activation: nn.Module, batch_norm: bool, dropout: float) -> nn.Sequential:
    """Linear, then batch norm, activation and dropout as asked for.

    What is switched off is left out, so that dropout 0 draws no random number and has no cost.
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict(linear=nn.Linear(inputs, outputs))
    if batch_norm:
        parts["norm"] = nn.BatchNorm1d(outputs)
    parts["activation"] = activation
    if dropout > 0:
        parts["dropout"] = nn.Dropout(dropout)
    return nn.Sequential(parts)


def numbered(blocks: list[nn.Sequential], first: int) -> nn.Sequential:
    """The blocks in sequence, named by number from ``first`` on, as the papers count their layers."""
    return nn.Sequential(OrderedDict((str(i), block) for i, block in enumerate(blocks, first)))
