"""Downstream tasks: text files to examples, outputs of the model to predictions and metrics."""

from __future__ import annotations

import difflib

from tpcore.tasks.task import DataError, Dataset, Example, Task, TaskBatch
from tpcore.tasks.text_classification import TextClassification

__all__ = [
    "TASKS",
    "DataError",
    "Dataset",
    "Example",
    "Task",
    "TaskBatch",
    "TextClassification",
    "task_class",
]

TASKS: dict[str, type[Task]] = {TextClassification.name: TextClassification}
"""By the name that a configuration's `task:` has."""


def task_class(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        ValueError: the name is not one of `TASKS`.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(TASKS)}"
    raise ValueError(f"task={name!r} is unknown; {hint}")
