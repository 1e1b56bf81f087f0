"""What a network is to the lab."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from manifold_mixup.lab.options import Options

__all__ = ["ModelEntry"]


@dataclass(frozen=True)
class ModelEntry:
    """A registry entry.

    Attributes:
        name: The name in recipes.
        title: One line for people.
        options: What a recipe can set under ``model.options``.
        build: From options, the shape of one example and the number of classes to a network with freshly drawn weights
            (from torch's global generator, which a run seeds).
        hidden: From options to the names of the modules whose outputs are the hidden states, first to last.
        example: Shape of the examples that it was made for; None if it reads any.
        positional: The option that ``name:VALUE`` on the command line sets, as in ``timm:resnet18``; or None.
        graph: Whether it reads numbers of nodes, and has to be given their graph: ``models.graph_nets.GraphNet``.
    """

    name: str
    title: str
    options: type[Options]
    build: Callable[[Any, tuple[int, ...], int], nn.Module]
    hidden: Callable[[Any], list[str]]
    positional: str | None = None
    example: tuple[int, ...] | None = None
    graph: bool = False
