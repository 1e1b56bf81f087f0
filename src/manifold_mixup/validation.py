"""What is refused: arguments out of range, models that cannot be mixed safely, batches that do not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from manifold_mixup.cutpoints import CutPoint, discover
from manifold_mixup.errors import BatchMismatch, DataFlowLost, DiscoveryFailed, UnsupportedModel
from manifold_mixup.pairing import PAIRINGS, Pairing
from manifold_mixup.structure import arguments, batch_size, tensors

__all__ = ["Layers", "joins_rows", "mismatch", "sizes", "unwrap", "validate"]

Layers = str | Sequence[str] | Callable[[list[CutPoint]], Sequence[str]]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DDP, FSDP and torch.compile; refuses what cannot be mixed safely."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"ManifoldMixup takes an nn.Module, not {type(model).__name__}.")
    while True:
        kind = type(model).__name__
        if isinstance(model, nn.DataParallel):
            raise UnsupportedModel(
                "nn.DataParallel splits the batch after it was paired, so partners land on other devices. "
                "Use torch.nn.parallel.DistributedDataParallel: each process mixes its own batch."
            )
        if isinstance(model, torch.jit.ScriptModule):
            raise UnsupportedModel(
                "A ScriptModule runs outside Python, where no hook can mix. Attach to the original module, "
                "or use torch.compile."
            )
        if kind == "GradSampleModule":
            raise UnsupportedModel(
                "Private training needs one gradient per example, but the loss of a mixed example depends on two. "
                "Mix without Opacus, or train privately without mixing."
            )
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel") and isinstance(model.module, nn.Module):
            model = model.module
        elif kind == "OptimizedModule" and isinstance(model._orig_mod, nn.Module):
            model = model._orig_mod
        else:
            return model


def validate(
    alpha: float, layers: Layers, per: str, pairing: Pairing, probability: float, seed: int | None, check: bool
) -> None:
    """Refuse arguments of ManifoldMixup that are out of range: ValueError, or TypeError for another type."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha < 0:
        raise ValueError(f"alpha must be a finite number, 0 or larger, but is {alpha!r}.")
    if isinstance(layers, str) and layers != "auto":
        raise ValueError(
            f"layers must be 'auto', a list of names or a callable; for one layer write layers=[{layers!r}]."
        )
    if not (isinstance(layers, str) or callable(layers)) and not all(isinstance(name, str) for name in layers):
        raise TypeError("layers must hold names as in model.named_modules().")
    if not check and (isinstance(layers, str) or callable(layers)):
        raise ValueError("check=False takes your word for S, so name it: layers=[...].")
    if per not in ("batch", "example"):
        raise ValueError(f"per must be 'batch' or 'example', but is {per!r}.")
    if not callable(pairing) and pairing not in PAIRINGS:
        raise ValueError(f"pairing must be one of {', '.join(map(repr, PAIRINGS))} or a callable, but is {pairing!r}.")
    if per == "example" and pairing == "two-batches":
        raise ValueError("pairing='two-batches' mixes all rows at one layer: use it with per='batch'.")
    if isinstance(probability, bool) or not isinstance(probability, (int, float)) or not 0 <= probability <= 1:
        raise ValueError(f"probability must lie in [0, 1], but is {probability!r}.")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed must be an integer or None, but is {seed!r}.")


def sizes(x: Any, y: Any) -> tuple[int, int]:
    """Rows of the inputs and of the targets; BatchMismatch where these disagree among themselves, or are none."""
    size = batch_size(x)
    if size is None:
        raise BatchMismatch("x holds no tensor with a batch dimension.")
    shapes = [tuple(tensor.shape) for tensor in tensors(y)]
    if not shapes:
        raise BatchMismatch("y holds no tensor: the targets have to be tensors with one row per example.")
    for shape in shapes:
        if shape[:1] != shapes[0][:1] or not shape:
            raise mismatch(size, shape)
    return size, shapes[0][0]


def joins_rows(model: nn.Module, x: Any, labels: int) -> bool:
    """Whether the model joins the rows of x, nodes of graphs, into as many as there are targets."""
    try:
        return discover(model, *arguments(x), labels).regroups
    except (BatchMismatch, DataFlowLost, DiscoveryFailed):
        return False


def mismatch(size: int, shape: tuple[int, ...], *, halves: bool = False) -> BatchMismatch:
    """The error for targets that are not those of x, or for two batches of graphs, which x does not hold in halves."""
    if halves:
        return BatchMismatch(
            f"pairing='two-batches' takes the halves of x, but its {size} rows are not those of the {shape[0]} "
            "targets. Where nodes form graphs, use pairing='random' or 'halves'."
        )
    return BatchMismatch(
        f"x has {size} rows, but the targets have shape {shape}. Give one target for every row of x; views and pairs "
        "belong into a tuple x = (a, b) or into a dimension of their own."
    )
