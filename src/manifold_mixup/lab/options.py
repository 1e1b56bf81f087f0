"""The base of everything that a recipe can set."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["NoOptions", "Options"]


class Options(BaseModel):
    """Strictly validated settings: unknown keys, wrong types, NaN and infinities are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class NoOptions(Options):
    """For what has nothing to set."""
