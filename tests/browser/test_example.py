"""The example of a report in the documentation: it works, and it is one that the present code would write."""

from __future__ import annotations

from pathlib import Path

import pytest

from browser.checks import assert_clean, assert_drawn, assert_self_contained, draw_all
from manifold_mixup.lab.report.templates import FOLDER

EXAMPLE = Path(__file__).parents[2] / "docs" / "example-report" / "index.html"
SECTIONS = (
    "Verdict", "Table", "Every seed", "Training", "Calibration", "Robustness", "Singular values of hidden states",
    "Mixing log", "Confusion", "Decision surfaces and hidden states", "Most confident mistakes", "Cost",
    "Configuration",
)  # fmt: skip


@pytest.mark.parametrize("name", ["page.css", "page.js"])
def test_the_example_has_the_present_styles_and_script(name):
    assert (FOLDER / name).read_text(encoding="utf-8") in EXAMPLE.read_text(encoding="utf-8"), "make example-report"


def test_the_example_opens_and_has_every_section(open_page):
    page = open_page(EXAMPLE)
    headings = page.locator("h3").all_text_contents()
    assert set(SECTIONS) <= set(headings)
    draw_all(page)
    assert_drawn(page)
    assert_self_contained(page)
    assert_clean(page)
