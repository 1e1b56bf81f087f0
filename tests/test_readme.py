"""What the README shows runs, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import manifold_mixup
from manifold_mixup import errors

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_every_python_block_runs_one_after_the_other(capsys):
    namespace: dict[str, object] = {}
    found = blocks("python")
    assert len(found) >= 2
    for block in found:
        exec(compile(block, "README.md", "exec"), namespace)
    assert isinstance(namespace["mixup"], manifold_mixup.ManifoldMixup)
    assert torch.isfinite(namespace["loss"])
    assert "input" in capsys.readouterr().out


def test_every_command_exists():
    typer = pytest.importorskip("typer")
    from manifold_mixup.lab.cli import app

    commands = set(typer.main.get_command(app).commands)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shell = "\n".join(blocks("bash"))
    assert set(re.findall(r"^manifold-mixup (\w+)", shell, re.MULTILINE)) <= commands
    assert set(re.findall(r"^make ([\w-]+)", shell, re.MULTILINE)) == {"demo", "test"} <= targets


def test_every_error_it_names_exists():
    named = set(re.findall(r"`([A-Z]\w+)`", README))
    known = set(errors.__all__) | {"DataParallel"}
    assert {n for n in named if n.endswith(("Found", "Reached", "Point", "Lost", "Mismatch", "Misuse"))} <= known
    assert len(named & known) >= 6


def test_every_link_into_the_repository_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
