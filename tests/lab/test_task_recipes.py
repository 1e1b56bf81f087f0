"""The recipes beyond supervised images: that they are valid, say what they are, and start."""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path

import pytest

from lab.published_data import publish
from manifold_mixup.lab.data import Places
from manifold_mixup.lab.experiment import Settings, run_experiments
from manifold_mixup.lab.recipe import RECIPES, Overrides, load_recipe
from manifold_mixup.lab.reproduce import cost_of
from manifold_mixup.lab.studies import load_study

FILES = {path.stem: path for path in sorted(RECIPES.rglob("*.toml"))}
GRAPHS = [name for name in FILES if name.endswith("_graphmix")]
IMAGES = [name for name in FILES if "_labels_" in name]

recipe = cache(load_recipe)


def header(name: str) -> str:
    found = re.match(r"(#.*\n)+", FILES[name].read_text())
    assert found is not None
    return found[0]


@pytest.mark.parametrize("name", [*GRAPHS, *IMAGES])
def test_a_recipe_says_its_study_its_cost_and_what_is_published(name):
    study, scale = ("graphmix", "desk") if name in GRAPHS else ("semi-supervised", FILES[name].parent.name)
    assert f"#   manifold-mixup reproduce {study} --scale {scale}\n" in header(name)
    assert f"#   manifold-mixup compare --recipe {name} --data-dir DIR\n" in header(name)
    assert cost_of(name)
    assert "ublished number" in header(name)
    assert [p.title for p in load_study(study).panels if p.recipes.get(scale) == name]
    assert recipe(name).name == name


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_recipes_have_the_settings_of_graphmix(name):
    config = recipe(name)
    train = config.train
    assert config.task.name == "node_classification"
    assert config.task.options == {"choose": "validation_error"}
    assert (train.steps, train.batch_size, train.eval_every) == (2000, 0, 1)
    assert (train.optimizer, train.lr, train.weight_decay, train.schedule) == ("adam", 0.01, 5e-4, "constant")
    init = "glorot" if config.model.name == "gat" else "uniform"
    assert (config.model.options["init"], config.model.options["input_dropout"]) == (init, 0.5)
    assert config.data.options["features"] == "binary"
    expected = {"alpha": 1.0, "gamma": 1.0 if name.startswith("pubmed") else 10.0, "predictions": 10}
    expected |= {"temperature": 0.1, "ramp_start": 500, "ramp_steps": 500, "loss": "bce-softmax", "coin": "either"}
    for method in config.methods[1:]:
        part = {"GraphMix without mixing": "alpha", "GraphMix without pseudo-labels": "gamma"}.get(method.label)
        for key, value in expected.items():
            assert method.options[key] == (0.0 if key == part else value)


@pytest.mark.parametrize("name", [name for name in IMAGES if name.endswith("_full")])
def test_full_recipes_have_the_settings_of_the_authors_first_code(name):
    config = recipe(name)
    train, updates = config.train, {"cifar10": 450 * 1000, "svhn": 660 * 200}[config.data.name]
    assert config.task.options["batch_size"] == train.batch_size == 100
    assert config.data.options["train_examples"] == {"cifar10": 4000, "svhn": 1000}[config.data.name]
    assert config.data.options["validation_examples"] == {"cifar10": 5000, "svhn": 7320}[config.data.name]
    assert (config.model.name, config.model.options["negative_slope"], config.model.options["dropout"]) == (
        "wrn_28_2",
        0.01,
        0.3,
    )
    falls = (0.5, 0.75, 0.875)
    assert train.steps == updates
    assert train.milestones == [round(updates * share) for share in falls]
    assert (train.lr, train.momentum, train.nesterov, train.weight_decay) == (0.1, 0.9, True, 5e-4)
    method = next(m for m in config.methods if m.label == "manifold mixup")
    assert method.options["layers"] == ["input", "stage1", "stage2"]
    assert (method.options["alpha"], method.options["alpha_unlabelled"], method.options["ramp"]) == (0.1, 2.0, 0.4)
    assert method.options["weight"] == {"cifar10": 1.0, "svhn": 2.0}[config.data.name]
    assert (method.options["targets"], method.options["target_mode"]) == ("logits", "train")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Places:
    with pytest.MonkeyPatch.context() as patch:
        yield publish(tmp_path_factory.mktemp("published"), patch)


def check_two_steps(name: str, places: Places, folder: Path, overrides: Overrides) -> None:
    """Two steps of every method, on small files of the published format."""
    outcome = run_experiments([load_recipe(name, overrides, places)], Settings(folder, places=places))
    assert [failure.error for failure in outcome.failures] == []
    labels = [method.label for method in recipe(name).methods]
    assert [record.label for record in outcome.records] == labels
    for record in outcome.records:
        assert record.train["steps"] == 2
        assert math.isfinite(record.metrics["test_nll"])
        assert math.isfinite(record.best["test_nll"])


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_recipe_starts(name, places, tmp_path):
    sizes = []
    if recipe(name).data.options.get("split", "random") == "random":
        sizes = ["data.options.labels_per_class=2", "data.options.test_examples=2"]
        planetoid = "split" in recipe(name).data.options
        sizes += [f"data.options.validation_{'examples' if planetoid else 'per_class'}=1"]
    check_two_steps(name, places, tmp_path, Overrides(steps=2, seeds="0,", settings=sizes))


@pytest.mark.parametrize("name", IMAGES)
def test_every_recipe_with_few_labels_starts(name, places, tmp_path):
    settings = ["train.batch_size=6", "task.options.batch_size=4", "data.options.validation_examples=4"]
    settings += ["train.precision=32-true", "train.eval_every=1", "train.threads=1"]
    if recipe(name).train.schedule == "step":
        settings += ["train.milestones=[1]"]
    width = 16 if recipe(name).model.name == "mlp" else 0.05
    overrides = Overrides(steps=2, train_examples=12, width=width, seeds="0,", settings=settings)
    check_two_steps(name, places, tmp_path, overrides)
