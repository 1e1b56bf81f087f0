"""Figures as files: drawn by plotly.js in a real browser, offline, whole or not at all."""

from __future__ import annotations

import asyncio
import copy
import http.server
import re
import struct
import sys
import threading
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from browser.install import needed_browser
from manifold_mixup.lab.errors import LabError, MissingExtra, StorageError, UsageError
from manifold_mixup.lab.report import export
from manifold_mixup.lab.report.export import FONT, file_stem, still, write_figures
from manifold_mixup.lab.report.figures.style import axis, colour_of, layout, literal, of_method, scatter

EVIL = "<script>alert(1)</script>"
COLOURS = {"series-1": "#0a7d33", "series-2": "#1155cc", "line": "#dddddd", "muted": "#555555"}
LABELS = ("no mixup", EVIL)
FORMATS = ("svg", "png", "pdf")


def curves(labels=LABELS, height=260):
    """A figure such as the page has: a line for every method, and a second one without a place in the legend."""
    traces = []
    for index, label in enumerate(labels):
        line = {"mode": "lines", "line": {"color": colour_of(index)}}
        traces.append({**scatter(x=[0, 1], y=[index, index + 1], **line), **of_method(label, index)})
        traces.append({**scatter(x=[0, 1], y=[index, index], **line), **of_method(label, index, first=False)})
    axes = {"xaxis": {**axis(), "title": {"text": literal("epoch <b>")}}, "yaxis": axis()}
    return {"data": traces, "layout": layout(height=height, margin={"l": 40, "r": 8, "t": 8, "b": 40}, **axes)}


@pytest.fixture(scope="module")
def chromium():
    """The browser of the tests, as the one that a user names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BROWSER_PATH", str(needed_browser()))
        yield


@pytest.fixture(scope="module")
def drawn(chromium, tmp_path_factory):
    """Two figures in every format: the folder and the files, by name."""
    folder = tmp_path_factory.mktemp("figures") / "made"
    figures = {"curves": curves(), f"../{EVIL}": {"data": [{"type": "scatter", "y": [1, 2]}]}}
    files = write_figures(figures, folder, FORMATS, colours=COLOURS, titles={"curves": f"Error & {EVIL}"}, scale=2)
    return folder, {file.name: file for file in files}


# ---------------------------------------------------------------- what a browser draws


def test_every_figure_is_there_in_every_format_and_nothing_else(drawn):
    folder, files = drawn
    assert list(files) == [f"{name}.{form}" for name in ("curves", "script-alert-1-script") for form in FORMATS]
    assert {file.parent for file in files.values()} == {folder}
    assert sorted(path.name for path in folder.iterdir()) == sorted(files)
    assert [path.name for path in folder.parent.iterdir()] == ["made"]


def test_an_svg_stands_alone(drawn):
    source = drawn[1]["curves.svg"].read_text(encoding="utf-8")
    root = ET.fromstring(source)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    height = still("", curves(), COLOURS, "x")["layout"]["height"]
    assert (root.get("width"), root.get("height")) == ("700", str(height))
    words = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"no mixup", EVIL, f"Error & {EVIL}", "epoch <b>"} <= set(words)
    assert words.count("no mixup") == 1  # the second line of a method has no place in the legend
    assert not [element.tag for element in root.iter() if element.tag.endswith(("script", "foreignObject"))]
    assert set(re.findall(r"font-family: ([^;]*);", source)) == {FONT}
    assert "var(" not in source
    assert all(f"stroke: rgb{colour}" in source for colour in ((10, 125, 51), (17, 85, 204)))
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", source)
    assert not re.findall(r"(?:https?:|file:|@import|@font-face|url\((?!['\"]?#))", outside)


def test_a_png_has_the_dots_that_were_asked_for_on_white(drawn):
    height = still("", curves(), COLOURS, "x")["layout"]["height"]
    for name, size in {"curves.png": (1400, 2 * height), "script-alert-1-script.png": (1400, 800)}.items():
        content = drawn[1][name].read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", content[16:24]) == size
        with Image.open(drawn[1][name]) as image:
            pixels = image.convert("RGBA")
            assert pixels.getpixel((1, 1)) == pixels.getpixel((size[0] - 1, size[1] - 1)) == (255, 255, 255, 255)
            assert len(pixels.getcolors(1 << 20)) > 10


def test_a_pdf_is_one_page_of_the_figures_size(drawn):
    content = drawn[1]["curves.pdf"].read_bytes()
    height = still("", curves(), COLOURS, "x")["layout"]["height"]
    assert content.startswith(b"%PDF-")
    (box,) = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", content)
    assert [float(side) for side in box] == pytest.approx([700 * 72 / 96, height * 72 / 96], abs=1)  # in points


def test_nothing_is_fetched_even_where_a_figure_asks_and_a_loop_is_running(chromium, tmp_path):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    async def write():
        return write_figures({"x": figure}, tmp_path, ["svg"])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        image = {"source": f"http://127.0.0.1:{server.server_port}/x.png", "x": 0, "y": 1, "sizex": 1, "sizey": 1}
        figure = {"data": [{"type": "scatter", "y": [1, 2]}], "layout": {"images": [image], "title": {"text": "$x$"}}}
        (file,) = asyncio.run(write())
        server.shutdown()
    assert ET.parse(file).getroot().get("width") == "700"
    assert asked == []


def test_one_figure_that_cannot_be_drawn_leaves_nothing_behind(chromium, tmp_path):
    cut = {"type": "scatter", "x": {"dtype": "f4", "bdata": "AAA="}, "y": [1]}  # two bytes of a number's four
    with pytest.raises(LabError, match=r"figure 'bad' cannot be drawn as bad\.svg: .*multiple of 4"):
        write_figures({"good": curves(), "bad": {"data": [cut]}}, tmp_path / "made", ["svg"], colours=COLOURS)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- browsers and packages that are missing


def test_a_browser_that_does_not_start_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(broken))
    with pytest.raises(LabError, match=r"the browser .*broken does not start; .*apt-get install chromium"):
        write_figures({"x": curves()}, tmp_path / "made", colours=COLOURS)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_named_browser_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(LabError, match=r"BROWSER_PATH is '.*nowhere', which is no file; .*plotly_get_chrome"):
        write_figures({"x": curves()}, tmp_path / "made", colours=COLOURS)
    assert list(tmp_path.iterdir()) == []


def test_without_any_browser_the_error_says_how_to_get_one(tmp_path, monkeypatch):
    from choreographer.browsers import Chromium

    monkeypatch.delenv("BROWSER_PATH", raising=False)
    monkeypatch.setattr(Chromium, "find_browser", classmethod(lambda *args, **keys: None))
    with pytest.raises(LabError, match=r"there is no browser: .*chromium.*plotly_get_chrome.*BROWSER_PATH"):
        write_figures({"x": curves()}, tmp_path / "made", colours=COLOURS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["kaleido", "choreographer.browsers"])
def test_without_kaleido_the_error_names_its_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"'kaleido': pip install 'manifold-mixup\[figures\]'"):
        write_figures({"x": curves()}, tmp_path / "made", colours=COLOURS)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- files


@pytest.fixture
def no_browser(monkeypatch):
    """Every image is the name of its file."""
    monkeypatch.setattr(export, "_draw", lambda jobs: [job.file.encode() for job in jobs])


def test_files_are_replaced_and_others_stay(no_browser, tmp_path):
    (tmp_path / "a.svg").write_text("old")
    (tmp_path / "other.svg").write_text("kept")
    assert write_figures({"a": curves()}, tmp_path, colours=COLOURS) == [tmp_path / "a.svg", tmp_path / "a.png"]
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"a.svg": "a.svg", "a.png": "a.png", "other.svg": "kept"}


def test_a_folder_in_the_way_of_one_file_leaves_all_as_it_was(no_browser, tmp_path):
    (tmp_path / "a.svg").write_text("old")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(StorageError, match=r"b\.png: Is a directory"):
        write_figures({"a": curves(), "b": curves()}, tmp_path, colours=COLOURS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.png"]
    assert (tmp_path / "a.svg").read_text() == "old"


def test_a_file_in_the_way_of_the_folder_is_an_error(no_browser, tmp_path):
    (tmp_path / "made").write_text("a file")
    with pytest.raises(StorageError, match="made"):
        write_figures({"a": curves()}, tmp_path / "made", colours=COLOURS)


def test_without_figures_nothing_is_made(tmp_path):
    assert write_figures({}, tmp_path / "made") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("validation-error", "validation-error"),
        ("../../etc/passwd", "etc-passwd"),
        ("a/b\\c:d*e", "a-b-c-d-e"),
        (".hidden", "hidden"),
        ("..", "figure"),
        ("", "figure"),
        ("é = 2.0", "é-=-2.0"),
        ("字" * 300, "字" * 60),
        ("line\nbreak\0", "line-break"),
    ],
)
def test_a_name_becomes_a_file_and_never_a_folder(name, stem):
    assert file_stem(name) == stem


def test_names_that_become_the_same_get_numbers(no_browser, tmp_path):
    names = ["a b", "a/b", "A-B", "a-b-2", "c"]
    files = write_figures({name: curves() for name in names}, tmp_path, ["svg"], colours=COLOURS)
    assert [file.stem for file in files] == ["a-b", "a-b-2", "A-B-3", "a-b-2-2", "c"]


# ---------------------------------------------------------------- from the page's figure to one that stands alone


def test_colours_are_looked_up_and_labels_are_left_alone():
    figure = curves(labels=("var(--line)",))
    figure["data"][0]["marker"] = {"color": ["var(--series-2)", "red"], "colorscale": [[0, "var(--line)"], [1, "#fff"]]}
    figure["data"][0]["text"] = "var(--unknown)"
    before = copy.deepcopy(figure)
    spec = still("x", figure, {"--series-1": "#111111", **{k: v for k, v in COLOURS.items() if k != "series-1"}})
    assert figure == before
    first = spec["data"][0]
    assert (first["name"], first["text"], first["line"]["color"]) == ("var(--line)", "var(--unknown)", "#111111")
    assert first["marker"] == {"color": ["#1155cc", "red"], "colorscale": [[0, "#dddddd"], [1, "#fff"]]}
    assert spec["layout"]["xaxis"]["gridcolor"] == "#dddddd"
    assert spec["layout"]["font"] == {"family": FONT, "size": 12, "color": "#555555"}
    assert (spec["layout"]["paper_bgcolor"], spec["layout"]["plot_bgcolor"]) == ("#ffffff", "#ffffff")


def test_a_colour_without_a_value_is_an_error_that_names_both():
    with pytest.raises(UsageError, match=r"figure 'x' uses the colour 'var\(--series-2\)'.*there is --line, --muted"):
        still("x", curves(), {k: v for k, v in COLOURS.items() if k != "series-2"})
    with pytest.raises(UsageError, match=r"'var\(--line, red\)'"):
        still("x", {"data": [{"fillcolor": "var(--line, red)"}]}, COLOURS)


def test_title_and_legend_stand_above_a_plot_of_the_same_size():
    def plot_height(spec):
        return spec["layout"]["height"] - spec["layout"]["margin"]["t"] - spec["layout"]["margin"]["b"]

    plain = {**curves(), "data": [{**trace, "showlegend": False} for trace in curves()["data"]]}
    alone, both = still("x", plain, COLOURS), still("x", curves(), COLOURS, "Title")
    long = still(
        "x",
        curves(labels=["a label of many words, number " + str(i) for i in range(7)]),
        {**COLOURS, **{f"series-{i + 1}": "#000000" for i in range(8)}},
    )
    assert plot_height(alone) == plot_height(both) == plot_height(long) == 260 - 8 - 40
    assert alone["layout"]["showlegend"] is False
    assert "title" not in alone["layout"]
    assert both["layout"]["showlegend"] is True
    assert alone["layout"]["height"] < both["layout"]["height"] < long["layout"]["height"]


@pytest.mark.parametrize("figure", [{}, {"data": 3}, {"data": [3]}, {"data": {"y": [1]}}])
def test_what_is_no_figure_is_refused(figure):
    with pytest.raises(UsageError, match="figure 'x' is no specification"):
        still("x", figure, {})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"formats": ["gif"]}, "svg, png, pdf"),
        ({"formats": "svg"}, "one or more of them"),
        ({"formats": []}, "one or more of them"),
        ({"formats": ["svg", "svg"]}, "twice"),
        ({"width": 0}, "100 to 4000"),
        ({"scale": 1e9}, "0.5 to 10"),
        ({"scale": float("nan")}, "0.5 to 10"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_made(tmp_path, keys, message):
    with pytest.raises(UsageError, match=message):
        write_figures({"x": curves()}, tmp_path / "made", **{"colours": COLOURS, **keys})
    assert list(tmp_path.iterdir()) == []
