"""A name with options, as it is written on the command line and in lists of recipes: ``name:key=value,key=value``."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable
from typing import Any

from manifold_mixup.lab.errors import UsageError

__all__ = ["parse_component", "parse_value"]


def parse_value(text: str) -> Any:
    """A number, boolean, list or quoted string as in TOML; anything else is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def parse_component(
    text: str, flag: str, positional: Callable[[str], str | None] = lambda name: None
) -> dict[str, Any]:
    """Read ``name`` or ``name:key=value,key=value``, or ``name:VALUE,key=value`` where a name takes a value.

    Values are numbers, true, false or text; layer names are joined by ``+``; a text with a comma needs quotes.
    ``label`` is not an option but the label.

    Args:
        text: What is read.
        flag: What to call it in errors.
        positional: From a name to the option that VALUE sets, or None.

    Raises:
        UsageError: It does not read like that.
    """
    name, colon, rest = text.partition(":")
    lexer = shlex.shlex(rest, posix=True, punctuation_chars=False)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = ",", True, ""
    part: dict[str, Any] = {"name": name.strip(), "options": {}}
    try:
        items = list(lexer)
    except ValueError as error:
        raise UsageError(f"{flag} {text!r}: {str(error).lower()}") from error
    if not name.strip() or (colon and not items):
        raise UsageError(f"{flag} {text!r} should read name or name:key=value,key=value")
    option = positional(part["name"])
    if option is not None and items and not re.match(r"\s*\w+\s*=", items[0]):
        part["options"][option] = items.pop(0)
    for item in items:
        key, equals, value = item.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"{flag} {text!r}: {item!r} should read key=value")
        if key == "label" and flag == "--method":
            part["label"] = value
        elif key in part["options"]:
            raise UsageError(f"{flag} {text!r}: {key!r} is given twice")
        else:
            part["options"][key] = parse_value(value)
    return part
