"""Punctuation and capitalisation of plain words: two labels for each word, from one head.

    data        a sentence of lower-case words a line, and a line of as many labels of two
                characters: the mark after the word (O: none), and U if it begins with a capital,
                else O
    head        token classification with columns for the marks and columns for the capitals
    loss        two terms, the mean cross entropy of each kind at the first piece of each word; sum
    metrics     precision, recall and F1 of both kinds, means over their labels as in NeMo; f1 is
                the mean of both

Long sentences become overlapping windows, as in token classification.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from os import PathLike
from typing import Any, ClassVar, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcore.models.heads import IGNORE_INDEX
from tpcore.models.output import BertOutput
from tpcore.tasks.labels import Labels
from tpcore.tasks.metrics import score_classification
from tpcore.tasks.sections import Source
from tpcore.tasks.sentence_files import (
    RawSentence,
    SentenceFile,
    format_sentences,
    read_sentences,
)
from tpcore.tasks.sentences import (
    SentenceDataset,
    SentenceWindow,
    cut_sentences,
    label_tokens,
    place_words,
)
from tpcore.tasks.task import (
    DataError,
    Dataset,
    Example,
    Monitor,
    TaskBatch,
    label_columns,
    numbered_texts,
    pack_examples,
    sample_limit,
)
from tpcore.tasks.text_file import write_whole
from tpcore.tokenizer import WordPieceTokenizer

NONE = "O"
CAPITALS = (NONE, "U")
_WAY_OUT = "correct it, or name all marks in model.class_labels.punct_labels_file"


class RestoredPrediction(TypedDict):
    """One sentence; JSON as it is."""

    text: str
    """With marks and capitals."""
    words: list[str]
    labels: list[str]


class PunctuationCapitalization:
    """See the module.

    Args:
        tokenizer: of the encoder.
        marks: the labels of marks; the first stands for none.
        max_seq_length: longest window, special tokens included.
        doc_stride: tokens from a window's start to the next; None: half of what fits into one.
        dropout: before the classifier; None: the encoder's hidden dropout.
    """

    name: ClassVar[str] = "punctuation_capitalization"
    head_name: ClassVar[str] = "token_classification"
    monitor: ClassVar[Monitor] = Monitor("f1", "max")

    def __init__(
        self,
        tokenizer: WordPieceTokenizer,
        marks: Labels,
        *,
        max_seq_length: int = 128,
        doc_stride: int | None = None,
        dropout: float | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.marks = marks
        self.capitals = Labels(CAPITALS)
        self.max_seq_length = max_seq_length
        self.doc_stride = doc_stride
        self.dropout = dropout

    @classmethod
    def create(
        cls, config: Any, tokenizer: WordPieceTokenizer, train_path: Source | None
    ) -> PunctuationCapitalization:
        """A task for a new run; marks from `class_labels.punct_labels_file`, else from the data.

        Raises:
            DataError: a file cannot be used.
        """
        data, labels_file = config.dataset, config.labels_file()
        if labels_file is not None:
            marks = Labels.from_file(labels_file)
        else:
            assert train_path is not None
            file = read_sentences(train_path, labelled=True)
            pairs = [_split(raw, file.labels_path) for raw in file.sentences]
            found = {mark for of_sentence in pairs for mark, _ in of_sentence}
            if found == {NONE}:
                raise DataError(f"{file.labels_path}: no word has a mark, such as .O")
            marks = Labels([NONE, *sorted(found - {NONE})])
        if marks.names[0] != NONE:
            raise DataError(
                f"{labels_file}:1: {marks.names[0]!r}; expected {NONE} in the first line"
            )
        return cls(
            tokenizer,
            marks,
            max_seq_length=data.max_seq_length,
            doc_stride=data.doc_stride,
            dropout=config.punct_head.fc_dropout,
        )

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], tokenizer: WordPieceTokenizer
    ) -> PunctuationCapitalization:
        """The task that `to_config` wrote down."""
        values = dict(config)
        return cls(tokenizer, Labels(values.pop("marks")), **values)

    def to_config(self) -> dict[str, Any]:
        return {
            "marks": list(self.marks.names),
            "max_seq_length": self.max_seq_length,
            "doc_stride": self.doc_stride,
            "dropout": self.dropout,
        }

    def head_kwargs(self) -> dict[str, Any]:
        return {"num_labels": len(self.marks) + len(self.capitals), "dropout": self.dropout}

    def load(
        self, path: Source, *, num_samples: int = -1, labelled: bool = True
    ) -> SentenceDataset:
        """Read texts and, beside them, labels.

        Raises:
            DataError: a file cannot be used.
        """
        end = sample_limit(num_samples)
        if not labelled and not isinstance(path, tuple):
            path = (path, path)  # a text alone: a sentence a line, whatever its lines look like
        file = read_sentences(path, labelled=labelled)
        file = replace(file, sentences=file.sentences[:end])
        if not file.sentences:
            raise DataError(f"{file.path} holds no words; expected at least one sentence")
        return self._encode(file, labelled)

    def from_inputs(self, inputs: Iterable[Any]) -> SentenceDataset:
        """Texts as strings, words separated by blanks.

        Raises:
            TypeError: an input is no string.
        """
        raws = []
        for number, text in numbered_texts(inputs):
            raws.append(RawSentence(number, tuple(text.split())))
        return self._encode(SentenceFile("input", "input", raws, "input"), labelled=False)

    def parse_line(self, line: str, where: str) -> Any:
        return line

    def collate(
        self, examples: Sequence[Example], device: torch.device | str | None = None
    ) -> TaskBatch:
        """Packed tokens and, where all examples have some, `mark` and `capital`: int64 [t]."""
        packed = pack_examples(examples, device)
        labels = label_columns(examples, ("mark", "capital"), device)
        return TaskBatch(tuple(examples), packed, labels)

    def label_counts(self, batch: TaskBatch) -> tuple[float, ...]:
        count = float(sum(len(_window(example).words) for example in batch.examples))
        return count, count

    def loss_sums(self, output: BertOutput, batch: TaskBatch) -> Tensor:
        return torch.stack(
            [
                F.cross_entropy(
                    logits, batch.labels[name], ignore_index=IGNORE_INDEX, reduction="sum"
                )
                for name, logits in zip(("mark", "capital"), self._logits(output), strict=True)
            ]
        )

    def decode(self, output: BertOutput, batch: TaskBatch) -> list[Any]:
        """[(word, mark id, capital id)] of the words that each window decodes."""
        marks, capitals = (logits.argmax(dim=-1).tolist() for logits in self._logits(output))
        decoded = []
        start = 0
        for example in batch.examples:
            words = _window(example).words
            decoded.append([(w, marks[start + at], capitals[start + at]) for at, _, w in words])
            start += len(example)
        return decoded

    def predictions(self, dataset: Dataset, decoded: Sequence[Any]) -> list[RestoredPrediction]:
        labels = [[NONE + NONE] * len(record.offsets) for record in dataset.records]
        for example, words in zip(dataset.examples, decoded, strict=True):
            for word, mark, capital in words:
                pair = self.marks.names[mark] + self.capitals.names[capital]
                labels[example.record][word] = pair
        return [
            RestoredPrediction(
                text=restore(record.words, of_record), words=record.words, labels=of_record
            )
            for record, of_record in zip(dataset.records, labels, strict=True)
        ]

    def metrics(
        self, dataset: Dataset, predictions: Sequence[RestoredPrediction]
    ) -> dict[str, float]:
        true = []
        for record in dataset.records:
            if record.labels is None:
                raise ValueError(
                    f"{dataset.source}: line {record.line} has no labels to compare with; load the "
                    "file with labelled=True"
                )
            true.append(record.labels)
        pairs = list(zip(chain(*true), chain(*(p["labels"] for p in predictions)), strict=True))
        metrics: dict[str, float] = {}
        for name, labels, part in (
            ("punct", self.marks, slice(0, -1)),
            ("capit", self.capitals, slice(-1, None)),
        ):
            scores = score_classification(
                [t[part] for t, _ in pairs], [p[part] for _, p in pairs], labels.names
            )
            seen = [c for c in scores.classes if c.support or c.precision or c.recall]
            metrics[f"{name}_precision"] = sum(c.precision for c in seen) / len(seen)
            metrics[f"{name}_recall"] = sum(c.recall for c in seen) / len(seen)
            metrics[f"{name}_f1"] = sum(c.f1 for c in seen) / len(seen)
            metrics |= {f"{name}_f1/{c.label}": c.f1 for c in scores.classes}
        return {"f1": (metrics["punct_f1"] + metrics["capit_f1"]) / 2, **metrics}

    def report(self, dataset: Dataset, predictions: Sequence[RestoredPrediction]) -> str:
        return ""

    def write_predictions(
        self,
        path: str | PathLike[str],
        dataset: Dataset,
        predictions: Sequence[RestoredPrediction],
    ) -> None:
        """A labels file; in a .json or .jsonl file an object a sentence, with the restored text."""
        if not str(path).endswith((".json", ".jsonl")):
            assert isinstance(dataset, SentenceDataset)
            assert dataset.file is not None
            write_whole(path, format_sentences(dataset.file, [p["labels"] for p in predictions]))
            return
        lines = [
            json.dumps({"line": record.line, **prediction}, ensure_ascii=False)
            for record, prediction in zip(dataset.records, predictions, strict=True)
        ]
        write_whole(path, "".join(f"{line}\n" for line in lines))

    def _logits(self, output: BertOutput) -> tuple[Tensor, Tensor]:
        """Of the marks [t, m] and of the capitals [t, 2]."""
        assert output.logits is not None
        logits = output.logits.float()
        return logits[:, : len(self.marks)], logits[:, len(self.marks) :]

    def _encode(self, file: SentenceFile, labelled: bool) -> SentenceDataset:
        notes = list(file.notes)
        records = [place_words(raw, self.tokenizer) for raw in file.sentences]
        windows, num_split = cut_sentences(
            records, self.tokenizer, self.max_seq_length, self.doc_stride
        )
        if num_split:
            notes.append(
                f"{file.path}: {num_split} sentence(s) longer than model.dataset.max_seq_length="
                f"{self.max_seq_length} tokens, split into overlapping windows"
            )
        if labelled:
            ids = []
            labelled_records = []
            for raw, record in zip(file.sentences, records, strict=True):
                pairs = _split(raw, file.labels_path)
                where = raw.place(file.labels_path)
                ids.append(
                    (
                        [self.marks.id_of(mark, where, _WAY_OUT) for mark, _ in pairs],
                        [self.capitals.names.index(capital) for _, capital in pairs],
                    )
                )
                labelled_records.append(replace(record, labels=raw.labels))
            records = labelled_records
            windows = [
                replace(w, labels=tuple(label_tokens(w, column) for column in ids[w.record]))
                for w in windows
            ]
        return SentenceDataset(file.path, records, windows, tuple(notes), file)


def restore(words: Sequence[str], labels: Sequence[str]) -> str:
    """The text that words and their labels make."""
    parts = []
    for word, label in zip(words, labels, strict=True):
        mark, capital = label[:-1], label[-1]
        shown = word[:1].upper() + word[1:] if capital == "U" else word
        parts.append(shown if mark == NONE else shown + mark)
    return " ".join(parts)


def _split(raw: RawSentence, path: str) -> list[tuple[str, str]]:
    """(mark, U or O) of each word.

    Raises:
        DataError: a label is not of that form.
    """
    assert raw.labels is not None
    for label in raw.labels:
        if len(label) < 2 or label[-1] not in CAPITALS:
            raise DataError(
                f"{raw.place(path)}: label {label!r}; expected a mark, or O for none, and U or O "
                "for a capital, such as OU or .O"
            )
    return [(label[:-1], label[-1]) for label in raw.labels]


def _window(example: Example) -> SentenceWindow:
    assert isinstance(example, SentenceWindow)
    return example
