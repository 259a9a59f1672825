"""NeMo's `.nemo` files: a tar archive of weights, model_config.yaml and the artifacts it names.

    model_config.yaml
    model_weights.ckpt                       one rank
    mp_rank_XX/model_weights.ckpt            or many
    model_weights/                           or a torch_dist folder (NeMo 1.20 on)
    <name>_encoder_config.json, megatron_checkpoint_version.json, tokenizer.vocab_file, labels

Artifacts may have an id before their names. Nothing that the configuration says is instantiated.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.formats import megatron_dist, nemo_names
from tpcore.checkpoint.formats.megatron import state_of
from tpcore.checkpoint.formats.megatron_rank import RankFile, rank_of
from tpcore.checkpoint.formats.nemo_config import NemoContents, args_of, read_contents
from tpcore.checkpoint.per_host import PerHost
from tpcore.checkpoint.state import CanonicalState, Source, check_vocabulary
from tpcore.checkpoint.stored import embedded_content
from tpcore.checkpoint.untrusted import archive
from tpcore.checkpoint.untrusted.archive import Archive, UnpackedArchive
from tpcore.checkpoint.untrusted.unpickle import load_pickle
from tpcore.checkpoint.untrusted.zip_directory import MAGIC

FORMAT = "NeMo"
WEIGHTS = "model_weights.ckpt"
VOCABULARY_FILE = "vocab.txt"

_RANK = re.compile(rf"mp_rank_(\d{{2,4}})/{re.escape(WEIGHTS)}")
_DIST = "model_weights/"


def recognise(path: Path) -> bool:
    """Whether `path` is a file that begins as a tar archive."""
    return path.is_file() and archive.recognise(path)


def contents(path: str | Path) -> NemoContents:
    """What a `.nemo` file holds beside its weights: configuration, labels, vocabulary.

    Raises:
        CheckpointError: it is damaged, or no such file.
    """
    with Archive(Path(path)) as members:
        return read_contents(members)


def read(
    path: Path, *, qkv_layout: str | None = None, overrides: Mapping[str, Any] | None = None
) -> CanonicalState:
    """Read a file.

    The weights of a plain archive are read where they lie. A gzip one is unpacked into a temporary
    folder, as far as it is needed, once for all processes of a machine; that stays there as long
    as one of their states lives.

    Args:
        path: the file.
        qkv_layout: as in `megatron.read`.
        overrides: as in `megatron.read`.

    Raises:
        CheckpointError: it is damaged, or something in it is not accounted for.
    """
    keep: list[PerHost] = []

    def once(purpose: str, fill: Callable[[Path], object]) -> Path:
        try:
            keep.append(PerHost(path, purpose, fill))
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be unpacked into a temporary folder ({error.strerror}); TMPDIR "
                "chooses another"
            ) from error
        return keep[-1].folder

    members: Archive | UnpackedArchive
    if archive.is_packed(path):
        members = UnpackedArchive(
            path, once("unpacked", lambda to: UnpackedArchive.fill(path, to, _is_weights))
        )
    else:
        members = plain = Archive(path)
    about = read_contents(members)
    names = _weights(members)
    is_dist = names[0].startswith(_DIST)
    if isinstance(members, Archive) and (is_dist or not _are_zips(members, names)):
        folder = once("unpacked", lambda to: UnpackedArchive.extract(plain, names, to))
        members = UnpackedArchive(path, folder)
    vocabulary: tuple[Path, ...] = ()
    if about.vocabulary is not None:
        text = "".join(f"{token}\n" for token in about.vocabulary)
        vocabulary = (once("vocabulary", partial(_write_vocabulary, text)) / VOCABULARY_FILE,)
    where = str(path)
    args = args_of(about, where)
    source = Source(
        path=path,
        format=FORMAT,
        notes=(f"task: {about.task or 'not said'}",),
        files=(path,),
        tokenizer_files=vocabulary,
        settings=about.config,
        keep=keep,
    )
    if is_dist:
        assert isinstance(members, UnpackedArchive)
        state = _read_dist(members, source, overrides, args)
    else:
        places = {name: members.place(name) for name in names}
        parts = tuple((*place, f"{path}: {name}") for name, place in places.items())
        ranks = [_rank(*part, about, args) for part in parts]
        source = dataclasses.replace(source, parts=parts)
        state = state_of([ranks], source, qkv_layout=qkv_layout, overrides=overrides)
    if about.vocabulary is not None and "vocab_size" not in args:
        tokens = len(about.vocabulary)
        check_vocabulary(tokens, state.vocab_rows, where)
        state = dataclasses.replace(state, config=state.config.replace(vocab_size=tokens))
    return state


def _is_weights(name: str) -> bool:
    return name == WEIGHTS or name.startswith(_DIST) or _RANK.fullmatch(name) is not None


def _weights(members: Archive | UnpackedArchive) -> list[str]:
    """The members that hold weights, in the order of ranks."""
    ranks = {int(m[1]): name for name in members.members if (m := _RANK.fullmatch(name))}
    alone = [WEIGHTS] if WEIGHTS in members else []
    dist = sorted(name for name in members.members if name.startswith(_DIST))
    kinds = [names for names in ([ranks[r] for r in sorted(ranks)], alone, dist) if names]
    if len(kinds) != 1:
        raise CheckpointError(
            f"{members.path}: expected either {WEIGHTS}, or mp_rank_XX/{WEIGHTS} for every rank, "
            f"or the folder {_DIST[:-1]}; it has {'more than one' if kinds else 'none'} of these"
        )
    missing = [rank for rank in range(max(ranks, default=-1) + 1) if rank not in ranks]
    if missing:
        raise CheckpointError(
            f"{members.path}: rank files are missing: mp_rank_{missing[0]:02d}/{WEIGHTS}"
        )
    return kinds[0]


def _are_zips(members: Archive, names: Sequence[str]) -> bool:
    """Whether the weights can be read in place: torch wrote other files before version 1.6."""
    for name in names:
        with members.open(name) as file:
            if file.read(len(MAGIC)) != MAGIC:
                return False
    return True


def _write_vocabulary(text: str, folder: Path) -> None:
    (folder / VOCABULARY_FILE).write_text(text, encoding="utf-8")


def _read_dist(
    members: UnpackedArchive,
    source: Source,
    overrides: Mapping[str, Any] | None,
    args: Mapping[str, Any],
) -> CanonicalState:
    folder = members.folder / _DIST
    try:
        state = megatron_dist.read(folder, overrides=overrides, args=args)
    except CheckpointError as error:
        # What it calls a file is a member.
        text = str(error).replace(f"{members.folder}/", f"{members.path}: ")
        raise CheckpointError(text) from error
    about = state.source
    renamed = (f"{members.folder}/", f"{members.path}: ")
    parts = tuple(
        (file, offset, size, where.replace(*renamed)) for file, offset, size, where in about.parts
    )
    source = dataclasses.replace(
        source, version=about.version, qkv_layout="v3", stated=about.stated, parts=parts
    )
    return dataclasses.replace(state, source=source)


def _rank(
    file: Path, offset: int, size: int, where: str, about: NemoContents, args: dict[str, Any]
) -> RankFile:
    with file.open("rb") as opened:
        opened.seek(offset)
        is_zip = opened.read(len(MAGIC)) == MAGIC
    part = (offset, size) if is_zip else None
    state = embedded_content(file, *part, where) if part else load_pickle(file, where)
    if not isinstance(state, dict):
        raise CheckpointError(f"{where}: holds a {type(state).__name__}, not a dict of tensors")
    weights = nemo_names.translate(state, about.task, where)
    content = nemo_names.content_of(weights, args, about.checkpoint_version)
    return rank_of(content, file, where, part)
