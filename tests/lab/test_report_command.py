"""``manifold-mixup report`` and ``board``: what they read, where they write, and what they say."""

import json
import re
from pathlib import Path

import pytest

from lab.report_runs import write_run
from lab.reporting import Page
from lab.test_cli import assert_refused, call  # noqa: F401  the fixture
from manifold_mixup.lab import report_command
from manifold_mixup.lab.report import board, export, live
from manifold_mixup.lab.report.templates import FOLDER
from manifold_mixup.lab.results import write_lines

CONFIG = {"data": {"name": "digits"}, "model": {"name": "mlp"}, "method": {"name": "none"}, "train": {"steps": 3}}


@pytest.fixture
def runs(tmp_path):
    """Two methods with two seeds each."""
    for label, error in (("none", 3.0), ("mixed", 2.0)):
        for seed in (0, 1):
            add(tmp_path / "runs", label, seed, error + seed / 4)
    return tmp_path / "runs"


def add(runs, label, seed, error):
    method = "none" if label == "none" else "manifold_mixup"
    result = write_run(runs, label, seed, method=method, metrics={"test_error": error, "test_nll": 0.1})
    text = json.dumps({"config": {**CONFIG, "seed": seed}, "hash": "0" * 16})
    (result.record.folder / "config.json").write_text(text)
    return result


def written(out):
    """The page that the command says it has written."""
    path = Path(re.fullmatch(r"page: (.*)\n", out)[1])
    return path, Page(path.read_text(encoding="utf-8"))


def test_the_page_lies_in_the_folder_of_its_runs(call, runs):  # noqa: F811
    code, out, err = call("report", runs)
    assert (code, err) == (0, "")
    path, page = written(out)
    assert path == runs / "report.html"
    assert "Manifold Mixup: runs" in page.words
    assert "mixed" in page.words
    assert "data-live" not in page.source
    before = path.read_bytes()
    assert call("report", runs)[0] == 0
    assert path.read_bytes() == before, "a page is no run"


def test_the_page_of_several_places_lies_here_or_where_it_is_told(call, runs, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    lines = tmp_path / "lines.jsonl"
    write_lines([write_run(tmp_path / "others", experiment="other")], lines)
    _, out, _ = call("report", runs, lines)
    path, page = written(out)
    assert path == Path("report.html")
    assert "Manifold Mixup: a report" in page.words
    assert "other" in page.words
    path, page = written(call("report", lines)[1])
    assert path == Path("report.html")
    assert "Manifold Mixup: lines" in page.words
    path, page = written(call("report", runs, "-o", tmp_path / "new" / "page.html", "--title", "<Ours>")[1])
    assert path == tmp_path / "new" / "page.html"
    assert "<Ours>" in page.words


def test_the_baseline_is_what_the_others_are_compared_with(call, runs):  # noqa: F811
    for chosen, text in ((None, "difference to none"), ("mixed", "difference to mixed")):
        _, page = written(call("report", runs, *(("--baseline", chosen) if chosen else ()))[1])
        assert text in page.words


@pytest.mark.parametrize("command", ["report", "board"])
def test_bad_input_is_one_line(call, runs, tmp_path, command):  # noqa: F811
    (tmp_path / "text.txt").write_text("")
    assert_refused(call(command), "Missing argument 'RUNS'")
    assert_refused(call(command, tmp_path / "text.txt"), "text.txt is neither a folder of runs nor a .jsonl file")


def test_what_is_no_folder_of_runs_is_said(call, runs, tmp_path):  # noqa: F811
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text("{\n")
    assert_refused(call("report", tmp_path / "empty"), "empty holds no run: a run is a folder with config.json")
    assert_refused(call("report", tmp_path / "nowhere"), "nowhere is neither a folder")
    assert_refused(call("report", tmp_path / "bad.jsonl"), "bad.jsonl is corrupted")
    assert_refused(call("report", runs, "--baseline", "nobody"), "no method is called 'nobody'; there is mixed, none")
    (tmp_path / "page.html").mkdir()
    assert_refused(call("report", runs, "-o", tmp_path / "page.html"), "cannot write .*page.html")


def test_figures_are_written_beside_the_page_in_the_colours_of_the_light_theme(
    call,  # noqa: F811
    runs,
    tmp_path,
    monkeypatch,
):
    kept = []

    def write(figures, folder, formats=("svg", "png"), *, colours, titles):
        for name, figure in figures.items():
            kept.append(name)
            spec = export.still(name, figure, colours, titles[name])  # raises for a colour without a value
            assert "var(--" not in json.dumps(spec)
        return [folder / f"{name}.{kind}" for name in figures for kind in formats]

    monkeypatch.setattr(export, "write_figures", write)
    code, out, err = call("report", runs, "--figures", tmp_path / "figures")
    assert (code, err) == (0, "")
    assert kept
    assert out == f"page: {runs / 'report.html'}\nfigures: {2 * len(kept)} files in {tmp_path / 'figures'}\n"


def test_the_colours_are_those_of_the_light_theme():
    colours = report_command._colours()
    assert {"paper", "ink", "muted", "line", *(f"series-{i}" for i in range(1, 9))} <= colours.keys()
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours.values())
    assert colours["paper"] == "#ffffff"
    style = (FOLDER / "page.css").read_text()
    assert set(re.findall(r"var\(--([\w-]+)\)", style)) <= colours.keys()


def test_watch_writes_again_until_ctrl_c(call, runs, monkeypatch):  # noqa: F811
    looks = []

    def look(paths):
        looks.append(paths)
        if len(looks) == 3:
            add(runs, "later", 0, 1.0)
        if len(looks) == 5:
            (runs / "digits" / "later" / "seed-0" / "config.json").write_text("{")
            (runs / "lines.jsonl").write_text("{")
        if len(looks) == 6:
            raise KeyboardInterrupt
        return real(paths)

    real = live.look
    monkeypatch.setattr(live, "look", look)
    monkeypatch.setattr(live, "TICK", 0.0)
    monkeypatch.setattr(live, "EASE", 0)
    code, out, err = call("report", runs, "--watch")
    assert (code, err) == (0, "")
    assert out == 3 * f"page: {runs / 'report.html'}\n"
    page = Page((runs / "report.html").read_text())
    assert "later" in page.words


def test_watch_says_why_it_could_not_write(call, runs, monkeypatch):  # noqa: F811
    looks = []

    def look(paths):
        looks.append(paths)
        if len(looks) == 3:
            raise KeyboardInterrupt
        if len(looks) == 2:
            (runs / "report.html").unlink()
            (runs / "report.html").mkdir()
        return live.Look(str(len(looks)), tuple(paths))

    monkeypatch.setattr(live, "look", look)
    monkeypatch.setattr(live, "TICK", 0.0)
    monkeypatch.setattr(live, "EASE", 0)
    code, out, err = call("report", runs, "--watch")
    assert (code, out) == (0, f"page: {runs / 'report.html'}\n")
    assert re.fullmatch(r"not written: cannot write .*report\.html: .*\n", err)


class Ended:
    """A server that was ended at once."""

    url, everywhere = "http://localhost:1/", True

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def serve_forever(self):
        raise KeyboardInterrupt


def test_board_says_where_it_is_who_can_read_it_and_opens_a_browser_when_asked(call, runs, monkeypatch):  # noqa: F811
    calls, opened = [], []

    def open_server(served, host, port):
        calls.append((served.answer(), host, port))
        return Ended()

    monkeypatch.setattr(board, "open_server", open_server)
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert call("board", runs) == (0, "board: http://localhost:1/ (Ctrl-C ends it)\n", EVERYONE)
    assert opened == []
    assert call("board", runs, "--host", "0.0.0.0", "--port", 7, "--title", "Ours", "--open")[2] == EVERYONE
    assert opened == [Ended.url]
    (first, *where), (second, *there) = calls
    assert (where, there) == (["127.0.0.1", None], ["0.0.0.0", 7])
    assert (first.status, second.status) == (200, 200)
    assert "Manifold Mixup: runs" in first.html
    assert "<h1>Ours</h1>" in second.html


EVERYONE = "everyone who can reach this machine can read it\n"


def test_board_of_a_port_that_cannot_be_had_is_one_line(call, runs):  # noqa: F811
    assert_refused(call("board", runs, "--host", "192.0.2.1"), "cannot listen at --host 192.0.2.1 --port 8000: ")
    assert_refused(call("board", runs, "--port", 70000), "Invalid value for '--port'")


@pytest.mark.parametrize("command", ["report", "board"])
def test_help_has_examples(call, command):  # noqa: F811
    code, out, _ = call(command, "--help")
    assert code == 0
    assert f"manifold-mixup {command} runs" in out
