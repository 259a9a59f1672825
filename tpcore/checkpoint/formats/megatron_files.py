"""Where the files of a Megatron-LM checkpoint are, by pipeline stage and tensor-parallel rank."""

from __future__ import annotations

import re
from pathlib import Path

from tpcore.checkpoint import names
from tpcore.checkpoint.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")
SINGLE_FILE = "MegatronBERT.pt"

_RANK_FOLDER = re.compile(
    r"mp_rank_(?P<rank>\d{2,4})(?:_(?P<stage>\d{3}))?(?:_(?P<expert>\d{3}))?"
    r"|tp_rank_(?P<nemo_rank>\d{2,4})_pp_rank_(?P<nemo_stage>\d{3})"  # NeMo 1.5 on
)
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
    """Files by pipeline stage and tensor-parallel rank: files[stage][rank].

    NeMo and Lightning call a rank's file what they like, with `.ckpt` at the end, and may keep
    several of them: one of those stands for the files of its name in the folders of all ranks.
    """
    if path.is_file():
        if path.suffix == ".ckpt" and _RANK_FOLDER.fullmatch(path.absolute().parent.name):
            return _rank_files(path.absolute().parent.parent, path.name)
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


def _rank_files(folder: Path, wanted: str | None = None) -> list[list[Path]]:
    """The files of all ranks; `wanted`: those of this name."""
    found: dict[tuple[int, int], Path] = {}
    empty: list[Path] = []
    for child in _children(folder):
        match = _RANK_FOLDER.fullmatch(child.name)
        if not match or not child.is_dir():
            continue
        file = _file_of_rank(child, wanted)
        if file is None:
            # The distributed optimizer of 2022 kept its shards in folders of their own.
            if not (child / "optim.pt").exists():
                empty.append(child)
            continue
        if match["expert"]:
            raise CheckpointError(f"{child}: expert-parallel checkpoints are not BERT's")
        stage = int(match["stage"] or match["nemo_stage"] or 0)
        found[stage, int(match["rank"] or match["nemo_rank"])] = file
    if not found:
        raise CheckpointError(f"{folder}: holds no mp_rank_XX/{wanted or MODEL_FILES[0]}")
    num_stages = 1 + max(stage for stage, _ in found)
    size = 1 + max(rank for _, rank in found)
    keys = [[(stage, rank) for rank in range(size)] for stage in range(num_stages)]
    first = next(iter(found.values()))
    name = first.name
    suffix = "_{:03d}" if num_stages > 1 else ""
    pattern = "tp_rank_{:02d}_pp_rank_{:03d}" if first.parent.name[0] == "t" else None
    pattern = pattern or "mp_rank_{:02d}" + suffix
    missing = [child / (name if name not in MODEL_FILES else MODEL_FILES[0]) for child in empty]
    missing += [
        folder / pattern.format(rank, stage) / (wanted or name)
        for row in keys
        for stage, rank in row
        if (stage, rank) not in found
    ]
    if missing:
        raise CheckpointError(
            f"{folder}: rank files are missing: {names.listing(dict.fromkeys(map(str, missing)))}"
        )
    differ = [file for file in found.values() if file.suffix == ".ckpt" and file.name != name]
    if differ:
        raise CheckpointError(
            f"{folder}: {first} and {differ[0]} have different names, so they may be of different "
            "steps; pass one of two files that belong together"
        )
    return [[found[key] for key in row] for row in keys]


def _file_of_rank(folder: Path, wanted: str | None) -> Path | None:
    """The one file of a rank, if there is any."""
    if wanted is not None:
        return folder / wanted if (folder / wanted).is_file() else None
    for name in MODEL_FILES:
        if (folder / name).is_file():
            return folder / name
    others = [child for child in _children(folder) if child.suffix == ".ckpt" and child.is_file()]
    if len(others) > 1:
        raise CheckpointError(
            f"{folder}: holds {len(others)} checkpoints; pass the path of one of them: "
            f"{names.listing([file.name for file in others])}"
        )
    return others[0] if others else None
