"""The folder of a run: where it is, what it holds, and whether a run goes on in it.

<exp_dir>/<name>/<version>/
    config.yaml          the configuration as resolved
    model_config.json    sizes of the encoder and what the head is
    task.json            settings and labels of the task
    tokenizer/           vocab.txt and tokenizer_config.json
    environment.json     code, packages, devices and ranks, for each time the run was started
    metrics.jsonl        one line for each logged step and each validation
    events.out.*         the same for TensorBoard
    log.txt              what the console showed
    checkpoints/         see checkpoint_files
    result.json          how the run ended; until then it can be resumed
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.folders import is_empty
from tpcore.models.bert import BertModel
from tpcore.tasks.task import Task
from tpcore.train.checkpoint_files import CHECKPOINT_FOLDER, recover, write_json_atomically
from tpcore.train.config import ConfigError, ExpManagerConfig, TrainConfig
from tpcore.train.launch import environment_int
from tpcore.train.logging import METRICS_FILE
from tpcore.train.read_config import flatten, load_config, save_config
from tpcore.train.run_folder import CONFIG_FILE, MODEL_FILE, TASK_FILE, is_run

TOKENIZER_FOLDER = "tokenizer"
ENVIRONMENT_FILE = "environment.json"
RESULT_FILE = "result.json"


def run_path(config: ExpManagerConfig) -> Path:
    """`<exp_dir>/<name>/<version>`; a version that is not given is the time now."""
    version = config.version or time.strftime("%Y-%m-%d_%H-%M-%S")
    return Path(config.exp_dir) / config.name / version


@dataclass(frozen=True)
class RunChoice:
    """Where a run goes."""

    path: Path
    resumes: bool
    """Whether the folder holds a run that is to be continued."""


def choose_run(config: ExpManagerConfig) -> RunChoice:
    """`<exp_dir>/<name>/<version>`, and whether to resume there; writes nothing.

    Without a version a new run is named by the time. A run that `resume_if_exists` continues is
    then the newest of that name that has not finished; one that torchrun has started again after a
    fault is the one that it had started before.

    Raises:
        ConfigError: the folder cannot be used.
    """
    path = run_path(config)
    restarted = environment_int("TORCHELASTIC_RESTART_COUNT", 0) > 0
    if config.version is not None:
        if is_run(path) and (config.resume_if_exists or restarted):
            _probe(path, path)
            return RunChoice(path, resumes=True)
    else:
        runs = sorted(_runs_below(path.parent), key=_started, reverse=True)
        if restarted:
            runs = [run for run in runs if _launchers(run)[-1:] == [launcher()]]
        elif config.resume_if_exists:
            runs = [run for run in runs if not (run / RESULT_FILE).exists()]
        else:
            runs = []
        if runs:
            _probe(runs[0], runs[0])
            return RunChoice(runs[0], resumes=True)
    check_writable(path)
    return RunChoice(path, resumes=False)


def launcher() -> str:
    """What has started this rank, the same after it has started it again: host, process, run."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"{socket.gethostname()}/{os.getppid()}/{run_id}"


def check_writable(path: Path) -> None:
    """Refuse a run folder that cannot be made or that holds a run, without leaving a trace.

    Raises:
        ConfigError: names the folder and the key that chose it.
    """
    where = "exp_manager.exp_dir, name and version"
    missing = [name for name in (MODEL_FILE, TASK_FILE) if not (path / name).exists()]
    if (path / CONFIG_FILE).exists() and missing:
        raise ConfigError(
            f"{path} ({where}) holds a run whose {' and '.join(missing)} is missing; restore that, "
            "or choose another version or name"
        )
    if (path / CONFIG_FILE).exists():
        raise ConfigError(
            f"{path} ({where}) already holds a run; choose another version or name, or continue it "
            "with exp_manager.resume_if_exists=true"
        )
    if path.exists() and not is_empty(path):
        raise ConfigError(
            f"{path} ({where}) exists and is not empty; choose another version or name"
        )
    parent = path
    while not os.path.lexists(parent):
        parent = parent.parent
    _probe(path, parent)


def _probe(path: Path, parent: Path) -> None:
    probe = parent / f".tpcore-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{path} (exp_manager.exp_dir, name and version) cannot be written: {parent}: "
            f"{error.strerror}; choose another folder"
        ) from error


def create_run(
    path: Path,
    config: TrainConfig,
    model: BertModel,
    task: Task,
    environment: Mapping[str, Any],
) -> None:
    """Make the folder and everything in it that does not change; on one rank only.

    It appears whole or not at all: a full disk leaves nothing that blocks the name.
    """
    folder = path.with_name(f".{path.name}.{os.getpid()}")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        (folder / CHECKPOINT_FOLDER).mkdir(parents=True)
        task.tokenizer.save(folder / TOKENIZER_FOLDER)
        _write_json(folder / TASK_FILE, {"task": task.name, **task.to_config()})
        content = {
            "config": model.config.to_dict(),
            "head": task.head_name,
            "head_kwargs": task.head_kwargs(),
        }
        _write_json(folder / MODEL_FILE, content)
        save_config(config, folder / CONFIG_FILE)
        write_json_atomically(folder / ENVIRONMENT_FILE, {"sessions": [environment]})
        folder.rename(path)  # over an empty folder, never over another
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
        raise


def continue_run(path: Path, config: TrainConfig, environment: Mapping[str, Any]) -> None:
    """Make a run folder ready to go on: files that a kill has cut off, what changed since.

    On one rank only.
    """
    recover(path)
    (path / RESULT_FILE).unlink(missing_ok=True)
    sessions: list[Any] = []
    with suppress(CheckpointError):  # facts alone: a run without them goes on
        found = read_json(path / ENVIRONMENT_FILE).get("sessions")
        sessions = found if isinstance(found, list) else []
    write_json_atomically(path / ENVIRONMENT_FILE, {"sessions": [*sessions, environment]})
    temporary = path / f".{CONFIG_FILE}.tmp"
    save_config(config, temporary)
    os.replace(temporary, path / CONFIG_FILE)


def forget_metrics_after(path: Path, step: int) -> None:
    """Take the lines of later steps, which will come again, out of metrics.jsonl."""
    file = path / METRICS_FILE
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with suppress(ValueError, KeyError, TypeError):  # the last line may have been cut off
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
    temporary = path / f".{METRICS_FILE}.tmp"
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, file)


# What may change when a run is resumed: it changes how long and how fast, or what is shown.
_MAY_CHANGE = (
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.log_every_n_steps",
    "trainer.accelerator",
    "trainer.num_threads",
    "trainer.compile",
    "trainer.enable_progress_bar",
    "trainer.peak_tflops",
    "trainer.data_parallel",
    "trainer.timeout_s",
    "model.tensor_model_parallel_size",
    "model.sequence_parallel",
    "model.activations_checkpoint_granularity",
    "model.test_ds.",
    "exp_manager.",
)


def check_resumable(path: Path, config: TrainConfig) -> list[str]:
    """Compare `config` with that of the run at `path`; returns a line for each allowed change.

    Raises:
        ConfigError: something differs that would make it another run.
    """
    before, now = (flatten(c) for c in (load_config(path / CONFIG_FILE), config))
    notes = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if not key.startswith(_MAY_CHANGE):
            raise ConfigError(
                f"{path} was made with {key}={old}, and now it is {new}: a resumed run goes on as "
                "it began; restore the value, or choose another exp_manager.version"
            )
        notes.append(f"resumed with {key}={new}, before {old}")
    return notes


def find_run(path: str | os.PathLike[str]) -> Path:
    """`path` if it is a run folder, else the newest run below it.

    Raises:
        CheckpointError: there is no run.
    """
    path = Path(path)
    if is_run(path):
        return path
    runs = _runs_below(path)
    if not runs:
        what = "holds no finished run" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {what}; expected a folder that `tpcore finetune` made")
    return max(runs, key=_started)


def _runs_below(path: Path) -> list[Path]:
    return [config.parent for config in path.glob(f"**/{CONFIG_FILE}") if is_run(config.parent)]


def _started(run: Path) -> float:
    return (run / CONFIG_FILE).stat().st_mtime


def _launchers(run: Path) -> list[str]:
    try:
        sessions = read_json(run / ENVIRONMENT_FILE)["sessions"]
        return [str(session["launcher"]) for session in sessions]
    except (CheckpointError, KeyError, TypeError):
        return []


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a run folder.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
