"""The page's and the figure's templates, with everything that is put into them escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "render"]

FOLDER = Path(__file__).parent / "templates"


def render(name: str, **values: Any) -> str:
    """Fill in a template of this package; what is missing is an error, what is filled in is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,  # for every name: by default jinja2 decides by the ending
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(**values)
