"""Every error a user of the lab can meet: one line each, saying what is wrong and what to do.

The command line prints them as ``error: ...`` without a stack trace, so the text has to stand alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from manifold_mixup.errors import ManifoldMixupError

__all__ = [
    "ConfigMismatch",
    "CorruptedFile",
    "Diverged",
    "ExperimentStopped",
    "FolderBusy",
    "Interrupted",
    "LabError",
    "MissingExtra",
    "RecipeError",
    "RunsFailed",
    "StorageError",
    "TestDataTaken",
    "UnknownName",
    "UsageError",
    "nearest",
]


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known: the closest ones, or the whole list if nothing is close."""
    known = sorted(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"there is {', '.join(map(repr, known))}" if known else "there is none"


class LabError(ManifoldMixupError):
    """Base class of the lab's errors."""

    exit_code = 2


class UsageError(LabError, ValueError):
    """An argument that cannot be understood."""


class UnknownName(LabError, ValueError):
    """A data set, method, model or recipe that does not exist."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown {kind} {name!r}: {nearest(name, known)}")
        self.kind = kind
        self.name = name


class RecipeError(LabError, ValueError):
    """A recipe with mistakes; all of them are reported at once, each with its key path."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        if len(self.problems) == 1:
            text = self.problems[0]
        else:
            numbered = "; ".join(f"({i}) {problem}" for i, problem in enumerate(self.problems, 1))
            text = f"{len(self.problems)} mistakes: {numbered}"
        super().__init__(f"{source}: {text}")


class ConfigMismatch(LabError):
    """A run folder or a checkpoint that was made with another configuration."""


class StorageError(LabError):
    """A file or folder that cannot be written or read: full disk, missing permission, a file in the way."""

    def __init__(self, path: Path, cause: OSError, action: str = "write") -> None:
        super().__init__(f"cannot {action} {path}: {cause.strerror or cause}")
        self.path = path


class FolderBusy(LabError):
    """Another process is at work on a run's folder."""


class CorruptedFile(LabError):
    """A checkpoint or record whose content is not what was written."""


class Diverged(LabError, ArithmeticError):
    """The training loss is no longer a number."""


class MissingExtra(LabError, ImportError):
    """A part of the lab whose packages are not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package {package!r}: pip install 'manifold-mixup[{extra}]'")


class TestDataTaken(LabError, RuntimeError):
    """The test split was asked for a second time."""

    __test__ = False  # the name starts with "Test", but it is no test class


class RunsFailed(LabError):
    """Some runs of an experiment failed; the others are finished and recorded."""

    exit_code = 1


class ExperimentStopped(LabError):
    """A run hit something that would stop all others too, such as a full disk."""


class Interrupted(LabError):
    """The user asked to stop; what was running left a checkpoint from which the same command goes on."""

    exit_code = 130
