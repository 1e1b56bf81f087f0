"""Networks by name: ``build_model("mlp", options, shape, classes)``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from manifold_mixup.lab.errors import UnknownName
from manifold_mixup.lab.models import graph_nets, libraries, mlp, mnist_nets, preact_resnet, spiral_net, wide_resnet
from manifold_mixup.lab.models.base import ModelEntry

__all__ = ["MODELS", "ModelEntry", "build_model", "get_model", "hidden_layers"]

MODELS: dict[str, ModelEntry] = {
    entry.name: entry
    for entry in (
        spiral_net.MODEL,
        mlp.MODEL,
        mnist_nets.MODEL,
        *preact_resnet.MODELS,
        *wide_resnet.MODELS,
        *graph_nets.MODELS,
        *libraries.MODELS,
    )
}


def get_model(name: str) -> ModelEntry:
    """The registry entry of a network.

    Raises:
        UnknownName: There is none of this name.
    """
    if name not in MODELS:
        raise UnknownName("model", name, MODELS)
    return MODELS[name]


def build_model(name: str, options: Mapping[str, Any], shape: tuple[int, ...], classes: int) -> nn.Module:
    """A network with fresh weights, drawn from torch's global generator.

    Args:
        name: The name in the registry.
        options: The network's own options.
        shape: Shape of one example, without the batch dimension.
        classes: Number of classes, the width of the output.

    Raises:
        UnknownName: There is no such network.
        UsageError: The network cannot read examples of this shape, or cannot be built with these options.
        MissingExtra: The library that has the network is not installed.
        pydantic.ValidationError: The options are not the network's.
    """
    entry = get_model(name)
    return entry.build(entry.options.model_validate(dict(options)), shape, classes)


def hidden_layers(name: str, options: Mapping[str, Any]) -> list[str]:
    """Names of the modules whose outputs are the network's hidden states, first to last."""
    entry = get_model(name)
    return entry.hidden(entry.options.model_validate(dict(options)))
