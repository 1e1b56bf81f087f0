"""One network of every family of timm, end to end, and the page in docs/results that says what came of it."""

from __future__ import annotations

import dataclasses
import functools
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")
from families import ROWS, exactness, examine, forced, randomise
from family_table import FAMILIES

from manifold_mixup import ManifoldMixup, cut_points

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(RESULTS / "families.py"))


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    lines = (RESULTS / "families.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_table_has_a_network_of_every_family():
    import timm

    assert sorted(FAMILIES) == sorted(timm.list_modules())
    for family, network in FAMILIES.items():
        assert network.model in timm.list_models(module=family)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_network_can_be_mixed(family):
    record = examine(family, clock=False)
    assert record["failure"] is None, record["failure"]
    assert record["layers"]
    assert len(record["layers"]) > 1 or record["reason"]


def test_every_family_has_a_record_of_the_network_in_the_table(records):
    assert [r["family"] for r in records] == sorted(FAMILIES)
    for record in records:
        network = FAMILIES[record["family"]]
        assert (record["network"], record["options"]) == (network.model, network.options)
        assert record["input"] == [3, network.size, network.size]


def test_nothing_is_wrong_in_the_records(script, records):
    assert script["problems"](records) == []
    for record in records:
        assert len(record["layers"]) > 1 or record["reason"]


def test_the_page_is_made_from_the_records(script, records):
    assert (RESULTS / "families.md").read_text(encoding="utf-8") == script["page"](records)


def test_failures_and_slow_searches_are_problems(script):
    good = {"family": "a", "failure": None, "forward_s": 1.0, "discovery_s": 1.0}
    assert script["problems"]([good]) == []
    (failed,) = script["problems"]([good, {"family": "b", "failure": "it broke"}])
    assert failed == "b: it broke"
    (slow,) = script["problems"]([good, good, good | {"family": "c", "discovery_s": 4.1}])
    assert slow.startswith("c: discovery takes 4.1 forwards")
    (typical,) = script["problems"]([good | {"discovery_s": 2.1}])
    assert "half of all families" in typical


# ---------------------------------------------------------------- the checks themselves


class Residual(nn.Module):
    """Two blocks with a skip connection around ``branch``, and a module on which nothing depends."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.zeros(8))
        self.unused = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        h = self.stem(x)
        return self.head(h + self.scale * self.branch(h))


@pytest.fixture
def residual() -> tuple[nn.Module, Tensor]:
    x = torch.randn(ROWS, 6, dtype=torch.float64)
    return randomise(Residual(), x), x


def test_randomising_leaves_no_branch_silent(residual):
    model, _ = residual
    assert model.training
    assert not any(child.training for child in model.children())
    assert float(model.scale.detach().abs().min()) >= 0.5


def test_the_check_of_exactness_sees_a_layer_that_mixes_a_part(residual, monkeypatch):
    model, x = residual
    assert exactness(model, x, ["input", "stem"]) < 1e-12
    monkeypatch.setattr("families.ManifoldMixup", functools.partial(ManifoldMixup, check=False))
    assert exactness(model, x, ["branch"]) > 1e-3


def test_forced_mixing_tells_cut_points_from_bypassed_and_unused_calls(residual):
    model, x = residual
    points = cut_points(model, x)
    tried = forced(model, x, points, "")
    assert {f.key: f.verdict for f in tried} == {
        "stem": "cut",
        "head": "cut",
        "branch": "bypassed",
        "unused": "unused",
    }
    assert not any(f.wrong for f in tried)
    fewer = [point for point in points if point.name != "stem"]
    assert [f.key for f in forced(model, x, fewer, "") if f.wrong] == ["stem"]
    more = [*points, dataclasses.replace(points[0], name="branch"), dataclasses.replace(points[0], name="unused")]
    assert sorted(f.key for f in forced(model, x, more, "") if f.wrong) == ["branch", "unused"]
