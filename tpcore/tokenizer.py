"""BERT WordPiece tokenisation from a vocabulary file, on the `tokenizers` library.

The pipeline is original BERT's: clean the text, put blanks around Chinese characters, lower-case
and strip accents (uncased vocabularies only), split at blanks and punctuation, then cut each word
greedily into the longest pieces of the vocabulary, `##` marking the inner ones. Ids, type ids and
offsets equal those of transformers' BertTokenizerFast.

Special tokens written out in a text, such as "[SEP]", become those tokens, as they do there.
"""

from __future__ import annotations

import gzip
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY_FILE = "vocab.txt"
CONFIG_FILE = "tokenizer_config.json"
SERIALIZED_FILE = "tokenizer.json"
_MAX_BYTES = 64 * 2**20
"""Of a vocabulary file; those of BERT have 0.2 MiB."""
SHIPPED_FOLDER = "vocabularies"
SHIPPED = {
    f"{name}-{case}": f"bert-base-{case}"
    for case in ("uncased", "cased")
    for name in ("megatron-bert", "megatron-bert-345m", "bert-base", "bert-large")
}
"""Name of a tokenizer -> its vocabulary in this package."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """The tokens of one text, or of a pair of texts: five lists of equal length.

    A special token has the offsets (0, 0) and the word id None.
    """

    ids: list[int]
    type_ids: list[int]
    """0 up to the first [SEP], 1 for the second text of a pair and its [SEP]."""
    offsets: list[tuple[int, int]]
    """First character and one past the last, in the text that the token came from."""
    word_ids: list[int | None]
    """Pieces of one word share a number; a punctuation mark is a word. A pair's second text
    counts from 0 again."""
    tokens: list[str]
    num_truncated: int = 0
    """Tokens that `max_length` cut off."""

    def __len__(self) -> int:
        return len(self.ids)


class WordPieceTokenizer:
    """`[CLS] text [SEP]` or `[CLS] text [SEP] pair [SEP]` from strings.

    Args:
        vocabulary: the tokens; a token's id is its index.
        whole_tokens: those of them that are found in a text as they are written, before it is
            cleaned, lower-cased or split: markers such as `@GENE$`.
        lowercase: lower-case and strip accents before the lookup. None: decided by the
            vocabulary, true unless one of its tokens (special ones aside) has a capital letter.

    Raises:
        ValueError: the vocabulary is empty, holds a token twice, or lacks a special token or one of
            `whole_tokens`.

    Warns:
        UserWarning: `lowercase` contradicts the vocabulary.
    """

    def __init__(
        self,
        vocabulary: Sequence[str],
        *,
        lowercase: bool | None = None,
        whole_tokens: Sequence[str] = (),
    ) -> None:
        # Here and not above: checkpoints are read without the extra that brings it.
        import tokenizers
        from tokenizers import normalizers, pre_tokenizers, processors
        from tokenizers.models import WordPiece

        self.vocabulary = tuple(vocabulary)
        ids = _ids_of(self.vocabulary)
        self.whole_tokens = tuple(whole_tokens)
        for token in self.whole_tokens:
            if token not in ids:
                raise ValueError(f"whole token {token!r} is not in the vocabulary; add it there")
        words = set(self.vocabulary) - set(self.whole_tokens)
        is_uncased = not any(map(_has_capital, words))
        if lowercase is not None and lowercase != is_uncased:
            has, wrong = (
                ("no token", "every word with a capital letter becomes [UNK]")
                if is_uncased
                else ("tokens", "those can never occur")
            )
            warnings.warn(
                f"lowercase={lowercase}, but this vocabulary has {has} with capital letters: "
                f"{wrong}; leave lowercase unset to follow the vocabulary",
                stacklevel=2,
            )
        self.lowercase = is_uncased if lowercase is None else lowercase
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            ids[token] for token in SPECIAL_TOKENS
        )
        self._tokenizer = tokenizers.Tokenizer(WordPiece(ids, unk_token="[UNK]"))
        self._tokenizer.normalizer = normalizers.BertNormalizer(lowercase=self.lowercase)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[("[CLS]", self.cls_id), ("[SEP]", self.sep_id)],
        )
        self._tokenizer.add_special_tokens([*SPECIAL_TOKENS, *self.whole_tokens])

    def with_whole_tokens(self, tokens: Sequence[str]) -> WordPieceTokenizer:
        """The same tokenizer, which takes `tokens` whole; new ones get the next ids.

        Raises:
            ValueError: one is empty or has blanks at its ends.
        """
        for token in tokens:
            if not token or token != token.strip():
                raise ValueError(
                    f"{token!r} cannot be a token; expected a text without outer blanks"
                )
        new = [token for token in dict.fromkeys(tokens) if token not in set(self.vocabulary)]
        return WordPieceTokenizer(
            (*self.vocabulary, *new),
            lowercase=self.lowercase,
            whole_tokens=tuple(dict.fromkeys((*self.whole_tokens, *tokens))),
        )

    @classmethod
    def from_vocab_file(
        cls,
        path: str | os.PathLike[str],
        *,
        lowercase: bool | None = None,
        whole_tokens: Sequence[str] = (),
    ) -> WordPieceTokenizer:
        """Read a BERT vocabulary: UTF-8, one token a line, in the order of the ids.

        `whole_tokens` that it does not hold are left out.

        Raises:
            ValueError: the file is missing or is not such a vocabulary.
        """
        lines = _read_text(Path(path)).split("\n")
        lines = [line.removesuffix("\r") for line in lines]
        while lines and not lines[-1]:
            lines.pop()
        if not lines:
            raise ValueError(f"{path} is empty; expected a vocabulary with one token a line")
        if "" in lines:
            raise ValueError(
                f"{path}: line {lines.index('') + 1} is empty; a vocabulary has one token a line, "
                "and removing a line would shift the ids of all that follow"
            )
        known = set(lines)
        whole = [token for token in whole_tokens if token in known]
        return cls._checked(lines, path, lowercase, whole)

    @classmethod
    def from_name(cls, name: str, *, lowercase: bool | None = None) -> WordPieceTokenizer:
        """The tokenizer of a released model, from a vocabulary in this package; no download.

        Raises:
            ValueError: `name` is none of `SHIPPED`.
        """
        if name not in SHIPPED:
            raise ValueError(
                f"no vocabulary is shipped for the tokenizer {name!r}; shipped: "
                f"{', '.join(SHIPPED)}; any other needs its vocab.txt"
            )
        path = Path(__file__).parent / SHIPPED_FOLDER / f"{SHIPPED[name]}.txt.gz"
        return cls(gzip.decompress(path.read_bytes()).decode().split(), lowercase=lowercase)

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], *, lowercase: bool | None = None
    ) -> WordPieceTokenizer:
        """Read what `save` or transformers wrote: a folder, a tokenizer.json or a vocab.txt.

        In a folder, vocab.txt is taken before tokenizer.json, and `do_lower_case` of
        tokenizer_config.json is heeded unless `lowercase` is given, and its
        `additional_special_tokens` are taken whole.

        Raises:
            ValueError: nothing readable is there, or it is not a BERT WordPiece tokenizer.
        """
        path = Path(path)
        if path.is_dir():
            vocabulary, serialized = path / VOCABULARY_FILE, path / SERIALIZED_FILE
            config = path / CONFIG_FILE
            stored = _read_json(config) if config.is_file() else {}
            if lowercase is None:
                lowercase = _flag(stored, "do_lower_case", config)
            if vocabulary.is_file():
                special = stored.get("additional_special_tokens")
                whole = list(map(str, special)) if isinstance(special, list) else []
                return cls.from_vocab_file(vocabulary, lowercase=lowercase, whole_tokens=whole)
            if not serialized.is_file():
                raise ValueError(f"{path} holds neither {VOCABULARY_FILE} nor {SERIALIZED_FILE}")
            path = serialized
        if path.suffix == ".json":
            tokens, normalizer = _parse_serialized(path)
            if lowercase is None:
                lowercase = _flag(normalizer, "lowercase", path)
            return cls._checked(tokens, path, lowercase)
        return cls.from_vocab_file(path, lowercase=lowercase)

    @classmethod
    def _checked(
        cls,
        tokens: Sequence[str],
        path: str | os.PathLike[str],
        lowercase: bool | None,
        whole_tokens: Sequence[str] = (),
    ) -> WordPieceTokenizer:
        try:
            return cls(tokens, lowercase=lowercase, whole_tokens=whole_tokens)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    def encode(
        self, text: str, pair: str | None = None, *, max_length: int | None = None
    ) -> Encoding:
        """The tokens of `text`, or of `text` and `pair`.

        Args:
            text: any string.
            pair: a second string, which gets type id 1.
            max_length: longest result, [CLS] and [SEP] included. Tokens go from the end of the
                longer text first, until both are equally long; [CLS] and [SEP] always stay.

        Raises:
            ValueError: max_length leaves no room for [CLS] and [SEP].
        """
        return self.encode_batch([text], None if pair is None else [pair], max_length=max_length)[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
    ) -> list[Encoding]:
        """`encode` of every text, on all cores.

        Raises:
            ValueError: as `encode`; or the numbers of texts and pairs differ; or a text is no
                valid Unicode.
        """
        num_special = 2 if pairs is None else 3
        if max_length is not None and max_length < num_special:
            raise ValueError(
                f"max_length={max_length} leaves no room for the {num_special} special tokens; "
                f"use at least {num_special + 1}"
            )
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"{len(texts)} texts but {len(pairs)} pairs; expected one pair a text")
        room = None if max_length is None else max_length - num_special
        # Cut here and not by the library's enable_truncation: that would be state, which two
        # callers with different lengths would share.
        first = self._pieces(texts)
        second: list[Any] = [None] * len(first) if pairs is None else self._pieces(pairs)
        return [self._finish(a, b, room) for a, b in zip(first, second, strict=True)]

    def _pieces(self, texts: Sequence[str]) -> list[Any]:
        try:
            return self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        except TypeError:
            # The library says the same of every string it cannot take; name the actual reason.
            for index, text in enumerate(texts):
                if not isinstance(text, str):
                    raise TypeError(
                        f"text {index} is a {type(text).__name__}; expected a str"
                    ) from None
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(
                        f"text {index}, character {error.start}: half of a surrogate pair is not a "
                        "character; decode the text with errors='replace'"
                    ) from None
            raise

    def _finish(self, first: Any, second: Any | None, room: int | None) -> Encoding:
        sizes = (len(first), 0 if second is None else len(second))
        num_truncated = 0
        if room is not None and sum(sizes) > room:
            num_truncated = sum(sizes) - room
            kept_first, kept_second = _longest_first(*sizes, room)
            first.truncate(kept_first)
            if second is not None:
                second.truncate(kept_second)
        whole = self._tokenizer.post_process(first, second)
        return Encoding(
            ids=whole.ids,
            type_ids=whole.type_ids,
            offsets=whole.offsets,
            word_ids=whole.word_ids,
            tokens=whole.tokens,
            num_truncated=num_truncated,
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write vocab.txt and tokenizer_config.json, which `from_file` and transformers read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "do_lower_case": self.lowercase,
            "tokenizer_class": "BertTokenizer",
        }
        if self.whole_tokens:
            config["additional_special_tokens"] = list(self.whole_tokens)
        for name, content in (
            (VOCABULARY_FILE, "".join(f"{token}\n" for token in self.vocabulary)),
            (CONFIG_FILE, json.dumps(config, indent=2) + "\n"),
        ):
            (folder / name).write_text(content, encoding="utf-8", newline="\n")


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of each text stay, when together they may have `room`."""
    shorter = min(first, second, room // 2)
    longer = room - shorter
    return (longer, shorter) if first > second else (shorter, longer)


def _ids_of(vocabulary: tuple[str, ...]) -> dict[str, int]:
    if not vocabulary:
        raise ValueError("the vocabulary is empty; expected one token an id")
    ids: dict[str, int] = {}
    for index, token in enumerate(vocabulary):
        if token in ids:
            raise ValueError(
                f"token {token!r} has the ids {ids[token]} and {index} (lines {ids[token] + 1} and "
                f"{index + 1}); a vocabulary holds each token once"
            )
        ids[token] = index
    missing = [token for token in SPECIAL_TOKENS if token not in ids]
    if missing:
        raise ValueError(
            f"the vocabulary lacks {', '.join(missing)}; a BERT vocabulary holds "
            f"{', '.join(SPECIAL_TOKENS)}"
        )
    return ids


def _has_capital(token: str) -> bool:
    is_special = token.startswith("[") and token.endswith("]")
    return not is_special and token != token.lower()


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a file; expected a vocabulary file")
        if path.exists() and path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path} is far too large for a vocabulary")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; expected a vocabulary file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}: line {line} is not UTF-8; expected a text file with one token a line"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; expected an object")
    return content


def _flag(values: dict[str, Any], name: str, path: Path) -> bool | None:
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{path}: {name}={value!r:.80} is neither true nor false")
    return value


def _parse_serialized(path: Path) -> tuple[list[str], dict[str, Any]]:
    """(tokens in the order of their ids, normaliser settings) of a tokenizer.json.

    Only the vocabulary and the case are taken from it; whatever else would change the tokens
    must be as BERT has it.
    """
    content = _read_json(path)
    model, normalizer, pre_tokenizer = (
        content[name] if isinstance(content.get(name), dict) else {}
        for name in ("model", "normalizer", "pre_tokenizer")
    )
    expected = (
        ("model.type", model.get("type"), "WordPiece"),
        ("model.unk_token", model.get("unk_token"), "[UNK]"),
        ("model.continuing_subword_prefix", model.get("continuing_subword_prefix"), "##"),
        ("normalizer.type", normalizer.get("type"), "BertNormalizer"),
        ("normalizer.clean_text", normalizer.get("clean_text"), True),
        ("normalizer.handle_chinese_chars", normalizer.get("handle_chinese_chars"), True),
        ("normalizer.strip_accents", normalizer.get("strip_accents"), None),
        ("pre_tokenizer.type", pre_tokenizer.get("type"), "BertPreTokenizer"),
    )
    for key, value, wanted in expected:
        if value != wanted:
            raise ValueError(f"{path}: {key} is {value!r:.80}; a BERT tokenizer has {wanted!r}")
    ids = model.get("vocab")
    if not isinstance(ids, dict) or not all(type(index) is int for index in ids.values()):
        raise ValueError(f"{path}: model.vocab does not map tokens to ids")
    try:
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    except (TypeError, KeyError):
        raise ValueError(f"{path}: added_tokens is no list of tokens with ids") from None
    unknown = [token for token, index in added.items() if ids.get(token) != index]
    if unknown:
        raise ValueError(
            f"{path} adds tokens that are not in its vocabulary: {', '.join(unknown[:5]):.200}; "
            "write the complete vocabulary to a vocab.txt, one token a line, and use that"
        )
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError(f"{path}: the token ids are not 0 to {len(tokens) - 1} without gaps")
    return tokens, normalizer
