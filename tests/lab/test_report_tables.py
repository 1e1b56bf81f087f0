"""The tables of the page: their numbers are those of the records, and their copies are safe and complete."""

import csv
import io
import math
import random
import re
import statistics
import string
import tempfile
from pathlib import Path

import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.report_runs import experiment_of
from lab.reporting import page, run, runs
from manifold_mixup.lab.measures.catalog import describe
from manifold_mixup.lab.report.tables import NOTHING, as_csv, as_latex, main_table, plain, table
from manifold_mixup.lab.statistics import paired_difference, summary

MINUS = "\N{MINUS SIGN}"
PERCENT = st.floats(0.01, 99.99, allow_nan=False)


def read_csv(text):
    """Header and rows, by the standard library's reader."""
    head, *rows = csv.reader(io.StringIO(text))
    return head, rows


# ---------------------------------------------------------------- the page equals the records


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.tuples(PERCENT, PERCENT), min_size=2, max_size=6))
def test_numbers_on_the_page_are_those_of_the_records_to_the_printed_digits(pairs):
    first, second = zip(*pairs, strict=True)
    with tempfile.TemporaryDirectory() as folder:
        found = page(Path(folder), runs("none", first) + runs("other", second))
    cells = [" ".join(cell.split()) for cell in found.cells]
    at = cells.index("test error (%)")
    plain_row, other_row = cells[at + 1 : at + 4], cells[at + 4 : at + 7]
    assert plain_row == ["none", str(len(pairs)), f"{statistics.fmean(first):.2f} ± {statistics.stdev(first):.2f}"]
    assert other_row[:2] == ["other", str(len(pairs))]
    text = other_row[2].replace(MINUS, "-")
    assert text.startswith(f"{statistics.fmean(second):.2f} ± {statistics.stdev(second):.2f} ")
    numbers = [float(n) for n in re.findall(r"[+-]?\d+\.\d+", text)]
    differences = [b - a for a, b in pairs]
    assert numbers[2] == pytest.approx(statistics.fmean(differences), abs=0.005 + 1e-9)
    if statistics.stdev(differences) > 1e-9:
        low, high = scipy.stats.ttest_rel(second, first).confidence_interval()
        assert numbers[3:] == pytest.approx([low, high], abs=0.005 + 1e-6 * (abs(low) + abs(high)))
        assert ("no significant difference" in text) == (low <= 0 <= high)
    else:
        assert len(numbers) == 3
        assert "so no interval" in text


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.tuples(PERCENT, PERCENT), min_size=1, max_size=6))
def test_the_csv_holds_the_numbers_to_the_last_bit(pairs):
    first, second = zip(*pairs, strict=True)
    experiment = experiment_of(runs("none", first) + runs("other", second))
    found = main_table(experiment, "Last weights", ["test_error"])
    head, (one, two) = read_csv(found.copies.csv)
    assert head == ["method", "n", *(f"test_error {part}" for part in ("mean", "sd", "difference", "low", "high"))]
    ours, theirs = summary(first), summary(second)
    difference = paired_difference(dict(enumerate(second)), dict(enumerate(first)))
    expected = (
        [(ours.mean, ours.sd, None, None, None), one, found.rows[0]],
        [(theirs.mean, theirs.sd, difference.mean, difference.low, difference.high), two, found.rows[1]],
    )
    for numbers, line, row in expected:
        assert row.cells[0].numbers == numbers
        assert line[:2] == [row.label, str(len(pairs))]
        assert [float(cell) if cell else None for cell in line[2:]] == list(numbers), "not a bit is lost"
        assert row.cells[0].sort == numbers[0]


def test_the_numbers_behind_the_page_are_what_sorting_uses(tmp_path):
    found = page(tmp_path, runs("none", [1 / 3, 2 / 3]) + runs("a", [None]) + runs("b", [1e-9]))
    values = [float(attrs["data-value"]) for tag, attrs in found.tags if tag == "td" and "data-value" in attrs]
    assert values[0::2] == [2, 1, 1]
    assert values[1::2][::2] == [summary([1 / 3, 2 / 3]).mean, 1e-9]
    assert math.isnan(values[3])


# ---------------------------------------------------------------- what there is not


def test_one_seed_has_neither_spread_nor_interval():
    experiment = experiment_of(runs("none", [3.0]) + runs("a", [2.5]))
    found = main_table(experiment, "c", ["test_error"])
    first, second = (row.cells[0] for row in found.rows)
    assert first.numbers == (3.0, None, None, None, None)
    assert second.numbers == (2.5, None, -0.5, None, None)
    assert (second.value, second.difference, second.interval) == ("2.50", f"{MINUS}0.50", "")
    assert (second.verdict, second.significant) == ("one common seed, so no interval", False)
    assert not any("±" in text for text in (first.value, second.value, found.copies.markdown, found.copies.latex))
    assert "pm" not in found.copies.latex
    assert read_csv(found.copies.csv)[1] == [
        ["none", "1", "3.0", "", "", "", ""],
        ["a", "1", "2.5", "", "-0.5", "", ""],
    ]


def test_methods_without_a_common_seed_have_no_difference():
    (first, second) = table(experiment_of([run("none", 0), run("a", 1)]), ["test_error"])
    assert second.cells[0].verdict == "no common seed"
    assert second.cells[0].numbers == (3.0, None, None, None, None)
    assert (first.note, second.note) == ("no run at seed 1", "no run at seed 0")


def test_a_diverged_run_leaves_no_number_that_looks_like_one():
    found = main_table(experiment_of(runs("none", [3.0, 4.0]) + runs("a", [None, None])), "c", ["test_error"])
    cell = found.rows[1].cells[0]
    assert cell.value == NOTHING
    assert math.isnan(cell.sort)
    assert cell.numbers == (None,) * 5
    assert read_csv(found.copies.csv)[1][1] == ["a", "2", *[""] * 5]
    assert not re.search(r"\b(nan|inf|None)\b", "".join(vars(found.copies).values()))


def test_a_measure_that_nobody_has_is_a_dash():
    (row,) = table(experiment_of([run("none")]), ["test_ece"])
    assert (row.cells[0].value, row.cells[0].numbers) == (NOTHING, (None,) * 5)
    assert row.cells[0].notes == ("measured in 0 of 1 runs",)


def test_the_best_weights_have_their_own_numbers():
    results = runs("none", [3.0, 4.0], best={"test_error": 1.25})
    assert table(experiment_of(results), ["test_error"], best=True)[0].cells[0].numbers[:2] == (1.25, 0.0)


def test_numbers_of_later_evaluations_stand_in_the_table():
    found = table(experiment_of([run("none", measured={"test_ece": 2.0})]), ["test_error", "test_ece"])
    assert [cell.numbers[0] for cell in found[0].cells] == [3.0, 2.0]


# ---------------------------------------------------------------- published numbers


def test_published_numbers_stand_with_the_same_network_only(tmp_path):
    for model, there in (("preact_resnet18", True), ("PreActResNet18", True), ("preact_resnet34", False)):
        found = page(tmp_path, runs("none", [5.0, 6.0], experiment="cifar10_desk", model=model))
        classes = [attrs.get("class") for _, attrs in found.tags]
        assert ("aside published" in classes) == there, model
    other = page(tmp_path, runs("none", [5.0, 6.0], experiment="another", model="preact_resnet18"))
    assert "aside published" not in [attrs.get("class") for _, attrs in other.tags]


def test_published_numbers_go_by_the_label_of_the_recipe():
    results = [
        *runs("a", [3.0], options={"alpha": 1.0}),
        *runs("a", [4.0], options={"alpha": 2.0}),
        *runs("b", [3.0]),
    ]
    found = table(experiment_of(results), ["test_error", "test_nll"], twins={("a", "test_error"): "4.83"})
    assert [[cell.published for cell in row.cells] for row in found] == [["4.83", ""], ["4.83", ""], ["", ""]]
    assert [row.label for row in found][:2] == ["a (none: alpha=1.0)", "a (none: alpha=2.0)"]


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("=1+1", "'=1+1"),
        ("+x", "'+x"),
        ("@x", "'@x"),
        ("-x", "'-x"),
        (f"{MINUS}x", "'-x"),
        ("\tx", "'\tx"),
        ("\rx", "'\nx"),
        ("a\rb", "a\nb"),
        ("-0.5", "-0.5"),
        (f"{MINUS}0.5", "-0.5"),
        ("+0.5", "+0.5"),
        ("-1e-05", "-1e-05"),
        ("x=1", "x=1"),
        ("", ""),
        (None, ""),
        (-0.5, "-0.5"),
        (-3, "-3"),
        (1 / 3, "0.3333333333333333"),
        ('say "a, b"\nc', 'say "a, b"\nc'),
    ],
)
def test_a_spreadsheet_reads_texts_as_texts_and_numbers_as_numbers(text, field):
    assert read_csv(as_csv(["method", "value"], [["a", text]])) == (["method", "value"], [["a", field]])


def test_labels_and_measures_that_look_like_formulas_are_guarded():
    results = [run("=cmd()", seed, {"@sum": -1.5 - seed}) for seed in (0, 1)]
    head, (row,) = read_csv(main_table(experiment_of(results), "c", ["@sum"]).copies.csv)
    assert head[2] == "'@sum mean"
    assert row[0] == "'=cmd()"
    assert float(row[2]) == -2.0


def cells_of(line):
    """The cells of a row of a Markdown table: split at every pipe without a backslash."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_a_pipe_or_a_line_break_in_a_label_does_not_break_the_markdown_table():
    experiment = experiment_of(runs("a|b", [1.0, 2.0]) + runs("c\nd||", [3.0, 5.0]))
    lines = main_table(experiment, "c", ["test_error"]).copies.markdown.splitlines()
    head, rule, *rows = map(cells_of, lines)
    assert head == ["method", "n", f"{describe('test_error').title} (%)"]
    assert set(rule) == {"---"}
    assert [len(row) for row in rows] == [3, 3]
    assert [row[0] for row in rows] == ["a|b", "c d||"]
    assert rows[0][2] == "1.50 ± 0.71"
    assert rows[1][2].startswith("4.00 ± 1.41 (+2.50 [")


SPECIAL = "&%$#_{}~^\\<>"
KNOWN = re.compile(  # every way in which a special character may stand in the body of a cell
    r"\\(?:textbackslash|textasciitilde|textasciicircum|textless|textgreater)\{\}"
    r"|\\[&%$#_{}]|\$\\(?:pm|lambda|alpha|epsilon)\$|\$-\$|\$\^2\$"
)


def assert_escaped(text):
    """No special character of LaTeX is left once the known forms are taken out."""
    rest = KNOWN.sub("", text)
    assert not set(SPECIAL) & set(rest), rest


def body_of(latex):
    """The cells between the rules, row by row, and the caption."""
    caption = re.search(r"\\caption\{(.*)\}\n\\begin\{tabular\}", latex)[1]
    rows = re.search(r"\\toprule\n(.*)\n\\midrule\n(.*)\n\\bottomrule", latex, re.DOTALL)
    lines = [line for part in rows.groups() for line in part.split("\n")]
    assert all(line.endswith(r" \\") for line in lines)
    return caption, [line.removesuffix(r" \\").split(" & ") for line in lines]


@pytest.mark.parametrize("character", SPECIAL)
def test_each_special_character_is_escaped_for_latex(character):
    caption, rows = body_of(as_latex([character, "b"], [[f"a{character}b", character * 2]], f"x{character}"))
    for text in (caption, *rows[0], *rows[1]):
        assert_escaped(text)
    assert KNOWN.fullmatch(rows[0][0]), "it is still there"
    assert rows[1][0] == f"a{rows[0][0]}b"


def test_any_mixture_of_special_characters_is_escaped_for_latex():
    drawn = random.Random(0)
    for _ in range(200):
        text = "".join(drawn.choices(SPECIAL + string.ascii_letters + "±λ²" + MINUS, k=12))
        caption, rows = body_of(as_latex(["a"], [[text]], text))
        assert_escaped(caption)
        assert rows[1] == [caption] or rows[1] == ["{}" + caption]


@pytest.mark.parametrize("label", ["[2pt] a", "* a"])
def test_a_label_is_no_argument_of_the_line_break_before_it(label):
    latex = as_latex(["a"], [["first"], [label]], "c")
    assert not re.search(r"\\\\\s*[\[*]", latex)
    assert "{}" + label in latex


def test_intervals_and_signs_are_latex():
    experiment = experiment_of(runs("a_b", [3.0, 4.0, 5.0]) + runs("50 %", [1.0, 2.5, 3.0]))
    _, rows = body_of(main_table(experiment, "c", ["test_error"]).copies.latex)
    assert rows[1] == [r"a\_b", "3", r"4.00 $\pm$ 1.00"]
    low, high = scipy.stats.ttest_rel([1.0, 2.5, 3.0], [3.0, 4.0, 5.0]).confidence_interval()
    assert rows[2] == [r"50 \%", "3", rf"2.17 $\pm$ 1.04 ($-$1.83 [$-${-low:.2f}, $-${-high:.2f}])"]


def test_tables_of_text_have_the_same_three_forms():
    found = plain("Cost & more", ["method", "ms"], [["a|b", "1.5"], ["=c", NOTHING]], notes=["a note"])
    assert [cells_of(line) for line in found.copies.markdown.splitlines()][2:] == [["a|b", "1.5"], ["=c", NOTHING]]
    assert read_csv(found.copies.csv) == (["method", "ms"], [["a|b", "1.5"], ["'=c", NOTHING]])
    assert body_of(found.copies.latex) == (r"Cost \& more", [["method", "ms"], ["a|b", "1.5"], ["=c", "--"]])
    assert found.notes == ["a note"]
