"""Examples to try a network on: ``--input 3,224,224``, ``--input 128:int``, ``--input mask=128:int``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manifold_mixup.lab.errors import UsageError, nearest

__all__ = ["ROWS", "Input", "describe", "examples", "parse_input", "random_tensor"]

ROWS = 2  # looking for cut points takes two rows of a batch, and makes a third one itself
KINDS = ("float", "int", "bool")


@dataclass(frozen=True)
class Input:
    """One input of a network.

    Attributes:
        shape: Of one example; () is one number.
        name: Of the argument, or None for the next position.
        kind: Of the numbers: "float", "int", "bool", or None where nobody said.
    """

    shape: tuple[int, ...]
    name: str | None = None
    kind: str | None = None


def parse_input(text: str, kind: str | None = None) -> Input:
    """Read ``3,224,224``, ``16:int``, ``NAME=16``, ``NAME=`` (one number for each example).

    Args:
        text: As above.
        kind: What the numbers are where the text does not say it.

    Raises:
        UsageError: It does not read like that.
    """
    match = re.fullmatch(r"(?:([^\W\d]\w*)=)?([\d,\s]*)(?::(\w+))?", text.strip())
    if match is None or not (match[1] or match[2]):
        raise UsageError(
            f"--input {text!r} should read 3,224,224 (the shape of one example, without the batch), 128:int, "
            "or NAME=128 for an input by keyword"
        )
    sizes = [size.strip() for size in match[2].split(",")] if match[2].strip() else []
    if not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise UsageError(f"--input {text!r}: {match[2]!r} should be sizes of at least 1, joined by commas")
    if (found := match[3] or kind) not in (None, *KINDS):
        flag = f"--input {text!r}" if match[3] else "--dtype"
        raise UsageError(f"{flag}: unknown kind of numbers {found!r}: {nearest(str(found), KINDS)}")
    return Input(tuple(map(int, sizes)), match[1], found)


def random_tensor(given: Input) -> Tensor:
    """Two rows of random numbers: normal ones, or 0 and 1, which every embedding knows."""
    shape = (ROWS, *given.shape)
    if given.kind == "int":
        return torch.randint(2, shape)
    if given.kind == "bool":
        return torch.randint(2, shape).bool()
    return torch.randn(shape)


def examples(inputs: Sequence[Input], default: Input | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for a forward: the inputs that were given, or else the default.

    Raises:
        UsageError: One name is given twice.
    """
    if not inputs and default is not None:
        inputs = [default]
    names = [given.name for given in inputs if given.name is not None]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--input: {twice[0]!r} is given twice")
    args = tuple(random_tensor(given) for given in inputs if given.name is None)
    return args, {given.name: random_tensor(given) for given in inputs if given.name is not None}


def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The inputs in words, without the batch: ``(3, 224, 224)``, ``input_ids=(128,) of integers``."""

    def one(value: Any) -> str:
        if not isinstance(value, Tensor):
            return type(value).__name__
        kind = "" if value.is_floating_point() else " of booleans" if value.dtype == torch.bool else " of integers"
        return f"{tuple(value.shape[1:])}{kind}"

    return ", ".join([*map(one, args), *(f"{name}={one(value)}" for name, value in kwargs.items())])
