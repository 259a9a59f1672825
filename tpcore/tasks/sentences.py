"""Sentences as the tasks that label words see them: words in a text, cut into windows of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tpcore.models.heads import IGNORE_INDEX
from tpcore.tasks.entities import Entity, Places, find_entities, find_scheme, label_entities
from tpcore.tasks.labels import Labels
from tpcore.tasks.sentence_files import RawSentence, SentenceFile, Span
from tpcore.tasks.task import Dataset, Example
from tpcore.tasks.windows import best_windows, cut_windows
from tpcore.tokenizer import WordPieceTokenizer

_UNKNOWN_LABEL = "correct it, or name all labels in model.class_labels.class_labels_file"


@dataclass(frozen=True, slots=True)
class Sentence:
    """Words in a text."""

    line: int
    text: str
    offsets: tuple[tuple[int, int], ...]
    """Of each word in `text`: its first character, and one past its last."""
    labels: tuple[str, ...] | None = None

    @property
    def words(self) -> list[str]:
        return [self.text[start:end] for start, end in self.offsets]


@dataclass(frozen=True, slots=True)
class SentenceWindow(Example):
    """A part of a sentence, or the whole."""

    words: tuple[tuple[int, int, int], ...] = ()
    """(place in `input_ids`, number of pieces in this window, number in the sentence) of each word
    that is learnt and decoded here."""


@dataclass(frozen=True)
class SentenceDataset(Dataset):
    """Beside the examples, the file as it was read: predictions are written in its format."""

    file: SentenceFile | None = None


def place_words(raw: RawSentence, tokenizer: WordPieceTokenizer) -> Sentence:
    """Words placed in a text: those of the file, with blanks between them.

    Where the file has a text alone, words are what the tokenizer says they are: blanks and
    punctuation end them, and a punctuation mark is a word.
    """
    if raw.words is not None:
        offsets = []
        start = 0
        for word in raw.words:
            offsets.append((start, start + len(word)))
            start += len(word) + 1
        return Sentence(raw.line, " ".join(raw.words), tuple(offsets))
    assert raw.text is not None
    places: list[tuple[int, int]] = []
    encoding = tokenizer.encode(raw.text)
    previous: int | None = None
    for number, (start, end) in zip(encoding.word_ids, encoding.offsets, strict=True):
        if number is None and start == end:
            continue  # [CLS] and [SEP]; one written in the text has characters
        if number is not None and number == previous:
            places[-1] = (places[-1][0], end)
        else:
            places.append((start, end))
        previous = number
    return Sentence(raw.line, raw.text, tuple(places))


def label_sentences(
    file: SentenceFile, sentences: Sequence[Sentence], labels: Labels, scheme: str
) -> tuple[list[Sentence], list[str]]:
    """(the sentences with the labels of their file, what to tell the user about them).

    Labels in another scheme than `scheme`, and spans of characters, are converted.

    Raises:
        DataError: a label is not among `labels`, whose first is the one outside of entities.
    """
    outside, where = labels.names[0], file.labels_path
    found = [(partial(raw.place, where), raw.labels) for raw in file.sentences if raw.labels]
    own = _own_scheme(found, scheme, outside)
    labelled = []
    num_moved = num_lost = 0
    counts: Counter[str] = Counter()
    for raw, sentence in zip(file.sentences, sentences, strict=True):
        if raw.labels is not None:
            of_words = list(raw.labels)
            if own == scheme:
                _check_labels(of_words, labels, raw, where)
            entities = find_entities(of_words, own, outside)
        else:
            entities, moved, lost = _entities_of_spans(raw.spans or (), sentence.offsets)
            num_moved, num_lost = num_moved + moved, num_lost + lost
        if raw.labels is None or own != scheme:
            of_words = label_entities(entities, len(sentence.offsets), scheme, outside)
            _check_labels(of_words, labels, raw, where)
        counts.update(entity.type for entity in entities)
        labelled.append(Sentence(sentence.line, sentence.text, sentence.offsets, tuple(of_words)))
    shown = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
    notes = [f"{file.path}: labels in {own}; {counts.total()} entities: {shown or '-'}"]
    if own != scheme:
        notes.append(f"{file.path}: labels converted from {own} to {scheme}")
    if num_moved:
        notes.append(
            f"{file.path}: {num_moved} entities begin or end inside of a word; all of the word "
            "belongs to them"
        )
    if num_lost:
        notes.append(f"{file.path}: {num_lost} entities without a word of their own left out")
    return labelled, notes


def cut_sentences(
    sentences: Sequence[Sentence],
    tokenizer: WordPieceTokenizer,
    max_seq_length: int,
    doc_stride: int | None,
) -> tuple[list[SentenceWindow], int]:
    """(windows of at most `max_seq_length` tokens, how many sentences became several).

    A word belongs to the window in which its first piece has the most context.
    """
    # Each different word is cut into pieces once.
    different = list(dict.fromkeys(word for sentence in sentences for word in sentence.words))
    encodings = tokenizer.encode_batch(different)
    # A word of nothing but control characters has no piece; it still has a label.
    pieces = {
        word: encoding.ids[1:-1] or [tokenizer.unk_id]
        for word, encoding in zip(different, encodings, strict=True)
    }
    room = max_seq_length - 2
    cut: list[SentenceWindow] = []
    num_split = 0
    for record, sentence in enumerate(sentences):
        ids: list[int] = []
        starts: list[int] = []
        for word in sentence.words:
            starts.append(len(ids))
            ids += pieces[word]
        windows = cut_windows(len(ids), room, doc_stride or max(1, room // 2))
        best = best_windows(windows, len(ids))
        num_split += len(windows) > 1
        words: list[list[tuple[int, int, int]]] = [[] for _ in windows]
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(ids)], strict=True)):
            window = windows[best[start]]
            inside = min(end, window.stop) - start
            words[best[start]].append((1 + start - window.start, inside, number))
        for window, of_window in zip(windows, words, strict=True):
            inner = ids[window.start : window.stop]
            whole = [tokenizer.cls_id, *inner, tokenizer.sep_id]
            cut.append(
                SentenceWindow(
                    index=len(cut),
                    input_ids=whole,
                    type_ids=[0] * len(whole),
                    record=record,
                    words=tuple(of_window),
                )
            )
    return cut, num_split


def label_tokens(
    window: SentenceWindow,
    ids: Sequence[int],
    *,
    all_pieces: bool = False,
    edge: int = IGNORE_INDEX,
) -> list[int]:
    """The label of each token of a window, `IGNORE_INDEX` for none.

    Args:
        window: from `cut_sentences`.
        ids: the label of each word of its sentence.
        all_pieces: at all pieces of a word; False: at the first.
        edge: the label at [CLS] and [SEP].
    """
    labels = [IGNORE_INDEX] * len(window)
    labels[0] = labels[-1] = edge
    for at, num_pieces, word in window.words:
        for piece in range(num_pieces if all_pieces else 1):
            labels[at + piece] = ids[word]
    return labels


def _own_scheme(found: Sequence[tuple[Places, Sequence[str]]], scheme: str, outside: str) -> str:
    """The scheme of a file's labels; `scheme` where the labels leave the choice."""
    if scheme == "IO" or not any(set(labels) - {outside} for _, labels in found):
        return scheme
    own = find_scheme(found, outside)
    if own == "IO":
        return scheme  # and its labels are unknown
    if {own, scheme} == {"IOB1", "IOB2"} and not _differ(found, outside):
        return scheme
    return own


def _differ(found: Sequence[tuple[Places, Sequence[str]]], outside: str) -> bool:
    """Whether the labels are not the same in IOB1 and IOB2."""
    return any(
        label_entities(find_entities(labels, "IOB2", outside), len(labels), scheme, outside)
        != list(labels)
        for _, labels in found
        for scheme in ("IOB1", "IOB2")
    )


def _check_labels(names: Sequence[str], labels: Labels, raw: RawSentence, path: str) -> None:
    for word, name in enumerate(names):
        labels.id_of(name, raw.place(path, word), _UNKNOWN_LABEL)


def _entities_of_spans(
    spans: Sequence[Span], offsets: Sequence[tuple[int, int]]
) -> tuple[list[Entity], int, int]:
    """(the words that spans touch, how many spans end inside of one, how many have none)."""
    entities: list[Entity] = []
    num_moved = num_lost = 0
    for span in spans:
        touched = [
            word
            for word, (start, end) in enumerate(offsets)
            if start < span.end and span.start < end
        ]
        if entities and touched and touched[0] == entities[-1].last:
            touched = touched[1:]  # two spans in one word: it belongs to the first
        if not touched:
            num_lost += 1
            continue
        exact = (offsets[touched[0]][0], offsets[touched[-1]][1]) == (span.start, span.end)
        num_moved += not exact
        entities.append(Entity(span.type, touched[0], touched[-1]))
    return entities, num_moved, num_lost
