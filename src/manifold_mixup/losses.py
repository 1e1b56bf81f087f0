"""What has to be known about the losses of ``torch.nn.functional`` to call them with something else than a tensor."""

from __future__ import annotations

import sys
from inspect import isfunction, signature
from typing import Any

import torch.nn.functional as F

__all__ = ["LOSSES", "weight_of_l1_loss"]


# The losses are the functions there that have a ``reduction``. Found once, as torch.compile cannot follow signature().
LOSSES = frozenset(
    function
    for function in vars(F).values()
    if isfunction(function) and function.__module__ == F.__name__ and "reduction" in signature(function).parameters
)


def weight_of_l1_loss() -> Any:
    """The ``weight`` of the ``l1_loss`` that is running.

    Of all arguments of all losses, this is the one that torch 2.13 does not hand on to ``__torch_function__``.
    Without it the loss would come out unweighted, and nobody would notice.
    """
    frame = sys._getframe()
    while frame.f_code is not F.l1_loss.__code__:
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return frame.f_locals.get("weight")
