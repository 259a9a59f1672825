"""validation.json in the folder of a run: what the last validation got wrong, for its report."""

from __future__ import annotations

from pathlib import Path

from tpcore.checkpoint.errors import CheckpointError
from tpcore.tasks.review import review
from tpcore.tasks.task import Dataset
from tpcore.train.checkpoint_files import write_json_atomically
from tpcore.train.evaluation import Evaluation
from tpcore.train.logging import RunLog
from tpcore.train.run_folder import REVIEW_FILE


def write_review(
    run: Path, dataset: Dataset, evaluation: Evaluation, *, epoch: int, step: int, log: RunLog
) -> None:
    """Replace the file; a run that cannot write it says so and goes on."""
    content = {
        "step": step,
        "epoch": epoch,
        "source": dataset.source,
        "num_records": len(dataset.records),
        **review(dataset, evaluation.predictions),
    }
    try:
        write_json_atomically(run / REVIEW_FILE, content)
    except (CheckpointError, OSError) as error:
        log.info(f"{REVIEW_FILE} is not up to date: {error}")
