"""The parts of a loss in the log: what is written down is what the steps had, interrupted or not."""

import json
import statistics

import pytest
import torch

from lab.methods import test_graphmix as graphs
from lab.methods.two_batches import Draws, attached, batch, criterion, labelled_loss, network
from lab.small import DIGITS, one_run
from manifold_mixup.lab import storage
from manifold_mixup.lab.methods import make_method
from manifold_mixup.lab.methods.ramp import ramp
from manifold_mixup.lab.methods.tally import Tally
from manifold_mixup.lab.records import RunFolder
from manifold_mixup.lab.run import execute

FEW = {**DIGITS, "task": {"name": "semi_supervised", "options": {"batch_size": 7}}}
FEW["data"] = {"name": "digits", "options": {"train_examples": 20}}


def checkpointed(state):
    """A state as a checkpoint gives it back."""
    tensors = {}
    return storage.unpack(json.loads(json.dumps(storage.pack(state, tensors))), tensors)


# ---------------------------------------------------------------- the tally


@pytest.mark.parametrize("cut", range(8))
def test_it_reads_means_and_latest_values_and_begins_anew_wherever_it_was_cut(cut):
    tally, noted = Tally("a", "b"), []
    for step in range(7):
        if step == cut:
            other = Tally("a", "b")
            other.load_state_dict(checkpointed(tally.state_dict()))
            tally = other
        if step == 3:
            assert tally.read() == {"a": 0.5, "w": 0.2}  # 0, 1 and no b
            noted = []
        value = torch.tensor([0.25, 0.5, 1.0, 3.0][step % 4] if step > 2 else step / 2, requires_grad=True)
        tally.add("b" if step > 4 else "a", value)
        tally.set("w", step / 10)
        noted.append(value)
    assert all(value.grad_fn is None for value in tally.state_dict()["sums"].values())
    assert list(tally.read().items()) == [("a", 1.625), ("b", 0.75), ("w", 0.6)]
    assert tally.read() == {}


# ---------------------------------------------------------------- labelled and unlabelled examples


@pytest.mark.parametrize("name", ["consistency", "ict"])
def test_the_parts_are_the_labelled_loss_and_the_distance_before_its_weight(name, monkeypatch):
    model = network()
    method = attached(name, model, weight=3.0, ramp=0.5)
    draws, totals, labelled = Draws(method, monkeypatch), [], []
    for step in (0, 4, 9, 12):
        given = batch(step)
        totals.append(method.step(model, criterion, given).item())
        labelled.append(labelled_loss(model, given, draws.found[-2]).item())
    logged = method.logged()
    assert list(logged) == ["labelled_loss", "unlabelled_loss", "unlabelled_weight"]
    assert logged["labelled_loss"] == pytest.approx(statistics.fmean(labelled), rel=1e-6)
    weights = [3.0 * ramp(step, 0, 10) for step in (0, 4, 9, 12)]
    distances = [(total - part) / w for total, part, w in zip(totals, labelled, weights, strict=True)]
    assert logged["unlabelled_loss"] == pytest.approx(statistics.fmean(distances), rel=1e-4)
    assert logged["unlabelled_weight"] == weights[-1] == 3.0
    assert method.logged() == {}


@pytest.mark.parametrize("name", ["consistency", "ict"])
def test_without_unlabelled_examples_there_is_one_part(name):
    model = network()
    method = attached(name, model, weight=0.0)
    loss = method.step(model, criterion, batch())
    assert method.logged() == {"labelled_loss": pytest.approx(loss.item(), rel=1e-6)}
    assert make_method(name, {}).logged() == {}


def lines(folder, every, **changes):
    place = RunFolder(folder, one_run(FEW, train__eval_every=every, **changes))
    execute(place)
    return [json.loads(line) for line in place.log.read_text().splitlines()]


@pytest.mark.parametrize("name", ["consistency", "ict"])
def test_a_line_of_the_log_has_the_means_since_the_line_before(tmp_path, name):
    changes = {"methods": [{"name": name}]}
    each, some = lines(tmp_path / "each", 1, **changes), lines(tmp_path / "some", 5, **changes)
    assert [line["step"] for line in some] == [5, 10, 12]
    for line in each:
        assert list(line)[2:7] == ["train_loss", "labelled_loss", "unlabelled_loss", "unlabelled_weight", "lr"]
        total = line["labelled_loss"] + line["unlabelled_weight"] * line["unlabelled_loss"]
        assert total == pytest.approx(line["train_loss"], rel=1e-5)
    for line, start in zip(some, (0, 5, 10), strict=True):
        part = each[start : line["step"]]
        for key in ("labelled_loss", "unlabelled_loss"):
            assert line[key] == pytest.approx(statistics.fmean(one[key] for one in part), rel=1e-5)
        assert line["unlabelled_weight"] == part[-1]["unlabelled_weight"]


def test_other_methods_log_what_they_did(tmp_path):
    found = lines(tmp_path, 4, methods=[{"name": "manifold_mixup"}])
    assert {tuple(line) for line in found} == {
        ("step", "epoch", "train_loss", "lr", "validation_error", "validation_nll")
    }


# ---------------------------------------------------------------- a graph and its twin


def graph_method(**options):
    net = graphs.network("gcn", graphs.graph()).train()
    return net, graphs.attached(net, **options)


def test_a_step_on_the_graph_logs_its_loss_alone():
    net, method = graph_method(features_share=0.0)
    losses = [method.step(net, graphs.criterion, graphs.batch()).item() for _ in range(3)]
    assert method.logged() == {"graph_loss": pytest.approx(statistics.fmean(losses), rel=1e-6)}


def test_a_step_of_the_twin_logs_both_kinds_of_nodes():
    net, method = graph_method(features_share=1.0)
    loss = method.step(net, graphs.criterion, graphs.batch(step=800)).item()
    logged = method.logged()
    assert list(logged) == ["labelled_loss", "unlabelled_loss", "unlabelled_weight"]
    assert logged["unlabelled_weight"] == 10 * ramp(800, 500, 500)
    total = logged["labelled_loss"] + logged["unlabelled_weight"] * logged["unlabelled_loss"]
    assert total == pytest.approx(loss, rel=1e-6)
    net, method = graph_method(features_share=1.0, gamma=0.0)
    loss = method.step(net, graphs.criterion, graphs.batch()).item()
    assert method.logged() == {"labelled_loss": pytest.approx(loss, rel=1e-6)}


def test_a_step_with_both_losses_logs_all_parts():
    net, method = graph_method(coin="both")
    loss = method.step(net, graphs.criterion, graphs.batch(step=0)).item()
    logged = method.logged()
    assert list(logged) == ["graph_loss", "labelled_loss", "unlabelled_loss", "unlabelled_weight"]
    twin = logged["labelled_loss"] + logged["unlabelled_weight"] * logged["unlabelled_loss"]
    assert logged["graph_loss"] + twin == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("done", [0, 1, 4])
def test_a_resumed_graph_run_logs_the_same(done):
    net, method = graph_method()
    for _ in range(done):
        method.step(net, graphs.criterion, graphs.batch())
    other = graphs.attached(net, seed=5)
    other.load_state_dict(checkpointed(method.state_dict()))
    found = []
    for one in (method, other):
        torch.manual_seed(3)
        for _ in range(6):
            one.step(net, graphs.criterion, graphs.batch())
        found.append(one.logged())
    assert found[0] == found[1]
    assert "graph_loss" in found[0]
    assert "labelled_loss" in found[0]
    assert make_method("graphmix", {}).logged() == {}
