"""From plain values to a validated experiment.

Everything wrong is reported at once, each mistake with its key path: the shape of the experiment, the names in the
registries, the options of every part against that part's own model, and the layers against the network itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, get_args

import torch
from pydantic import BaseModel, ValidationError

from manifold_mixup.lab.components import parse_component
from manifold_mixup.lab.config import CLASSIFICATION, Component, ExperimentConfig, RunConfig, TrainConfig, slug
from manifold_mixup.lab.data import DataInfo, Places, describe_data, get_dataset
from manifold_mixup.lab.errors import LabError, RecipeError, UnknownName, nearest
from manifold_mixup.lab.measures.base import Measure
from manifold_mixup.lab.measures.registry import get_measure
from manifold_mixup.lab.methods import get_method, make_method
from manifold_mixup.lab.models import build_model, get_model, hidden_layers
from manifold_mixup.lab.options import Options
from manifold_mixup.lab.tasks import get_task, make_task

__all__ = ["effective_settings", "explain", "parse_config"]


def parse_config(raw: Mapping[str, Any], source: str, places: Places | None = None) -> ExperimentConfig:
    """Validate an experiment and fill in every default.

    Args:
        raw: The experiment as plain values; it is left as it is.
        source: What to call it in an error.
        places: Where the data lie, for those whose shape and classes only they themselves can say.

    Raises:
        RecipeError: With all mistakes at once.
    """
    tree = copy.deepcopy(dict(raw))
    _add_labels(tree)
    problems, known = _resolve_options(tree)
    config: ExperimentConfig | None = None
    try:
        config = ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        problems = explain(error, ExperimentConfig) + problems
    problems += _check_repetitions(tree)
    wrong, measures = _check_measures(tree)
    problems += wrong
    problems += _check_fit(tree, known, measures, places)
    if problems or config is None:
        raise RecipeError(source, problems)
    return config


def effective_settings(run: RunConfig) -> tuple[dict[str, Any], TrainConfig]:
    """The network's options and the training settings once the method has set its own.

    Returns:
        Options for ``build_model``, and the settings of the loop.
    """
    method = make_method(run.method.name, run.method.options)
    model_options = {**run.model.options, **method.model_options()}
    train = TrainConfig.model_validate({**run.train.model_dump(), **method.train_options()})
    return model_options, train


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """Pydantic's findings as one sentence each: key path, what is wrong, what was given."""
    sentences = []
    for item in error.errors(include_url=False):
        loc = item["loc"]
        path = prefix + ".".join(map(str, loc)) if loc else prefix.rstrip(".")
        if item["type"] == "extra_forbidden":
            text = f"unknown key, {nearest(str(loc[-1]), _fields_at(model, loc[:-1]))}"
        else:
            text = item["msg"].removeprefix("Value error, ")
            text = text[:1].lower() + text[1:]
            if item["type"] != "missing" and isinstance(item["input"], (str, int, float)):
                text += f" (got {item['input']!r})"
        sentences.append(f"{path}: {text}" if path else text)
    return sentences


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Names of the keys that are allowed at a place in a nested model."""
    for part in loc:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            inner = [t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)]
            model = inner[0]
    return list(model.model_fields)


def _named(value: Any) -> bool:
    """Whether a part of the tree can be looked up; if not, its shape is pydantic's to report."""
    return isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get("options", {}), dict)


def _methods(tree: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The methods that can be looked up, by key path."""
    methods = tree.get("methods")
    return {f"methods.{i}": m for i, m in enumerate(methods) if _named(m)} if isinstance(methods, list) else {}


def _add_labels(tree: Mapping[str, Any]) -> None:
    """Give every method without a label one: its name and the options that were set."""
    for method in _methods(tree).values():
        given = ", ".join(f"{key}={_show(value)}" for key, value in method.get("options", {}).items())
        method.setdefault("label", f"{method['name']} ({given})" if given else method["name"])


def _show(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _resolve_options(tree: Mapping[str, Any]) -> tuple[list[str], set[str]]:
    """Replace the options of task, data set, network and methods by their full form, in place.

    Returns:
        What is wrong, and the key paths of the parts whose names are known.
    """
    problems: list[str] = []
    known: set[str] = set()
    parts: list[tuple[str, dict[str, Any], str]] = [
        *((kind, tree[kind], kind) for kind in ("task", "data", "model") if _named(tree.get(kind))),
        *((path, method, "method") for path, method in _methods(tree).items()),
    ]
    for path, part, kind in parts:
        try:
            model = _options_model(kind, part["name"])
            part["options"], mistakes = _validate_options(model, part.get("options", {}))
        except UnknownName as error:
            problems.append(f"{path}.name: {error}")
            continue
        problems += [f"{path}.options.{mistake}" for mistake in mistakes]
        known.add(path)
    return problems, known


def _validate_options(model: type[Options], options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The full form of what is right, so that it can be checked on, and what is wrong."""
    try:
        return model.model_validate(dict(options)).model_dump(mode="json"), []
    except ValidationError as error:
        wrong = {item["loc"][0] for item in error.errors() if item["loc"]}
        right = {key: value for key, value in options.items() if wrong and key not in wrong}
        # what is missing is missing without the wrong ones, too: then nothing can be filled in
        rest = _validate_options(model, right)[0] if len(right) < len(options) else dict(options)
        return rest, explain(error, model)


def _options_model(kind: str, name: str) -> type[Options]:
    if kind == "task":
        return get_task(name).Options
    if kind == "data":
        return get_dataset(name).options
    return get_model(name).options if kind == "model" else get_method(name).Options


def _check_repetitions(tree: Mapping[str, Any]) -> list[str]:
    """Labels and seeds must differ, since each names a folder."""
    problems = []
    first: dict[str, str] = {}
    for path, method in _methods(tree).items():
        if not isinstance(method["label"], str):
            continue
        folder = slug(method["label"])
        if not folder:
            problems.append(f"{path}.label: {method['label']!r} holds no letter or digit")
        elif folder in first:
            problems.append(
                f"{path}.label: {method['label']!r} is the label of {first[folder]} too; labels must differ"
            )
        first.setdefault(folder, path)
    seeds = tree.get("seeds")
    if isinstance(seeds, list) and len(set(map(repr, seeds))) < len(seeds):
        problems.append("seeds: a seed is listed twice")
    return problems


def _check_measures(tree: Mapping[str, Any]) -> tuple[list[str], dict[str, Measure]]:
    """Names and options of the measures.

    Returns:
        What is wrong, and the measures that there are by key path.
    """
    problems: list[str] = []
    found: dict[str, Measure] = {}
    listed = tree.get("measures")
    for i, text in enumerate(listed if isinstance(listed, list) else []):
        if not isinstance(text, str):
            continue  # pydantic's to report
        path = f"measures.{i}"
        try:
            part = parse_component(text, path)
            entry = get_measure(part["name"])
            entry.options.model_validate(part["options"])
        except UnknownName as error:
            problems.append(f"{path}: {error}")
        except LabError as error:
            problems.append(str(error))
        except ValidationError as error:
            problems += explain(error, entry.options, f"{path}: {entry.name}.")
        else:
            if entry in found.values():  # its numbers would have the same names
                problems.append(f"{path}: measure {entry.name!r} is listed twice")
            found[path] = entry
    return problems, found


def _check_fit(
    tree: Mapping[str, Any], known: set[str], measures: Mapping[str, Measure], places: Places | None
) -> list[str]:
    """Whether network, data and methods fit; asked of the network itself, built without memory or random numbers."""
    if not {"data", "model"} <= known:
        return []
    try:
        info = describe_data(tree["data"]["name"], tree["data"]["options"], places)
    except LabError as error:
        return [f"data: {error}"]
    problems = _without_images(info, measures) + _check_task(tree, known, info)
    model = Component(name=tree["model"]["name"], options=tree["model"]["options"])
    settable = get_model(model.name).options.model_fields
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            modules = [
                n for n, _ in build_model(model.name, model.options, info.shape, len(info.classes)).named_modules()
            ]
    except LabError as error:
        return [*problems, f"model: {error}"]
    hidden = hidden_layers(model.name, model.options)
    for path, part in _methods(tree).items():
        if path in known:
            method = make_method(part["name"], part["options"])
            problems += [
                f"{path}: method {part['name']!r} sets model.options.{key}, which model {model.name!r} does not have"
                for key in method.model_options()
                if key not in settable
            ]
            problems += [f"{path}.{problem}" for problem in method.problems(modules, hidden)]
    return problems


def _check_task(tree: Mapping[str, Any], known: set[str], info: DataInfo) -> list[str]:
    """Whether data, network, training and methods are what the task works with."""
    part = tree.get("task", {"name": CLASSIFICATION.name})
    if "task" in tree and "task" not in known:
        return []
    task = make_task(Component(name=part["name"], options=part.get("options", {})))
    try:
        train = TrainConfig.model_validate(tree.get("train", {}))
    except ValidationError:
        train = None  # its mistakes are reported elsewhere
    data = Component(name=tree["data"]["name"], options=tree["data"]["options"])
    problems = task.problems(data, info, get_model(tree["model"]["name"]), train)
    for path, method in _methods(tree).items():
        if path in known and task.name not in (fit := get_method(method["name"]).tasks):
            problems.append(f"{path}: method {method['name']!r} is for {' and '.join(fit)}, the task is {task.name}")
    return problems


def _without_images(info: DataInfo, measures: Mapping[str, Measure]) -> list[str]:
    """The measures that need images, where the data are none: found out before the runs, not after them."""
    if info.images:
        return []
    return [
        f"{path}: measure {entry.name!r} needs images, and data {info.name!r} are none"
        for path, entry in measures.items()
        if "images" in entry.needs
    ]
