"""What the README shows runs, and what it names exists."""

from __future__ import annotations

import re

import pytest
import torch

import manifold_mixup
from manifold_mixup import errors
from support_docs import ROOT, blocks, run, shell_problems

PAGE = ROOT / "README.md"
README = PAGE.read_text(encoding="utf-8")


def test_every_python_block_runs_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(blocks(PAGE, "python")) >= 2
    namespace, printed = run(PAGE)
    assert isinstance(namespace["mixup"], manifold_mixup.ManifoldMixup)
    assert torch.isfinite(namespace["loss"])
    assert "input" in printed


def test_every_command_exists():
    pytest.importorskip("typer")
    assert shell_problems(PAGE) == []
    shell = "\n".join(block.content for block in blocks(PAGE, "bash"))
    assert set(re.findall(r"^make ([\w-]+)", shell, re.MULTILINE)) == {"demo", "test"}
    assert len(set(re.findall(r"^manifold-mixup (\w+)", shell, re.MULTILINE))) >= 5


def test_every_error_it_names_exists():
    named = set(re.findall(r"`([A-Z]\w+)`", README))
    known = set(errors.__all__) | {"DataParallel"}
    assert {n for n in named if n.endswith(("Found", "Reached", "Point", "Lost", "Mismatch", "Misuse"))} <= known
    assert len(named & known) >= 6


def test_every_link_into_the_repository_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
