"""Runs on a graph, from the small files of the published format to the record and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.published_data import publish
from manifold_mixup.lab.config import Component
from manifold_mixup.lab.data import Places
from manifold_mixup.lab.errors import Interrupted, RecipeError, UsageError
from manifold_mixup.lab.evaluation import evaluate_run
from manifold_mixup.lab.hooks import Hooks
from manifold_mixup.lab.parsing import parse_config
from manifold_mixup.lab.recipe import Overrides, without_recipe
from manifold_mixup.lab.records import Record, RunFolder
from manifold_mixup.lab.run import execute

SMALL: dict[str, Any] = {
    "name": "small",
    "task": {"name": "node_classification"},
    "data": {"name": "citeseer"},
    "model": {"name": "gcn", "options": {"hidden": 4}},
    "train": {"steps": 12, "batch_size": "full", "lr": 0.05, "eval_every": 1},
    "methods": [{"name": "graphmix", "options": {"ramp_start": 2, "ramp_steps": 4, "predictions": 2}}],
    "seeds": [0],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Places:
    with pytest.MonkeyPatch.context() as patch:
        yield publish(tmp_path_factory.mktemp("published"), patch)


def run(folder: Path, places: Places, hooks: Hooks | None = None, **changes: Any) -> tuple[Record, RunFolder]:
    place = RunFolder(folder, next(parse_config(SMALL | changes, "test", places).runs()))
    return execute(place, hooks, places=places), place


@pytest.mark.parametrize("method", ["none", "graphmix", "label_smoothing", "weight_decay"])
@pytest.mark.parametrize("model", ["gcn", "gat"])
def test_a_run_is_recorded_and_measured_again_to_the_same_numbers(tmp_path, places, method, model):
    changes = {"methods": [{"name": method}], "model": {"name": model, "options": {"hidden": 4}}}
    record, folder = run(tmp_path, places, **changes)
    assert (record.task, record.train["best_by"]) == ("node_classification", "validation_error")
    log = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 13))
    least = min(line["validation_error"] for line in log)
    assert record.train["best_step"] == max(line["step"] for line in log if line["validation_error"] == least)
    assert record.best["validation_error"] == pytest.approx(least)
    for weights, numbers in (("last", record.metrics), ("best", record.best)):
        again = evaluate_run(folder.path, [], weights=weights, places=places).metrics
        assert {name: again[name] for name in numbers} == numbers


@pytest.mark.parametrize("step", [1, 6, 11])
def test_a_run_that_is_cut_off_ends_with_the_same_bits(tmp_path, places, step):
    whole, place = run(tmp_path / "whole", places)
    left = iter(range(step))
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", places, Hooks(stop=lambda: next(left, None) is None))
    resumed, other = run(tmp_path / "cut", places)
    assert (resumed.metrics, resumed.best) == (whole.metrics, whole.best)
    assert other.log.read_text() == place.log.read_text()
    assert (other.path / "model.safetensors").read_bytes() == (place.path / "model.safetensors").read_bytes()


def test_labels_of_the_test_nodes_have_no_influence_on_the_training(tmp_path, places, monkeypatch):
    """Their features are seen, their labels are not: shuffled ones change what is measured and nothing else."""
    whole, place = run(tmp_path / "whole", places)
    from manifold_mixup.lab.data.base import DataSplits, Examples

    hand_out = DataSplits.hand_out_test

    def shuffled(self: DataSplits) -> Examples:
        test = hand_out(self)
        return Examples(test.x, (test.y + 1) % len(self.info.classes))

    monkeypatch.setattr(DataSplits, "hand_out_test", shuffled)
    other, second = run(tmp_path / "other", places)
    assert other.metrics["test_nll"] != whole.metrics["test_nll"]
    for name in ("model.safetensors", "best.safetensors"):
        assert (second.path / name).read_bytes() == (place.path / name).read_bytes()


def test_a_network_on_a_graph_is_not_measured_on_other_data(tmp_path, places):
    _, folder = run(tmp_path, places)
    with pytest.raises(UsageError, match=r"measured on that graph only: leave out --data"):
        evaluate_run(folder.path, [], data=Component(name="digits"), places=places)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"name": "classification"}, "methods": [{"name": "none"}]}, "'citeseer' is one graph; set task.name"),
        ({"model": {"name": "mlp"}, "methods": [{"name": "none"}]}, "'mlp' reads no graph"),
        ({"methods": [{"name": "manifold_mixup"}]}, "'manifold_mixup' is for classification and semi_supervised"),
        ({"methods": [{"name": "ict"}]}, "'ict' is for semi_supervised, the task is node_classification"),
        ({"train": {"steps": 2, "batch_size": 0, "compile": True}}, r"train\.compile: networks on a graph"),
        ({"data": {"name": "digits"}, "task": {"name": "classification"}}, "'gcn' reads nodes of a graph"),
        ({"measures": ["fgsm"]}, "measure 'fgsm' needs images"),
    ],
)
def test_what_does_not_fit_a_graph_is_named(places, changes, message):
    with pytest.raises(RecipeError, match=message):
        parse_config(SMALL | changes, "test", places)


def test_a_graph_alone_makes_an_experiment(places):
    config = without_recipe(Overrides(data="citeseer"), places=places)
    assert (config.task.name, config.model.name) == ("node_classification", "gcn")
    assert [method.name for method in config.methods] == ["none", "graphmix"]
    assert (config.train.steps, config.train.batch_size, config.train.lr) == (2000, 0, 0.01)


def test_few_labels_alone_make_an_experiment():
    config = without_recipe(Overrides(task="semi_supervised:batch_size=9", train_examples=20))
    assert config.task.options["batch_size"] == 9
    assert config.train.batch_size == 20
    said = without_recipe(Overrides(task="semi_supervised", train_examples=20, settings=["train.batch_size=5"]))
    assert said.train.batch_size == 5
    assert [method.name for method in config.methods] == ["none", "manifold_mixup", "consistency", "ict"]
    assert config.data.options["train_examples"] == 20


def test_isolated_nodes_are_classified_by_their_own_features(tmp_path, places):
    """Of all nodes without edges: what the network says of one is what its twin without edges says."""
    from manifold_mixup.lab.run import fresh_model
    from manifold_mixup.lab.tasks import make_task

    config = next(parse_config(SMALL, "test", places).runs()).config
    task = make_task(config.task)
    splits = task.splits(config.data, 0, places)
    assert splits.graph is not None
    lonely = torch.ones(splits.graph.nodes, dtype=torch.bool)
    lonely[splits.graph.edges.flatten()] = False
    assert lonely.any()
    with torch.random.fork_rng():
        model, _ = fresh_model(config, splits.info)
    task.place(model, splits)
    nodes = lonely.nonzero().flatten()
    model.eval()
    torch.testing.assert_close(model(nodes), model.features_only().eval()(nodes))
