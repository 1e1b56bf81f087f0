"""Networks and labelled examples to measure: small, with known hidden states."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from manifold_mixup.lab.data.base import DataInfo, Examples, Pixels
from manifold_mixup.lab.measures.base import Subject

PIXELS = Pixels(mean=(0.5, 0.25, 0.4), sd=(0.2, 0.25, 0.3))


class Given(nn.Module):
    """Returns its inputs as logits, through a child whose output is the hidden state."""

    def __init__(self):
        super().__init__()
        self.state = nn.Identity()

    def forward(self, x):
        return self.state(x)


def info(pixels: Pixels | None = None, classes: int = 3, unit_range: bool = False) -> DataInfo:
    names = tuple(str(c) for c in range(classes))
    return DataInfo("made", "made here", (), names, (), "this test", "none", pixels=pixels, unit_range=unit_range)


def subject(
    model: nn.Module,
    *,
    pixels: Pixels | None = None,
    unit_range: bool = False,
    batch_size: int = 7,
    seed: int = 0,
    **parts,
) -> Subject:
    """``test=(x, y)`` and so on become the splits."""
    examples = {
        name: Examples(torch.as_tensor(x), torch.as_tensor(y, dtype=torch.long)) for name, (x, y) in parts.items()
    }
    facts = info(pixels, unit_range=unit_range)
    return Subject(model.eval(), facts, examples, seed=seed, batch_size=batch_size)


def images(n: int, classes: int = 3, side: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """uint8 images of three channels and their classes, all of which occur."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 3, side, side), generator=g, dtype=torch.uint8)
    return x, torch.arange(n)[torch.randperm(n, generator=g)] % classes


AS_THEY_ARE = Pixels(mean=(0.0,) * 3, sd=(1.0,) * 3)


def both_forms(model: nn.Module, n: int = 40, **settings: int) -> tuple[Subject, Subject]:
    """One network measured on the same images as bytes, and in floating point from 0 to 1."""
    x, y = images(n)
    stored = subject(model, pixels=AS_THEY_ARE, test=(x, y), **settings)
    return stored, subject(model, unit_range=True, test=(x.float() / 255, y), **settings)


def convolutional(classes: int = 3) -> nn.Sequential:
    """With batch norm, dropout and a ReLU in place, in training mode but for one frozen module."""
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, classes),
    )
    model[1].running_mean.uniform_(-0.2, 0.2)
    model[1].running_var.uniform_(0.5, 1.5)
    return model


@contextlib.contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Fails if a block changes modes, hooks, weights, buffers, gradients, what needs them, or the global generator."""

    def state():
        return {
            "modes": [m.training for m in model.modules()],
            "hooks": [
                len(hooks)
                for m in model.modules()
                for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
            ],
            "needs": [p.requires_grad for p in model.parameters()],
            "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            "tensors": copy.deepcopy(model.state_dict()),
            "enabled": torch.is_grad_enabled(),
            "generator": torch.get_rng_state(),
        }

    before = state()
    yield
    after = state()
    for name in ("modes", "hooks", "needs", "enabled"):
        assert after[name] == before[name], name
    for old, new in zip(before["grads"], after["grads"], strict=True):
        assert (old is None and new is None) or torch.equal(old, new)
    assert all(torch.equal(before["tensors"][name], value) for name, value in after["tensors"].items())
    assert torch.equal(before["generator"], after["generator"])
