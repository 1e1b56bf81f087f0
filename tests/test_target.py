"""A MixedTarget means λ·ℓ(output, y) + (1 - λ)·ℓ(output, y'), for every loss, or it raises."""

from __future__ import annotations

import collections
import copy
import dataclasses
import inspect
import pickle
import re
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from manifold_mixup.errors import BatchMismatch, LayerNotReached, MixedTargetMisuse
from manifold_mixup.target import MixedTarget

F64 = torch.float64
LAMS = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")  # kl_div's own


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def partner_of(y: Tensor) -> Tensor:
    return y.roll(1, 0)


def mixed(y: Tensor, lam: float | Tensor = 0.3, **kwargs) -> MixedTarget:
    return MixedTarget(y, partner_of(y), lam, **kwargs)


def outputs_of(arguments: dict) -> list[Tensor]:
    """What gradients are taken of."""
    return [value for value in arguments.values() if isinstance(value, Tensor) and value.requires_grad]


def losses(n: int = 4) -> dict[str, tuple[dict, str, Tensor]]:
    """For every loss: its other arguments, the name of its target, and y."""
    x, z, classes = rand(n, 5), rand(n, 5), torch.randint(5, (n,))
    x.requires_grad_()
    share, signs = torch.rand(n, 5, dtype=F64), torch.randint(2, (n, 5)).to(F64) * 2 - 1
    pair, one_sign = {"input1": x, "input2": z}, signs[:, 0]
    ctc = {
        "log_probs": rand(9, n, 5).log_softmax(-1).requires_grad_(),
        "input_lengths": torch.full((n,), 9),
        "target_lengths": torch.full((n,), 3),
    }
    return {
        "binary_cross_entropy": ({"input": x.sigmoid()}, "target", share),
        "binary_cross_entropy_with_logits": ({"input": x}, "target", share),
        "cosine_embedding_loss": (pair, "target", one_sign),
        "cross_entropy": ({"input": x}, "target", classes),
        "ctc_loss": (ctc, "targets", torch.randint(1, 5, (n, 3))),
        "gaussian_nll_loss": ({"input": x, "var": share + 0.1}, "target", z),
        "hinge_embedding_loss": ({"input": x}, "target", signs),
        "huber_loss": ({"input": x}, "target", z),
        "kl_div": ({"input": x.log_softmax(1)}, "target", share),
        "l1_loss": ({"input": x}, "target", z),
        "linear_cross_entropy": ({"input": x, "linear_weight": rand(7, 5)}, "target", classes),
        "margin_ranking_loss": ({"input1": x[:, 0], "input2": z[:, 0]}, "target", one_sign),
        "mse_loss": ({"input": x}, "target", z),
        "multi_margin_loss": ({"input": x}, "target", classes),
        "multilabel_margin_loss": ({"input": x}, "target", torch.tensor([[0, 3, -1, 1, 1], [2, -1, 0, 0, 0]] * n)[:n]),
        "multilabel_soft_margin_loss": ({"input": x}, "target", (signs + 1) / 2),
        "nll_loss": ({"input": x.log_softmax(1)}, "target", classes),
        "poisson_nll_loss": ({"input": x}, "target", share),
        "smooth_l1_loss": ({"input": x}, "target", z),
        "soft_margin_loss": ({"input": x}, "target", signs),
        "triplet_margin_loss": ({"anchor": x, "negative": z}, "positive", rand(n, 5)),
        "triplet_margin_with_distance_loss": ({"anchor": x, "negative": z}, "positive", rand(n, 5)),
    }


NAMES = sorted(losses())
MODULES = sorted(name for name in dir(nn) if name.endswith("Loss") and name != "AdaptiveLogSoftmaxWithLoss")


def gradients(loss: Tensor, arguments: dict) -> tuple[Tensor, ...]:
    leaf = next(node for node in _leaves(loss))
    return torch.autograd.grad(loss.sum(), leaf, retain_graph=True)


def _leaves(loss: Tensor) -> list[Tensor]:
    """The leaf that the loss was computed from (the x of ``losses``, which most cases wrap)."""
    nodes, seen, leaves = [loss.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        nodes += [n for n, _ in node.next_functions]
    return leaves


# ---------------------------------------------------------------- the losses of torch.nn.functional


def test_no_loss_of_torch_is_forgotten():
    by_name = {n for n in dir(F) if re.search(r"loss$|entropy|kl_div", n) and callable(getattr(F, n))}
    by_argument = {n for n, f in vars(F).items() if inspect.isfunction(f) and "reduction" in str(inspect.signature(f))}
    assert set(NAMES) >= by_name - {"_cross_entropy"}
    assert {n for n in by_argument if not n.startswith("_")} == set(NAMES)
