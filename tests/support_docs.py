"""What the README and the pages of docs/ say in code blocks: found, run and compared with what they print."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shlex
import sys
import textwrap
import tomllib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<content>.*?)^(?P=indent)``` *$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """One fenced code block: its language, its text, and the line of its fence in the page."""

    language: str
    content: str
    line: int
    follows: Block | None = None  # the block that ends right before this one, with blank lines between them alone


class Ran(NamedTuple):
    """What running a page leaves behind: its names, and all that it printed."""

    namespace: dict[str, object]
    printed: str


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page in order, of one language if it is given."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    end = 0
    for match in FENCE.finditer(text):
        adjacent = bool(found) and not text[end : match.start()].strip()
        content = textwrap.dedent(match["content"])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match["language"], content, line, found[-1] if adjacent else None))
        end = match.end()
    return [block for block in found if language in (None, block.language)]


def run(page: Path) -> Ran:
    """Run every python block of a page in order, in one namespace, and compare what is printed.

    A text block right after a python block is what that block prints, up to blanks at the ends of lines and of the
    block; ``...`` stands for anything.

    Raises:
        AssertionError: a text block differs; it names page and line.
        Exception: what a block raised; the traceback shows the page's lines.
    """
    # A module of its own, known to Python, so that what the page defines can be pickled and inspected.
    module = types.ModuleType(f"page_{page.stem}")
    module.__file__ = str(page)
    sys.modules[module.__name__] = module
    printed: dict[int, str] = {}
    try:
        for block in blocks(page):
            if block.language == "python":
                printed[block.line] = _execute(block, page, vars(module))
            elif block.language == "text" and block.follows and block.follows.language == "python":
                _compare(printed[block.follows.line], block, page)
    finally:
        del sys.modules[module.__name__]
    return Ran(vars(module), "".join(printed.values()))


def _execute(block: Block, page: Path, namespace: dict[str, object]) -> str:
    # Empty lines first: then line numbers are those of the page, in tracebacks and for inspect.
    code = compile("\n" * block.line + block.content, str(page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as captured:
        exec(code, namespace)
    return captured.getvalue()


def _compare(printed: str, block: Block, page: Path) -> None:
    shown, real = _normalised(block.content), _normalised(printed)
    pattern = ".*".join(re.escape(part) for part in shown.split("..."))
    assert re.fullmatch(pattern, real, re.DOTALL), (
        f"{page.name}, line {block.line}: the page shows\n{shown}\nbut the block above it prints\n{real}"
    )


def _normalised(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def shell_problems(page: Path) -> list[str]:
    """What the bash blocks of a page name and what does not exist: commands, options, targets, extras, scripts."""
    return [
        f"line {block.line}: {problem}"
        for block in blocks(page, "bash")
        for command in _commands(block.content)
        for problem in _problems(command)
    ]


def make_targets() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def _commands(script: str) -> Iterator[list[str]]:
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        words.whitespace_split, words.commenters = True, "#"
        for joined, group in itertools.groupby(words, key=lambda word: set(word) <= set("&|;")):
            command = list(group)
            while command and re.fullmatch(r"\w+=.*", command[0]):  # variables set for one command
                command = command[1:]
            if command and not joined:
                yield command


def _problems(words: list[str]) -> Iterator[str]:
    program, arguments = words[0], words[1:]
    if program == "make":
        yield from (f"make {t}: no such target" for t in arguments if "=" not in t and t not in make_targets())
    elif program == "manifold-mixup":
        yield from _cli_problems(arguments)
    elif program in ("python", "python3") and arguments and arguments[0].endswith(".py"):
        if "/" in arguments[0] and not (ROOT / arguments[0]).exists():
            yield f"{arguments[0]}: no such file"
    elif program == "pip" and arguments[:1] == ["install"]:
        known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
        named = {e for a in arguments for group in re.findall(r"\[([\w,-]+)\]", a) for e in group.split(",")}
        yield from (f"extra {name!r}: no such extra" for name in sorted(named - set(known)))


def _cli_problems(arguments: list[str]) -> Iterator[str]:
    import typer

    from manifold_mixup.lab.cli import app

    commands = typer.main.get_command(app).commands
    names = [a for a in arguments if not a.startswith("-")]
    if not names:
        return
    command = commands.get(names[0])
    if command is None:
        yield f"manifold-mixup {names[0]}: no such command"
        return
    options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    for argument in arguments:
        option = argument.partition("=")[0]
        if re.fullmatch(r"--?[a-zA-Z][\w-]*", option) and option not in options:
            yield f"manifold-mixup {names[0]} {option}: no such option"
