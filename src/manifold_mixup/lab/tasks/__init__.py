"""What is learned, by name: ``make_task(Component(name="semi_supervised"))``."""

from __future__ import annotations

from typing import Any

from manifold_mixup.lab.config import Component
from manifold_mixup.lab.errors import UnknownName
from manifold_mixup.lab.tasks.base import Task
from manifold_mixup.lab.tasks.classification import Classification
from manifold_mixup.lab.tasks.node_classification import NodeClassification
from manifold_mixup.lab.tasks.semi_supervised import SemiSupervised

__all__ = ["TASKS", "Task", "get_task", "make_task"]

TASKS: dict[str, type[Task[Any]]] = {task.name: task for task in (Classification, SemiSupervised, NodeClassification)}


def get_task(name: str) -> type[Task[Any]]:
    """The class of a task.

    Raises:
        UnknownName: There is none of this name.
    """
    if name not in TASKS:
        raise UnknownName("task", name, TASKS)
    return TASKS[name]


def make_task(component: Component) -> Task[Any]:
    """A task with its options.

    Raises:
        UnknownName: There is no such task.
        pydantic.ValidationError: The options are not the task's.
    """
    task = get_task(component.name)
    return task(task.Options.model_validate(dict(component.options)))
