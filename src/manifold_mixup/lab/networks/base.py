"""What every source of networks shares: the request, the network with its examples, and errors of one line."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from manifold_mixup.lab.errors import MissingExtra, UsageError
from manifold_mixup.lab.networks.inputs import Input, describe

__all__ = ["Network", "Request", "refuse_weights", "require", "unknown"]


@dataclass(frozen=True)
class Network:
    """A network and a batch to try it on.

    Attributes:
        model: With random weights.
        args: Positional inputs, rows in dimension 0.
        kwargs: Inputs by keyword.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def described(self) -> str:
        """One example in words: ``(3, 224, 224)``, ``input_ids=(128,) of integers``."""
        return describe(self.args, self.kwargs)


@dataclass(frozen=True)
class Request:
    """A network as it was asked for.

    Attributes:
        text: All of it, to be named in errors.
        name: The part that the source looks up.
        options: Keyword arguments of whatever builds it.
        inputs: What ``--input`` says; empty for the source's own.
        config: A saved configuration.
    """

    text: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[Input, ...] = ()
    config: Path | None = None


def require(package: str, extra: str) -> Any:
    """Import a package of an extra.

    Raises:
        MissingExtra: It is not installed.
        UsageError: It is, but cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise MissingExtra(package, extra) from error
        raise UsageError(f"the package {package!r} cannot be imported: {error}") from error
    except Exception as error:  # torchvision raises RuntimeError where it was built for another PyTorch
        raise UsageError(f"the package {package!r} cannot be imported: {type(error).__name__}: {error}") from error


def unknown(kind: str, name: str, known: Iterable[str], listing: str) -> UsageError:
    """The error for a name that a library does not have: the nearest of its names, or where it lists them."""
    known = list(known)
    near = get_close_matches(name, known, n=3, cutoff=0.6) or [k for k in known if name and name.lower() in k.lower()]
    hint = f"did you mean {' or '.join(map(repr, near[:3]))}?" if near else f"{listing} lists them"
    return UsageError(f"unknown {kind} {name!r}: {hint}")


def refuse_weights(request: Request, options: Iterable[str]) -> None:
    """Refuse options that would fetch weights.

    Raises:
        UsageError: One of them is set.
    """
    for option in options:
        if option in request.options:
            raise UsageError(
                f"{request.text!r}: leave out {option!r}; weights are drawn at random here and never downloaded, "
                "for where a network may be mixed does not depend on them"
            )
