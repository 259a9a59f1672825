"""Released encoders by name: where their files are, what the files do not say, and the cache.

A file that is there always wins: a path of that name, or one in the cache, is never looked up
elsewhere. What is missing is downloaded once into `$TPCORE_CACHE/<name>/` (default
~/.cache/tpcore).
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcore.checkpoint.download import download
from tpcore.checkpoint.errors import CheckpointError
from tpcore.models.config import PRESETS, BertConfig

CACHE_VARIABLE = "TPCORE_CACHE"
VOCABULARY_FILE = "vocab.txt"

_NGC = "https://api.ngc.nvidia.com/v2/models/nvidia"


@dataclass(frozen=True, kw_only=True)
class Release:
    """What is known of a released encoder."""

    checkpoint_url: str | None
    """None: there is no one file; the user brings a checkpoint and its configuration."""
    config: BertConfig | None
    lowercase: bool
    vocabulary: str | None = None
    """Name of the vocabulary in this package (`tokenizer.SHIPPED`); None: it has its own."""
    vocabulary_url: str | None = None
    sha256: str | None = None
    """Of the checkpoint; its publisher gives none, so None until somebody verifies one. A user
    pins the digest of a file that he trusts in `<file>.sha256` beside its place in the cache."""


RELEASES = {
    "megatron-bert-345m-uncased": Release(
        checkpoint_url=f"{_NGC}/megatron_bert_345m/versions/v0.0/files/release/mp_rank_00/"
        "model_optim_rng.pt",
        config=PRESETS["megatron-bert-345m-uncased"],
        lowercase=True,
        vocabulary="megatron-bert-uncased",
    ),
    "megatron-bert-345m-cased": Release(
        checkpoint_url=f"{_NGC}/megatron_bert_345m/versions/v0.1_cased/files/release/mp_rank_00/"
        "model_optim_rng.pt",
        config=PRESETS["megatron-bert-345m-cased"],
        lowercase=False,
        vocabulary="megatron-bert-cased",
    ),
    "biomegatron-bert-345m-uncased": Release(
        checkpoint_url=f"{_NGC}/biomegatron345muncased/versions/0/files/MegatronBERT.pt",
        vocabulary_url=f"{_NGC}/biomegatron345muncased/versions/0/files/vocab.txt",
        config=BertConfig(vocab_size=30522),
        lowercase=True,
    ),
    "biomegatron-bert-345m-cased": Release(
        checkpoint_url=f"{_NGC}/biomegatron345mcased/versions/0/files/MegatronBERT.pt",
        vocabulary_url=f"{_NGC}/biomegatron345mcased/versions/0/files/vocab.txt",
        config=BertConfig(vocab_size=28996),
        lowercase=False,
    ),
    "megatron-bert-uncased": Release(
        checkpoint_url=None, config=None, lowercase=True, vocabulary="megatron-bert-uncased"
    ),
    "megatron-bert-cased": Release(
        checkpoint_url=None, config=None, lowercase=False, vocabulary="megatron-bert-cased"
    ),
}


def cache_folder() -> Path:
    """`$TPCORE_CACHE`, else ~/.cache/tpcore."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/tpcore").expanduser()


def locate(path: str | Path) -> Path:
    """The checkpoint at a path, else the one that the path names, downloaded if need be.

    Raises:
        CheckpointError: there is nothing at the path and it is no name, the name has no file, or
            the download failed; says which file to put where.
    """
    path = Path(path)
    if path.exists():
        return path
    name = str(path)
    if name in RELEASES:
        return fetch(name)
    near = difflib.get_close_matches(name, RELEASES, n=1)
    hint = f"; did you mean the name {near[0]}?" if near else ""
    raise CheckpointError(f"{path}: no such file or directory{hint}")


def known_facts(name: str | Path) -> dict[str, Any]:
    """Fields of `BertConfig` that a released file may not say; empty for any other name."""
    release = RELEASES.get(str(name))
    if release is None or release.config is None:
        return {}
    return {"vocab_size": release.config.vocab_size}  # the files know their padded size only


def fetch(name: str) -> Path:
    """The checkpoint of a name in the cache, downloaded if it is not there.

    Raises:
        CheckpointError: see `locate`.
    """
    release = RELEASES[name]
    if release.checkpoint_url is None:
        raise CheckpointError(
            f"{name}: is a family of models without one checkpoint to download; pass the path of "
            "yours, and its configuration where the file has none"
        )
    return _fetch(name, release.checkpoint_url, release.sha256)


def fetch_vocabulary(name: str) -> Path | None:
    """The vocabulary of a name that has its own, in the cache; None: it has none of its own.

    Raises:
        CheckpointError: see `locate`.
    """
    release = RELEASES.get(name)
    if release is None or release.vocabulary_url is None:
        return None
    return _fetch(name, release.vocabulary_url, None)


def _fetch(name: str, url: str, sha256: str | None) -> Path:
    target = cache_folder() / name / url.rpartition("/")[2]
    if target.is_file():
        return target
    try:
        download(url, target, sha256=_pinned(target) or sha256)
    except CheckpointError as error:
        raise CheckpointError(
            f"{name}: {error}; get the file elsewhere and put it at {target} (the environment "
            f"variable {CACHE_VARIABLE} moves that folder), or pass its path instead of the name"
        ) from error
    return target


def _pinned(target: Path) -> str | None:
    """The digest that the user expects of a file: the first word of `<file>.sha256`."""
    file = target.with_name(f"{target.name}.sha256")
    if not file.is_file():
        return None
    with file.open(encoding="ascii", errors="replace") as stream:
        words = stream.read(4096).split()
    digest = words[0].lower() if words else ""
    if len(digest) != 64 or digest.strip("0123456789abcdef"):
        raise CheckpointError(f"{file}: does not begin with a SHA-256 digest (64 hex digits)")
    return digest
