"""What a MixedTarget has to know about the targets and λ it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manifold_mixup.errors import BatchMismatch, MixedTargetMisuse
from manifold_mixup.structure import map_tensors, tensors

__all__ = [
    "Lam",
    "check_classes",
    "check_pair",
    "checked_lam",
    "checked_loss",
    "index_of_rows",
    "is_index",
    "one_row_each",
    "rows_of_lam",
    "same_draw",
    "summary",
]

Lam = float | Tensor


def check_pair(y: Any, y_partner: Any) -> int:
    """Refuse targets that do not fit each other.

    Returns:
        The number of rows.

    Raises:
        TypeError, BatchMismatch: as :class:`~manifold_mixup.MixedTarget` says.
    """
    _check_leaves(y, "y")
    _check_leaves(y_partner, "y_partner")
    if map_tensors(lambda _: ..., y) != map_tensors(lambda _: ..., y_partner):
        raise TypeError(f"y and y_partner differ in structure: {summary(y)} and {summary(y_partner)}.")
    ones = list(tensors(y))
    if not ones:
        raise TypeError("y holds no tensor.")
    for one, other in zip(ones, tensors(y_partner), strict=True):
        if not one.dim() or len(one) != len(ones[0]) or one.shape != other.shape:
            raise BatchMismatch(
                "All targets need the same first dimension, the batch, and y_partner the shapes of y, but they are "
                f"{summary(y)} and {summary(y_partner)}."
            )
    return len(ones[0])


def _check_leaves(value: Any, where: str) -> None:
    """Tensors only (None is let pass): a plain list of labels would come through unmixed, without a word."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check_leaves(entry, f"{where}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for i, entry in enumerate(value):
            _check_leaves(entry, f"{where}[{i}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _check_leaves(getattr(value, field.name), f"{where}.{field.name}")
    elif value is not None and not isinstance(value, Tensor):
        raise TypeError(f"Targets must be tensors, or structures of tensors, but {where} is a {type(value).__name__}.")


def checked_lam(lam: Lam, rows: int) -> Lam:
    """λ as a float, or as the tensor that it is; raises ValueError and BatchMismatch."""
    if isinstance(lam, Tensor):
        if not lam.is_floating_point() or lam.dim() != 1:
            raise ValueError(
                "λ must be a float, or a floating tensor of shape (n,) with one λ per example, but it is a tensor of "
                f"{summary(lam)}."
            )
        if len(lam) != rows:
            raise BatchMismatch(f"There are {len(lam)} values of λ for {rows} targets.")
        # The values on an accelerator are not read: that would wait for the device.
        inside = lam.device.type != "cpu" or bool(((lam >= 0) & (lam <= 1)).all())
    else:
        lam = float(lam)
        inside = 0.0 <= lam <= 1.0
    if not inside:
        raise ValueError(f"λ must lie in [0, 1], but is {lam}.")
    return lam


def is_index(y: Tensor) -> bool:
    """Whether y holds class indices."""
    return not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)


def index_of_rows(index: Any, dim: int) -> Any:
    """The part of an index into a tensor of ``dim`` dimensions that chooses among its rows; ``...`` where none does."""
    first, *rest = index if isinstance(index, tuple) and index else (index,)
    if first is ... and sum(part is not None for part in rest) >= dim:  # it stands for no dimension at all
        first = rest[0]
    return first


def rows_of_lam(lam: Lam, y: Tensor, index: Any) -> Lam:
    """λ of the rows of ``y[index]``."""
    if not isinstance(lam, Tensor):
        return lam
    if all(part is ... or isinstance(part, (slice, int)) for part in (index if isinstance(index, tuple) else (index,))):
        return lam[index_of_rows(index, y.dim())] if index != () else lam
    # Row numbers are indexed as y is, and have to come out alike along each row.
    rows = torch.arange(len(lam), device=y.device).view(-1, *[1] * (y.dim() - 1)).expand(y.shape)[index]
    if rows.dim() > 1:
        whole = rows.flatten(1)
        if not whole.shape[1] or bool((whole != whole[:, :1]).any()):
            raise MixedTargetMisuse("The index puts examples of different λ into one row.")
        rows = whole[:, 0]
    return lam[rows.to(lam.device)]


def summary(value: Any) -> str:
    """Dtypes and shapes, as ``int64[8]`` or ``{'boxes': float32[8, 4]}``."""
    return repr(map_tensors(_Brief, value))


class _Brief:
    def __init__(self, tensor: Tensor) -> None:
        self.text = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"

    def __repr__(self) -> str:
        return self.text


def one_row_each(output: Any, y: Tensor) -> None:
    """Refuse an output with another number of rows than the targets have."""
    if isinstance(output, Tensor) and output.dim() > 1 and y.dim() and output.shape[0] != y.shape[0]:
        raise BatchMismatch(
            f"The model returned {output.shape[0]} rows for {y.shape[0]} mixed targets, so which of them belong "
            "together cannot be told. Give the loss one row for every example: slice what the model returns, or, "
            "where it is flattened, flatten the target as well (target.view(-1))."
        )


def check_classes(labels: Tensor, num_classes: int) -> None:
    """Refuse labels that have no one-hot form.

    To look at labels makes an accelerator wait, and cannot be compiled: there the scatter refuses them.
    """
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if outside.numel():
        raise ValueError(
            f"Label {int(outside[0])} lies outside [0, {num_classes}) and has no one-hot form. If it is an "
            "ignore_index, use the loss form, which honours it: F.cross_entropy(output, target, ignore_index=...) or "
            "target.loss(criterion, output)."
        )


def checked_loss(loss: Any) -> Any:
    """The loss, if it can be weighted."""
    if isinstance(loss, (Tensor, float, int)):
        return loss
    raise MixedTargetMisuse(f"The criterion has to return a tensor to be weighted, not a {type(loss).__name__}.")


def same_draw(one: Any, other: Any) -> bool:
    """Whether two mixed targets come of one draw."""
    a, b = one.lam, other.lam
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a is b or torch.equal(a, b.to(a.device))
    else:
        same = not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
    return same and one.ready == other.ready
