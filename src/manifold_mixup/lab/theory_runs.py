"""Carrying out the checks of the theory once, and what is kept of them: the numbers, and how they were made."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from manifold_mixup.lab import storage
from manifold_mixup.lab.errors import CorruptedFile, UsageError
from manifold_mixup.lab.results import public_command
from manifold_mixup.lab.run import hardware, versions
from manifold_mixup.lab.side_by_side import Grid, duration
from manifold_mixup.lab.theory import TheoryResult, run_theory

__all__ = ["NOTE", "TITLE", "read_theory", "run_and_keep", "theory_grids", "write_theory"]

TITLE = "The theorem's consequences, checked"
NOTE = (
    "Free representations with an affine head and squared error, for which the statements are exact: each check passes "
    "or fails. With deep heads they are tendencies, and are measured. The guide on the theory says what is checked."
)
NUMBERS, MADE = "theory.jsonl", "theory.json"


def run_and_keep(
    runs: Path, seeds: Sequence[int], command: str, progress: Callable[[int, int], None] | None = None
) -> tuple[TheoryResult, Mapping[str, Any]]:
    """All checks at these seeds, on one thread; read back if they were made at these seeds before.

    Args:
        runs: Gets ``theory/theory.jsonl``, a check a line, and ``theory/theory.json``, how they were made.
        seeds: Different seeds.
        command: The command line.
        progress: Called with what is done and how much there is.

    Returns:
        The checks, and how they were made.
    """
    folder = runs / "theory"
    if (folder / MADE).exists() and storage.read_json(folder / MADE).get("seeds") == list(seeds):
        return read_theory(runs)
    threads, begun = torch.get_num_threads(), time.monotonic()
    torch.set_num_threads(1)
    try:
        result = run_theory(seeds, progress=progress)
        made = {
            "seeds": list(seeds),
            "seconds": round(time.monotonic() - begun, 3),
            "command": public_command(command),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "hardware": hardware("cpu", 1),
        }
    finally:
        torch.set_num_threads(threads)
    storage.make_folder(folder)
    write_theory(result, made, folder)
    return result, made


def write_theory(result: TheoryResult, made: Mapping[str, Any], folder: Path) -> None:
    """Write both files; how they were made comes last, so that its presence means that the numbers are whole."""
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in result.to_records())
    storage.write_atomically(folder / NUMBERS, "".join(lines).encode())
    storage.write_json(folder / MADE, dict(made))


def read_theory(runs: Path) -> tuple[TheoryResult, Mapping[str, Any]]:
    """The checks that are kept in a folder of runs, or in one of records.

    Raises:
        UsageError: There are none.
        CorruptedFile: A file is damaged.
    """
    folder = runs if (runs / NUMBERS).exists() else runs / "theory"
    if not (folder / MADE).exists():
        raise UsageError(f"{runs} holds no checks of the theory: manifold-mixup reproduce theory makes them")
    try:
        records = [json.loads(line) for line in (folder / NUMBERS).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise CorruptedFile(f"{folder / NUMBERS} is corrupted; delete {folder} and run it again") from error
    made: Mapping[str, Any] = storage.read_json(folder / MADE)
    return TheoryResult.from_records(records), made


def theory_grids(result: TheoryResult, made: Mapping[str, Any]) -> list[Grid]:
    """What could fail, and what is measured, with where the numbers come from."""
    found = made["hardware"]
    origin = (
        f"Made by `{made['command']}`, commit {made['versions'].get('commit') or 'not recorded'}, PyTorch "
        f"{made['versions']['torch']}, {found['cpu']}, one thread, {made['date'][:10]}: {len(made['seeds'])} seeds, "
        f"{duration(made['seconds'])}."
    )
    first, second = result.verdict_grid(), result.measured_grid()
    return [dataclasses.replace(grid, notes=[*grid.notes, origin]) for grid in (first, second)]
