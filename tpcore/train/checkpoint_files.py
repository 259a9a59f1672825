"""Checkpoints of a run: they appear whole or not at all, on all ranks, whenever a run is killed.

    checkpoints/mp_rank_XX/<name>.ckpt     the file of tensor-parallel rank XX
    checkpoints/<name>.ckpt.json           the manifest: step, metrics, digests of the files

All ranks write `.<name>.ckpt.tmp` and sync it to the disk. Then one of them puts the manifest in
place, by one rename: that makes the checkpoint. Only then the files get their names. So whoever
reads finds the files that the manifest has the digests of, under one name or the other: before the
manifest's rename the files of the checkpoint before, and after it those of the new one. `recover`
ends what was cut off; a file that no manifest belongs to was never finished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.untrusted.unpickle import check_records, load_pickle
from tpcore.parallel.collectives import barrier
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.train.launch import on_all_ranks

CHECKPOINT_FOLDER = "checkpoints"
FORMAT = "tpcore run 2"
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Progress:
    """Where a run stands when a checkpoint is written."""

    epoch: int
    global_step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class StoredFile:
    """What the manifest says about one rank's file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What makes a checkpoint of files: their digests, and what they are of."""

    filename: str
    epoch: int
    global_step: int
    metrics: Mapping[str, float]
    monitor: str
    mode: str
    files: tuple[StoredFile, ...]
    """By tensor-parallel rank."""

    @property
    def score(self) -> float | None:
        """The value of the metric that chooses the best; None: it was not measured."""
        return self.metrics.get(self.monitor)


def rank_folder(run: Path, rank: int) -> Path:
    """Where a tensor-parallel rank keeps its checkpoints."""
    return run / CHECKPOINT_FOLDER / f"mp_rank_{rank:02d}"


def manifest_path(run: Path, filename: str) -> Path:
    """Where the manifest of a checkpoint lies."""
    return run / CHECKPOINT_FOLDER / f"{filename}.json"


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


# --- writing ------------------------------------------------------------------------------------


class _Digesting:
    """A file that is written from beginning to end, and its digest."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(
    run: Path,
    filename: str,
    content: Mapping[str, Any],
    progress: Progress,
    monitor: tuple[str, str],
    *,
    tp: TensorParallelGroup,
    dp: DataParallelGroup,
) -> None:
    """Write `filename` under every `mp_rank_XX`, all of them or none; called on all ranks.

    Args:
        run: folder of the run.
        filename: of the checkpoint.
        content: of this rank's file; only the first data-parallel rank writes.
        progress: goes into the files and the manifest.
        monitor: metric and its better direction.
        tp: the ranks that hold the other shards.
        dp: the ranks that hold the same.

    Raises:
        ValueError: a rank could not write; the previous checkpoint of that name is still there.
    """
    final = rank_folder(run, tp.rank) / filename
    temporary = _temporary(final)
    whole = {
        "format": FORMAT,
        "epoch": progress.epoch,
        "global_step": progress.global_step,
        "metrics": dict(progress.metrics),
        "monitor": monitor[0],
        "mode": monitor[1],
        "tensor_model_parallel_size": tp.size,
        "tensor_model_parallel_rank": tp.rank,
        **content,
    }

    def write() -> StoredFile | None:
        if dp.rank != 0:
            return None
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                digesting = _Digesting(file)
                torch.save(whole, digesting)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(final.parent)
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError of its zip writer.
            raise CheckpointError(f"{final} cannot be written: {error}") from error
        return StoredFile(digesting.num_bytes, digesting.digest.hexdigest())

    def commit() -> None:
        if tp.rank == 0 and dp.rank == 0:
            assert all(file is not None for file in files)
            record = Manifest(
                filename=filename,
                epoch=progress.epoch,
                global_step=progress.global_step,
                metrics=dict(progress.metrics),
                monitor=monitor[0],
                mode=monitor[1],
                files=tuple(file for file in files if file is not None),
            )
            write_json_atomically(manifest_path(run, filename), dataclasses.asdict(record))

    try:
        own = on_all_ranks(write, tp, dp)
        files: list[StoredFile | None] = [own]
        if dp.rank == 0 and tp.size > 1:
            files = [None] * tp.size
            dist.all_gather_object(files, own, group=tp.process_group)
        on_all_ranks(commit, tp, dp)
    except BaseException:  # Ctrl-C and the end of another rank leave nothing half-written either
        if dp.rank == 0 and not _is_committed(run, filename, progress):
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise

    def publish() -> None:
        if dp.rank == 0:
            os.replace(temporary, final)
            _sync_folder(final.parent)
            if tp.rank == 0:
                _remove_files(run, filename, from_rank=tp.size)

    on_all_ranks(publish, tp, dp)
    barrier(dp)


def remove_checkpoint(run: Path, filename: str) -> None:
    """Remove a checkpoint and all its files; the manifest goes first. On one rank only."""
    manifest_path(run, filename).unlink(missing_ok=True)
    _sync_folder(run / CHECKPOINT_FOLDER)
    _remove_files(run, filename)


def write_json_atomically(path: Path, content: Any) -> None:
    """Replace `path` by `content`, durably: it holds the old or the new, whatever happens.

    Raises:
        CheckpointError: it cannot be written; the old content is still there.
    """
    temporary = _temporary(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error


def _is_committed(run: Path, filename: str, progress: Progress) -> bool:
    try:
        return read_manifest(run, filename).global_step == progress.global_step
    except CheckpointError:
        return False


def _remove_files(run: Path, filename: str, from_rank: int = 0) -> None:
    for folder in (run / CHECKPOINT_FOLDER).glob("mp_rank_*"):
        if int(folder.name.rpartition("_")[2]) >= from_rank:
            (folder / filename).unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()  # where it is empty


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: the name lives in the folder, not in the file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- reading ------------------------------------------------------------------------------------


def read_manifest(run: Path, filename: str) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = manifest_path(run, filename)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = tuple(StoredFile(**file) for file in content.pop("files"))
        manifest = Manifest(**content, files=files)
    except FileNotFoundError:
        raise CheckpointError(
            f"{rank_folder(run, 0) / filename} has no manifest {path}: it was never finished"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if manifest.filename != filename or not files:
        raise CheckpointError(f"{path} is damaged: it is of {manifest.filename!r}")
    return manifest


def list_checkpoints(run: Path) -> tuple[list[Manifest], list[str]]:
    """All checkpoints, the newest first, and a line about each one that cannot be used.

    Contents of files are not looked at.
    """
    manifests, problems = [], []
    folder = run / CHECKPOINT_FOLDER
    names = {path.name.removesuffix(".json") for path in folder.glob("*.ckpt.json")}
    names |= {path.name for path in folder.glob("mp_rank_*/*.ckpt")}
    for name in sorted(names):
        try:
            manifests.append(read_manifest(run, name))
        except CheckpointError as error:
            problems.append(str(error))
    manifests.sort(key=lambda m: (-m.global_step, not m.filename.endswith("-last.ckpt")))
    return manifests, problems


def find_file(run: Path, manifest: Manifest, rank: int) -> Path:
    """The file of `rank`, under its name or the one that it was written under; its digest is right.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    final = rank_folder(run, rank) / manifest.filename
    wanted = manifest.files[rank]
    for path in (_temporary(final), final):
        with suppress(FileNotFoundError):  # a run that goes on may rename it at any instant
            if path.stat().st_size == wanted.num_bytes and _digest(path) == wanted.sha256:
                return path
    if not final.is_file():
        raise CheckpointError(f"{final} is missing; the checkpoint needs the files of all ranks")
    if final.stat().st_size != wanted.num_bytes:
        raise CheckpointError(
            f"{final}: damaged: it has {final.stat().st_size} bytes, and was written with "
            f"{wanted.num_bytes}"
        )
    check_records(final)  # says more, where it can
    raise CheckpointError(f"{final}: damaged: its content is not what was written")


def usable_checkpoints(run: Path, note: Callable[[str], None]) -> list[Manifest]:
    """The checkpoints whose files are all there and undamaged, the newest first.

    The others are told to `note` and set aside: their manifests get the ending `.damaged`.
    """
    manifests, problems = list_checkpoints(run)
    for problem in problems:
        note(f"passed over: {problem}")
    usable = []
    for manifest in manifests:
        try:
            for rank in range(len(manifest.files)):
                find_file(run, manifest, rank)
        except CheckpointError as error:
            note(f"passed over: {error}")
            path = manifest_path(run, manifest.filename)
            os.replace(path, path.with_name(f"{path.name}.damaged"))
        else:
            usable.append(manifest)
    return usable


def recover(run: Path) -> None:
    """End what a kill has cut off: finished files get their names, others go. On one rank only."""
    manifests, _ = list_checkpoints(run)
    for manifest in manifests:
        for rank in range(len(manifest.files)):
            final = rank_folder(run, rank) / manifest.filename
            with suppress(CheckpointError):
                if _temporary(final).is_file() and find_file(run, manifest, rank) != final:
                    os.replace(_temporary(final), final)
                    _sync_folder(final.parent)
        _remove_files(run, manifest.filename, from_rank=len(manifest.files))
    known = {manifest.filename for manifest in manifests}
    folder = run / CHECKPOINT_FOLDER
    for path in folder.glob("mp_rank_*/*.ckpt"):
        if path.name not in known and not manifest_path(run, path.name).exists():
            path.unlink()
    for path in (*folder.glob("mp_rank_*/.*.tmp"), *folder.glob(".*.tmp")):
        path.unlink()


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
    """The files of all tensor-parallel ranks of one checkpoint, checked against their digests.

    A run that goes on may replace it meanwhile; the files returned are always those of one write.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    for last_try in [False] * 9 + [True]:
        before = _stamps(run, filename)
        try:
            manifest = read_manifest(run, filename)
            paths = [find_file(run, manifest, rank) for rank in range(len(manifest.files))]
            contents = [read_checkpoint(path) for path in paths]
        except CheckpointError:
            if last_try or _stamps(run, filename) == before:
                raise
        else:
            if _stamps(run, filename) == before:
                return contents
    raise CheckpointError(f"{manifest_path(run, filename)} is replaced again and again; try later")


def _stamps(run: Path, filename: str) -> list[tuple[str, int, int]]:
    """Changes with every step of a write of `filename`."""
    stamps = []
    for path in (run / CHECKPOINT_FOLDER).rglob("*"):
        if filename in path.name:
            with suppress(FileNotFoundError):
                state = path.stat()
                stamps.append((str(path), state.st_ino, state.st_mtime_ns))
    return sorted(stamps)


def find_checkpoint(run: Path, which: str = "best") -> str:
    """The file name of a run's `best` or `last` checkpoint, or `which` itself if it is one.

    Raises:
        CheckpointError: there is none.
    """
    manifests, problems = list_checkpoints(run)
    names = sorted(manifest.filename for manifest in manifests)
    if which in names:
        return which
    last = [name for name in names if name.endswith("-last.ckpt")]
    scored = []
    if which == "best":
        for manifest in manifests:
            if manifest.filename not in last and manifest.score is not None:
                sign = -1.0 if manifest.mode == "max" else 1.0
                scored.append((sign * manifest.score, manifest.global_step, manifest.filename))
    if scored:
        return min(scored)[2]
    if which in ("best", "last") and last:
        return last[0]
    unfinished = "; ".join(["", *problems])
    raise CheckpointError(
        f"{run / CHECKPOINT_FOLDER} has no checkpoint {which!r}; it holds "
        f"{', '.join(names) or 'none'}{unfinished}"
    )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
