"""Experiments that take milliseconds, and the pieces of one run put together by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manifold_mixup.lab import streams
from manifold_mixup.lab.config import ExperimentConfig, PlannedRun, TrainConfig
from manifold_mixup.lab.data import Examples, Pixels, load_data
from manifold_mixup.lab.methods import make_method
from manifold_mixup.lab.models import build_model, hidden_layers
from manifold_mixup.lab.parsing import effective_settings, parse_config
from manifold_mixup.lab.training import Fitted, Hooks, fit

SPIRAL: dict[str, Any] = {
    "name": "small",
    "data": {"name": "spiral", "options": {"points_per_class": 12, "validation_points": 20, "test_points": 20}},
    "model": {"name": "spiral_net", "options": {"width": 8}},
    "train": {"steps": 12, "batch_size": 10, "lr": 0.01, "eval_every": 4},
    "methods": [{"name": "none"}],
    "seeds": [0],
}
DIGITS: dict[str, Any] = {
    "name": "small",
    "data": {"name": "digits", "options": {"train_examples": 50}},
    "model": {"name": "mlp", "options": {"width": 12, "depth": 2}},
    "train": {"steps": 12, "batch_size": 10, "lr": 0.01, "eval_every": 4},
    "methods": [{"name": "none"}],
    "seeds": [0],
}


def tree(base: Mapping[str, Any] = SPIRAL, **changes: Any) -> dict[str, Any]:
    """A copy of a small experiment; ``train__steps=3`` changes ``train.steps``."""
    result = copy.deepcopy(dict(base))
    for path, value in changes.items():
        *parents, key = path.split("__")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = value
    return result


def experiment(base: Mapping[str, Any] = SPIRAL, **changes: Any) -> ExperimentConfig:
    return parse_config(tree(base, **changes), "test")


def one_run(base: Mapping[str, Any] = SPIRAL, **changes: Any) -> PlannedRun:
    return next(experiment(base, **changes).runs())


def train(run: PlannedRun, folder: Path, hooks: Hooks | None = None) -> tuple[dict[str, Tensor], Fitted, nn.Module]:
    """Train one run without measuring it: its last weights, what the loop returned, and the network."""
    config = run.config
    folder.mkdir(parents=True, exist_ok=True)
    splits = load_data(config.data.name, config.data.options, config.seed)
    options, settings = effective_settings(config)
    with torch.random.fork_rng():
        torch.manual_seed(streams.stream_seed(config.seed, "weights"))
        model = build_model(config.model.name, options, splits.info.shape, len(splits.info.classes))
        torch.manual_seed(streams.stream_seed(config.seed, "torch"))
        fitted = fit(
            model,
            make_method(config.method.name, config.method.options),
            splits.train,
            splits.validation,
            settings,
            hidden=hidden_layers(config.model.name, options),
            seed=config.seed,
            folder=folder,
            config_hash=config.hash,
            hooks=hooks or Hooks(),
            pixels=splits.info.pixels,
        )
    return {name: value.clone() for name, value in model.state_dict().items()}, fitted, model


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two sets of weights are the same bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


PIXELS = Pixels((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), crop_padding=1, flip=True)


def coloured(n: int, seed: int = 0) -> Examples:
    """Images of 8x8 pixels, uint8, in three classes that differ in colour."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randint(0, 150, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
    x[torch.arange(n), y] += 100
    return Examples(x, y)


def train_images(
    folder: Path, hooks: Hooks | None = None, *, method: str = "manifold_mixup", validation: int = 12, **settings: Any
) -> tuple[dict[str, Tensor], Fitted]:
    """Train a small residual network on small images: its last weights and what the loop returned."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {"width": 4}
    values = {"steps": 12, "batch_size": 8, "optimizer": "sgd", "momentum": 0.9, "lr": 0.05, **settings}
    if "epochs" in settings:
        del values["steps"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model("preact_resnet8", options, (3, 8, 8), 3)
        fitted = fit(
            model,
            make_method(method, {}),
            coloured(32),
            coloured(validation, seed=1),
            TrainConfig.model_validate(values),
            hidden=hidden_layers("preact_resnet8", options),
            seed=0,
            folder=folder,
            config_hash="x",
            hooks=hooks or Hooks(),
            pixels=PIXELS,
        )
    return {name: value.clone() for name, value in model.state_dict().items()}, fitted
