"""Supervised classification: the task of the papers' tables."""

from __future__ import annotations

from manifold_mixup.lab.options import NoOptions
from manifold_mixup.lab.tasks.base import Task

__all__ = ["Classification"]


class Classification(Task[NoOptions]):
    """Every training example has its label."""

    name = "classification"
    title = "classification, every training example with its label"
    Options = NoOptions
