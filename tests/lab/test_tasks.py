"""Tasks: what they refuse, what they hand to a run, and that supervised runs are what they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lab.small import DIGITS, equal, experiment, one_run
from manifold_mixup.lab.batches import Batches
from manifold_mixup.lab.config import CLASSIFICATION, Component, RunConfig
from manifold_mixup.lab.data import DataInfo, DataSplits, Examples, Graph, load_data
from manifold_mixup.lab.devices import Devices
from manifold_mixup.lab.errors import Interrupted, RecipeError, UnknownName, UsageError
from manifold_mixup.lab.evaluation import evaluate_run
from manifold_mixup.lab.hooks import Hooks
from manifold_mixup.lab.parsing import parse_config
from manifold_mixup.lab.records import Record, RunFolder
from manifold_mixup.lab.results import read_lines
from manifold_mixup.lab.run import execute
from manifold_mixup.lab.selection import Best
from manifold_mixup.lab.tasks import TASKS, make_task

DESK = Path(__file__).parents[2] / "docs" / "results" / "desk"
FEW: dict[str, Any] = {
    **DIGITS,
    "task": {"name": "semi_supervised", "options": {"batch_size": 7}},
    "data": {"name": "digits", "options": {"train_examples": 20}},
    "methods": [{"name": "consistency"}],
}


def problems(**changes: Any) -> list[str]:
    """What is wrong with a small semi-supervised experiment after these changes."""
    with pytest.raises(RecipeError) as caught:
        experiment(FEW, **changes)
    return caught.value.problems


# ---------------------------------------------------------------- supervised runs are what they were


def test_a_supervised_run_keeps_the_hash_that_it_had_before_there_were_tasks():
    record = read_lines(DESK / "digits_200_desk.jsonl")[0].record
    config = next(
        run.config
        for run in parse_config(_recipe("digits_200_desk"), "test").runs()
        if (run.label, run.config.seed) == (record.label, record.seed)
    )
    assert config.task == CLASSIFICATION
    assert config.hash == record.config_hash


def _recipe(name: str) -> dict[str, Any]:
    from manifold_mixup.lab.recipe import read_recipe

    return read_recipe(name)[0]


def test_another_task_and_each_of_its_options_is_part_of_the_hash():
    base = one_run(FEW).config
    supervised = one_run(DIGITS, data__options={"train_examples": 20}).config
    other = one_run(FEW, task__options={"batch_size": 8}).config
    assert len({base.hash, supervised.hash, other.hash}) == 3


def test_a_configuration_without_a_task_is_read_as_supervised():
    saved = one_run(DIGITS).config.model_dump(mode="json")
    del saved["task"]
    assert RunConfig.model_validate(saved).hash == one_run(DIGITS).config.hash


# ---------------------------------------------------------------- what does not fit


def test_an_unknown_task_names_those_there_are():
    with pytest.raises(RecipeError, match="semi_supervised"):
        experiment(FEW, task__name="semisupervised")
    with pytest.raises(UnknownName):
        make_task(Component(name="clustering"))


def test_the_options_of_a_task_are_checked():
    assert "task.options.batch_size" in problems(task__options={"batch_size": 0})[0]
    assert "unknown key" in problems(task__options={"batch": 3})[0]


def test_a_method_for_unlabelled_examples_is_refused_where_there_are_none():
    found = problems(task={"name": "classification"})
    assert found == ["methods.0: method 'consistency' is for semi_supervised, the task is classification"]


def test_labels_cannot_be_taken_away_without_saying_how_many_stay():
    assert problems(data={"name": "mnist"}) == [
        "data.options.train_examples: say how many training examples keep their labels"
    ]


def test_data_that_cannot_be_thinned_out_have_no_unlabelled_pool():
    found = problems(data={"name": "spiral"}, model={"name": "spiral_net", "options": {"width": 8}})
    assert found == ["data: 'spiral' has no option train_examples, so no labels can be taken away"]


def test_images_are_no_graph():
    found = problems(task={"name": "node_classification"}, methods=[{"name": "none"}])
    assert len(found) == 2
    assert "'digits' is no graph" in found[0]
    assert "'mlp' reads no graph" in found[1]


def test_every_task_says_what_it_is():
    assert all(task.title and task.name == name for name, task in TASKS.items())


# ---------------------------------------------------------------- few labels: the splits


def splits(seed: int = 0, **options: Any) -> DataSplits:
    task = make_task(Component(name="semi_supervised", options={"batch_size": 7, **options}))
    return task.splits(Component(name="digits", options={"train_examples": 20}), seed, None)


def rows(x: Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in x}


def test_the_pool_is_all_that_the_validation_split_leaves_and_holds_no_test_example():
    found, whole = splits(), load_data("digits", {}, 0)
    assert found.unlabelled is not None
    assert torch.equal(found.unlabelled.x, whole.train.x)
    assert len(found.train) == 20
    assert rows(found.train.x) <= rows(found.unlabelled.x)
    known = rows(found.unlabelled.x)
    assert not known & rows(found.validation.x)
    assert not known & rows(found.hand_out_test().x)


def test_the_labelled_split_is_the_one_that_a_supervised_run_has():
    found, supervised = splits(3), load_data("digits", {"train_examples": 20}, 3)
    assert torch.equal(found.train.x, supervised.train.x)
    assert torch.equal(found.train.y, supervised.train.y)


def test_a_smaller_pool_is_a_part_of_the_whole():
    pool = splits(unlabelled_examples=50).unlabelled
    assert pool is not None
    assert len(pool.x) == 50
    assert rows(pool.x) <= rows(load_data("digits", {}, 0).train.x)


def test_a_pool_smaller_than_a_batch_is_refused():
    with pytest.raises(UsageError, match=r"batch_size 60 is more than the 50 unlabelled"):
        splits(unlabelled_examples=50, batch_size=60)


def test_a_class_without_any_labelled_example_is_named(monkeypatch):
    def lacking(name: str, options: dict[str, Any], *rest: Any) -> DataSplits:
        found = load_data(name, options, 0)
        keep = found.train.y != 4
        found.train = Examples(found.train.x[keep], found.train.y[keep])
        return found

    monkeypatch.setattr("manifold_mixup.lab.tasks.semi_supervised.load_data", lacking)
    with pytest.raises(UsageError, match=r"no labelled example of class '4' among the 18: raise data\.options"):
        splits()


# ---------------------------------------------------------------- few labels: runs


def run(folder: Path, hooks: Hooks | None = None, **changes: Any) -> tuple[Record, RunFolder]:
    place = RunFolder(folder, one_run(FEW, **changes))
    return execute(place, hooks), place


@pytest.mark.parametrize("method", ["consistency", "ict", "manifold_mixup", "none"])
def test_a_run_ends_with_a_record_that_names_its_task_and_its_examples(tmp_path, method):
    record, folder = run(tmp_path, methods=[{"name": method}])
    assert record.task == "semi_supervised"
    assert record.train["examples"] == 20
    looks = method in ("consistency", "ict")
    assert record.train.get("unlabelled") == (len(load_data("digits", {}, 0).train) if looks else None)
    assert record.train["best_by"] == "validation_error"
    again = evaluate_run(folder.path, [])
    assert {name: again.metrics[name] for name in record.metrics} == record.metrics


@pytest.mark.parametrize("method", ["consistency", "ict"])
@pytest.mark.parametrize("step", [1, 5, 11])
def test_a_run_that_is_cut_off_ends_with_the_same_bits(tmp_path, method, step):
    changes = {"methods": [{"name": method}], "train__lr": 0.02}
    whole, place = run(tmp_path / "whole", **changes)
    steps = iter(range(step))
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", Hooks(stop=lambda: next(steps, None) is None), **changes)
    resumed, other = run(tmp_path / "cut", **changes)
    assert resumed.metrics == whole.metrics
    assert resumed.best == whole.best
    assert other.log.read_text() == place.log.read_text()
    for name in ("model.safetensors", "best.safetensors"):
        assert (other.path / name).read_bytes() == (place.path / name).read_bytes()


def test_methods_at_one_seed_see_the_same_labelled_batches(tmp_path):
    """The unlabelled batches have a stream of their own: the controls are paired with what looks at them."""
    plain, _ = run(tmp_path, methods=[{"name": "manifold_mixup", "options": {"alpha": 0.1}}])
    off, _ = run(tmp_path, methods=[{"name": "consistency", "options": {"weight": 0.0}}])
    assert off.metrics == plain.metrics


def test_the_teacher_is_what_is_measured_and_kept(tmp_path):
    record, folder = run(tmp_path, methods=[{"name": "ict", "options": {"decay": 0.0, "weight": 0.0}}])
    student, other = run(tmp_path, methods=[{"name": "manifold_mixup", "options": {"alpha": 1.0, "layers": ["input"]}}])
    assert record.metrics == student.metrics  # a teacher that keeps nothing of itself is the network
    kept, _ = run(tmp_path / "kept", methods=[{"name": "ict", "options": {"decay": 1.0, "weight": 0.0}}])
    assert kept.metrics != student.metrics
    assert folder.path != other.path


def test_a_teacher_beside_an_average_of_the_weights_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"has a teacher, an average of its own: leave train\.ema unset"):
        run(tmp_path, methods=[{"name": "ict"}], train__ema=0.9)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    from lightning_fabric import Fabric

    monkeypatch.setattr(Fabric, "world_size", 2)
    place = RunFolder(tmp_path, one_run(FEW, train__batch_size=10))
    with pytest.raises(UsageError, match="'consistency' trains on one device, not on 2"):
        execute(place, devices=Devices("cpu"))


# ---------------------------------------------------------------- the pieces


def test_batches_with_replacement_come_from_all_examples_and_go_on_from_a_saved_state():
    batches = Batches(5, 40, 0, stream="/unlabelled", replacement=True)
    first = batches.draw()
    assert set(first.tolist()) == {0, 1, 2, 3, 4}
    saved = json.loads(json.dumps({"next": batches.state_dict()["next"]})) | {
        key: value for key, value in batches.state_dict().items() if key != "next"
    }
    then = [batches.draw() for _ in range(3)]
    other = Batches(5, 40, 1, replacement=True)
    other.load_state_dict(saved)
    assert all(torch.equal(a, other.draw()) for a in then)
    assert not torch.equal(first, then[0])


def test_streams_of_two_feeds_are_independent():
    labelled, pool = Batches(100, 10, 0), Batches(100, 10, 0, stream="/unlabelled")
    assert not torch.equal(labelled.draw(), pool.draw())


@pytest.mark.parametrize(
    ("by", "expected"),
    [("validation_nll", 2), ("validation_error", 4)],
)
def test_the_best_weights_are_the_first_of_equal_nlls_and_the_last_of_equal_errors(by, expected):
    looks = [(1, 5.0, 1.0), (2, 4.0, 0.5), (3, 3.0, 0.5), (4, 3.0, 0.7), (5, 6.0, 0.9)]
    best = Best(by)
    for step, error, nll in looks:
        best.consider(step, error, nll, lambda step=step: {"w": torch.tensor(float(step))})
    assert best.found["step"] == expected
    assert best.weights["w"].item() == expected
    copy = Best(by)
    copy.load_state_dict(best.state_dict())
    copy.consider(6, 100.0, 100.0, dict)
    assert equal(copy.weights, best.weights)


# ---------------------------------------------------------------- graphs: what the task hands out


def graph_splits(train: Tensor, nodes: int, classes: tuple[str, ...]) -> DataSplits:
    info = DataInfo("ring", "a ring", (2,), classes, ("two numbers",), "here", "none", nodes=nodes)
    edges = torch.stack([torch.arange(nodes), torch.arange(nodes).roll(1)])
    graph = Graph(torch.ones(nodes, 2).to_sparse_coo().coalesce(), torch.cat([edges, edges.flip(0)], 1))
    one = Examples(torch.tensor([0]), torch.tensor([0]))
    return DataSplits(info, Examples(train, torch.zeros(len(train), dtype=torch.int64)), one, one, graph=graph)


@pytest.fixture
def ring(monkeypatch) -> Callable[[DataSplits], DataSplits]:
    def use(found: DataSplits) -> DataSplits:
        monkeypatch.setattr("manifold_mixup.lab.tasks.base.load_data", lambda *args: found)
        return make_task(Component(name="node_classification")).splits(Component(name="ring"), 0, None)

    return use


def test_all_nodes_but_the_labelled_ones_are_the_pool(ring):
    pool = ring(graph_splits(torch.tensor([1, 4]), 6, ("a", "b"))).unlabelled
    assert pool.x.tolist() == [0, 2, 3, 5]
    assert (pool.batch_size, pool.replacement) == (2, True)


def test_a_graph_with_one_class_is_refused(ring):
    with pytest.raises(UsageError, match="have one class only"):
        ring(graph_splits(torch.tensor([1]), 6, ("a",)))


def test_a_graph_without_unlabelled_nodes_is_refused(ring):
    with pytest.raises(UsageError, match="all 3 nodes of data 'ring' are labelled"):
        ring(graph_splits(torch.arange(3), 3, ("a", "b")))
