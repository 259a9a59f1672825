"""What the folder of a run says, read for one page; `report_page` draws it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpcore.checkpoint.errors import CheckpointError
from tpcore.train.config import TrainConfig
from tpcore.train.logging import METRICS_FILE
from tpcore.train.read_config import load_config
from tpcore.train.report_page import Curve, ReportData, draw
from tpcore.train.run_folder import CONFIG_FILE, REVIEW_FILE
from tpcore.train.run_state import ENVIRONMENT_FILE, RESULT_FILE, find_run, read_json

REPORT_FILE = "report.html"
_NOT_METRICS = ("step", "epoch")


def write_report(run: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
    """Write one HTML page about a run that needs nothing but itself; returns its path.

    Args:
        run: folder of a run, or one above it: then its newest run. It need not have finished.
        output: the file; None: `report.html` in the run's folder.

    Raises:
        CheckpointError: no run, or a file of it is damaged.
        OSError: the page cannot be written.
    """
    folder = find_run(run)
    page = draw(read_run(folder))
    path = folder / REPORT_FILE if output is None else Path(output)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def read_run(folder: Path) -> ReportData:
    """What the page shows.

    Raises:
        CheckpointError: a file is damaged.
    """
    config = load_config(folder / CONFIG_FILE)
    curves = _curves(folder / METRICS_FILE)
    result = _optional(folder / RESULT_FILE)
    sessions = _optional(folder / ENVIRONMENT_FILE).get("sessions", [])
    return ReportData(
        name=config.exp_manager.name,
        version=folder.name,
        task=config.task,
        finished=bool(result),
        headline=_headline(config, curves, result),
        curves=curves,
        best={name: value for name, value in (result.get("best") or {}).items()},
        test=result.get("test") or {},
        review=_optional(folder / REVIEW_FILE),
        config_text=(folder / CONFIG_FILE).read_text(encoding="utf-8"),
        environment=sessions[-1] if sessions else {},
        num_starts=len(sessions),
    )


def _curves(path: Path) -> dict[str, Curve]:
    """Name -> its finite values by step. The last one wins where a step was done twice."""
    values: dict[str, dict[int, float]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break  # cut while it was written
            raise CheckpointError(f"{path}:{number} is damaged: {error}") from error
        for name, value in record.items():
            if (
                name in _NOT_METRICS
                or isinstance(value, bool)
                or not isinstance(value, int | float)
            ):
                continue
            if math.isfinite(value):
                values.setdefault(name, {})[step] = float(value)
    return {name: sorted(points.items()) for name, points in values.items()}


def _headline(
    config: TrainConfig, curves: Mapping[str, Curve], result: Mapping[str, Any]
) -> dict[str, str]:
    """A few numbers that answer the first questions."""
    shown = {}
    best = result.get("best") or {}
    monitor = config.exp_manager.checkpoint_callback_params.monitor
    overall = [name for name in best if "/" not in name and name != "val_loss"]
    if monitor in best:
        overall = [monitor, *(name for name in overall if name != monitor)]
    for name in overall[:2]:
        shown[f"best {name}"] = f"{best[name]:.4g}"
    for name, value in list((result.get("test") or {}).items())[:2]:
        shown[name] = f"{value:.4g}"
    steps = [points[-1][0] for points in curves.values() if points]
    if steps:
        shown["optimizer steps"] = f"{max(steps):,}"
    speeds = sorted(value for _, value in curves.get("tokens_per_s", []))
    if speeds:
        shown["tokens/s, median"] = f"{speeds[len(speeds) // 2]:,.0f}"
    return shown


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
