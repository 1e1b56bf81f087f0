"""A small network cut by hand, labelled and unlabelled batches, and what a step should do to them, done slowly."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from manifold_mixup.lab.methods import make_method
from manifold_mixup.lab.methods.base import Batch

PARTS = ["0", "1", "2", "3"]
LAYERS = ["input", "0", "1"]
SEED = 4


def network(dropout=0.0):
    """Four parts in a row, each of whose outputs is a cut point, in double precision."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU()),
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=0.9), nn.ReLU()),
        nn.Dropout(dropout),
        nn.Linear(8, 4),
    ).double()


def batch(step=3, steps=20, n=6, m=9):
    generator = torch.Generator().manual_seed(step)
    x, u = (torch.randn(rows, 3, generator=generator).double() for rows in (n, m))
    return Batch(x, torch.arange(n) % 4, u, step, steps)


def criterion(output, target):
    return F.cross_entropy(output, target, reduction="none").mean()


def attached(name, model, seed=SEED, **options):
    method = make_method(name, options)
    method.attach(model, [], seed)
    return method


class Draws:
    """Notes what a method's mixer draws, one draw after the other."""

    def __init__(self, method, monkeypatch):
        self.found, mixup = [], method._mixup
        original = mixup._draw

        def draw(size, y):
            result = original(size, y)
            self.found.append(result[0])
            return result

        monkeypatch.setattr(mixup, "_draw", draw)


def mixed(value, drawn):
    """λ of every row and 1 - λ of its partner's, row by row."""
    if drawn.layer is None:
        return value
    rows = [drawn.lam * value[i] + (1 - drawn.lam) * value[j] for i, j in enumerate(drawn.partner.tolist())]
    return torch.stack(rows)


def run_mixed(model, x, drawn):
    """The network, part by part, mixed by hand behind the part that was drawn."""
    h = mixed(x, drawn) if drawn.layer == "input" else x
    for part in PARTS:
        h = model.get_submodule(part)(h)
        if part == drawn.layer:
            h = mixed(h, drawn)
    return h


def labelled_loss(model, given, drawn):
    """The supervised part: log-probabilities of the two labels of every example, weighed by hand."""
    log = run_mixed(model, given.x, drawn).log_softmax(1)
    total = 0.0
    for i, label in enumerate(given.y.tolist()):
        other = label if drawn.layer is None else int(given.y[drawn.partner[i]])
        total = total - drawn.lam * log[i, label] - (1 - drawn.lam) * log[i, other]
    return total / len(given.y)


def squares(output, target):
    """The mean squared error, number by number."""
    n, classes = output.shape
    return sum((output[i, c] - target[i, c]) ** 2 for i in range(n) for c in range(classes)) / (n * classes)


def statistics(model):
    return {name: value.clone() for name, value in model.named_buffers()}


def assert_same_gradients(loss, model, expected, reference):
    """Losses, gradients and running statistics of two copies of a network, after one backward pass of each."""
    assert abs(loss.item() - expected.item()) < 1e-10 * max(1.0, abs(expected.item()))
    loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12), name
    for (name, ours), theirs in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12), name


def copied(model):
    """A copy made before anything hooks the network."""
    return copy.deepcopy(model)
