"""Recipes: finding them, reading them, and changing them from the command line."""

from __future__ import annotations

import contextlib
import copy
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from manifold_mixup.lab.components import parse_component, parse_value
from manifold_mixup.lab.config import ExperimentConfig
from manifold_mixup.lab.data import DATASETS, Places, describe_data
from manifold_mixup.lab.errors import LabError, RecipeError, StorageError, UnknownName, UsageError
from manifold_mixup.lab.inheritance import inherit
from manifold_mixup.lab.models import MODELS
from manifold_mixup.lab.parsing import parse_config

__all__ = [
    "RECIPES",
    "Overrides",
    "load_recipe",
    "parse_component",
    "parse_data",
    "parse_seeds",
    "read_recipe",
    "recipe_files",
    "without_recipe",
]

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Overrides:
    """What the command line changes in a recipe; None and empty leave it as it is.

    Attributes:
        task: ``name`` or ``name:key=value,...``; with the recipe's own name, the options are changed one by one.
        data: ``name`` or ``name:key=value,...`` (``folder:PATH``, ``hf:NAME``); with the recipe's own name, the options
            are changed one by one.
        model: Likewise (``timm:NAME``).
        methods: ``name`` or ``name:key=value,...,label=text`` each; they replace the recipe's.
        seeds: ``5`` is 0 to 4, ``3,4`` and ``100-102`` are these.
        steps: Optimiser updates.
        epochs: Passes over the training data, in place of steps.
        train_examples: Size of the training split.
        width: The network's ``width``.
        threads: CPU threads of a run.
        settings: ``key.path=value`` each, for every other key.
        keep: Keep only the recipe's methods with these labels or names.
        measures: ``name`` or ``name:key=value,...`` each; they replace the recipe's, which are of no use to another
            data set and are left out there. ``none`` alone is no measure.
    """

    task: str | None = None
    data: str | None = None
    model: str | None = None
    methods: Sequence[str] = ()
    seeds: str | None = None
    steps: int | None = None
    epochs: int | None = None
    train_examples: int | None = None
    width: float | None = None
    threads: int | None = None
    settings: Sequence[str] = ()
    keep: Sequence[str] = ()
    measures: Sequence[str] = ()


def recipe_files() -> dict[str, Path]:
    """The recipes that come with the package, by name.

    Raises:
        RecipeError: Two files have one name.
    """
    files: dict[str, Path] = {}
    for path in sorted(RECIPES.rglob("*.toml")):
        if path.stem in files:
            both = " and ".join(str(p.relative_to(RECIPES)) for p in (files[path.stem], path))
            raise RecipeError(f"recipe {path.stem}", [f"{both} have one name; rename one of them"])
        files[path.stem] = path
    return files


def read_recipe(name_or_path: str) -> tuple[dict[str, Any], str]:
    """The plain values of a recipe, with those of the recipes that it extends, and what to call it in errors.

    Args:
        name_or_path: The name of a recipe of the package, or the path of a TOML file.

    Raises:
        UnknownName: There is no such recipe.
        RecipeError: A file is no TOML, or extends what does not exist or what extends it in turn.
        StorageError: A file cannot be read.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        known = recipe_files()
        if name_or_path not in known:
            raise UnknownName("recipe", name_or_path, known)
        path = known[name_or_path]
    source = f"recipe {name_or_path}"
    return _read(path, source, []), source


def _read(path: Path, source: str, children: Sequence[Path]) -> dict[str, Any]:
    """The values of one file on top of those of its parents; ``children`` led to it."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(path, error, "read the recipe") from error
    except ValueError as error:  # TOML mistakes and bytes that are no UTF-8
        raise RecipeError(source, [f"it is no TOML: {error}"]) from error
    if "extends" not in tree:
        return tree
    parent = tree.pop("extends")
    if not isinstance(parent, str):
        raise RecipeError(source, [f"extends: it should be a recipe's name or path, not {parent!r}"])
    known = recipe_files()
    if not parent.endswith(".toml") and parent not in known:
        raise RecipeError(source, [f"extends: {UnknownName('recipe', parent, known)}"])
    origin = path.parent / parent if parent.endswith(".toml") else known[parent]
    chain = [*children, path.resolve()]
    if origin.resolve() in chain:
        circle = " extends ".join(p.stem for p in (*chain, origin))
        raise RecipeError(source, [f"extends: {circle}, a circle"])
    return inherit(tree, _read(origin, f"recipe {parent}", chain))


def load_recipe(
    name_or_path: str, overrides: Overrides | None = None, places: Places | None = None
) -> ExperimentConfig:
    """Read a recipe, apply what the command line changes, and validate the result.

    Raises:
        LabError: It does not exist, cannot be read, or has mistakes (all of them are named).
    """
    tree, source = read_recipe(name_or_path)
    if overrides is not None:
        apply_overrides(tree, overrides)
    return parse_config(tree, source, places)


def apply_overrides(tree: dict[str, Any], overrides: Overrides) -> None:
    """Change the plain values of an experiment, in place.

    Raises:
        UsageError: A flag cannot be understood.
    """
    if overrides.keep:
        tree["methods"] = [m for m in tree["methods"] if {m.get("label"), m.get("name")} & set(overrides.keep)]
    for kind, text in (("task", overrides.task), ("data", overrides.data), ("model", overrides.model)):
        if text is not None:
            part, old = _PARTS[kind](text), tree.get(kind)
            if isinstance(old, dict) and old.get("name") == part["name"]:
                part["options"] = {**old.get("options", {}), **part["options"]}
            elif kind == "data":
                tree.pop("measures", None)
            tree[kind] = part
    if overrides.methods:
        tree["methods"] = [parse_component(text, "--method") for text in overrides.methods]
    if overrides.measures:
        tree["measures"] = [] if list(overrides.measures) == ["none"] else list(overrides.measures)
    if overrides.seeds is not None:
        tree["seeds"] = parse_seeds(overrides.seeds)
    train = dict(tree.get("train", {}))
    for length, other in (("steps", "epochs"), ("epochs", "steps")):
        if (value := getattr(overrides, length)) is not None:
            train[length] = value
            if getattr(overrides, other) is None:
                train.pop(other, None)
    if overrides.threads is not None:
        train["threads"] = overrides.threads
    if train:
        tree["train"] = train
    for kind, key, option in (
        ("data", "train_examples", overrides.train_examples),
        ("model", "width", overrides.width),
    ):
        if option is not None:
            part = tree.setdefault(kind, {})
            part["options"] = {**part.get("options", {}), key: option}
    for setting in overrides.settings:
        _set(tree, setting)


def _set(tree: dict[str, Any], setting: str) -> None:
    """Apply one ``key.path=value``; whether the key exists is for the validation to say."""
    path, equals, text = setting.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UsageError(f"--set {setting!r} should read key=value, such as train.lr=0.01")
    node: Any = tree
    for key in keys[:-1]:
        node = _item(node, key, setting) if isinstance(node, list) else node.setdefault(key, {})
        if not isinstance(node, (dict, list)):
            raise UsageError(f"--set {setting!r}: {key!r} is a value, not a table")
    if isinstance(node, list):
        raise UsageError(f"--set {setting!r}: a whole list entry cannot be set")
    node[keys[-1]] = parse_value(text)


def _item(items: list[Any], key: str, setting: str) -> Any:
    if not key.isdigit() or int(key) >= len(items):
        raise UsageError(f"--set {setting!r}: {key!r} is no index of a list of {len(items)}")
    return items[int(key)]


def _data_value(name: str) -> str | None:
    return DATASETS[name].positional if name in DATASETS else None


def _model_value(name: str) -> str | None:
    return MODELS[name].positional if name in MODELS else None


def parse_data(text: str) -> dict[str, Any]:
    """Read ``--data`` of a command that takes no recipe.

    Raises:
        UsageError: It does not read like a data set with options.
    """
    part = parse_component(text, "--data", _data_value)
    option = _data_value(part["name"])
    if isinstance(value := part["options"].get(option), str):
        path = Path(value).expanduser()
        if path.exists():  # in full, since a run is looked at from other folders too
            part["options"][option] = str(path.absolute())
    return part


def parse_model(text: str) -> dict[str, Any]:
    """Read ``--model``.

    Raises:
        UsageError: It does not read like a network with options.
    """
    return parse_component(text, "--model", _model_value)


def parse_task(text: str) -> dict[str, Any]:
    """Read ``--task``.

    Raises:
        UsageError: It does not read like a task with options.
    """
    return parse_component(text, "--task")


_PARTS = {"task": parse_task, "data": parse_data, "model": parse_model}


def parse_seeds(text: str) -> list[int]:
    """Read ``5`` (five seeds: 0 to 4), ``3,4`` (these), ``7,`` (this one) or ``100-104`` (a range).

    Raises:
        UsageError: It does not read like that.
    """
    cleaned = text.replace(" ", "")
    if re.fullmatch(r"[1-9]\d*", cleaned):
        return list(range(int(cleaned)))
    seeds: list[int] = []
    for item in cleaned.rstrip(",").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if cleaned == "0" or last < first:
            raise UsageError(f"--seeds {text!r} should read 5 (seeds 0 to 4), 3,4 or 100-104 (these), or 7, (this one)")
        seeds += range(first, last + 1)
    return seeds


IMAGES: dict[str, Any] = {
    "model": {"name": "preact_resnet18"},
    "train": {
        "epochs": 40,
        "batch_size": 100,
        "optimizer": "sgd",
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
        "schedule": "one-cycle",
        "precision": "bf16-mixed",
    },
}
GRAPH: dict[str, Any] = {
    "task": {"name": "node_classification"},
    "model": {"name": "gcn"},
    "train": {"steps": 2000, "batch_size": "full", "lr": 0.01, "weight_decay": 5e-4, "eval_every": 1},
}
OTHER: dict[str, Any] = {"model": {"name": "mlp"}}
BATCH = 100  # examples, unless there are fewer labels
METHODS: dict[str, tuple[str, ...]] = {
    "classification": ("none", "input_mixup", "manifold_mixup"),
    "semi_supervised": ("none", "manifold_mixup", "consistency", "ict"),
    "node_classification": ("none", "graphmix"),
}


def without_recipe(overrides: Overrides, *, name: str | None = None, places: Places | None = None) -> ExperimentConfig:
    """An experiment from the command line alone: digits, the usual methods and three seeds unless told otherwise.

    Images are trained with SGD and one cycle of the learning rate in bfloat16, on a PreActResNet18; graphs as in
    GraphMix's code, on a GCN; anything else with the defaults of :class:`~manifold_mixup.lab.config.TrainConfig`, on an
    MLP.

    Args:
        overrides: What the command line says.
        name: What the experiment is called; None makes a name of data and network.
        places: Where the data lie.

    Raises:
        RecipeError: With all mistakes at once.
    """
    data = parse_data(overrides.data or "digits")
    tree = copy.deepcopy({"data": {"name": "digits"}, "seeds": [0, 1, 2], **_defaults(data, places)})
    labels = overrides.train_examples or data["options"].get("train_examples")
    if isinstance(labels, int) and overrides.task is not None and labels < BATCH:
        tree.setdefault("train", {})["batch_size"] = labels  # few labels are seen all at once
    apply_overrides(tree, overrides)
    usual = METHODS.get(tree.get("task", {"name": "classification"})["name"], ())
    tree.setdefault("methods", [{"name": method} for method in usual])
    if name is None:
        parts = [*(Path(str(v)).stem for v in _values(tree["data"])), *map(str, _values(tree["model"]))]
        name = "-".join([tree["data"]["name"], tree["model"]["name"], *parts])
    tree["name"] = re.sub(r"[^\w.-]+", "-", name)
    return parse_config(tree, "command line", places)


def _defaults(data: Mapping[str, Any], places: Places | None) -> dict[str, Any]:
    """Network and training for such data; what is wrong with them is for the validation to say."""
    if data["name"] not in DATASETS:
        return OTHER
    info = DATASETS[data["name"]].info
    if not info.shape:  # only the data themselves can say
        with contextlib.suppress(LabError, ValidationError):
            info = describe_data(data["name"], data["options"], places)
    if info.nodes:
        return GRAPH
    return OTHER if info.pixels is None else IMAGES


def _values(part: Mapping[str, Any]) -> list[Any]:
    """What a name takes as its value, such as the path of a folder."""
    option = _data_value(part["name"]) or _model_value(part["name"])
    value = part.get("options", {}).get(option)
    return [] if value is None else [value]
