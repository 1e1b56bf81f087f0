"""The pictures of the page, and the still figure."""

import base64
import math
import statistics
import struct
import xml.etree.ElementTree as ET
import zlib

import numpy as np
import plotly.graph_objects as go
import pytest
from safetensors.numpy import save_file

from lab.reporting import EVIL, keep_pictures, page, runs, spiral
from manifold_mixup.lab.errors import CorruptedFile, UsageError
from manifold_mixup.lab.report import write_figure
from manifold_mixup.lab.report.collect import collect
from manifold_mixup.lab.report.figures.seeds import seeds_figure
from manifold_mixup.lab.report.figures.spiral import hidden_figure, surface_figure
from manifold_mixup.lab.report.pictures import SURFACE_COLOURS, read_pictures, surface_png

# ---------------------------------------------------------------- pictures


def test_every_method_has_its_two_pictures_and_the_seed_is_named(tmp_path):
    found = page(tmp_path, spiral(tmp_path, labels=("none", "input", "manifold"), seeds=(4, 5)))
    names = [attrs["aria-label"] for _, attrs in found.tags if attrs.get("class") == "plot"]
    pictures = [name for name in names if name.startswith(("Decision surface", "Hidden states"))]
    assert [name.partition(".")[0] for name in pictures] == [
        f"{kind}: {label}"
        for label in ("none", "input", "manifold")
        for kind in ("Decision surface in input space", "Hidden states")
    ]
    articles = [attrs["aria-label"] for tag, attrs in found.tags if tag == "article"]
    assert articles == ["none", "input", "manifold"]
    assert "Decision surfaces and hidden states" in found.words
    assert "All of seed 4, last weights." in found.words


def test_whoever_cannot_see_the_pictures_reads_their_numbers(tmp_path):
    records = spiral(tmp_path, labels=("none",))
    arrays = keep_pictures(records[0].record.folder, seed=3)
    surface, hidden = arrays["surface"].astype(float), arrays["train_hidden"].astype(float).tolist()
    unsure = sum(0.1 < value < 0.9 for value in surface.ravel().tolist()) / 400
    spreads = []
    for points in (hidden[:10], hidden[10:]):
        x, y = zip(*points, strict=True)
        spreads.append(math.sqrt(statistics.pvariance(x) + statistics.pvariance(y)))
    words = page(tmp_path, records).words
    assert f"{unsure:.0f} % of the square have a probability between 0.1 and 0.9." in words
    assert f"from the mean of their class: red {spreads[0]:.2f}, blue {spreads[1]:.2f}." in words


def test_a_method_without_that_seed_says_so(tmp_path):
    records = spiral(tmp_path, seeds=(0, 1))
    found = page(tmp_path, [r for r in records if (r.record.label, r.record.seed) != ("manifold", 0)])
    assert "seed 1; seed 0 is missing" in found.words


def test_missing_and_damaged_pictures_are_said_so(tmp_path):
    records = spiral(tmp_path, labels=("none", "damaged", "other", "absent", "shapes"))
    folders = [result.record.folder for result in records]
    (folders[1] / "pictures.safetensors").write_bytes(b"nonsense")
    save_file({"surface": np.zeros((2, 2), np.float32)}, folders[2] / "pictures.safetensors")
    (folders[3] / "pictures.safetensors").unlink()
    keep_pictures(folders[4], extent=np.zeros(3, np.float32), train_hidden=np.zeros((19, 2), np.float32))
    words = page(tmp_path, records).words
    assert "pictures.safetensors is corrupted" in words
    assert "pictures.safetensors lacks extent, train_x" in words
    assert "this run kept no pictures" in words
    assert "pictures.safetensors has arrays of another shape: extent, train_hidden" in words
    assert "Decision surface in input space: none" in words, "the others are drawn"


def test_without_pictures_there_is_no_such_section(tmp_path):
    found = page(tmp_path, runs("none", [3.0]))
    assert "Decision surfaces" not in found.words
    assert not [attrs for _, attrs in found.tags if attrs.get("id") == "experiment-1-pictures"]


def unpacked(array):
    kinds = {"f4": np.float32, "f8": np.float64, "u1": np.uint8}
    values = np.frombuffer(base64.b64decode(array["bdata"]), kinds[array["dtype"]])
    return values.reshape([int(side) for side in array.get("shape", str(len(values))).split(",")])


def coloured(value):
    """Style-sheet colours replaced by one that plotly's own validation knows."""
    if isinstance(value, dict):
        return {key: coloured(item) for key, item in value.items()}
    if isinstance(value, list):
        return [coloured(item) for item in value]
    return "#123456" if isinstance(value, str) and value.startswith("var(") else value


def test_figures_are_valid_plotly_and_hold_the_arrays(tmp_path):
    arrays = keep_pictures(tmp_path)
    pictures = read_pictures(tmp_path)
    surface, hidden = surface_figure(pictures), hidden_figure(pictures)
    experiment = collect(runs("none", [1.0, 2.0]) + runs("dropout", [3.0, 4.0]))[0]
    for figure in (surface, hidden, seeds_figure(experiment, "test_error")):
        assert len(go.Figure(coloured(figure)).data) == len(figure["data"])
    heat = surface["data"][0]
    assert np.array_equal(unpacked(heat["z"]), np.rint(100 * arrays["surface"].astype(float)))
    assert (heat["x0"], heat["y0"]) == (pytest.approx(-14.925), pytest.approx(-14.925))
    assert heat["x0"] + 199 * heat["dx"] == pytest.approx(14.925)
    drawn = [np.stack([unpacked(t["x"]), unpacked(t["y"])], axis=1) for t in hidden["data"]]
    assert np.array_equal(drawn[0], arrays["uniform_hidden"])
    assert np.array_equal(np.concatenate(drawn[1:]), arrays["train_hidden"])
    assert np.array_equal(unpacked(surface["data"][2]["x"]), arrays["train_x"][arrays["train_y"] == 1, 0])


def test_the_seeds_figure_shows_every_finite_run(tmp_path):
    long = "a rather long label of a method"
    experiment = collect(runs("none", [1.0, None, 2.0]) + runs(long, [3.0]) + runs("lost", [None]))[0]
    figure = seeds_figure(experiment, "test_error")
    dots, means = figure["data"][::2], figure["data"][1::2]
    assert [trace["x"] for trace in dots] == [[1.0, 2.0], [3.0]]
    assert [trace["text"] for trace in dots] == [["seed 0", "seed 2"], ["seed 0"]]
    assert [trace["x"] for trace in means] == [[1.5], [3.0]]
    wrapped = "a rather long label<br>of a method"
    assert [trace["y"] for trace in (*dots, *means)] == [["none"] * 2, [wrapped], ["none"], [wrapped]]
    assert [trace["legendgroup"] for trace in figure["data"]] == ["method-0", "method-0", "method-1", "method-1"]
    assert [trace["name"] for trace in dots] == ["none", long]
    assert figure["layout"]["yaxis"]["categoryarray"] == ["none", wrapped, "lost"], "a row without a dot"


def test_the_page_says_the_mean_and_spread_of_every_method_beside_the_seeds(tmp_path):
    words = page(tmp_path, runs("none", [1.0, None, 2.0]) + runs("a", [3.0])).words
    assert "Test error (%) of every run".lower() in words.lower()
    assert "mean and standard deviation: none 1.50 ± 0.71, a 3.00." in words


def test_the_png_holds_the_surface_from_top_to_bottom():
    surface = np.array([[0.0, 0.5, 1.0], [1.0, math.nan, 0.25]])
    png = surface_png(surface)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + data)
        chunks[kind], at = data, at + 12 + size
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (3, 2, 8, 3, 0, 0, 0)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(2, 4)
    assert rows[:, 0].tolist() == [0, 0]
    assert rows[:, 1:].tolist() == [[255, 128, 64], [0, 128, 255]]
    palette = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(256, 3)
    assert [tuple(palette[i]) for i in (0, 255)] == [SURFACE_COLOURS[0][1], SURFACE_COLOURS[-1][1]]


def recorded(results):
    return [result.record for result in results]


def test_the_still_figure_is_valid_svg_with_a_column_per_method(tmp_path):
    path = write_figure(recorded(spiral(tmp_path, labels=("none", EVIL, "manifold"))), tmp_path / "figure.svg")
    root = ET.parse(path).getroot()
    name = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{name}text")]
    assert "none" in texts
    assert EVIL in texts
    assert "test accuracy 90.0 %" in texts
    assert "Seed 0." in texts
    images = [element.attrib["href"] for element in root.iter(f"{name}image")]
    assert len(images) == 3
    assert base64.b64decode(images[0].removeprefix("data:image/png;base64,"))[:4] == b"\x89PNG"
    assert len(list(root.iter(f"{name}circle"))) == 3 * (20 + 20 + 700)
    assert not list(root.iter(f"{name}script"))
    assert all(
        0 <= float(c.attrib["cx"]) <= 190 and 0 <= float(c.attrib["cy"]) <= 190 for c in root.iter(f"{name}circle")
    )


def test_columns_of_the_still_figure_can_be_chosen(tmp_path):
    records = recorded(spiral(tmp_path, labels=("a", "b", "c")))
    source = write_figure(records, tmp_path / "figure.svg", columns=["c", "a"]).read_text()
    assert source.index(">c</text>") < source.index(">a</text>")
    assert ">b</text>" not in source
    with pytest.raises(UsageError, match="'d'; there are a, b, c"):
        write_figure(records, tmp_path / "figure.svg", columns=["d"])


def test_a_diverged_network_can_still_be_drawn(tmp_path):
    records = spiral(tmp_path, labels=("none",))
    lost = np.full((20, 2), np.nan, np.float32)
    keep_pictures(records[0].record.folder, surface=np.full((200, 200), np.nan, np.float16), train_hidden=lost)
    root = ET.parse(write_figure(recorded(records), tmp_path / "figure.svg")).getroot()
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 20 + 700
    found = page(tmp_path, records)
    assert len(found.figures) == 4
    assert "of their class: red without a finite number, blue without a finite number." in found.words


def test_the_still_figure_needs_pictures_of_one_experiment(tmp_path):
    with pytest.raises(UsageError, match="one experiment with pictures, not 0"):
        write_figure(recorded(runs("none", [1.0])), tmp_path / "figure.svg")
    with pytest.raises(UsageError, match="nothing to report"):
        write_figure([], tmp_path / "figure.svg")
    one = recorded(spiral(tmp_path, labels=("none",)))
    with pytest.raises(UsageError, match="not 2"):
        write_figure([*one, one[0].model_copy(update={"experiment": "other"})], tmp_path / "figure.svg")
    (one[0].folder / "pictures.safetensors").write_bytes(b"")
    with pytest.raises(CorruptedFile):
        write_figure(one, tmp_path / "figure.svg")
    assert not (tmp_path / "figure.svg").exists()
