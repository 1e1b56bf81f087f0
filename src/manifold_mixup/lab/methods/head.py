"""The classifier's head: the linear layer that turns the last features into logits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from manifold_mixup.cutpoints import CutPoint
from manifold_mixup.lab.errors import UsageError

__all__ = ["check_head", "find_head"]


def find_head(model: nn.Module, option: str) -> str:
    """Name of the network's last linear layer, in the order in which its modules were made.

    Args:
        model: The network.
        option: The option that names the layer in place of this search, for the error.

    Raises:
        UsageError: It has none.
    """
    names: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise UsageError(
            f"{type(model).__name__} has no linear layer that could be its head: say with options.{option} which "
            "module returns the logits"
        )
    return names[-1]


def check_head(head: str, points: Sequence[CutPoint], option: str) -> None:
    """Make sure that what was found returns the logits.

    Args:
        head: What :func:`find_head` found.
        points: The network's cut points. Where the head is none of them, nothing is checked.
        option: The option that names the layer in place of the search, for the error.

    Raises:
        UsageError: What a later cut point returns has another shape.
    """
    found = next((point for point in points if point.name == head), None)
    if found is not None and found.shape != points[-1].shape:
        raise UsageError(
            f"the network's last linear layer {head!r} is not its head: it returns {found.shape} numbers and "
            f"{points[-1].name!r}, after it, {points[-1].shape}; name the head with options.{option}"
        )
