import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.progress import TimeRemainingColumn

from lab.small import one_run
from manifold_mixup.lab import display
from manifold_mixup.lab.data import DataInfo
from manifold_mixup.lab.records import Failure, Record


def record(label, seed, **metrics):
    return Record(
        experiment="e",
        data="spiral",
        model="spiral_net",
        method="none",
        label=label,
        options={},
        seed=seed,
        metrics=metrics,
        best=metrics,
        train={"best_step": 3},
        config_hash="0",
        versions={},
        hardware={},
        seconds=1.0,
        command="",
        date="",
        folder=Path(),
    )


def rows(table, width=300):
    """The cells of a table, row by row, the lines of a cell joined by ``|``."""
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    found = []
    for line in console.file.getvalue().splitlines():
        if "━" in line or "├" in line:
            found.append(None)
        elif "│" in line:
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            if found and found[-1] is not None:
                cells = [f"{above}|{cell}" if cell else above for above, cell in zip(found.pop(), cells, strict=True)]
            found.append(cells)
    return [row for row in found if row is not None]


def compared(values_a, values_b, name="test_error"):
    records = [record("a", seed, **{name: value}) for seed, value in enumerate(values_a)]
    records += [record("b", seed, **{name: value}) for seed, value in enumerate(values_b)]
    return {name: rows(table) for table, name in zip(display.comparison(records), ("main", "own"), strict=False)}


def test_means_spread_and_a_significant_difference():
    # differences -1, -1.1, -0.9: mean -1, sd 0.1, t(0.975, 2) = 4.3027, half width 0.2484
    a, b = compared([3.0, 3.0, 3.0], [2.0, 1.9, 2.1])["main"]
    assert a[:3] == ["a", "3", "3.00 ± 0.00"]
    assert b[:3] == ["b", "3", "2.00 ± 0.10|-1.00 [-1.25, -0.75]"]


def test_a_difference_that_may_be_chance_is_called_so():
    _, b = compared([3.0, 2.0, 4.0], [2.0, 3.0, 3.5])["main"]
    assert b[2].endswith("|no significant difference")
    assert b[2].startswith("2.83 ± 0.76|-0.17 [")


def test_equal_methods_have_no_significant_difference_and_no_interval():
    _, b = compared([3.0, 2.0], [3.0, 2.0])["main"]
    assert b[2] == "2.50 ± 0.71|+0.00|no significant difference"


def test_one_seed_has_a_difference_without_an_interval():
    a, b = compared([3.0], [2.0])["main"]
    assert a[2] == "3.00"
    assert b[2] == "2.00|-1.00"


def test_only_common_seeds_are_paired():
    records = [record("a", 0, test_error=3.0), record("b", 0, test_error=1.0), record("b", 1, test_error=9.0)]
    (table,) = display.comparison(records)
    assert rows(table)[1][2] == "5.00 ± 5.66|-2.00"


def test_methods_without_a_common_seed_are_not_compared():
    (table,) = display.comparison([record("a", 0, test_error=3.0), record("b", 1, test_error=1.0)])
    assert rows(table)[1][2] == "1.00"


def test_a_run_that_diverged_shows():
    _, b = compared([1.0, 1.0], [None, 2.0])["main"]
    assert "nan" in b[2]


def test_a_measure_that_was_not_taken_is_a_dash():
    a, _ = compared([1.0], [2.0])["main"]
    assert a[3:] == ["-", "-"]


def test_a_data_sets_own_measures_have_a_table_of_their_own():
    tables = compared([0.5, 0.6], [0.7, 0.9], name="within_between_ratio")
    assert [row[0] for row in tables["own"]] == ["a", "b"]
    assert tables["own"][0][2] == "0.550 ± 0.071"
    assert list(display.comparison([])) == []


@pytest.mark.parametrize("label", ["[red]x", "[/]", "[b]"])
def test_labels_are_text_not_markup(label):
    (table,) = display.comparison([record(label, 0, test_error=1.0), record("b", 0, test_error=1.0)])
    assert rows(table)[0][0] == label
    assert rows(display.single(record(label, 0, test_error=1.0)))[0] == ["test_error", "1.0000", "1.0000"]


@pytest.mark.parametrize(
    ("train", "head"),
    [
        ({"best_step": 7, "best_by": "validation_error"}, "lowest validation error (step 7)"),
        ({"best_step": 7, "best_by": "validation_nll"}, "lowest validation NLL (step 7)"),
        ({"best_step": 7}, "lowest validation NLL (step 7)"),  # from before there was a choice
    ],
)
def test_a_single_run_says_what_chose_its_best_weights(train, head):
    found = record("a", 0, test_error=1.0).model_copy(update={"train": train, "best": {"test_error": None}})
    table = display.single(found)
    assert [column.header for column in table.columns] == ["metric", "last weights", head]
    assert rows(table) == [["test_error", "1.0000", "-"]]


def test_a_single_run_without_a_validation_split_has_one_kind_of_weights():
    table = display.single(record("a", 0, test_error=1.0).model_copy(update={"train": {}, "best": {}}))
    assert [column.header for column in table.columns] == ["metric", "last weights"]
    assert rows(table) == [["test_error", "1.0000"]]


def test_progress_is_silent_where_nobody_looks_but_failures_are_said(capsys):
    run = one_run()
    for quiet in (False, True):
        with display.Bars(2, quiet=quiet) as bars:
            bars.started(run)
            bars.advanced(run, 3, 12, 10)
            bars.prepared("archive", 5, 0)
            bars.prepared("archive", 7, 7)
            bars.ended(run, record("none", 0, test_error=1.0))
        assert capsys.readouterr() == ("", "")
    why = "it broke " * 30
    for runs, said in ((2, f"failed: [b]none, seed 0: {why}\n"), (1, "")):  # of one run the command's own error tells
        with display.Bars(runs) as bars:
            bars.ended(run, Failure("e", "[b]none", 0, why))
        assert capsys.readouterr() == ("", said)


def test_the_size_of_a_graph_is_that_of_its_nodes():
    facts = {"source": "s", "terms": "t", "features": ("words",), "classes": ("a", "b")}
    assert display.size_text(DataInfo("g", "g", (1433,), **facts, sizes=(140, 1000), nodes=2708)) == (
        "140 to train, 1,000 to test\n2,708 nodes of 1433 features\n2 classes"
    )
    assert (
        display.size_text(DataInfo("i", "i", (1, 28, 28), **facts))
        == "1\N{MULTIPLICATION SIGN}28\N{MULTIPLICATION SIGN}28\n2 classes"
    )


def test_a_bar_tells_images_per_second_and_the_time_that_is_left():
    column = display._ExamplesPerSecond()
    assert column.render(SimpleNamespace(speed=12.5, fields={"batch": 100})).plain == "1,250/s"
    for nothing in (SimpleNamespace(speed=None, fields={"batch": 100}), SimpleNamespace(speed=3.0, fields={})):
        assert column.render(nothing).plain == ""
    columns = display.Bars(1)._progress.columns
    assert any(isinstance(c, display._ExamplesPerSecond) for c in columns)
    assert any(isinstance(c, TimeRemainingColumn) for c in columns)
