"""Plain text for masked language models: documents of lines to passages, passages to examples.

One sentence, paragraph or document stands in a line; a blank line ends a document. Consecutive
lines of a document are joined into passages that fit into a sequence; a line that does not is cut.

What is masked in a passage is a function of the run's seed, the epoch and the passage's place:
the same for any number of ranks, and anew in every epoch (RoBERTa, arXiv 1907.11692, 4.1).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tpcore.models.heads import IGNORE_INDEX
from tpcore.tasks.task import DataError, Example
from tpcore.tasks.text_file import read_lines
from tpcore.tokenizer import WordPieceTokenizer

Sentence = tuple[int, ...]
"""Token ids of a line, or of a part of one."""


@dataclass(frozen=True, slots=True)
class Passage:
    """Consecutive lines of one document, as many as fit into a sequence."""

    line: int
    """Number of the first line, from 1."""
    document: int
    """Number of its document, from 0."""
    sentences: tuple[Sentence, ...]

    @property
    def num_tokens(self) -> int:
        """Without special tokens."""
        return sum(map(len, self.sentences))


class MaskedLabels(NamedTuple):
    """What an example asks for."""

    positions: tuple[int, ...]
    """In the example, rising."""
    targets: tuple[int, ...]
    """The tokens that stood there."""
    sentence: int = IGNORE_INDEX
    """1: the second part is not what follows the first; 0: it is; -100: there is no second part."""


def read_passages(
    path: str | os.PathLike[str], tokenizer: WordPieceTokenizer, room: int
) -> tuple[list[Passage], list[str]]:
    """(the passages of a text file, what to tell the user about it).

    Args:
        path: the file.
        tokenizer: of the model.
        room: most tokens of a passage.

    Raises:
        DataError: the file cannot be used.
    """
    lines = read_lines(path)
    own = [line for line in lines if line.text.strip()]
    encodings = tokenizer.encode_batch([line.text for line in own])
    special = special_ids(tokenizer)
    document, num_documents, num_empty, num_cut = -1, 0, 0, 0
    passages: list[Passage] = []
    pending: list[Sentence] = []
    pending_line = 0

    def flush() -> None:
        if pending:
            passages.append(Passage(pending_line, num_documents - 1, tuple(pending)))
            pending.clear()

    tokens = {
        line.number: encoding.ids[1:-1] for line, encoding in zip(own, encodings, strict=True)
    }
    for line in lines:
        if line.number not in tokens:
            flush()
            document = -1
            continue
        ids = tokens[line.number]
        if all(token in special for token in ids):
            num_empty += 1
            continue
        if document < 0:
            document = num_documents
            num_documents += 1
        num_cut += len(ids) > room
        for start in range(0, len(ids), room):
            part = tuple(ids[start : start + room])
            if all(token in special for token in part):
                continue
            if sum(map(len, pending)) + len(part) > room:
                flush()
            if not pending:
                pending_line = line.number
            pending.append(part)
    flush()
    if not passages:
        raise DataError(f"{path} holds no words of the vocabulary; expected plain text")
    count = sum(passage.num_tokens for passage in passages)
    notes = [f"{path}: {len(passages)} passages of {num_documents} document(s), {count} tokens"]
    if num_empty:
        notes.append(f"{path}: {num_empty} line(s) without a word left out")
    if num_cut:
        notes.append(
            f"{path}: {num_cut} line(s) of more than {room} tokens became several passages"
        )
    return passages, notes


class Masking:
    """How passages become examples.

    Args:
        tokenizer: of the model.
        probability: part of the tokens of an example that is predicted; at least one is.
        whole_words: choose words, of whose pieces all are predicted or none.
        sentence_loss: null, `order` or `next`.
    """

    def __init__(
        self,
        tokenizer: WordPieceTokenizer,
        *,
        probability: float = 0.15,
        whole_words: bool = False,
        sentence_loss: str | None = None,
    ) -> None:
        self.tokenizer, self.probability = tokenizer, probability
        self.whole_words, self.sentence_loss = whole_words, sentence_loss
        vocabulary = tokenizer.vocabulary
        self._special = special_ids(tokenizer)
        self._ordinary = [
            i
            for i, token in enumerate(vocabulary)
            if i not in self._special and i != tokenizer.unk_id and not token.startswith("[unused")
        ]
        self._pieces = {i for i, token in enumerate(vocabulary) if token.startswith("##")}

    def example(self, passages: Sequence[Passage], index: int, seed: int) -> Example:
        """The example of passage `index`: a function of `seed` and nothing else.

        With a sentence loss, a passage of several sentences is cut between two of them:

            order   half of the time the parts are swapped (ALBERT, arXiv 1909.11942)
            next    half of the time the second part is of another document (arXiv 1810.04805)
        """
        draws = random.Random(seed)
        first, second, label = self._parts(passages, index, draws)
        cls, sep = self.tokenizer.cls_id, self.tokenizer.sep_id
        ids = [cls, *first, sep]
        types = [0] * len(ids)
        if second:
            ids += [*second, sep]
            types += [1] * (len(second) + 1)
        positions = sorted(self._choose(ids, draws))
        targets = tuple(ids[position] for position in positions)
        for position in positions:
            ids[position] = self._replaced(ids[position], draws)
        labels = MaskedLabels(tuple(positions), targets, label)
        return Example(index=index, input_ids=ids, type_ids=types, labels=labels, record=index)

    def _parts(
        self, passages: Sequence[Passage], index: int, draws: random.Random
    ) -> tuple[list[int], list[int], int]:
        own = passages[index]
        if self.sentence_loss is None or len(own.sentences) < 2:
            return _joined(own.sentences), [], IGNORE_INDEX
        cut = draws.randrange(1, len(own.sentences))
        first, second = _joined(own.sentences[:cut]), _joined(own.sentences[cut:])
        if draws.random() < 0.5:
            return first, second, 0
        if self.sentence_loss == "order":
            return second, first, 1
        for _ in range(10):
            other = passages[draws.randrange(len(passages))]
            if other.document != own.document:
                start = draws.randrange(len(other.sentences))
                return first, _joined(other.sentences[start:])[: len(second)], 1
        return first, second, 0

    def _choose(self, ids: Sequence[int], draws: random.Random) -> list[int]:
        """Positions to predict: `probability` of the tokens that are text, at least one."""
        words: list[list[int]] = []
        previous = -1
        for position, token in enumerate(ids):
            if token in self._special:
                continue
            joins = (
                self.whole_words and token in self._pieces and previous == position - 1 and words
            )
            if joins:
                words[-1].append(position)
            else:
                words.append([position])
            previous = position
        wanted = max(1, round(self.probability * sum(map(len, words))))
        draws.shuffle(words)
        chosen: list[int] = []
        for word in words:
            # A word that is too long for what is left is passed over, unless it is the first.
            if not chosen or len(chosen) + len(word) <= wanted:
                chosen += word
            if len(chosen) >= wanted:
                break
        return chosen

    def _replaced(self, token: int, draws: random.Random) -> int:
        kind = draws.random()
        if kind < 0.8:
            return self.tokenizer.mask_id
        if kind < 0.9:
            return self._ordinary[draws.randrange(len(self._ordinary))]
        return token


def special_ids(tokenizer: WordPieceTokenizer) -> frozenset[int]:
    """Tokens that are no text; the unknown token stands for a word."""
    return frozenset((tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id))


def _joined(sentences: Sequence[Sentence]) -> list[int]:
    return [token for sentence in sentences for token in sentence]


class MaskedExamples(Sequence[Example]):
    """The examples of an epoch, masked when they are taken.

    Args:
        masking: how.
        passages: of the data.
        seeds: the mask of passage i is drawn from `seeds(i)`.
    """

    def __init__(
        self, masking: Masking, passages: Sequence[Passage], seeds: Callable[[int], int]
    ) -> None:
        self.masking, self.passages, self.seeds = masking, passages, seeds

    def __len__(self) -> int:
        return len(self.passages)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.masking.example(self.passages, index, self.seeds(index))
