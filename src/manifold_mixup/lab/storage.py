"""Files that are either whole or absent: atomic writes, and nested state as safetensors plus JSON.

Nothing here unpickles: what a checkpoint holds is plain numbers in two open formats, and a checksum ties the two files
together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from manifold_mixup.lab.errors import CorruptedFile, StorageError

__all__ = [
    "append",
    "load_state",
    "make_folder",
    "pack",
    "read_json",
    "read_tensors",
    "save_state",
    "saved_step",
    "trim_log",
    "unpack",
    "write_atomically",
    "write_json",
    "write_tensors",
]

TENSOR, ITEMS = "$tensor", "$items"


def make_folder(folder: Path) -> None:
    """Create a folder and its parents; an existing one is left as it is.

    Raises:
        StorageError: It cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(folder, error, "create the folder") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new one and nothing between.

    Raises:
        StorageError: Full disk, missing permission, a folder in the way.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def append(path: Path, text: str) -> None:
    """Add to a text file.

    Raises:
        StorageError: It cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError as error:
        raise StorageError(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON that people can read, atomically. NaN and infinities are refused: they are no JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CorruptedFile: It is no JSON.
        StorageError: It cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise StorageError(path, error, "read") from error
    except ValueError as error:
        raise CorruptedFile(f"{path} is corrupted (no JSON): {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file atomically and return the sha256 of its bytes."""
    content = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CorruptedFile: Its bytes are not those of the checksum, or no safetensors.
        StorageError: It cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(path, error, "read") from error
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise CorruptedFile(f"{path} is corrupted (its checksum does not match)")
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise CorruptedFile(f"{path} is corrupted: {error}") from error


def pack(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Turn nested state into a JSON tree, moving its tensors into ``tensors`` under their path.

    Dictionaries, lists, numbers, strings, booleans and None are kept as they are, whole-number keys included.

    Raises:
        TypeError: Something else is in the state.
    """
    if isinstance(value, Tensor):
        tensors[path] = value.detach().clone()
        return {TENSOR: path}
    if isinstance(value, Mapping):
        pairs = [(k, pack(v, tensors, f"{path}/{k}" if path else str(k))) for k, v in value.items()]
        if all(isinstance(k, str) and not k.startswith("$") for k, _ in pairs):
            return dict(pairs)
        return {ITEMS: [list(pair) for pair in pairs]}
    if isinstance(value, (list, tuple)):
        return [pack(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"state at {path!r} is a {type(value).__name__}, which has no place in a checkpoint")


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`pack`; tuples come back as lists."""
    if isinstance(tree, dict):
        if TENSOR in tree:
            return tensors[tree[TENSOR]]
        if ITEMS in tree:
            return {key: unpack(value, tensors) for key, value in tree[ITEMS]}
        return {key: unpack(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    return tree


def save_state(folder: Path, state: Mapping[str, Any], step: int) -> None:
    """Save nested state as ``state.json`` and one safetensors file; a crash leaves this state or the one before.

    The tensor file is new at every step and ``state.json`` names it with its checksum; replacing ``state.json`` is the
    one moment at which the new state takes over.

    Raises:
        StorageError: The folder cannot be written.
    """
    make_folder(folder)
    tensors: dict[str, Tensor] = {}
    tree = pack(state, tensors)
    name = f"tensors-{step}.safetensors"
    digest = write_tensors(folder / name, tensors)
    content = {"step": step, "tensors": name, "sha256": digest, "state": tree}
    write_json(folder / "state.json", {**content, "checksum": _checksum(content)})
    for old in folder.glob("tensors-*.safetensors"):
        if old.name != name:
            with contextlib.suppress(OSError):
                old.unlink()


def _checksum(content: Mapping[str, Any]) -> str:
    """The sha256 of JSON values, whatever their layout in a file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_state(folder: Path) -> dict[str, Any] | None:
    """The state that :func:`save_state` left, or None if there is none.

    Raises:
        CorruptedFile: A file is truncated, changed or missing.
    """
    path = folder / "state.json"
    if not path.exists():
        return None
    hint = f"delete {folder} to start this run from the beginning"
    try:
        saved = read_json(path)
        if saved.pop("checksum") != _checksum(saved):
            raise CorruptedFile(f"{path} is corrupted (its checksum does not match)")
        tensors = read_tensors(folder / saved["tensors"], saved["sha256"])
        state: dict[str, Any] = unpack(saved["state"], tensors)
    except CorruptedFile as error:
        raise CorruptedFile(f"{error}; {hint}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptedFile(f"the checkpoint {path} is corrupted; {hint}") from error
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise CorruptedFile(f"the checkpoint {path} is incomplete; {hint}") from error
        raise
    return state


def saved_step(folder: Path) -> int | None:
    """The step of the state that :func:`save_state` left, or None if there is none that can be read."""
    try:
        step = read_json(folder / "state.json")["step"]
    except (CorruptedFile, StorageError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def trim_log(path: Path, step: int) -> None:
    """Drop the lines after a step, and a last line that was cut off; the log then reads as if nothing had happened."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, "".join(kept).encode())


def torch_rng_state() -> dict[str, Tensor]:
    """The states of torch's global generators, which ``nn.Dropout`` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_torch_rng(state: Mapping[str, Tensor]) -> None:
    """Put back what :func:`torch_rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
