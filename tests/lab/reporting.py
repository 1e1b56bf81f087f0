"""Records of runs that never took place, and a page taken apart."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lab.report_runs import record_fields
from manifold_mixup.lab.records import Record
from manifold_mixup.lab.report import write_report
from manifold_mixup.lab.report.sources import Sources
from manifold_mixup.lab.results import Result

EVIL = "<script>alert(1)</script>"


def run(label="none", seed=0, metrics=None, folder=Path("runs/digits"), measured=None, **changes):
    """One finished run; ``changes`` are fields of its record."""
    metrics = {"test_error": 3.0, "test_nll": 0.1} if metrics is None else metrics
    fields = record_fields(label, seed, **{"metrics": metrics, **changes})
    # values that a record's file cannot hold are tried as well
    return Result(Record.model_construct(**fields, folder=folder), measured or {}, {})


def runs(label, values, name="test_error", **keys):
    """One run for each value, seeds from 0."""
    return [run(label, seed, {name: value}, **keys) for seed, value in enumerate(values)]


class Page(HTMLParser):
    """A page taken apart as a browser would."""

    def __init__(self, source):
        super().__init__()
        self.source, self.text, self.tags, self.scripts, self.cells = source, [], [], [], []
        self._inside = None
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = tag
            self.scripts.append((dict(attrs).get("type"), "")) if tag == "script" else None
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        if tag == self._inside:
            self._inside = None
        if tag == "table":
            self.cells.append("")  # what follows belongs to no cell

    def handle_data(self, data):
        if self._inside == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        elif self._inside is None:
            self.text.append(data)
            if self.cells:
                self.cells[-1] += f" {data.strip()}"

    @property
    def words(self):
        return re.sub(r"\s+", " ", " ".join(self.text))

    @property
    def figures(self):
        return [json.loads(text) for kind, text in self.scripts if kind == "application/json"]


def page(tmp_path, results, *failures, title="A comparison", **sources):
    found = Sources(list(results), list(failures), **sources)
    return Page(write_report(found, tmp_path / "page.html", title).read_text(encoding="utf-8"))


def keep_pictures(folder, seed=0, **changes):
    rng = np.random.default_rng(seed)
    axis = (np.arange(200) + 0.5) * 0.15 - 15
    arrays = {
        "surface": np.broadcast_to(1 / (1 + np.exp(-axis)), (200, 200)).astype(np.float16).copy(),
        "extent": np.array([-15, 15, -15, 15], np.float32),
        "train_x": rng.normal(size=(20, 2)).astype(np.float32),
        "train_y": np.repeat([0, 1], 10).astype(np.int64),
        "train_hidden": rng.normal(size=(20, 2)).astype(np.float32),
        "uniform_hidden": rng.normal(size=(2000, 2)).astype(np.float32),
        "uniform_top": rng.uniform(0.5, 1, size=2000).astype(np.float32),
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / "pictures.safetensors")
    return arrays


def spiral(tmp_path, labels=("none", "manifold"), seeds=(0,)):
    found = []
    for label in labels:
        for seed in seeds:
            folder = tmp_path / "runs" / re.sub(r"\W", "", label) / str(seed)
            keep_pictures(folder, seed)
            metrics = {"test_accuracy": 90.0 + seed, "margin": 0.25}
            found.append(run(label, seed, metrics, folder, experiment="spiral", data="spiral"))
    return found
