"""Tokens of many texts: on all cores, behind a progress bar, and kept in a file if wished.

What is kept are the tokens of each text and their places, before any setting of a task is applied
to them. Its file is named by a digest of the texts and of the tokenizer, so other data, another
vocabulary or another version of the library have another file, and nothing in it can be out of
date. It holds arrays of numbers (safetensors), no pickle; one that is damaged is made again.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tpcore.tokenizer import WordPieceTokenizer

SHOWN_FROM = 20_000
"""Fewer texts are encoded before a bar is of use."""
_FORMAT = "tpcore tokens 1"
_CHUNK = 512


class TextTokens(NamedTuple):
    """The tokens of one text, without [CLS] and [SEP]."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """First character and one past the last."""


def encode_texts(
    tokenizer: WordPieceTokenizer, texts: Sequence[str], label: str = ""
) -> list[TextTokens]:
    """The tokens of every text; `label` stands before the bar, which a terminal shows."""
    found = []
    with _bar(label, len(texts)) as advance:
        for start in range(0, len(texts), _CHUNK):
            for encoding in tokenizer.encode_batch(texts[start : start + _CHUNK]):
                found.append(TextTokens(encoding.ids[1:-1], encoding.offsets[1:-1]))
            advance(min(_CHUNK, len(texts) - start))
    return found


def cached_tokens(
    tokenizer: WordPieceTokenizer, texts: Sequence[str], beside: str | os.PathLike[str]
) -> tuple[list[TextTokens], str]:
    """(`encode_texts`, what to tell the user); read from the file beside the data, or kept in it.

    Several processes may do this at once: a file appears whole or not at all.
    """
    key = cache_key(tokenizer, texts)
    path = Path(beside).with_name(f"{Path(beside).name}.tokens-{key[:16]}.safetensors")
    if path.is_file():
        try:
            return read_tokens(path, key, texts, tokenizer.vocab_size), f"tokens read from {path}"
        except ValueError as error:
            reason = f", since it {error}"
    else:
        reason = ""
    found = encode_texts(tokenizer, texts, Path(beside).name)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(save(_arrays(found), {"key": key}))
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        return found, f"tokens are not kept: {path.parent} cannot be written to: {error.strerror}"
    return found, f"tokens written to {path}{reason}"


def cache_key(tokenizer: WordPieceTokenizer, texts: Sequence[str]) -> str:
    """A digest of everything that tokens depend on."""
    import tokenizers

    digest = hashlib.sha256()
    settings = (_FORMAT, tokenizers.__version__, str(tokenizer.lowercase))
    for group in (settings, tokenizer.whole_tokens, tokenizer.vocabulary, texts):
        digest.update(f"{len(group)}:".encode())
        for text in group:
            content = text.encode("utf-8", "surrogatepass")
            digest.update(f"{len(content)}:".encode() + content)
    return digest.hexdigest()


def read_tokens(path: Path, key: str, texts: Sequence[str], vocab_size: int) -> list[TextTokens]:
    """What `cached_tokens` kept.

    Raises:
        ValueError: it is not what should be there; the message goes on from the file's name.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                raise ValueError("was of other texts")
            ids, offsets, ends = (file.get_tensor(name) for name in ("ids", "offsets", "ends"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"could not be read ({error})") from None
    if not _is_sound(ids, offsets, ends, texts, vocab_size):
        raise ValueError("was damaged")
    all_ids, all_offsets = ids.tolist(), list(map(tuple, offsets.tolist()))
    bounds = pairwise([0, *ends.tolist()])
    return [TextTokens(all_ids[start:end], all_offsets[start:end]) for start, end in bounds]


def _is_sound(
    ids: Tensor, offsets: Tensor, ends: Tensor, texts: Sequence[str], vocab_size: int
) -> bool:
    """Whether every token is one of the vocabulary and lies inside of its text."""
    if any(tensor.dtype != torch.int32 for tensor in (ids, offsets, ends)):
        return False
    if ends.shape != (len(texts),) or ids.dim() != 1 or offsets.shape != (len(ids), 2):
        return False
    counts = ends.diff(prepend=ends.new_zeros(1))
    if len(texts) == 0 or counts.min() < 0 or ends[-1] != len(ids):
        return False
    sizes = torch.tensor([len(text) for text in texts], dtype=torch.int32)
    limit = sizes.repeat_interleave(counts)
    start, end = offsets.unbind(1)
    in_vocabulary = (ids >= 0) & (ids < vocab_size)
    in_text = (start >= 0) & (start <= end) & (end <= limit)
    return bool((in_vocabulary & in_text).all())


def _arrays(found: Sequence[TextTokens]) -> dict[str, Tensor]:
    counts = torch.tensor([len(tokens.ids) for tokens in found])
    offsets = [offset for tokens in found for offset in tokens.offsets]
    return {
        "ids": torch.tensor([i for tokens in found for i in tokens.ids], dtype=torch.int32),
        "offsets": torch.tensor(offsets, dtype=torch.int32).reshape(-1, 2),
        "ends": counts.cumsum(0).to(torch.int32),
    }


@contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int], Any]]:
    """A progress bar on the terminal of the first process, for many texts."""
    first = os.environ.get("RANK", "0") == "0"
    if total < SHOWN_FROM or not first or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn(f"{label}: tokens of texts"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)
