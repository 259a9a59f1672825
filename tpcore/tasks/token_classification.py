"""Token classification: a label for each word, entities such as names and diseases from labels.

    head        token classification: one linear layer on each token
    loss        sum of cross entropies -log softmax(logits)[label] in fp32 over labelled pieces,
                each with the weight of its class (1 without class balancing)
    decoding    the most probable label at the first piece of each word
    metrics     precision, recall, F1 of whole entities, in all and of each type; accuracy of words;
                their macro-F1 over all labels, which is what NeMo calls f1

A sentence longer than `max_seq_length` becomes overlapping windows; each word is learnt and decoded
in the one window where it has the most context, so it counts once. Files: see `sentence_files`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from os import PathLike
from typing import Any, ClassVar, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcore.models.heads import IGNORE_INDEX
from tpcore.models.output import BertOutput
from tpcore.tasks.entities import (
    Entity,
    all_labels,
    find_entities,
    find_scheme,
    score_entities,
)
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
    Sentence,
    SentenceDataset,
    SentenceWindow,
    cut_sentences,
    label_sentences,
    label_tokens,
    place_words,
)
from tpcore.tasks.task import (
    DataError,
    Dataset,
    Example,
    Monitor,
    TaskBatch,
    pack_examples,
    sample_limit,
)
from tpcore.tasks.text_file import write_whole
from tpcore.tokenizer import WordPieceTokenizer


class EntityPrediction(TypedDict):
    """Characters `start` to `end`, exclusive, of the text."""

    type: str
    start: int
    end: int
    text: str
    probability: float
    """Of the least certain of its words."""


class SentencePrediction(TypedDict):
    """The labels of one sentence; JSON as it is."""

    text: str
    words: list[str]
    labels: list[str]
    entities: list[EntityPrediction]


class TokenClassification:
    """See the module.

    Args:
        tokenizer: of the encoder.
        labels: all labels; the first is the one outside of entities.
        scheme: how labels mark entities, one of `entities.SCHEMES`.
        max_seq_length: longest window, special tokens included.
        doc_stride: tokens from a window's start to the next; None: half of what fits into one.
        label_all_pieces: learn the word's label at all its pieces, not only at the first.
        label_start_end: learn the outside label at [CLS] and [SEP].
        class_weights: a positive weight for each label; None: 1.
        dropout: before the classifier; None: the encoder's hidden dropout.
        token_column: of CoNLL files, from 0; None: the first.
        label_column: of CoNLL files; None: the last.
    """

    name: ClassVar[str] = "token_classification"
    head_name: ClassVar[str] = "token_classification"
    monitor: ClassVar[Monitor] = Monitor("f1", "max")

    def __init__(
        self,
        tokenizer: WordPieceTokenizer,
        labels: Labels,
        *,
        scheme: str = "IOB2",
        max_seq_length: int = 128,
        doc_stride: int | None = None,
        label_all_pieces: bool = False,
        label_start_end: bool = False,
        class_weights: Sequence[float] | None = None,
        dropout: float | None = None,
        token_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.labels = labels
        self.outside = labels.names[0]
        self.scheme = scheme
        self.max_seq_length = max_seq_length
        self.doc_stride = doc_stride
        self.label_all_pieces = label_all_pieces
        self.label_start_end = label_start_end
        self.class_weights = None if class_weights is None else tuple(class_weights)
        self.dropout = dropout
        self.token_column = token_column
        self.label_column = label_column

    @classmethod
    def create(
        cls, config: Any, tokenizer: WordPieceTokenizer, train_path: Source | None
    ) -> TokenClassification:
        """A task for a new run.

        The labels are those of `class_labels.class_labels_file`, one a line with `pad_label` first,
        else `pad_label` and then all that the scheme has for the types in the training data.

        Args:
            config: the `model` section, see `settings.TokenClassificationSections`.
            tokenizer: of the encoder.
            train_path: the training data; may be None when a label file is given.

        Raises:
            ValueError: settings do not fit; DataError when a file cannot be used.
        """
        data, labels_file = config.dataset, config.labels_file()
        columns = {"token_column": data.token_column, "label_column": data.label_column}
        labels = None if labels_file is None else Labels.from_file(labels_file)
        if labels is not None and labels.names[0] != data.pad_label:
            raise DataError(
                f"{labels_file}:1: {labels.names[0]!r}; expected model.dataset.pad_label="
                f"{data.pad_label} in the first line"
            )
        scheme, weights = data.scheme, None
        if train_path is None:
            if labels is None:
                raise ValueError(
                    "no labels: give training data, or model.class_labels.class_labels_file"
                )
            if data.class_balancing:
                raise ValueError("class balancing counts labels in training data; give some")
            scheme = scheme or find_scheme(
                [(lambda index: f"{labels_file}:{index + 1}", labels.names)], data.pad_label
            )
        else:
            file = read_sentences(train_path, labelled=True, **columns)
            where = file.labels_path
            found = [
                (partial(s.place, where), s.labels) for s in file.sentences if s.labels is not None
            ]
            if len(found) < len(file.sentences):  # spans of characters
                scheme = scheme or "IOB2"
            scheme = scheme or find_scheme(found, data.pad_label)
            if labels is None:
                kinds = {f"B-{span.type}" for s in file.sentences for span in s.spans or ()}
                if scheme == "IO":
                    kinds = {kind[2:] for kind in kinds}
                kinds |= {label for _, sentence in found for label in sentence}
                names = all_labels(kinds, scheme, data.pad_label)
                if len(names) < 2:
                    raise DataError(
                        f"{file.path}: all words have the label {data.pad_label!r}; expected some "
                        "entities: check model.dataset.label_column"
                    )
                labels = Labels(names)
        task = cls(
            tokenizer,
            labels,
            scheme=scheme,
            max_seq_length=data.max_seq_length,
            doc_stride=data.doc_stride,
            label_all_pieces=not data.ignore_extra_tokens,
            label_start_end=not data.ignore_start_end,
            dropout=config.head.fc_dropout,
            **columns,
        )
        if data.class_balancing:
            assert train_path is not None
            records = task.load(train_path).records
            weights = labels.balanced_weights(
                [labels.names.index(label) for record in records for label in record.labels]
            )
            task.class_weights = tuple(weights)
        return task

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], tokenizer: WordPieceTokenizer
    ) -> TokenClassification:
        """The task that `to_config` wrote down."""
        values = dict(config)
        return cls(tokenizer, Labels(values.pop("labels")), **values)

    def to_config(self) -> dict[str, Any]:
        return {
            "labels": list(self.labels.names),
            "scheme": self.scheme,
            "max_seq_length": self.max_seq_length,
            "doc_stride": self.doc_stride,
            "label_all_pieces": self.label_all_pieces,
            "label_start_end": self.label_start_end,
            "class_weights": None if self.class_weights is None else list(self.class_weights),
            "dropout": self.dropout,
            "token_column": self.token_column,
            "label_column": self.label_column,
        }

    def head_kwargs(self) -> dict[str, Any]:
        return {"num_labels": len(self.labels), "dropout": self.dropout}

    def load(
        self, path: Source, *, num_samples: int = -1, labelled: bool = True
    ) -> SentenceDataset:
        """Read a file, or a pair of text and labels.

        Labels of another scheme than the training data's are converted.

        Raises:
            DataError: a file cannot be used.
        """
        end = sample_limit(num_samples)
        file = read_sentences(
            path,
            labelled=labelled,
            token_column=self.token_column,
            label_column=self.label_column,
        )
        raws = file.sentences[:end]
        if not raws:
            raise DataError(f"{file.path} holds no words; expected at least one sentence")
        file = replace(file, sentences=raws)
        return self._encode(file, labelled)

    def from_inputs(self, inputs: Iterable[Any]) -> SentenceDataset:
        """Texts as strings, or sentences as lists of words.

        Raises:
            TypeError: an input is neither.
            ValueError: an empty word.
        """
        raws = []
        for number, value in enumerate(inputs, start=1):
            if isinstance(value, str):
                raws.append(RawSentence(number, None, text=value))
            elif isinstance(value, list | tuple) and all(isinstance(w, str) for w in value):
                if not all(word.strip() for word in value):
                    raise ValueError(f"input {number} has an empty word; remove it")
                raws.append(RawSentence(number, tuple(value)))
            else:
                raise TypeError(
                    f"input {number} is a {type(value).__name__}; expected a text, or a list of "
                    "words"
                )
        return self._encode(SentenceFile("input", "input", raws, "input"), labelled=False)

    def parse_line(self, line: str, where: str) -> Any:
        return line

    def collate(
        self, examples: Sequence[Example], device: torch.device | str | None = None
    ) -> TaskBatch:
        """Packed tokens and, where all examples have some, `labels["token"]`: int64 [t]."""
        packed = pack_examples(examples, device)
        labels = {}
        if all(example.labels is not None for example in examples):
            flat = [label for example in examples for label in example.labels]
            labels["token"] = torch.tensor(flat, dtype=torch.int64, device=device)
        return TaskBatch(tuple(examples), packed, labels)

    def label_counts(self, batch: TaskBatch) -> tuple[float, ...]:
        labels = [i for example in batch.examples for i in example.labels if i != IGNORE_INDEX]
        if self.class_weights is None:
            return (float(len(labels)),)
        return (sum(self.class_weights[index] for index in labels),)

    def loss_sums(self, output: BertOutput, batch: TaskBatch) -> Tensor:
        assert output.logits is not None
        logits = output.logits.float()
        weight = None
        if self.class_weights is not None:
            weight = torch.tensor(self.class_weights, dtype=torch.float32, device=logits.device)
        loss = F.cross_entropy(
            logits, batch.labels["token"], weight, ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return loss.reshape(1)

    def decode(self, output: BertOutput, batch: TaskBatch) -> list[Any]:
        """[(word, label id, probability)] of the words that each window decodes."""
        assert output.logits is not None
        best = output.logits.float().softmax(dim=-1).max(dim=-1)
        probabilities, ids = best.values.tolist(), best.indices.tolist()
        decoded = []
        start = 0
        for example in batch.examples:
            assert isinstance(example, SentenceWindow)
            decoded.append(
                [
                    (word, ids[start + at], probabilities[start + at])
                    for at, _, word in example.words
                ]
            )
            start += len(example)
        return decoded

    def predictions(self, dataset: Dataset, decoded: Sequence[Any]) -> list[SentencePrediction]:
        """Windows joined: one prediction for each sentence."""
        labels = [[self.outside] * len(record.offsets) for record in dataset.records]
        probabilities = [[0.0] * len(record.offsets) for record in dataset.records]
        for example, words in zip(dataset.examples, decoded, strict=True):
            for word, index, probability in words:
                labels[example.record][word] = self.labels.names[index]
                probabilities[example.record][word] = probability
        return [
            SentencePrediction(
                text=record.text,
                words=record.words,
                labels=of_record,
                entities=[
                    self._entity(record, entity, certain)
                    for entity in find_entities(of_record, self.scheme, self.outside)
                ],
            )
            for record, of_record, certain in zip(
                dataset.records, labels, probabilities, strict=True
            )
        ]

    def _entity(
        self, record: Sentence, entity: Entity, probabilities: Sequence[float]
    ) -> EntityPrediction:
        start, end = record.offsets[entity.first][0], record.offsets[entity.last][1]
        return EntityPrediction(
            type=entity.type,
            start=start,
            end=end,
            text=record.text[start:end],
            probability=min(probabilities[entity.first : entity.last + 1]),
        )

    def metrics(
        self, dataset: Dataset, predictions: Sequence[SentencePrediction]
    ) -> dict[str, float]:
        true, predicted = self._compared(dataset, predictions)
        entities = score_entities(true, predicted, self.scheme, self.outside)
        words = score_classification(list(chain(*true)), list(chain(*predicted)), self.labels.names)
        return {
            **entities.to_metrics(),
            "word_accuracy": words.accuracy,
            "word_macro_f1": words.macro_f1,
        }

    def report(self, dataset: Dataset, predictions: Sequence[SentencePrediction]) -> str:
        true, predicted = self._compared(dataset, predictions)
        return score_entities(true, predicted, self.scheme, self.outside).to_table()

    def write_predictions(
        self,
        path: str | PathLike[str],
        dataset: Dataset,
        predictions: Sequence[SentencePrediction],
    ) -> None:
        """The file's own format with the predicted labels, or entities by their characters.

        A .json or .jsonl file has one object a sentence, as `predict` returns them and with `line`
        and, where known, `true_labels`; any other file is as `sentence_files.format_sentences` has
        it.
        """
        file = dataset.file if isinstance(dataset, SentenceDataset) else None
        if file is not None and not str(path).endswith((".json", ".jsonl")):
            write_whole(path, format_sentences(file, [p["labels"] for p in predictions]))
            return
        lines = []
        for record, prediction in zip(dataset.records, predictions, strict=True):
            known = {} if record.labels is None else {"true_labels": list(record.labels)}
            value = {"line": record.line, **prediction, **known}
            lines.append(json.dumps(value, ensure_ascii=False))
        write_whole(path, "".join(f"{line}\n" for line in lines))

    def _compared(
        self, dataset: Dataset, predictions: Sequence[SentencePrediction]
    ) -> tuple[list[list[str]], list[list[str]]]:
        for record in dataset.records:
            if record.labels is None:
                raise ValueError(
                    f"{dataset.source}: line {record.line} has no labels to compare with; load the "
                    "file with labelled=True"
                )
        true = [list(record.labels) for record in dataset.records]
        return true, [prediction["labels"] for prediction in predictions]

    def _encode(self, file: SentenceFile, labelled: bool) -> SentenceDataset:
        notes = list(file.notes)
        records = [place_words(raw, self.tokenizer) for raw in file.sentences]
        if labelled:
            records, more = label_sentences(file, records, self.labels, self.scheme)
            notes += more
        windows, num_split = cut_sentences(
            records, self.tokenizer, self.max_seq_length, self.doc_stride
        )
        if num_split:
            notes.append(
                f"{file.path}: {num_split} sentence(s) longer than model.dataset.max_seq_length="
                f"{self.max_seq_length} tokens, split into overlapping windows"
            )
        if labelled:
            windows = [replace(window, labels=self._labels(window, records)) for window in windows]
        return SentenceDataset(file.path, records, windows, tuple(notes), file)

    def _labels(self, window: SentenceWindow, records: Sequence[Sentence]) -> list[int]:
        """Of each token of a window."""
        of_words = records[window.record].labels
        assert of_words is not None
        ids = [self.labels.names.index(label) for label in of_words]
        edge = 0 if self.label_start_end else IGNORE_INDEX
        return label_tokens(window, ids, all_pieces=self.label_all_pieces, edge=edge)
