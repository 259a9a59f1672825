"""The folder of a run: what it holds, how checkpoints get there whole or not at all.

    <exp_dir>/<name>/<version>/
        config.yaml          the configuration as resolved
        model_config.json    sizes of the encoder and what the head is
        task.json            settings and labels of the task
        tokenizer/           vocab.txt and tokenizer_config.json
        metrics.jsonl        one line for each logged step and each validation
        log.txt              what the console showed
        checkpoints/mp_rank_XX/<name>--<monitor>=0.98-epoch=0.ckpt     the best
        checkpoints/mp_rank_XX/<name>-last.ckpt                        the latest

Rank XX of the tensor-parallel group writes its own shards under `mp_rank_XX`. A checkpoint is
written under a temporary name on all ranks, and only when all of them have it on disk does it get
its own: a full disk or a kill leaves the previous one as it was. After a kill (SIGKILL, SIGTERM) a
`.<file>.tmp` may lie beside it; nothing reads it, and no later run writes into the same folder.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.folders import is_empty
from tpcore.checkpoint.unpickle import check_records, load_pickle
from tpcore.models.bert import BertModel
from tpcore.parallel.collectives import barrier
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.parallel.sharding import Replicated, Sharded, sharding_table
from tpcore.tasks.task import Task
from tpcore.train.config import ConfigError, ExpManagerConfig, TrainConfig
from tpcore.train.launch import on_all_ranks
from tpcore.train.read_config import save_config
from tpcore.train.run_folder import CONFIG_FILE, MODEL_FILE, TASK_FILE, is_run

TOKENIZER_FOLDER = "tokenizer"
CHECKPOINT_FOLDER = "checkpoints"
FORMAT = "tpcore run 1"


def run_path(config: ExpManagerConfig) -> Path:
    """`<exp_dir>/<name>/<version>`; a version that is not given is the time now."""
    version = config.version or time.strftime("%Y-%m-%d_%H-%M-%S")
    return Path(config.exp_dir) / config.name / version


def check_writable(path: Path) -> None:
    """Refuse a run folder that cannot be made or that holds a run, without leaving a trace.

    Raises:
        ConfigError: names the folder and the key that chose it.
    """
    where = "exp_manager.exp_dir, name and version"
    if (path / CONFIG_FILE).exists():
        raise ConfigError(f"{path} ({where}) already holds a run; choose another version or name")
    if path.exists() and not is_empty(path):
        raise ConfigError(
            f"{path} ({where}) exists and is not empty; choose another version or name"
        )
    parent = path
    while not os.path.lexists(parent):
        parent = parent.parent
    probe = parent / f".tpcore-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{path} ({where}) cannot be written: {parent}: {error.strerror}; choose another folder"
        ) from error


def create_run(path: Path, config: TrainConfig, model: BertModel, task: Task) -> None:
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
        folder.rename(path)  # over an empty folder, never over another
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
        raise


def rank_folder(run: Path, rank: int) -> Path:
    """Where a tensor-parallel rank keeps its checkpoints."""
    return run / CHECKPOINT_FOLDER / f"mp_rank_{rank:02d}"


@dataclass(frozen=True)
class Progress:
    """Where a run stands when a checkpoint is written."""

    epoch: int
    global_step: int
    metrics: Mapping[str, float]


def write_checkpoint(
    run: Path,
    filename: str,
    model: BertModel,
    progress: Progress,
    monitor: tuple[str, str],
    *,
    tp: TensorParallelGroup,
    dp: DataParallelGroup,
) -> None:
    """Write `filename` under every `mp_rank_XX`, all of them or none; called on all ranks.

    Raises:
        ValueError: a rank could not write; the previous file of that name is still there.
    """
    final = rank_folder(run, tp.rank) / filename
    temporary = final.with_name(f".{filename}.tmp")
    table = sharding_table(model)
    shards = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    content = {
        "format": FORMAT,
        "epoch": progress.epoch,
        "global_step": progress.global_step,
        "metrics": dict(progress.metrics),
        "monitor": monitor[0],
        "mode": monitor[1],
        "tensor_model_parallel_size": tp.size,
        "tensor_model_parallel_rank": tp.rank,
        "state_dict": shards,
        # The dimension that each parameter is split along; None where every rank has all of it.
        "sharded_dim": {name: _sharded_dim(table[name]) for name in shards},
    }

    def write() -> None:
        if dp.rank != 0:
            return
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError of its zip writer.
            raise CheckpointError(f"{final} cannot be written: {error}") from error

    try:
        on_all_ranks(write, tp, dp)
    except BaseException:  # Ctrl-C and the end of another rank leave nothing half-written either
        if dp.rank == 0:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise
    if dp.rank == 0:
        os.replace(temporary, final)
        _sync_folder(final.parent)
        barrier(tp)
    barrier(dp)


@dataclass(frozen=True)
class Kept:
    """One of the best checkpoints."""

    score: float
    filename: str
    metrics: Mapping[str, float]


@dataclass
class CheckpointKeeper:
    """Decides which checkpoints exist: the best `save_top_k` and the last.

    Args:
        name: start of the file names.
        monitor: metric and its better direction, "max" or "min".
        save_top_k: how many of the best to keep.
        save_last: whether to keep `<name>-last.ckpt`.
        name_steps: put the step into the names, for runs that validate within epochs.
    """

    name: str
    monitor: tuple[str, str]
    save_top_k: int
    save_last: bool
    name_steps: bool = False
    kept: list[Kept] = field(default_factory=list)
    """The best first; of equal scores the older one."""

    def update(
        self, progress: Progress, write: Callable[[str], None], remove: Callable[[str], None]
    ) -> None:
        """Call `write` and `remove` with the file names of what is new and what is surplus.

        The new file is there before an old one goes. A score that is not a number is never kept.
        """
        if self.save_top_k:
            self._update_best(progress, write, remove)
        if self.save_last:
            write(f"{self.name}-last.ckpt")

    @property
    def best(self) -> Kept | None:
        """The best checkpoint so far."""
        return self.kept[0] if self.kept else None

    def _update_best(
        self, progress: Progress, write: Callable[[str], None], remove: Callable[[str], None]
    ) -> None:
        metric, mode = self.monitor
        score = progress.metrics[metric]
        sign = -1.0 if mode == "max" else 1.0
        full = len(self.kept) == self.save_top_k
        if score != score or (full and sign * score >= sign * self.kept[-1].score):
            return
        # A metric of one class has a slash in its name.
        shown = metric.replace("/", "_")
        filename = f"{self.name}--{shown}={score:.2f}-epoch={progress.epoch}"
        filename += f"-step={progress.global_step}.ckpt" if self.name_steps else ".ckpt"
        write(filename)
        self.kept.append(Kept(score, filename, progress.metrics))
        self.kept.sort(key=lambda kept: sign * kept.score)  # stable: the older of equals is first
        for surplus in self.kept[self.save_top_k :]:
            remove(surplus.filename)
        del self.kept[self.save_top_k :]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """One rank's file, its tensors mapped from disk.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint of a run.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; the checkpoint needs the files of all ranks")
    content = load_pickle(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of a tpcore run")
    return content


def read_all_ranks(run: Path, filename: str) -> list[dict[str, Any]]:
    """The files of all tensor-parallel ranks of one checkpoint.

    Raises:
        CheckpointError: one is missing, damaged, or of another step than the first.
    """
    first = read_checkpoint(rank_folder(run, 0) / filename)
    size = first["tensor_model_parallel_size"]
    for rank in range(size):
        if rank_folder(run, rank).joinpath(filename).is_file():
            check_records(rank_folder(run, rank) / filename)
    files = [first, *(read_checkpoint(rank_folder(run, r) / filename) for r in range(1, size))]
    for rank, content in enumerate(files):
        if content["global_step"] != first["global_step"]:
            raise CheckpointError(
                f"{rank_folder(run, rank) / filename} is of step {content['global_step']}, that "
                f"of rank 0 of step {first['global_step']}; use another checkpoint of the run"
            )
    return files


def find_checkpoint(run: Path, which: str = "best") -> str:
    """The file name of a run's `best` or `last` checkpoint, or `which` itself if it is one.

    Raises:
        CheckpointError: there is none.
    """
    folder = rank_folder(run, 0)
    names = sorted(path.name for path in folder.glob("*.ckpt"))
    if which in names:
        return which
    last = [name for name in names if name.endswith("-last.ckpt")]
    scored = []
    if which == "best":
        for name in names:
            if name not in last:
                content = read_checkpoint(folder / name)
                score = content["metrics"][content["monitor"]]
                scored.append((-score if content["mode"] == "max" else score, name))
    if scored:
        return min(scored)[1]
    if which in ("best", "last") and last:
        return last[0]
    raise CheckpointError(
        f"{folder} has no checkpoint {which!r}; it holds {', '.join(names) or 'none'}"
    )


def find_run(path: str | os.PathLike[str]) -> Path:
    """`path` if it is a run folder, else the newest run below it.

    Raises:
        CheckpointError: there is no run.
    """
    path = Path(path)
    if is_run(path):
        return path
    runs = [config.parent for config in path.glob(f"**/{CONFIG_FILE}") if is_run(config.parent)]
    if not runs:
        what = "holds no finished run" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {what}; expected a folder that `tpcore finetune` made")
    return max(runs, key=lambda run: (run / CONFIG_FILE).stat().st_mtime)


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


def _sharded_dim(sharding: Any) -> int | None:
    if isinstance(sharding, Replicated):
        return None
    assert isinstance(sharding, Sharded)
    return sharding.dim


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: the name lives in the folder, not in the file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
