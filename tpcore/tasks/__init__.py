"""Downstream tasks: text files to examples, outputs of the model to predictions and metrics.

The names below are imported when first used: configurations are read without torch.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpcore.tasks.glue import Glue
    from tpcore.tasks.intent_slot_classification import IntentSlotClassification
    from tpcore.tasks.masked_lm import MaskedLM
    from tpcore.tasks.punctuation_capitalization import PunctuationCapitalization
    from tpcore.tasks.question_answering import QuestionAnswering
    from tpcore.tasks.relation_extraction import RelationExtraction
    from tpcore.tasks.task import DataError, Dataset, Example, Task, TaskBatch
    from tpcore.tasks.text_classification import TextClassification
    from tpcore.tasks.text_regression import TextRegression
    from tpcore.tasks.token_classification import TokenClassification

# Public name -> the module that it is an attribute of.
_HOMES = {
    "DataError": "task",
    "Dataset": "task",
    "Example": "task",
    "Glue": "glue",
    "IntentSlotClassification": "intent_slot_classification",
    "MaskedLM": "masked_lm",
    "PunctuationCapitalization": "punctuation_capitalization",
    "QuestionAnswering": "question_answering",
    "RelationExtraction": "relation_extraction",
    "Task": "task",
    "TaskBatch": "task",
    "TextClassification": "text_classification",
    "TextRegression": "text_regression",
    "TokenClassification": "token_classification",
}

__all__ = [
    "TASKS",
    "DataError",
    "Dataset",
    "Example",
    "Glue",
    "IntentSlotClassification",
    "MaskedLM",
    "PunctuationCapitalization",
    "QuestionAnswering",
    "RelationExtraction",
    "Task",
    "TaskBatch",
    "TextClassification",
    "TextRegression",
    "TokenClassification",
    "task_class",
]

TASKS = {
    "text_classification": "TextClassification",
    "text_regression": "TextRegression",
    "glue": "Glue",
    "token_classification": "TokenClassification",
    "punctuation_capitalization": "PunctuationCapitalization",
    "intent_slot_classification": "IntentSlotClassification",
    "question_answering": "QuestionAnswering",
    "relation_extraction": "RelationExtraction",
    "masked_lm": "MaskedLM",
}
"""The name that a configuration's `task:` has -> the class."""


def task_class(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        ValueError: the name is not one of `TASKS`.
    """
    if name in TASKS:
        cls: type[Task] = __getattr__(TASKS[name])
        return cls
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(TASKS)}"
    raise ValueError(f"task={name!r} is unknown; {hint}")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
