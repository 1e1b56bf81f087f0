"""Pages of runs that never took place: what is hostile, what is missing, and the board that follows runs."""

from __future__ import annotations

import contextlib
import json
import threading

import numpy as np
import pytest

from browser.checks import assert_clean, assert_drawn, assert_no_overflow, draw_all, screenshot, seen
from lab.report_runs import details, log_lines, write_log, write_run
from manifold_mixup.lab.records import Failure
from manifold_mixup.lab.report.board import Board, open_server
from manifold_mixup.lab.report.page import render_page, write_report
from manifold_mixup.lab.report.sources import Sources, gather

SCRIPT, IMAGE = "<script>alert(1)</script>", "<img src=x onerror=alert(1)>"


def predictions(seed, n=60, classes=3):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(classes, 0.4), n), rng.integers(classes, size=n)


def arrays(seed):
    """All that a run keeps of three classes."""
    rng = np.random.default_rng(seed)
    images = rng.integers(256, size=(60, 1, 8, 8), dtype=np.uint8)
    spectra = {"classes": np.arange(3), "layer": np.frombuffer(IMAGE.encode(), np.uint8)}
    for suffix in ("", "_centred"):
        spectra[f"by_class{suffix}"] = np.sort(rng.uniform(0.5, 9, (3, 5)))[:, ::-1].copy()
        spectra[f"effective_rank{suffix}"] = rng.uniform(1, 5, 3)
    return {"details": details(*predictions(seed), images=images), "spectra": spectra}


def mixing(layers):
    return {"unit": "batches", "layers": layers, "unmixed": 3, "lam": [2] * 50, "alpha": 2.0}


# ---------------------------------------------------------------- hostile


def test_whatever_comes_from_runs_is_text_in_tables_and_figures(tmp_path, open_page):
    measured = {"rotation_20_accuracy": 80.0, "rotation_40_accuracy": 60.0, IMAGE: 1.0}
    results = [
        write_run(
            tmp_path / IMAGE,
            label,
            seed,
            experiment=SCRIPT,
            data=IMAGE,
            model=SCRIPT,
            options={IMAGE: SCRIPT},
            classes=[SCRIPT, IMAGE, "\"'>" + IMAGE],
            log=log_lines([9.0, 5.0 + seed, 4.0]),
            arrays=arrays(seed),
            measured=measured,
            metrics={"test_error": 3.0 + seed, IMAGE: 2.0 + seed},
            train={"mixing": mixing({SCRIPT: 30, IMAGE: 27}), "settings": {SCRIPT: IMAGE}},
            versions={SCRIPT: IMAGE},
            hardware={"device": IMAGE},
            command=f"manifold-mixup {SCRIPT}",
        )
        for label in (SCRIPT, IMAGE)
        for seed in range(2)
    ]
    failures = [Failure(SCRIPT, SCRIPT, 2, IMAGE), Failure(IMAGE, SCRIPT, 0, SCRIPT)]
    descriptions = {SCRIPT: IMAGE}
    path = write_report(Sources(results, failures, descriptions=descriptions), tmp_path / "page.html", SCRIPT)
    page = open_page(path)
    draw_all(page)
    figures = assert_drawn(page)
    assert len(figures) >= 14
    assert page.title() == page.locator("h1").text_content() == SCRIPT
    assert page.locator("h2").text_content() == SCRIPT
    words = page.locator("main").inner_text()
    for text in (f"Data: {IMAGE}. Network: {SCRIPT}. {IMAGE}.", f"{SCRIPT}, seed 2: {IMAGE}", f"{IMAGE} = {SCRIPT}"):
        assert text in words
    assert f"{IMAGE}: {SCRIPT}, seed 0, failed: {SCRIPT}" in words
    # plotly.js writes labels itself: the very characters, and no element made of them
    drawn = page.locator(".plot").evaluate_all("plots => plots.map(plot => plot.textContent)")
    assert any("<script>alert(1)" in text for text in drawn)
    assert any("<img src=x" in text for text in drawn)
    hovered = page.evaluate(
        """async () => {
          const texts = [];
          for (const name of ["training-loss", "reliability", "mixed-layers", "confusion-1", "spectrum"]) {
            const plot = document.querySelector(`#experiment-1-${name} .plot`);
            plot.scrollIntoView();
            for (let curveNumber = 0; curveNumber < plot.data.length; curveNumber++) {
              const pointNumber = plot.data[0].type === "heatmap" ? [0, 1] : 1;
              Plotly.Fx.hover(plot, [{ curveNumber, pointNumber }]);
              await new Promise((done) => setTimeout(done, 60)); // plotly.js lets some time pass between two
              texts.push(...[...plot.querySelectorAll(".hoverlayer text")].map((text) => text.textContent));
            }
          }
          return texts;
        }"""
    )
    assert any(SCRIPT in text for text in hovered), hovered[:20]
    assert any(IMAGE in text for text in hovered)
    page.locator(".key").first.click()
    page.wait_for_timeout(300)
    inside = page.locator(".plot script, .plot img, .plot foreignObject, .plot [onerror]")
    assert inside.count() == 0
    assert page.locator("[onerror]").count() == 0
    sources = page.locator("img").evaluate_all("images => images.map(image => image.src.slice(0, 22))")
    assert sources
    assert set(sources) == {"data:image/png;base64,"}
    kinds = page.locator("script").evaluate_all("scripts => scripts.map(script => script.type)")
    assert kinds.count("") == 2, "the page's own and the unpacked plotly.js"
    assert set(kinds) == {"", "application/json", "application/gzip"}
    assert_no_overflow(page)
    screenshot(page, "hostile")
    assert_clean(page)


# ---------------------------------------------------------------- what is missing


def test_what_is_missing_is_said_and_one_seed_has_no_spread(tmp_path, open_page):
    log = log_lines([9.0, 5.0, 4.0])
    results = [write_run(tmp_path, "none", s, log=log_lines([9.0 - s, 5.0, 4.0 + s])) for s in range(3)]
    results += [write_run(tmp_path, "single", 0, log=log, metrics={"test_error": 2.0, "test_nll": 0.2})]
    lost = [{"test_error": 2.0, "test_nll": None}, {"test_error": 2.5, "test_nll": 0.2}, {"test_error": 4.0}]
    results += [write_run(tmp_path, "lost", s, log=log, metrics=metrics) for s, metrics in enumerate(lost)]
    results += [write_run(tmp_path, "nowhere", 0, metrics={"test_error": None, "test_nll": None})]
    failures = [Failure("digits", "single", 1, "out of memory"), Failure("digits", "gone", 0, "no such layer")]
    page = open_page(write_report(Sources(results, failures), tmp_path / "page.html", "Gaps"))
    words = page.locator("main").inner_text()
    for text in (
        "single (failed at seed 1; no run at seed 2)",
        "gone has no finished run: it failed at seed 0.",
        "Failed: single, seed 1: out of memory",
        "no finite number at seed 0, left out of the mean",
        "measured in 2 of 3 runs",
        "one common seed, so no interval",
        "no difference: a run has no finite number",
        "one seed in common, so nothing can be said of its certainty: test error",
    ):
        assert text in words
    rows = page.locator(".table").first.locator("tbody tr")
    texts = {label: rows.nth(i).locator("td").all_inner_texts() for i, label in enumerate(page_labels(rows))}
    assert list(texts) == ["none", "single", "lost", "nowhere"]
    assert texts["single"][:2] == ["1", f"2.00\n{chr(0x2212)}1.00\none common seed, so no interval"]
    for label in ("single", "nowhere"):
        assert not {"±", "["} & set("".join(texts[label]))
    assert all("±" in cell for cell in texts["none"][1:])
    assert texts["nowhere"][1].startswith("\N{EN DASH}\nno finite number at seed 0")
    assert not any("NaN" in cell or "nan" in cell for row in texts.values() for cell in row)
    # what is no number stays last, whichever way the table is sorted
    for _ in range(2):
        page.locator(".table").first.get_by_role("button", name="test error").click()
        assert page_labels(rows)[-1] == "nowhere"
    draw_all(page)
    assert_drawn(page)
    traces = page.locator("#experiment-1-validation-error .plot").evaluate(
        "plot => plot.data.map(trace => [trace.legendgroup, trace.fill ?? 'none'])"
    )
    assert [method for method, fill in traces if fill == "toself"] == ["method-0", "method-2"]
    assert [method for method, fill in traces if fill == "none"] == ["method-0", "method-1", "method-2"]
    screenshot(page, "gaps")
    assert_clean(page)


def page_labels(rows):
    return rows.locator("th").evaluate_all("cells => cells.map(cell => cell.dataset.value)")


# ---------------------------------------------------------------- the board


@pytest.fixture
def board(tmp_path):
    """A board of a folder that is not there yet: the folder, the address, and what stops it."""
    runs = tmp_path / "runs"
    server = open_server(
        Board([runs], lambda paths: render_page(gather(paths), "Runs", live=True), "Runs"), "127.0.0.1", 0
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    stopped = threading.Event()

    def stop():
        if not stopped.is_set():
            stopped.set()
            server.shutdown()
            thread.join()
            server.server_close()

    with contextlib.ExitStack() as stack:
        stack.callback(stop)
        yield runs, server.url, stop


def finished(runs, label, seed, values):
    """A finished run with the file by which the board knows runs."""
    result = write_run(runs, label, seed, log=log_lines(values), metrics={"test_error": values[-1], "test_nll": 0.1})
    unfinished(result.record.folder, label, seed)


def unfinished(folder, label, seed, values=()):
    folder.mkdir(parents=True, exist_ok=True)
    if values:
        write_log(folder, log_lines(values))
    config = {"data": {"name": "digits"}, "model": {"name": "mlp"}, "method": {"name": "none"}, "seed": seed}
    text = json.dumps({"config": {**config, "train": {"steps": 60}}, "hash": "0" * 16})
    (folder / "config.json").write_text(text, encoding="utf-8")


def test_the_board_follows_runs_and_keeps_what_the_reader_has_chosen(board, open_page):
    runs, url, stop = board
    page = open_page(url)
    assert "no runs yet" in page.get_by_role("status").inner_text()
    finished(runs, "none", 0, [9.0, 5.0, 4.0])
    page.wait_for_selector("h2:text-is('digits')", timeout=30_000)
    cell = page.locator(".table").first.locator("tbody tr").first.locator("td").nth(1)
    assert cell.inner_text() == "4.00"
    finished(runs, "other", 0, [8.0, 5.0, 3.0])
    page.wait_for_selector(".key >> nth=1", timeout=30_000)
    # the reader opens a part, hides a method, and scrolls
    page.locator("summary:text-is('All runs')").click()
    page.locator(".key").nth(1).click()
    page.locator("#experiment-1-validation-nll").scroll_into_view_if_needed()
    page.wait_for_selector("#experiment-1-validation-error[data-drawn] .js-line")
    page.wait_for_timeout(200)
    place = page.evaluate("scrollY")
    assert place > 0
    curve = page.locator("#experiment-1-validation-error .plot")
    known = curve.element_handle()
    finished(runs, "none", 1, [9.0, 5.0, 5.0])
    unfinished(runs / "digits" / "other" / "seed-1", "other", 1, [8.0, 6.0, 5.0])
    page.wait_for_selector(".status:has-text('3 of 4 runs are finished')", timeout=30_000)
    page.wait_for_timeout(300)
    assert cell.inner_text() == "4.50 ± 0.71"
    assert "other, seed 1, was stopped at step 30 of 60." in page.locator(".status").inner_text()
    assert page.locator("details:has(> summary:text-is('All runs'))").get_attribute("open") is not None
    assert page.locator("details:not([open])").count() >= 1
    assert [key.get_attribute("aria-pressed") for key in page.locator(".key").all()] == ["true", "false"]
    assert curve.evaluate("(plot, known) => plot === known", known), "the figure stays, it is not drawn afresh"
    traces = curve.evaluate("plot => plot.data.map(t => [t.legendgroup, t.fill ?? 'none', t.visible, [...t.y]])")
    assert ["method-0", "none", True, [9, 5, 4.5]] in traces
    assert ["method-1", "none", False, [8, 5.5, 4]] in traces
    assert all(shown == (method == "method-0") for method, _, shown, _ in traces)
    # the lines above grew by two, so the place may move by their height, and is kept to what the reader looked at
    assert abs(page.evaluate("scrollY") - place) < 250
    assert page.get_by_role("status").inner_text().startswith("live: last looked at ")
    assert page.evaluate("performance.getEntriesByType('navigation')[0].type") == "reload", "the waiting page went once"
    assert_clean(page)
    stop()
    page.wait_for_selector("#news:has-text('the board does not answer')", timeout=30_000)
    assert cell.inner_text() == "4.50 ± 0.71"
    assert not seen(page).errors
