"""What tells the folder of a run from other folders; imports nothing that an extra brings."""

from __future__ import annotations

from pathlib import Path

CONFIG_FILE = "config.yaml"
MODEL_FILE = "model_config.json"
TASK_FILE = "task.json"
REVIEW_FILE = "validation.json"


def is_run(path: Path) -> bool:
    """Whether `path` is the folder of a run."""
    return all((path / name).is_file() for name in (CONFIG_FILE, MODEL_FILE, TASK_FILE))
