"""Running a network in order to measure it: evaluation mode, no gradient, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["evaluation_mode", "predicted_labels", "predicted_logits"]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in, even after an exception.

    The modes are put back one by one: a batch norm that its owner froze inside a training network has to stay frozen.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def predicted_logits(
    model: nn.Module, x: Tensor, batch_size: int = 1000, prepare: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The outputs of a classifier, computed on the device of its parameters.

    Args:
        model: Maps inputs to logits of shape ``(rows, classes)``, at least two classes.
        x: Inputs, one example per row; at least one.
        batch_size: Rows per forward pass, at least 1. The result does not depend on it in evaluation mode, up to
            rounding.
        prepare: From rows of ``x``, on the network's device, to what the network reads; None if that is ``x`` itself.

    Returns:
        Logits of shape ``(len(x), classes)``, float64, on the CPU.

    Raises:
        ValueError: ``x`` is empty, ``batch_size`` is below 1, or the outputs are no logits.
    """
    if len(x) == 0:
        raise ValueError("there is nothing to measure: x has no rows")
    if batch_size < 1:
        raise ValueError(f"batch_size has to be at least 1, not {batch_size}")
    parameter = next(model.parameters(), None)
    device = x.device if parameter is None else parameter.device
    outputs = []
    with evaluation_mode(model):
        for start in range(0, len(x), batch_size):
            rows = x[start : start + batch_size]
            inputs = rows.to(device)
            output = model(inputs if prepare is None else prepare(inputs))
            if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(rows) or output.shape[1] < 2:
                found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(f"the network has to return logits of shape ({len(rows)}, classes), not {found}")
            outputs.append(output.double().cpu())
    return torch.cat(outputs)


def predicted_labels(logits: Tensor) -> Tensor:
    """The most probable class of each row of ``logits``; -1, which is never right, where the softmax is not a number.

    Args:
        logits: Shape ``(rows, classes)``. Minus infinity is a class that is ruled out; NaN and plus infinity leave the
            whole row without probabilities.
    """
    undefined = logits.softmax(dim=1).isnan().any(dim=1)
    return logits.argmax(dim=1).masked_fill(undefined, -1)
