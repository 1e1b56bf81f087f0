"""The numbers that papers and benchmarks have printed, read from the TOML files beside this one."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from manifold_mixup.lab.errors import LabError
from manifold_mixup.lab.options import Options

__all__ = ["PUBLISHED", "Published", "find_published", "read_published"]

PUBLISHED = Path(__file__).parent / "published"


class Published(Options):
    """One printed number."""

    source: str = Field(min_length=1, description="where it is printed")
    table: str = Field(min_length=1, description="the group that it belongs to")
    dataset: str
    network: str
    method: str
    metric: str
    value: float
    unit: Literal["percent", "nats", "1"]
    alpha: float | None = Field(default=None, description="of Beta(alpha, alpha); None if it is not stated or has none")
    layers: list[int] | None = Field(default=None, description="the eligible set S; None if it is not stated")
    epochs: int | None = Field(default=None, description="of training; None if not stated")
    std: float | None = Field(default=None, description="standard deviation over training runs, if printed")
    note: str = Field(default="", description="what whoever compares with it must know")


@functools.cache
def read_published() -> tuple[Published, ...]:
    """All of them, file by file."""
    found: list[Published] = []
    for path in sorted(PUBLISHED.glob("*.toml")):
        entries: list[dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8"))["result"]
        found += [Published.model_validate(entry) for entry in entries]
    return tuple(found)


def find_published(where: Mapping[str, Any]) -> Published | None:
    """The one number whose keys have these values, or None.

    Args:
        where: Keys of :class:`Published` and their values.

    Raises:
        LabError: Several numbers match: the study that asks has to say more.
    """
    found = [entry for entry in read_published() if all(getattr(entry, key) == value for key, value in where.items())]
    if len(found) > 1:
        raise LabError(f"{len(found)} published numbers have {dict(where)}; name more keys, such as alpha or layers")
    return found[0] if found else None
