"""Every method has a card, and the card has what the method has."""

import re
from pathlib import Path

import pytest

from manifold_mixup.lab.methods import METHODS

CARDS = Path(__file__).resolve().parents[3] / "docs" / "methods"
NAV = (Path(__file__).resolve().parents[3] / "mkdocs.yml").read_text(encoding="utf-8")
ELSEWHERE = {"manifold_mixup"}  # its card is about the core; its options are arguments there


def card(name):
    return (CARDS / f"{name}.md").read_text(encoding="utf-8")


def test_every_method_has_a_card_and_every_card_a_method():
    assert {path.stem for path in CARDS.glob("*.md")} == METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_the_card_is_in_the_navigation_and_shows_the_command(name):
    assert f"methods/{name}.md" in NAV
    commands = " ".join(re.findall(r"^manifold-mixup compare .*$", card(name), re.MULTILINE))
    assert re.search(rf"-m \"?{name}\b", commands) or name == "manifold_mixup"


@pytest.mark.parametrize("name", sorted(METHODS.keys() - ELSEWHERE))
def test_the_card_names_every_option_and_the_papers_that_the_class_cites(name):
    method, text = METHODS[name], card(name)
    missing = [option for option in method.Options.model_fields if not re.search(rf"`{option}(=[^`]*)?`", text)]
    assert missing == []
    for paper in re.findall(r"\d{4}\.\d{5}", method.source):
        assert f"https://arxiv.org/abs/{paper}" in text
