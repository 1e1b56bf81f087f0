"""Networks from a user's file: ``path/to/file.py:factory``."""

from __future__ import annotations

import contextlib
import inspect
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from manifold_mixup.lab.errors import StorageError, UsageError, nearest
from manifold_mixup.lab.networks.base import Network, Request
from manifold_mixup.lab.networks.inputs import examples

__all__ = ["build"]

MODULE = "manifold_mixup_network_file"  # in sys.modules: dataclasses and others look the file's module up


def build(request: Request) -> Network:
    """Call the factory, or take the module, that ``FILE.py:NAME`` names.

    A factory returns the module, or the module and its inputs as a mixer takes them: a tensor, a tuple of positional
    or a mapping of keyword arguments, with rows in dimension 0.

    Raises:
        StorageError: The file cannot be read.
        UsageError: Anything else that is wrong with it, with the line where there is one.
    """
    file, _, name = request.name.rpartition(":")
    path = Path(file)
    with _beside(path):
        module = _load(path)
        if not hasattr(module, name):
            callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise UsageError(f"{path} has no {name!r}: {nearest(name, callables)}")
        made = getattr(module, name)
        if not isinstance(made, nn.Module):
            made = _call(made, request, path, name)
    model, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{path}: {name} should return an nn.Module, or an nn.Module and its inputs, not {_kind(made)}"
        )
    if request.inputs:
        return Network(model, *examples(request.inputs))
    if given is None:
        raise UsageError(
            f"{path}: {name} returns no inputs, so say what the network reads: --input 3,224,224 is the shape of one "
            "example; or return (module, inputs)"
        )
    if isinstance(given, Tensor):
        return Network(model, (given,))
    if isinstance(given, Mapping):
        return Network(model, (), dict(given))
    if isinstance(given, (tuple, list)):
        return Network(model, tuple(given))
    raise UsageError(f"{path}: the inputs that {name} returns should be a tensor, tuple or dict, not {_kind(given)}")


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Let the file import its neighbours, as Python does for a script; afterwards ``sys.path`` is what it was."""
    before = list(sys.path)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        yield
    finally:
        sys.path[:] = before


def _load(path: Path) -> types.ModuleType:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise StorageError(path, error, "read") from error
    module = types.ModuleType(MODULE)
    module.__file__ = str(path)
    sys.modules[MODULE] = module
    try:
        exec(compile(source, str(path), "exec"), vars(module))
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""  # there is none where the file holds a null byte
        raise UsageError(f"{error.filename or path}{line}: {type(error).__name__}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        raise _raised(path, "", error) from error
    return module


def _call(factory: Callable[..., Any], request: Request, path: Path, name: str) -> Any:
    if not callable(factory):
        raise UsageError(f"{path}: {name} should be a function that returns an nn.Module, not {_kind(factory)}")
    try:
        inspect.signature(factory).bind(**request.options)
    except TypeError as error:
        raise UsageError(
            f"{path}: {name} cannot be called like that: {error}; arguments are given as {path}:{name}:key=value,..."
        ) from error
    try:
        return factory(**request.options)
    except (Exception, SystemExit) as error:
        raise _raised(path, f" in {name}", error) from error


def _raised(path: Path, where: str, error: BaseException) -> UsageError:
    """What the user's own code raised, and the last of its lines on the way there."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = f", line {lines[-1]}" if lines else ""
    return UsageError(f"{path}{line}{where}: {type(error).__name__}: {error}")


def _kind(value: Any) -> str:
    return f"an object of type {type(value).__name__!r}"
