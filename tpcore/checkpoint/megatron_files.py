"""Where the files of a Megatron-LM checkpoint are, by pipeline stage and tensor-parallel rank."""

from __future__ import annotations

import re
from pathlib import Path

from tpcore.checkpoint import names
from tpcore.checkpoint.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")
SINGLE_FILE = "MegatronBERT.pt"

_RANK_FOLDER = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3}))?(?:_(\d{3}))?")
_ITERATION_FOLDER = re.compile(r"iter_\d+|release")


def recognise(path: Path) -> bool:
    """Whether `path` is such a checkpoint, judged by what is there."""
    if path.is_file():
        return path.suffix in (".pt", ".ckpt")
    children = [child.name for child in _children(path)]
    return any(
        name in (TRACKER, SINGLE_FILE, *MODEL_FILES)
        or _RANK_FOLDER.fullmatch(name)
        or _ITERATION_FOLDER.fullmatch(name)
        for name in children
    )


def iteration_folder(iteration: int | None) -> str:
    """The folder of an iteration; None is a release."""
    return "release" if iteration is None else f"iter_{iteration:07d}"


def _children(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir()) if path.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be listed ({error.strerror})") from error


def find_files(path: Path) -> list[list[Path]]:
    """Files by pipeline stage and tensor-parallel rank: files[stage][rank]."""
    if path.is_file():
        return [[path]]
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or directory")
    for name in (*MODEL_FILES, SINGLE_FILE):
        if (path / name).is_file():
            return [[path / name]]
    if any(_RANK_FOLDER.fullmatch(child.name) for child in _children(path)):
        return _rank_files(path)
    return _rank_files(path / tracked_folder(path))


def tracked_folder(root: Path) -> str:
    """The folder of the iteration that the tracker file names.

    Raises:
        CheckpointError: there is no such file, or no such folder.
    """
    tracker = root / TRACKER
    if not tracker.is_file():
        found = [c.name for c in _children(root) if _ITERATION_FOLDER.fullmatch(c.name)]
        hint = f"; pass {root / found[-1]} to read that one" if found else ""
        raise CheckpointError(f"{root}: there is no {TRACKER} that says which iteration{hint}")
    try:
        with tracker.open(encoding="ascii") as file:
            word = file.read(64).strip()
    except (OSError, UnicodeError) as error:
        raise CheckpointError(f"{tracker}: cannot be read ({error})") from error
    if word != "release" and not re.fullmatch(r"\d{1,12}", word):
        raise CheckpointError(
            f"{tracker}: {word!r} is neither an iteration number nor the word release"
        )
    folder = iteration_folder(None if word == "release" else int(word))
    if not (root / folder).is_dir():
        raise CheckpointError(f"{tracker}: names iteration {word}, but {root / folder} is missing")
    return folder


def _rank_files(folder: Path) -> list[list[Path]]:
    found: dict[tuple[int, int], Path] = {}
    empty: list[Path] = []
    for child in _children(folder):
        match = _RANK_FOLDER.fullmatch(child.name)
        if not match or not child.is_dir():
            continue
        present = [child / name for name in MODEL_FILES if (child / name).is_file()]
        if not present:
            # The distributed optimizer of 2022 kept its shards in folders of their own.
            if not (child / "optim.pt").exists():
                empty.append(child / MODEL_FILES[0])
            continue
        if match.group(3):
            raise CheckpointError(f"{child}: expert-parallel checkpoints are not BERT's")
        found[int(match.group(2) or 0), int(match.group(1))] = present[0]
    if not found:
        raise CheckpointError(f"{folder}: holds no mp_rank_XX/{MODEL_FILES[0]}")
    num_stages = 1 + max(stage for stage, _ in found)
    size = 1 + max(rank for _, rank in found)
    wanted = [[(stage, rank) for rank in range(size)] for stage in range(num_stages)]
    suffix = "_{:03d}" if num_stages > 1 else ""
    missing = empty + [
        folder / f"mp_rank_{rank:02d}{suffix.format(stage)}" / MODEL_FILES[0]
        for row in wanted
        for stage, rank in row
        if (stage, rank) not in found
    ]
    if missing:
        raise CheckpointError(
            f"{folder}: rank files are missing: {names.listing(dict.fromkeys(map(str, missing)))}"
        )
    return [[found[key] for key in row] for row in wanted]
