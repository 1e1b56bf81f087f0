"""The report's page in a browser: the page of the demo's own experiments, made as the demo makes it, with few steps."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections import defaultdict
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from PIL import Image
from scipy import stats

from browser.checks import (
    assert_accessible,
    assert_clean,
    assert_drawn,
    assert_no_overflow,
    assert_self_contained,
    draw_all,
    screenshot,
    seen,
)
from manifold_mixup.lab.invocation import ExperimentPage, make_settings, run_all
from manifold_mixup.lab.recipe import Overrides, load_recipe

MINUS = "\N{MINUS SIGN}"
SPIRAL, DIGITS = "#experiment-1", "#experiment-2"
FIRST = ["Verdict", "Table", "Every seed", "Training", "Calibration"]
LAST = ["Most confident mistakes", "Cost", "Configuration"]
PARTS = {
    "spiral": [*FIRST, "Mixing log", "Confusion", "Decision surfaces and hidden states", *LAST],
    "digits": [*FIRST, "Robustness", "Singular values of hidden states", "Mixing log", "Confusion", *LAST],
}
# heading on the page: name in the records, and how many decimals are printed
COLUMNS = {
    "spiral": {
        "training accuracy (%)": ("train_accuracy", 1),
        "test accuracy (%)": ("test_accuracy", 1),
        "low confidence (%)": ("low_confidence_share", 1),
        "within / between": ("within_between_ratio", 3),
        "margin": ("margin", 3),
        "test NLL (nats)": ("test_nll", 3),
        "test ECE (%)": ("test_ece", 2),
    },
    "digits": {
        "test error (%)": ("test_error", 2),
        "test NLL (nats)": ("test_nll", 3),
        "test ECE (%)": ("test_ece", 2),
    },
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The page, and from the files of the runs: experiment -> label -> seed -> record, the later measures in it."""
    runs = tmp_path_factory.mktemp("demo") / "runs"
    few = ["train.steps=60", "train.eval_every=20"]
    overrides = Overrides(seeds="2", keep=("none", "input_mixup", "manifold_mixup"), settings=few)
    configs = [load_recipe(name, overrides) for name in ("spiral", "digits")]
    page = ExperimentPage(configs, runs, runs / "demo.html", "Manifold Mixup: the demo")
    run_all(configs, make_settings(runs, 1, 15.0), True, page)
    found = defaultdict(lambda: defaultdict(dict))
    for path in runs.rglob("record.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        later = path.parent / "evaluations.jsonl"
        for line in later.read_text(encoding="utf-8").splitlines() if later.exists() else ():
            evaluation = json.loads(line)
            if evaluation["weights"] == "last":
                record["metrics"] = evaluation["metrics"] | record["metrics"]
        found[record["experiment"]][record["label"]][record["seed"]] = {
            **record,
            "folder": "/".join(path.parent.parts[-3:]),
        }
    return SimpleNamespace(page=page.write(), runs=found)


@pytest.fixture
def opened(demo, open_page):
    return lambda *size, **keys: open_page(demo.page, *size, **keys)


def values(demo, experiment, label, name):
    """Seed to value."""
    return {seed: record["metrics"][name] for seed, record in demo.runs[experiment][label].items()}


def main_table(page, section):
    return page.locator(f"{section} .table").first


def labels_of(table):
    return table.locator("tbody th").evaluate_all("cells => cells.map(cell => cell.dataset.value)")


# ---------------------------------------------------------------- what is there


def test_everything_is_there_is_drawn_and_comes_from_the_page_itself(opened, demo):
    page = opened()
    for section, (name, parts) in zip((SPIRAL, DIGITS), PARTS.items(), strict=True):
        assert page.locator(f"{section} h2").text_content() == name
        assert page.locator(f"{section} h3").all_text_contents() == parts
        links = page.locator(f"{section} .contents a")
        assert links.all_text_contents() == parts
        targets = links.evaluate_all(
            "links => links.map(link => document.getElementById(link.hash.slice(1)).innerText)"
        )
        assert targets == parts
        assert page.locator(f"{section} .key").all_text_contents() == labels_of(main_table(page, section))
        assert set(demo.runs[name]) == set(labels_of(main_table(page, section)))
    draw_all(page)
    figures = assert_drawn(page)
    assert len(figures) == page.locator(".figure").count() > 40
    images = page.locator(f"{DIGITS} .mistakes img").evaluate_all(
        "async images => { for (const image of images) await image.decode();"
        " return images.map(image => [image.naturalWidth, image.naturalHeight, image.alt]); }"
    )
    assert len(images) == 4 * 12
    assert {(width, height) for width, height, _ in images} == {(8, 8)}
    assert all(re.fullmatch(r"Test example \d+, \d", alt) for *_, alt in images)
    assert_clean(page)
    assert_self_contained(page)


# ---------------------------------------------------------------- numbers


def printed(value, digits, *, sign=False):
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return (text.lstrip("+-") if float(text) == 0 else text).replace("-", MINUS)


def expected_cell(demo, experiment, label, first, name, digits):
    """A cell of the main table by the standard library and SciPy."""
    ours, theirs = values(demo, experiment, label, name), values(demo, experiment, first, name)
    lines = [f"{printed(statistics.fmean(ours.values()), digits)} ± {statistics.stdev(ours.values()):.{digits}f}"]
    if label == first:
        return lines
    differences = [ours[seed] - theirs[seed] for seed in ours]
    lines.append(printed(statistics.fmean(differences), digits, sign=True))
    if len(set(differences)) == 1:
        return [*lines, "the same in all 2 seeds, so no interval"]
    seeds = sorted(ours)
    test = stats.ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    interval = test.confidence_interval(0.95)
    ends = ", ".join(printed(end, digits, sign=True) for end in interval)
    inside = [] if test.pvalue < 0.05 else ["no significant difference"]
    return [*lines, f"[{ends}]", *inside]


@pytest.mark.parametrize(("section", "experiment"), [(SPIRAL, "spiral"), (DIGITS, "digits")])
def test_the_numbers_are_those_of_the_records(opened, demo, section, experiment):
    page = opened()
    table = main_table(page, section)
    assert table.locator("thead button").all_text_contents() == ["method", "n", *COLUMNS[experiment]]
    labels = labels_of(table)
    for row, label in zip(table.locator("tbody tr").all(), labels, strict=True):
        cells = row.locator("td").evaluate_all(
            "cells => cells.map(cell => cell.children.length"
            " ? [...cell.children].map(line => line.textContent) : [cell.textContent])"
        )
        columns = COLUMNS[experiment].values()
        wanted = [expected_cell(demo, experiment, label, labels[0], name, digits) for name, digits in columns]
        assert cells == [["2"], *wanted]
        marked = row.locator("td").evaluate_all("cells => cells.map(cell => cell.classList.contains('significant'))")
        assert marked == [False, *(len(cell) == 3 and cell[2].startswith("[") for cell in wanted)]
    runs = page.locator(f"{section} details:has(> summary:text-is('All runs')) tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    assert runs == [
        [
            label,
            str(seed),
            *(printed(record["metrics"][name], digits) for name, digits in COLUMNS[experiment].values()),
            f"{record['seconds']:.1f}",
            record["folder"],
        ]
        for label in labels
        for seed, record in sorted(demo.runs[experiment][label].items())
    ]


# ---------------------------------------------------------------- what one can do


def test_a_table_is_sorted_by_its_numbers_with_mouse_and_keyboard(opened, demo):
    page = opened()
    table = main_table(page, DIGITS)

    def orders():
        return table.locator("thead th").evaluate_all("cells => cells.map(cell => cell.getAttribute('aria-sort'))")

    original = labels_of(table)
    assert set(orders()) == {"none"}
    how = (lambda button: button.click(), lambda button: button.press("Enter"), lambda button: button.press("Space"))
    for place, (heading, (name, _)), press in zip(range(2, 5), COLUMNS["digits"].items(), how, strict=True):
        means = {label: statistics.fmean(values(demo, "digits", label, name).values()) for label in original}
        rising = sorted(original, key=means.__getitem__)
        button = table.get_by_role("button", name=heading)
        for order, wanted in (("ascending", rising), ("descending", rising[::-1])):
            press(button)
            assert labels_of(table) == wanted
            assert orders() == [order if i == place else "none" for i in range(5)]
    table.get_by_role("button", name="method").click()
    assert labels_of(table) == sorted(original)
    assert labels_of(main_table(page, SPIRAL))[0] == "none", "the other tables stay"
    assert_clean(page)


LOOK = """
() => {
  const figure = document.getElementById("experiment-2-validation-error");
  const line = [...figure.querySelectorAll(".trace")].at(-3).querySelector(".js-line"); // of the second of four methods
  const series = getComputedStyle(document.documentElement).getPropertyValue("--series-2").trim();
  return [
    getComputedStyle(document.body).backgroundColor,
    figure.querySelector(".plot").data.at(-3).line.color === series,
    getComputedStyle(line).stroke,
    document.getElementById("theme").textContent,
  ];
}
"""
LIGHT = ["rgb(255, 255, 255)", True, "rgb(0, 114, 178)"]
DARK = ["rgb(20, 23, 27)", True, "rgb(86, 180, 233)"]


def test_the_theme_is_chosen_followed_by_the_figures_and_remembered(opened):
    page = opened()
    figure, button = page.locator("#experiment-2-validation-error"), page.locator("#theme")

    def look():
        figure.scroll_into_view_if_needed()
        page.wait_for_selector("#experiment-2-validation-error[data-drawn] .js-line")
        page.wait_for_timeout(100)
        return page.evaluate(LOOK)

    assert look() == [*LIGHT, "theme: as the system"]
    button.click()
    assert look() == [*LIGHT, "theme: light"]
    button.click()
    assert look() == [*DARK, "theme: dark"]
    page.reload()
    assert look() == [*DARK, "theme: dark"]
    button.click()
    assert look() == [*LIGHT, "theme: as the system"]
    page.emulate_media(color_scheme="dark")
    assert look() == [*DARK, "theme: as the system"]
    # where a page from a file may remember nothing, it works all the same
    refuse = "{get() { throw new DOMException('no', 'SecurityError'); }}"
    page.add_init_script(f"Object.defineProperty(window, 'localStorage', {refuse})")
    page.reload()
    button.click()
    assert look() == [*LIGHT, "theme: light"]
    assert_clean(page)


def visible(page, figure):
    """Method of each trace, and whether it is shown, as plotly.js has it; and how many traces it has drawn."""
    return page.locator(f"#{figure} .plot").evaluate(
        "plot => [plot.data.map(t => [t.legendgroup, t.visible]), plot.querySelectorAll('.trace').length]"
    )


def test_the_legend_hides_and_shows_a_method_in_all_figures(opened):
    page = opened()

    def look_at(figure):
        page.locator(f"#{figure}").scroll_into_view_if_needed()
        page.wait_for_selector(f"#{figure}[data-drawn] .js-line")
        page.wait_for_timeout(200)
        return visible(page, figure)

    curves = ["experiment-2-validation-error", "experiment-2-lambda"]  # drawn before and after the legend is used
    before, drawn = look_at(curves[0])
    assert [method for method, shown in before if shown] == [f"method-{i}" for i in (0, 1, 2, 3)] * 2
    assert drawn == 8
    assert not page.locator(f"#{curves[1]}[data-drawn]").count()
    for section, name in ((DIGITS, "confusion-1"), (SPIRAL, "surface-1"), (SPIRAL, "hidden-1")):
        own, key = page.locator(f"{section}-{name}"), page.locator(f"{section} .key").nth(1)
        for pressed in ("true", "false") if name != "hidden-1" else ("false",):
            assert (key.get_attribute("aria-pressed"), own.is_visible()) == (pressed, pressed == "true")
            if pressed == "true":
                key.press("Space")
        assert page.locator(f"{section}-confusion-0").is_visible()
        assert page.locator(f"{SPIRAL}-confusion-1").is_visible() == (section == DIGITS), "the other experiment's stay"
    for curve, left in zip(curves, (6, 4), strict=True):
        traces, drawn = look_at(curve)
        assert traces == [[method, method != "method-1"] for method, _ in traces]
        assert drawn == left
    for section in (DIGITS, SPIRAL):
        page.locator(f"{section} .key").nth(1).click()
    assert look_at(curves[0]) == [before, 8]
    for name in (f"{DIGITS}-confusion-1", f"{SPIRAL}-surface-1"):
        page.locator(name).scroll_into_view_if_needed()
        page.wait_for_selector(f"{name}[data-drawn] .heatmaplayer image")
    assert_clean(page)


def copied(page, table, kind):
    """What is on the clipboard after a press of the button; the button says that it worked, and then its name again."""
    button = table.get_by_role("button", name=kind)
    handle = button.element_handle()
    button.click()
    page.wait_for_function("button => button.textContent === 'copied'", arg=handle)
    return page.evaluate("window.taken ?? navigator.clipboard.readText()")


@pytest.mark.parametrize("clipboard", ["given", "refused"])
def test_a_table_is_copied_in_every_form(opened, demo, clipboard):
    page = opened()
    if clipboard == "given":
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    else:  # the old way has to do; the event tells what it takes
        page.evaluate(
            "() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no'));"
            " document.addEventListener('copy', () => { window.taken = document.activeElement.value; }); }"
        )
    table = main_table(page, DIGITS)
    rows = list(csv.DictReader(io.StringIO(copied(page, table, "CSV"))))
    assert [row["method"] for row in rows] == labels_of(table)
    for row in rows:
        for name, _ in COLUMNS["digits"].values():
            measured = values(demo, "digits", row["method"], name).values()
            assert float(row[f"{name} mean"]) == statistics.fmean(measured)
            assert float(row[f"{name} sd"]) == statistics.stdev(measured)
    markdown = copied(page, table, "Markdown").splitlines()
    assert markdown[0].startswith("| method | n | test error (%) |")
    assert len(markdown) == 2 + len(rows)
    latex = copied(page, table, "LaTeX")
    assert latex.count(r" \\") == 1 + len(rows)
    assert r"test error (\%)" in latex
    assert copied(page, table, "BibTeX").startswith("@inproceedings{verma2019manifold,")
    assert_clean(page)


def test_a_figure_is_saved_with_its_legend_and_without_hidden_methods(opened):
    page = opened()
    page.locator(f"{DIGITS} .key").nth(1).click()

    def saved(figure, kind):
        with page.expect_download() as download:
            page.locator(f"#{figure} [data-save={kind}]").click()
        assert download.value.suggested_filename == f"{figure.removeprefix('experiment-2-')}.{kind}"
        return download.value.path().read_bytes()

    text = "".join(ElementTree.fromstring(saved("experiment-2-training-loss", "svg")).itertext())
    assert "Training loss" in text
    assert "none" in text
    assert "manifold mixup, hidden layers only" in text
    assert "input mixup" not in text
    with Image.open(io.BytesIO(saved("experiment-2-training-loss", "png"))) as image:
        assert image.size == (1600, 2 * (300 + 160))
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20
    assert_clean(page)


# ---------------------------------------------------------------- windows, themes, paper


@pytest.mark.parametrize(("width", "height", "scheme"), [(1440, 900, "light"), (390, 844, "dark")])
def test_the_page_fits_its_window_and_is_accessible(opened, width, height, scheme):
    page = opened(width, height, scheme)
    draw_all(page)
    assert_no_overflow(page)
    # drawings are images to whoever cannot see them; that each has a text is looked at with all else
    assert_accessible(page, {"exclude": [[".plot > *"]]})
    screenshot(page, f"page-{width}-{scheme}")
    other = "dark" if scheme == "light" else "light"
    page.emulate_media(color_scheme=other)
    page.wait_for_timeout(300)
    assert_accessible(page, {"include": [["header"], [DIGITS]], "exclude": [[".plot"]]})
    assert_drawn(page)
    screenshot(page, f"page-{width}-{other}")
    assert_clean(page)


def test_paper_holds_everything_in_light_colours(opened):
    page = opened(color_scheme="dark")
    page.wait_for_function("() => window.Plotly !== undefined")  # it is there before anybody has scrolled to a figure
    page.evaluate(
        """() => addEventListener("beforeprint", () => { // after the page's own listener, right before it is printed
          window.printed = [...document.querySelectorAll(".figure")].map((figure) => [
            "drawn" in figure.dataset, figure.querySelector(".plot").layout?.font.color]);
          window.closed = document.querySelectorAll("details:not([open])").length;
        })"""
    )
    document = page.pdf()
    assert document.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", document)) > 1
    assert page.evaluate("closed") == 0
    assert page.evaluate("printed") == [[True, "#57606a"]] * page.locator(".figure").count()
    page.wait_for_timeout(500)
    colours = page.evaluate("[...document.querySelectorAll('.plot')].map(plot => plot.layout.font.color)")
    assert set(colours) == {"#a3acb5"}, "on the screen it is dark again"
    assert page.locator("#theme").text_content() == "theme: as the system"
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator(".copies, #theme, .contents").locator("visible=true").count()
    assert not seen(page).problems()
