"""The page of runs that look at unlabelled examples, and of nodes of a graph."""

import dataclasses
import statistics

import numpy as np
import pytest
import torch

from lab.published_data import publish
from lab.report_runs import details, experiment_of, going, log_lines, write_run
from lab.reporting import page, run, runs
from lab.small import DIGITS, one_run
from lab.test_graph_runs import run as run_graph
from lab.test_report_figures import check_plots, line_of, predictions, traces_of
from lab.test_report_figures_inside import mixing_log
from manifold_mixup.lab.config import Component, PlannedRun, RunConfig, TrainConfig
from manifold_mixup.lab.measures.details import mistakes as most_confident
from manifold_mixup.lab.published import Published
from manifold_mixup.lab.records import RunFolder
from manifold_mixup.lab.report.beside import published_twins
from manifold_mixup.lab.report.figures.curves import POINTS, curve_plots, part_plots
from manifold_mixup.lab.report.figures.mixing import ALPHA, mixing_plots
from manifold_mixup.lab.report.sections import section
from manifold_mixup.lab.report.sources import gather
from manifold_mixup.lab.run import execute
from manifold_mixup.lab.side_by_side import printed
from manifold_mixup.lab.studies import Panel, load_study, study_files

NODES = {"task": "node_classification", "data": "cora", "model": "gcn"}
FEW = {"task": "semi_supervised"}


def of(found):
    return dict(section(experiment_of(found), 1).facts)


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("task", "title"),
    [
        ("classification", "classification, every training example with its label"),
        ("semi_supervised", "classification with few labels and an unlabelled pool"),
        ("node_classification", "classification of the nodes of one graph"),
        ("a task of tomorrow", "a task of tomorrow"),
    ],
)
def test_the_task_is_named(task, title):
    assert of(runs("none", [3.0], task=task))["task"] == title


def test_examples_are_counted_once_where_all_runs_agree():
    supervised = runs("none", [3.0, 3.0], train={"examples": 54000})
    assert of(supervised)["training examples"] == "54,000"
    few = runs("ict", [3.0, 3.0], train={"examples": 100, "unlabelled": 54000}, **FEW)
    assert of(few)["training examples"] == "100 labelled, 54,000 unlabelled"
    assert "training examples" not in of(runs("none", [3.0]))


def test_methods_that_look_at_no_unlabelled_examples_are_told_from_those_that_do():
    results = runs("none", [3.0, 3.0], train={"examples": 100}, **FEW)
    results += runs("a, b", [3.0], train={"examples": 100}, **FEW)
    results += runs("ict", [3.0, 3.0], train={"examples": 100, "unlabelled": 54000}, **FEW)
    found = [text for name, text in section(experiment_of(results), 1).facts if name == "training examples"]
    assert found == ["none and “a, b”: 100 labelled", "ict: 100 labelled, 54,000 unlabelled"]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (["validation_error"], " (lowest error)"),
        (["validation_nll"], " (lowest NLL)"),
        ([None], " (lowest NLL)"),  # a record from before there was a choice
        (["validation_error", None], " (lowest error and NLL)"),
    ],
)
def test_the_table_of_the_best_weights_says_what_chose_them(tmp_path, chosen, words):
    best = {"test_error": 1.0, "train_error": 0.5}
    trains = [{"best_step": 3, **({"best_by": by} if by else {})} for by in chosen]
    results = [run("none", i, best=best, train=train) for i, train in enumerate(trains)]
    captions = [table.caption for table in section(experiment_of(results), 1).tables]
    assert captions[1:] == [
        f"Weights with the best validation score{words}",
        f"Other measures: weights with the best validation score{words}",
    ]
    assert captions[1] in page(tmp_path, results).words


# ---------------------------------------------------------------- published numbers


def chosen_on_validation():
    """Recipe, row, column and published number of all that are of the best weights."""
    for name in study_files():
        for panel in load_study(name).panels:
            for row in panel.rows:
                for column in panel.columns:
                    entry = panel.twin(row, column)
                    if entry is not None and column.weights == "best" and not column.complement:
                        yield next(iter(panel.recipes.values())), row, column, entry


def test_a_number_that_was_chosen_on_validation_stands_beside_the_best_weights_alone():
    found = list(chosen_on_validation())
    assert found
    for recipe, row, column, entry in found:
        results = runs(row.label, [4.0], experiment=recipe, model=entry.network, best={column.metric: 5.0})
        experiment = experiment_of(results)
        assert published_twins(experiment, "best")[row.label, column.metric] == printed(entry)
        assert published_twins(experiment) == {}
        last, best, *_ = section(experiment, 1).tables
        assert [cell.published for cell in last.rows[0].cells] == [""]
        assert best.rows[0].cells[0].published == printed(entry)
        assert any("Published numbers are those of" in remark for remark in section(experiment, 1).remarks)


def test_numbers_of_both_kinds_of_weights_stand_each_beside_its_own(monkeypatch):
    column = {"metric": "test_error", "published": "test_error"}
    columns = [column, {**column, "published": "chosen", "weights": "best"}, {**column, "complement": True}]
    panel = Panel.model_validate(
        {"title": "t", "recipes": {"desk": "digits"}, "columns": columns, "rows": [{"label": "none", "published": {}}]}
    )
    numbers = {"test_error": 1.25, "chosen": 2.5}
    words = dict.fromkeys(("source", "table", "dataset", "method", "metric"), "any")
    entry = Published(**words, network="mlp", value=0, unit="percent")

    def twin(self, row, column):
        return entry.model_copy(update={"value": numbers[column.published]})

    monkeypatch.setattr(Panel, "twin", twin)
    monkeypatch.setattr("manifold_mixup.lab.report.beside._panels", lambda: {"digits": ((None, panel, "desk"),)})
    experiment = experiment_of(runs("none", [3.0]))
    assert published_twins(experiment) == {("none", "test_error"): "1.25"}
    assert published_twins(experiment, "best") == {("none", "test_error"): "2.50"}


# ---------------------------------------------------------------- parts of the loss


def parts(steps, seed=0, *, coin=False):
    """Lines of a log, one each step: what a step logs of its loss; with a coin, a step has one kind of loss."""
    rng = np.random.default_rng(seed)
    found = []
    for step in range(1, steps + 1):
        line = {"step": step, "epoch": float(step), "train_loss": rng.uniform(1, 2)}
        if coin and rng.random() < 0.5:
            line["graph_loss"] = rng.uniform(1, 2)
        else:
            line |= {"labelled_loss": rng.uniform(1, 2), "unlabelled_loss": rng.uniform(1, 2)}
            line["unlabelled_weight"] = step / steps
        found.append({**line, "lr": 0.1, "validation_error": rng.uniform(1, 2), "validation_nll": 1.0})
    return found


def test_parts_are_means_over_seeds_against_steps(tmp_path):
    logs = [parts(3, seed) for seed in range(3)]
    results = [write_run(tmp_path, "none", 0, log=log_lines([3.0]), **FEW)]
    results += [write_run(tmp_path, "ict", seed, log=log, **FEW) for seed, log in enumerate(logs)]
    plots = check_plots(part_plots(experiment_of(results)))
    assert [plot.key for plot in plots] == ["labelled-loss", "unlabelled-loss", "unlabelled-weight"]
    for plot in plots:
        name = plot.key.replace("-", "_")
        expected = [statistics.fmean(log[step][name] for log in logs) for step in range(3)]
        assert line_of(plot, 1)["x"] == [1, 2, 3]
        assert line_of(plot, 1)["y"] == pytest.approx(expected)
        assert traces_of(plot, 0) == []
        assert plot.figure["layout"]["xaxis"]["title"]["text"] == "steps"
        assert "point" not in plot.note
    assert len(traces_of(plots[0], 1, fill="toself")) == 1
    assert [part.title for part in section(experiment_of(results), 1).drawn] == [
        "Every seed",
        "Training",
        "Parts of the loss",
    ]


def test_without_unlabelled_examples_the_loss_has_no_parts(tmp_path):
    lines = [{name: v for name, v in line.items() if "unlabelled" not in name} for line in parts(4)]
    assert part_plots(experiment_of([write_run(tmp_path, log=lines)])) == []
    assert part_plots(experiment_of([write_run(tmp_path, "b", log=log_lines([3.0]))])) == []
    assert part_plots(experiment_of([write_run(tmp_path, "c")])) == []


def test_unfinished_runs_have_parts_as_well(tmp_path):
    unfinished = dataclasses.replace(going("ict", 0), log=tuple(parts(4)))
    found = part_plots(experiment_of([write_run(tmp_path)], [unfinished]))
    assert line_of(found[0], 1)["x"] == [1, 2, 3, 4]
    assert "1 run that is not finished takes part." in found[0].note


def test_where_a_line_has_some_of_the_parts_a_point_is_the_mean_over_ten_steps(tmp_path):
    logs = [parts(48, seed, coin=True) for seed in range(2)]
    results = [write_run(tmp_path, "GraphMix", seed, log=log, **NODES) for seed, log in enumerate(logs)]
    experiment = experiment_of(results)
    plots = check_plots(part_plots(experiment) + curve_plots(experiment)[:1])
    assert [plot.key for plot in plots] == [
        "graph-loss",
        "labelled-loss",
        "unlabelled-loss",
        "unlabelled-weight",
        "training-loss",
    ]
    for plot in plots:
        name = {"training-loss": "train_loss"}.get(plot.key, plot.key.replace("-", "_"))
        assert line_of(plot)["x"] == [10, 20, 30, 40, 48]
        for start, y in zip(range(0, 50, 10), line_of(plot)["y"], strict=True):
            inside = [[line[name] for line in log[start : start + 10] if name in line] for log in logs]
            assert all(inside), "each of these seeds has such a step in each window"
            assert y == pytest.approx(statistics.fmean(map(statistics.fmean, inside)))
        assert "A point is the mean over 10 steps." in plot.note
        assert "as far" not in plot.note, "a seed whose last step was of the other kind has got as far"
    error = curve_plots(experiment)[1]
    assert len(line_of(error)["x"]) == 48
    assert "point" not in error.note


def test_a_window_without_such_a_step_is_left_out_of_a_seed(tmp_path):
    logs = [parts(30, seed) for seed in range(3)]
    for line in logs[0][10:20]:
        del line["labelled_loss"]
    for log in logs[:2]:
        for line in log[20:]:
            del line["labelled_loss"]
    results = [write_run(tmp_path, "GraphMix", seed, log=log, **NODES) for seed, log in enumerate(logs)]
    line = line_of(part_plots(experiment_of(results))[0])
    assert line["x"] == [10, 20]  # of the last window one seed knows
    two = [statistics.fmean(one["labelled_loss"] for one in log[10:20]) for log in logs[1:]]
    assert line["y"][1] == pytest.approx(statistics.fmean(two))


def test_long_curves_of_training_are_means_of_windows_and_few_points(tmp_path):
    log = parts(2003)
    experiment = experiment_of([write_run(tmp_path, "GraphMix", log=log, **NODES)])
    for plot in (part_plots(experiment)[0], curve_plots(experiment)[0]):
        name = {"training-loss": "train_loss", "labelled-loss": "labelled_loss"}[plot.key]
        line = line_of(plot)
        assert line["x"] == [*range(6, 2003, 6), 2003]
        expected = [statistics.fmean(one[name] for one in log[at : at + 6]) for at in range(0, 2003, 6)]
        assert line["y"] == pytest.approx(expected)
        assert plot.note == "A point is the mean over 6 steps."
    for plot in part_plots(experiment) + curve_plots(experiment):
        assert len(line_of(plot)["x"]) <= POINTS


def test_epochs_of_the_labelled_examples_are_no_measure_of_time(tmp_path):
    log = log_lines([9.0, 7.0], per_epoch=2)
    for task, unit, x in (("classification", "epochs", [5, 10]), ("semi_supervised", "steps", [10, 20])):
        plot = curve_plots(experiment_of([write_run(tmp_path / task, log=log, task=task)]))[0]
        assert plot.figure["layout"]["xaxis"]["title"]["text"] == unit
        assert line_of(plot)["x"] == x


# ---------------------------------------------------------------- mixing


def test_mixing_of_unlabelled_examples_has_figures_of_its_own(tmp_path):
    both = mixing_log([0.5] * 40, {"input": 40}, alpha=0.1)
    both["mixing_unlabelled"] = mixing_log([0.1] * 30, {"input": 10, "hidden.1": 20}, alpha=2.0)["mixing"]
    results = [write_run(tmp_path, "manifold mixup", train=mixing_log([0.5] * 20, {"input": 20}))]
    results += [write_run(tmp_path, "consistency", seed, train=both) for seed in (0, 1)]
    layers, lam, more, other = check_plots(mixing_plots(experiment_of(results)))
    assert [plot.key for plot in (layers, lam, more, other)] == [
        "mixed-layers",
        "lambda",
        "mixed-layers-unlabelled",
        "lambda-unlabelled",
    ]
    for plot in (layers, lam):
        assert plot.title.endswith(", labelled examples")
    for plot in (more, other):
        assert plot.title.endswith(", unlabelled examples")
        assert traces_of(plot, 0) == []
    assert "consistency, 80 batches: input 100.0 %" in layers.alt
    assert "consistency, 60 batches: input 33.3 %, hidden.1 66.7 %" in more.alt
    assert f"{ALPHA} = 0.1" in lam.alt
    assert f"{ALPHA} = 2" in other.alt


# ---------------------------------------------------------------- nodes of a graph


def test_numbers_of_nodes_are_no_pictures():
    nodes = torch.arange(30)
    found = most_confident(torch.randn(30, 3), torch.zeros(30, dtype=torch.int64), nodes)
    assert len(found["mistakes_index"])
    assert "mistakes_image" not in found


def test_the_page_of_a_graph_has_what_makes_sense_for_nodes(tmp_path):
    train = {"examples": 140, "unlabelled": 2568, "best_by": "validation_error", "step_seconds": 0.01}
    results = [
        write_run(
            tmp_path,
            label,
            seed,
            log=parts(40, seed, coin=True),
            arrays={"details": details(*predictions(seed, 30))},
            classes=["Theory", "Case_Based", "Rule_Learning"],
            train={**train, **mixing_log([0.5] * 20, {"activation.1": 20})},
            best={"test_error": 3.0},
            **NODES,
        )
        for label in ("none", "GraphMix")
        for seed in (0, 1)
    ]
    found = page(tmp_path, results)
    for words in ("Every seed", "Parts of the loss", "Calibration", "Confusion: GraphMix", "Mixing log", "Cost"):
        assert words in found.words
    for words in ("Most confident mistakes", "Robustness", "Singular values", "labelled examples: "):
        assert words not in found.words
    assert not [attrs for tag, attrs in found.tags if tag == "img"]
    assert "140 labelled, 2,568 unlabelled" in found.words


# ---------------------------------------------------------------- runs that go on


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"steps": 40, "batch_size": 0}, 40),
        ({"epochs": 30, "batch_size": 0}, 30),
        ({"epochs": 30, "batch_size": 10}, None),
    ],
)
def test_an_epoch_of_full_batches_is_one_step(tmp_path, settings, steps):
    config = RunConfig(
        task=Component(name="node_classification"),
        data=Component(name="cora"),
        model=Component(name="gcn"),
        train=TrainConfig.model_validate(settings),
        method=Component(name="none"),
        seed=0,
    )
    RunFolder(tmp_path, PlannedRun("graph", "none", config)).claim()
    (found,) = gather([tmp_path]).going
    assert (found.steps, found.task) == (steps, "node_classification")


# ---------------------------------------------------------------- real runs


def test_runs_with_few_labels_make_such_a_page(tmp_path):
    few = {**DIGITS, "task": {"name": "semi_supervised", "options": {"batch_size": 7}}}
    few["data"] = {"name": "digits", "options": {"train_examples": 20}}
    for method in ("none", "consistency"):
        execute(RunFolder(tmp_path, one_run(few, methods=[{"name": method}])))
    found = page(tmp_path, gather([tmp_path]).results)
    for words in (
        "classification with few labels and an unlabelled pool",
        "none: 20 labelled",
        "consistency: 20 labelled, 1,000 unlabelled",
        "Weights with the best validation score (lowest error)",
        "Loss of unlabelled examples",
        "Weight of unlabelled examples",
        "Which layers were mixed, unlabelled examples",
        "Most confident mistakes",
    ):
        assert words in found.words


def test_runs_on_a_graph_make_such_a_page(tmp_path, monkeypatch):
    places = publish(tmp_path / "data", monkeypatch)
    for method in ("none", "graphmix"):
        run_graph(tmp_path / "runs", places, methods=[{"name": method}])
    found = page(tmp_path, gather([tmp_path / "runs"]).results)
    for words in (
        "classification of the nodes of one graph",
        "Weights with the best validation score (lowest error)",
        "Loss of steps on the graph",
        "Weight of unlabelled examples",
        "Confusion: graphmix",
    ):
        assert words in found.words
    assert "Most confident mistakes" not in found.words
    assert len(found.figures) == sum(("class", "figure") in attrs.items() for _, attrs in found.tags)
