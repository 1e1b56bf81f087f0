"""The page: what it says, what it shows as text, and what it refuses."""

import base64
import gzip
import html
import json
import math
import re
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from lab.reporting import EVIL, keep_pictures, page, run, runs, spiral
from manifold_mixup.lab.errors import StorageError, UsageError
from manifold_mixup.lab.records import Failure, Record
from manifold_mixup.lab.report import write_report
from manifold_mixup.lab.report.findings import listed, number
from manifold_mixup.lab.report.sources import Sources
from manifold_mixup.lab.results import Result
from manifold_mixup.lab.statistics import format_mean_sd, paired_difference, summary

# ---------------------------------------------------------------- what the page is


def test_the_page_is_one_small_file_that_loads_nothing(tmp_path):
    found = page(tmp_path, spiral(tmp_path, labels=[f"m{i}" for i in range(8)]))
    assert len(found.source.encode()) < 4_000_000
    (packed,) = [text for kind, text in found.scripts if kind == "application/gzip"]
    assert gzip.decompress(base64.b64decode(packed)).decode() == get_plotlyjs()
    links = [attrs[key] for _, attrs in found.tags for key in ("src", "href") if key in attrs]
    assert all(link.startswith("#") for link in links)
    policies = [a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
    ]
    assert "prefers-color-scheme: dark" in found.source
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.tags


def test_every_table_scrolls_in_its_own_box(tmp_path):
    found = page(tmp_path, runs("none", [3.0, 4.0]) + runs("dropout", [2.0, 2.5]))
    order = [(tag, attrs.get("class", "")) for tag, attrs in found.tags if tag in ("div", "table")]
    tables = [i for i, (tag, _) in enumerate(order) if tag == "table"]
    assert len(tables) >= 3
    assert all(order[i - 1] == ("div", "scroll") for i in tables)


def test_the_real_record_is_understood(tmp_path):
    record = Record(
        experiment="e", data="d", model="m", method="none", label="plain", options={"alpha": 1.0}, seed=3,
        metrics={"test_error": 2.5, "test_nll": None}, best={"test_error": 2.25},
        train={"settings": {"steps": 77}, "model_options": {"width": 8}}, config_hash="0" * 16,
        versions={"torch": "2"}, hardware={"cpus": 2}, seconds=4.0, command="manifold-mixup train", date="2025",
        folder=tmp_path,
    )  # fmt: skip
    found = page(tmp_path, [Result(record, {"test_ece": 1.5}, {})])
    for words in (
        "plain",
        "1.50",
        "2.50",
        "2.25",
        "steps = 77",
        "network width = 8",
        "alpha = 1.0",
        "manifold-mixup train",
    ):
        assert words in found.words


def test_settings_versions_hardware_seeds_and_commands_are_named(tmp_path):
    plain, other = ({"settings": {"lr": 0.001, "weight_decay": decay}} for decay in (0.0, 0.5))
    one = runs("none", [3.0, 4.0], best={"test_error": 1.0}, train=plain)
    two = runs(
        "decay", [3.0, 4.0], options={"strength": 0.5}, versions={"torch": "2.14.0"}, train=other, command="again"
    )
    found = page(tmp_path, one + two)
    assert "training, all methods lr = 0.001 runs" in found.words
    assert "strength = 0.5, weight_decay = 0.5" in found.words
    for words in ("torch 2.13.0", "torch 2.14.0", "cpus 2", "seeds 0, 1", "runs 4, 6 s in all", "again"):
        assert words in found.words
    assert "manifold-mixup compare --recipe digits" in found.words
    assert "Weights with the best validation score" in found.words


# ---------------------------------------------------------------- what it says


def test_the_table_holds_means_spreads_and_paired_intervals(tmp_path):
    a, b = [3.1, 2.9, 3.6, 3.0, 3.3], [2.2, 2.1, 2.5, 2.4, 2.0]
    found = page(tmp_path, runs("none", a) + runs("dropout", b))
    difference = paired_difference(dict(enumerate(b)), dict(enumerate(a)))
    cells = [" ".join(cell.split()) for cell in found.cells]
    assert format_mean_sd(summary(a)) in cells
    expected = f"{format_mean_sd(summary(b))} {difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"
    assert expected.replace("-", "\N{MINUS SIGN}") in cells
    assert [attrs.get("class") for tag, attrs in found.tags if tag == "td"].count("significant") == 1


@pytest.mark.parametrize(("shift", "word"), [(-1.0, "lower with dropout"), (1.0, "higher with dropout")])
def test_the_summary_follows_the_numbers(tmp_path, shift, word):
    a, noise = [3.0, 3.5, 4.0, 3.2], [0.05, -0.05, 0.02, 0.0]
    b = [x + shift + e for x, e in zip(a, noise, strict=True)]
    c = [x + e for x, e in zip(a, noise, strict=True)]
    found = page(tmp_path, runs("none", a) + runs("dropout", b) + runs("nothing", c))
    mean = f"{summary(b).mean:.2f}"
    assert f"Test error (none 3.42 %): {word} ({mean} %)" in found.words
    assert "no significant difference: nothing." in found.words
    assert "2 comparisons of methods without any difference would show about 0.1 significant ones" in found.words


def test_no_difference_anywhere_is_printed_as_such(tmp_path):
    found = page(tmp_path, runs("none", [3.0, 3.5]) + runs("a", [3.5, 3.0]) + runs("b", [3.2, 3.4]))
    assert "no significant difference with any other method" in found.words
    assert "lower with" not in found.words
    assert "higher with" not in found.words


def test_equal_differences_are_no_significant_difference(tmp_path):
    found = page(tmp_path, runs("none", [3.0, 4.0, 5.0]) + runs("a", [3.0, 4.0, 5.0]) + runs("b", [2.0, 3.0, 4.0]))
    assert "the same number in every seed: a" in found.words
    assert "the same difference in every seed, so no interval: b" in found.words
    assert "the same in all 3 seeds, so no interval" in found.words


def test_one_seed_has_no_interval_and_nothing_is_significant(tmp_path):
    found = page(tmp_path, runs("none", [3.0]) + runs("dropout", [1.0]))
    assert "one common seed, so no interval" in found.words
    assert "nothing can be called significant" in found.words
    assert "±" not in "".join(found.cells)
    assert "lower with" not in found.words


def test_one_method_has_nothing_to_compare_with(tmp_path):
    assert (
        "There is one method, none, so there is nothing to compare." in page(tmp_path, runs("none", [3.0, 4.0])).words
    )


def test_failed_and_missing_runs_are_named(tmp_path):
    records = [*runs("none", [3.0, 3.1, 3.2]), *runs("a", [2.0]), run("b", 2, {"test_error": 5.0})]
    failures = [
        Failure("digits", "a", 1, "ran out of memory"),
        Failure("digits", "gone", 0, "no such layer"),
        Failure("another", "c", 7, "all of it failed"),
    ]
    words = page(tmp_path, records, *failures).words
    assert "a (failed at seed 1; no run at seed 2)" in words
    assert "b (no run at seeds 0 and 1)" in words
    assert "gone has no finished run: it failed at seed 0." in words
    assert "Failed: a, seed 1: ran out of memory" in words
    assert "another: c, seed 7, failed: all of it failed" in words


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_a_diverged_run_is_shown_and_makes_no_difference_significant(tmp_path, bad):
    found = page(tmp_path, runs("none", [3.0, 3.1, 3.2]) + runs("a", [1.0, bad, 1.2]))
    cell = next(cell for cell in found.cells if "left out of the mean" in cell)
    assert " ".join(cell.split()) == (
        "1.10 ± 0.14 no finite number at seed 1, left out of the mean no difference: a run has no finite number"
    )
    assert "a run without a finite number, so no interval: a" in found.words
    assert "lower with" not in found.words
    assert not re.search(r"\b(nan|inf)\b", found.words)


def test_a_first_method_that_diverged_still_makes_a_page(tmp_path):
    found = page(tmp_path, runs("none", [None, 3.0]) + runs("a", [1.0, 1.2]))
    assert "Test error: a run without a finite number, so no interval: a." in found.words


def test_measures_that_some_runs_lack_are_said_so(tmp_path):
    records = [*runs("none", [3.0, 3.1]), run("none", 2, {}), *runs("a", [2.0, 2.1])]
    assert "measured in 2 of 3 runs" in page(tmp_path, records).words


def test_runs_with_other_options_or_settings_are_never_averaged(tmp_path):
    records = [
        *runs("mixup", [1.0, 2.0], options={"alpha": 1.0}),
        *runs("mixup", [5.0, 6.0], options={"alpha": 2.0}),
        *runs("mixup", [7.0, 9.0], options={"alpha": 2.0}, train={"settings": {"steps": 9}}),
    ]
    words = page(tmp_path, records).words
    for expected in (
        "(none: alpha=1.0)",
        "(none: alpha=2.0)",
        "(none: alpha=2.0), other settings 1",
        "1.50 ±",
        "5.50 ±",
    ):
        assert expected in words


def test_a_repeated_run_replaces_the_earlier_one_and_this_is_said(tmp_path):
    found = page(tmp_path, [*runs("none", [3.0]), *runs("none", [9.0])])
    assert "9.00" in found.words
    assert "3.00" not in found.words
    assert "1 repeated runs of the same method and seed were replaced" in found.words


def test_experiments_have_sections_of_their_own(tmp_path):
    found = page(tmp_path, [*runs("none", [3.0]), *runs("none", [4.0], experiment="spiral", data="spiral")])
    assert [attrs["id"] for tag, attrs in found.tags if tag == "section"] == ["experiment-1", "experiment-2"]
    assert [a["href"] for tag, a in found.tags if tag == "a" and a["href"].count("-") == 1] == [
        "#experiment-1",
        "#experiment-2",
    ]


def test_without_records_there_is_no_page(tmp_path):
    with pytest.raises(UsageError, match="nothing to report"):
        write_report(Sources(), tmp_path / "page.html", "t")
    assert list(tmp_path.iterdir()) == []


def test_labels_with_commas_are_quoted_in_sentences(tmp_path):
    found = page(tmp_path, runs("none", [3.0, 4.0]) + runs("a, b only", [1.0, 2.01]) + runs("c", [3.0, 4.0]))
    assert "lower with “a, b only” (1.50 %)" in found.words


# ---------------------------------------------------------------- hostile text


def hostile(tmp_path, evil):
    """A page of an experiment whose every text ends with ``evil``."""
    folder = tmp_path / "runs"
    keep_pictures(folder)
    found = [
        run(
            f"{label}{evil}", seed, {"test_error": 3.0 + seed + gap, f"m{evil}": 1.0}, folder,
            experiment=f"E{evil}", data=f"d{evil}", model=f"n{evil}", method=f"x{evil}",
            options={f"o{evil}": f"v{evil}"}, best={f"b{evil}": 2.0},
            versions={f"p{evil}": f"q{evil}", "commit": f"r{evil}"}, hardware={f"h{evil}": f"w{evil}"},
            command=f"c{evil}", train={"settings": {f"s{evil}": f"t{evil}"}},
        )
        for label, gap in (("one", 0.0), ("two", 0.7)) for seed in (0, 1)
    ]  # fmt: skip
    failures = [Failure(f"E{evil}", f"f{evil}", 1, f"e{evil}"), Failure(f"O{evil}", f"l{evil}", 1, f"y{evil}")]
    about = {f"E{evil}": f"A{evil}"}
    return page(tmp_path, found, *failures, title=f"T{evil}", descriptions=about)


LETTERS = ("T", "E", "A", "O", "d", "n", "x", "o", "v", "p", "q", "r", "h", "w", "f", "e", "l", "y", "s", "t", "b")


def test_whatever_a_record_holds_is_shown_as_text(tmp_path):
    found = hostile(tmp_path, EVIL)
    figures = found.figures
    assert len(found.scripts) == len(figures) + 2  # plotly.js and the page's own
    assert not any(text.strip() == "alert(1)" for _, text in found.scripts)
    for letter in (*LETTERS, "m", "one", "two"):
        assert f"{letter}{EVIL}" in found.words, letter
    assert f"'c{EVIL}'" in found.words, "of a command each word is quoted for the shell"
    # plotly.js reads markup in its labels, so there the brackets are entities.
    texts = json.dumps(figures)
    assert "<" not in texts.replace("<extra></extra>", "").replace("<br>", "")
    assert "one&lt;script&gt;alert" in texts


@pytest.mark.parametrize(
    "evil",
    [
        EVIL,
        '" onmouseover="alert(1)',
        "' onfocus='alert(1)' autofocus x='",
        '"><img src=x onerror=alert(1)>',
        "</pre></script><script>alert(1)//",
        "]]><!--",
        "{{ 7 * 7 }}{% raw %}",
        "&lt;b&gt;&quot;",
    ],
)
def test_no_text_changes_the_tags_and_attributes_of_the_page(tmp_path, evil):
    def shape(found):
        return [(tag, list(attrs)) for tag, attrs in found.tags]

    found = hostile(tmp_path / "evil", evil)
    assert shape(found) == shape(hostile(tmp_path / "tame", "-"))
    for letter in LETTERS:
        assert f"{letter}{evil}" in found.words, letter
    attributes = {key: [attrs[key] for _, attrs in found.tags if key in attrs] for key in ("data-copy", "aria-label")}
    assert f"Sections of E{evil}" in attributes["aria-label"]
    assert f"one{evil}" in attributes["aria-label"], "the card of the pictures"
    copies = attributes["data-copy"]
    assert any(copy.startswith("| method | n |") and f"| one{evil} | 2 |" in copy for copy in copies)
    assert any(copy.startswith("method,n,") for copy in copies)
    assert any(copy.startswith("% needs") for copy in copies)


def test_a_label_cannot_leave_its_json_block(tmp_path):
    label = '</script><img src=x onerror="alert(1)"><!-- & \u2028'
    found = page(tmp_path, runs(label, [3.0, 4.0]) + runs("b", [3.0, 5.0]))
    assert not [attrs for tag, attrs in found.tags if tag == "img"]
    assert len(found.figures) == 1
    assert found.figures[0]["data"][0]["name"] == html.escape(label, quote=False)
    assert label.replace("\u2028", "").strip() in found.words


def test_folders_with_markup_in_their_names(tmp_path):
    folder = tmp_path / "<b>bold<script>"
    keep_pictures(folder)
    (folder / "pictures.safetensors").write_bytes(b"nonsense")
    found = page(tmp_path, [run(folder=folder)])
    assert str(folder) in found.words
    assert "b" not in [tag for tag, _ in found.tags]


@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_the_places_of_a_machine_are_not_in_the_commands(tmp_path, quote):
    command = f"manifold-mixup compare --runs /home/me/runs --data-dir=/home/me/data {quote}"
    found = page(tmp_path, [run(command=command)])
    assert "/home/me" not in found.source
    assert "manifold-mixup compare --runs RUNS --data-dir=DIR" in found.words


# ---------------------------------------------------------------- writing


def test_a_write_that_fails_leaves_the_old_page_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        write_report(Sources(runs("none", [3.0])), path, "t")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    assert path.read_text() == "old"


def test_a_page_in_a_new_folder(tmp_path):
    path = write_report(Sources(runs("none", [3.0])), tmp_path / "new" / "page.html", "t")
    assert path.exists()


# ---------------------------------------------------------------- words


def test_numbers_for_people():
    minus = "\N{MINUS SIGN}"
    assert number(-1.234, 2) == f"{minus}1.23"
    assert number(1.234, 1, sign=True) == "+1.2"
    assert number(-0.001, 2, sign=True) == number(0.001, 2) == "0.00"
    assert number(math.nan, 2) == "not a number"


def test_lists_for_people():
    assert [listed(x) for x in ([], ["a"], ["a", "b"], ["a", "b", 3])] == ["", "a", "a and b", "a, b and 3"]


def test_the_page_says_where_a_run_lies_among_the_runs_and_not_on_the_machine(tmp_path):
    folder = tmp_path / "secret" / "digits" / "none" / "seed-0"
    found = page(tmp_path, [run(folder=folder), run(seed=1, folder=Path())])
    assert "digits/none/seed-0" in found.words
    assert "secret" not in found.source
