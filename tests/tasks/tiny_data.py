"""Small data that can be learnt, for each task, and the settings of a run on it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.train import tiny

NAMES, OTHERS = tiny.GOOD, tiny.OTHER


def write_token_classification(folder: Path) -> dict[str, Any]:
    """Names are entities of one or two words; one sentence needs windows."""
    for name, count, seed in (("train", 24, 0), ("validation", 13, 1)):
        draw = random.Random(seed)
        lines = []
        for number in range(count):
            for _ in range(60 if number == 3 else draw.randint(2, 9)):
                if draw.random() < 0.3:
                    lines.append(f"{draw.choice(NAMES)}\tB-PER")
                    if draw.random() < 0.3:
                        lines.append(f"{draw.choice(NAMES)}s\tI-PER")
                else:
                    lines.append(f"{draw.choice(OTHERS)}\tO")
            lines.append("")
        (folder / f"{name}.conll").write_text("\n".join(lines))
    return {
        "model__train_ds__file_path": folder / "train.conll",
        "model__validation_ds__file_path": folder / "validation.conll",
    }


WRITERS = {"token_classification": write_token_classification}
"""Task -> what writes its data below a folder and returns the keys that name it."""


def overrides(task: str, folder: Path, **values: Any) -> list[str]:
    """Dotted overrides of a run of `task` in `folder`, as `tiny.overrides`."""
    tiny.write_vocabulary(folder / "vocab.txt")
    return tiny.overrides(
        folder, **{"task": task, "trainer__max_epochs": 2, **WRITERS[task](folder), **values}
    )
