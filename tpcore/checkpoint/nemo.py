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
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpcore.checkpoint import archive, megatron_dist, nemo_names
from tpcore.checkpoint.archive import Archive
from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.megatron import state_of
from tpcore.checkpoint.megatron_rank import RankFile, rank_of
from tpcore.checkpoint.nemo_config import NemoContents, args_of, read_contents
from tpcore.checkpoint.state import CanonicalState, Source, check_vocabulary
from tpcore.checkpoint.unpickle import check_records, load_pickle

FORMAT = "NeMo"
WEIGHTS = "model_weights.ckpt"

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
    """Read a file. Its weights are unpacked into a temporary folder, as long as the state lives.

    Args:
        path: the file.
        qkv_layout: as in `megatron.read`.
        overrides: as in `megatron.read`.

    Raises:
        CheckpointError: it is damaged, or something in it is not accounted for.
    """
    with Archive(path) as members:
        about = read_contents(members)
        names = _weights(members)
        unpacked = Unpacked()
        files = members.extract(names, unpacked.folder)
    where = str(path)
    args = args_of(about, where)
    if about.vocabulary is not None:
        (unpacked.folder / "vocab.txt").write_text("".join(f"{t}\n" for t in about.vocabulary))
    source = Source(
        path=path,
        format=FORMAT,
        notes=(f"task: {about.task or 'not said'}",),
        files=(path,),
        tokenizer_files=(unpacked.folder / "vocab.txt",) if about.vocabulary else (),
        settings=about.config,
        keep=unpacked,
    )
    if names[0].startswith(_DIST):
        folder = unpacked.folder / _DIST
        state = megatron_dist.read(folder, overrides=overrides, args=args)
        about_run = state.source
        source = dataclasses.replace(
            source,
            version=about_run.version,
            qkv_layout="v3",
            stated=about_run.stated,
            parts=about_run.parts,
        )
        state = dataclasses.replace(state, source=source)
    else:
        ranks = [_rank(file, f"{path}: {name}", about, args) for name, file in files.items()]
        state = state_of([ranks], source, qkv_layout=qkv_layout, overrides=overrides)
    if about.vocabulary is not None and "vocab_size" not in args:
        tokens = len(about.vocabulary)
        check_vocabulary(tokens, state.vocab_rows, where)
        state = dataclasses.replace(state, config=state.config.replace(vocab_size=tokens))
    return state


class Unpacked:
    """A temporary folder that goes when nobody needs it any more."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tpcore-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


def _weights(members: Archive) -> list[str]:
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


def _rank(file: Path, where: str, about: NemoContents, args: dict[str, Any]) -> RankFile:
    check_records(file, where)  # a plain archive has no checksum of its own
    state = load_pickle(file, where)
    if not isinstance(state, dict):
        raise CheckpointError(f"{where}: holds a {type(state).__name__}, not a dict of tensors")
    weights = nemo_names.translate(state, about.task, where)
    content = nemo_names.content_of(weights, args, about.checkpoint_version)
    return rank_of(content, file, where)
