"""Intents and slots: what an utterance wants, and which of its words say with what.

    data        NeMo's folder: dict.intents.csv and dict.slots.csv name the labels, a line each;
                <prefix>.tsv has `sentence<TAB>intent number` under a header, <prefix>_slots.tsv a
                slot number for each word
    head        token classification: columns for intents, read at [CLS], and columns for slots
    loss        intent_loss_weight * CE(intent) + (1 - intent_loss_weight) * CE(slots), means; slots
                at the first piece of each word
    metrics     intent_accuracy, intent_f1 (mean over intents); slot_precision, slot_recall, slot_f1
                of whole slots (seqeval); joint_accuracy: sentences without any mistake

A long utterance becomes overlapping windows; the first one says the intent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcore.models.heads import IGNORE_INDEX
from tpcore.models.output import BertOutput
from tpcore.tasks.entities import find_entities, find_scheme, score_entities
from tpcore.tasks.labels import Labels, is_integer
from tpcore.tasks.metrics import score_classification
from tpcore.tasks.sections import Source
from tpcore.tasks.sentence_files import RawSentence
from tpcore.tasks.sentences import (
    Sentence,
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
from tpcore.tasks.text_file import read_lines, write_whole
from tpcore.tokenizer import WordPieceTokenizer

OUTSIDE = "O"


@dataclass(frozen=True, slots=True)
class Utterance:
    """One line of a data file; `sentence.labels` are slots."""

    line: int
    sentence: Sentence
    intent: str | None = None


class SlotPrediction(TypedDict):
    """Characters `start` to `end`, exclusive, of the text."""

    slot: str
    start: int
    end: int
    text: str


class UtterancePrediction(TypedDict):
    """What one utterance wants; JSON as it is."""

    text: str
    intent: str
    words: list[str]
    labels: list[str]
    slots: list[SlotPrediction]


class IntentSlotClassification:
    """See the module.

    Args:
        tokenizer: of the encoder.
        intents: their names, in the order of their numbers.
        slots: their names, in the order of their numbers; O among them.
        max_seq_length: longest window, special tokens included.
        intent_loss_weight: of the intents in the loss, from 0 to 1; the slots have the rest.
        dropout: before the classifier; None: the encoder's hidden dropout.
    """

    name: ClassVar[str] = "intent_slot_classification"
    head_name: ClassVar[str] = "token_classification"
    monitor: ClassVar[Monitor] = Monitor("joint_accuracy", "max")

    def __init__(
        self,
        tokenizer: WordPieceTokenizer,
        intents: Labels,
        slots: Labels,
        *,
        max_seq_length: int = 50,
        intent_loss_weight: float = 0.6,
        dropout: float | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.intents = intents
        self.slots = slots
        self.max_seq_length = max_seq_length
        self.intent_loss_weight = intent_loss_weight
        self.dropout = dropout
        self.scheme = _scheme("dict.slots.csv", slots)
        if OUTSIDE not in slots.names:
            raise DataError(f"dict.slots.csv names no {OUTSIDE}, the label of words without a slot")

    @classmethod
    def create(
        cls, config: Any, tokenizer: WordPieceTokenizer, train_path: Source | None
    ) -> IntentSlotClassification:
        """A task for a new run; the labels are those that `data_dir` names.

        Raises:
            DataError: a file cannot be used.
        """
        folder = Path(config.data_dir)
        slots = Labels.from_file(folder / "dict.slots.csv")
        _scheme(folder / "dict.slots.csv", slots)  # an error of it names the file
        return cls(
            tokenizer,
            Labels.from_file(folder / "dict.intents.csv"),
            slots,
            max_seq_length=config.dataset.max_seq_length,
            intent_loss_weight=config.intent_loss_weight,
            dropout=config.head.fc_dropout,
        )

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], tokenizer: WordPieceTokenizer
    ) -> IntentSlotClassification:
        """The task that `to_config` wrote down."""
        values = dict(config)
        intents, slots = Labels(values.pop("intents")), Labels(values.pop("slots"))
        return cls(tokenizer, intents, slots, **values)

    def to_config(self) -> dict[str, Any]:
        return {
            "intents": list(self.intents.names),
            "slots": list(self.slots.names),
            "max_seq_length": self.max_seq_length,
            "intent_loss_weight": self.intent_loss_weight,
            "dropout": self.dropout,
        }

    def head_kwargs(self) -> dict[str, Any]:
        return {"num_labels": len(self.intents) + len(self.slots), "dropout": self.dropout}

    def load(self, path: Source, *, num_samples: int = -1, labelled: bool = True) -> Dataset:
        """Read `<prefix>.tsv` and, for labels, `<prefix>_slots.tsv` beside it.

        Raises:
            DataError: a file cannot be used.
        """
        end = sample_limit(num_samples)
        assert not isinstance(path, tuple)
        read = read_lines(path)
        lines = [line for line in read if line.text.strip()]
        num_blank = len(read) - len(lines)
        cells = [line.text.split("\t") for line in lines]
        if len(cells[0]) > 1 and not is_integer(cells[0][-1].strip()):
            lines, cells = lines[1:], cells[1:]  # the header
        utterances: list[Utterance] = []
        beside = Path(path).with_name(f"{Path(path).stem}_slots.tsv")
        slots = [line for line in read_lines(beside) if line.text.strip()] if labelled else []
        if labelled and len(slots) != len(lines):
            raise DataError(
                f"{path} has {len(lines)} sentences, but {beside} has {len(slots)} lines; expected "
                "the slots of each sentence in a line"
            )
        for number, (line, row) in enumerate(zip(lines, cells, strict=True)):
            where = f"{path}:{line.number}"
            words = tuple(row[0].split())
            if not words:
                raise DataError(f"{where}: the sentence is empty; remove it and its slots")
            raw, intent = RawSentence(line.number, words), None
            if labelled:
                if len(row) != 2:
                    raise DataError(
                        f"{where}: {len(row)} column(s); expected a sentence and the number of its "
                        "intent, with a tab between them"
                    )
                intent = _name(row[1].strip(), self.intents, where, "dict.intents.csv")
                at = f"{beside}:{slots[number].number}"
                found = slots[number].text.split()
                if len(found) != len(words):
                    raise DataError(
                        f"{at}: {len(found)} slots for the {len(words)} words of {where}; expected "
                        "one for each word"
                    )
                names = tuple(_name(cell, self.slots, at, "dict.slots.csv") for cell in found)
                raw = replace(raw, labels=names)
            sentence = replace(place_words(raw, self.tokenizer), labels=raw.labels)
            utterances.append(Utterance(line.number, sentence, intent))
            if len(utterances) == end:
                break
        if not utterances:
            raise DataError(f"{path}: a header and no sentence; expected at least one")
        dataset = self._encode(str(path), utterances, labelled)
        if not num_blank:
            return dataset
        note = f"{path}: {num_blank} blank line(s) left out"
        return replace(dataset, notes=(note, *dataset.notes))

    def from_inputs(self, inputs: Iterable[Any]) -> Dataset:
        """Texts as strings; words are separated by blanks and punctuation.

        Raises:
            TypeError: an input is no string.
        """
        utterances = []
        for number, text in numbered_texts(inputs):
            raw = RawSentence(number, None, text=text)
            utterances.append(Utterance(number, place_words(raw, self.tokenizer)))
        return self._encode("input", utterances, labelled=False)

    def parse_line(self, line: str, where: str) -> Any:
        return line

    def collate(
        self, examples: Sequence[Example], device: torch.device | str | None = None
    ) -> TaskBatch:
        """Packed tokens and, where all examples have some, `intent` and `slot`: int64 [t]."""
        packed = pack_examples(examples, device)
        labels = label_columns(examples, ("intent", "slot"), device)
        return TaskBatch(tuple(examples), packed, labels)

    def label_counts(self, batch: TaskBatch) -> tuple[float, ...]:
        columns = ([e.labels[column] for e in batch.examples] for column in (0, 1))
        counts = [sum(i != IGNORE_INDEX for part in column for i in part) for column in columns]
        return tuple(map(float, counts))

    def loss_sums(self, output: BertOutput, batch: TaskBatch) -> Tensor:
        weights = (self.intent_loss_weight, 1.0 - self.intent_loss_weight)
        terms = zip(weights, ("intent", "slot"), self._logits(output), strict=True)
        return torch.stack(
            [
                weight
                * F.cross_entropy(
                    logits, batch.labels[name], ignore_index=IGNORE_INDEX, reduction="sum"
                )
                for weight, name, logits in terms
            ]
        )

    def decode(self, output: BertOutput, batch: TaskBatch) -> list[Any]:
        """(intent id, [(word, slot id)] of the words that the window decodes)."""
        intents, slots = (logits.argmax(dim=-1).tolist() for logits in self._logits(output))
        decoded = []
        start = 0
        for example in batch.examples:
            assert isinstance(example, SentenceWindow)
            words = [(word, slots[start + at]) for at, _, word in example.words]
            decoded.append((intents[start], words))
            start += len(example)
        return decoded

    def predictions(self, dataset: Dataset, decoded: Sequence[Any]) -> list[UtterancePrediction]:
        intents: dict[int, str] = {}
        labels = [[OUTSIDE] * len(record.sentence.offsets) for record in dataset.records]
        for example, (intent, words) in zip(dataset.examples, decoded, strict=True):
            intents.setdefault(example.record, self.intents.names[intent])
            for word, slot in words:
                labels[example.record][word] = self.slots.names[slot]
        return [
            UtterancePrediction(
                text=record.sentence.text,
                intent=intents[number],
                words=record.sentence.words,
                labels=labels[number],
                slots=self._slots(record.sentence, labels[number]),
            )
            for number, record in enumerate(dataset.records)
        ]

    def _slots(self, sentence: Sentence, labels: Sequence[str]) -> list[SlotPrediction]:
        slots = []
        for entity in find_entities(labels, self.scheme, OUTSIDE):
            start, end = sentence.offsets[entity.first][0], sentence.offsets[entity.last][1]
            text = sentence.text[start:end]
            slots.append(SlotPrediction(slot=entity.type, start=start, end=end, text=text))
        return slots

    def metrics(
        self, dataset: Dataset, predictions: Sequence[UtterancePrediction]
    ) -> dict[str, float]:
        true, slots = [], []
        for record in dataset.records:
            if record.intent is None:
                raise ValueError(
                    f"{dataset.source}: line {record.line} has no labels to compare with; load the "
                    "file with labelled=True"
                )
            true.append(record.intent)
            slots.append(list(record.sentence.labels))
        found = [prediction["intent"] for prediction in predictions]
        labels = [prediction["labels"] for prediction in predictions]
        intents = score_classification(true, found, self.intents.names)
        entities = score_entities(slots, labels, self.scheme, OUTSIDE)
        right = [
            one == other and own == given
            for one, other, own, given in zip(true, found, slots, labels, strict=True)
        ]
        return {
            "joint_accuracy": sum(right) / len(right),
            "intent_accuracy": intents.accuracy,
            "intent_f1": intents.macro_f1,
            "slot_precision": entities.precision,
            "slot_recall": entities.recall,
            "slot_f1": entities.f1,
        }

    def report(self, dataset: Dataset, predictions: Sequence[UtterancePrediction]) -> str:
        return ""

    def write_predictions(
        self,
        path: str | PathLike[str],
        dataset: Dataset,
        predictions: Sequence[UtterancePrediction],
    ) -> None:
        """`sentence<TAB>intent number`, and slot numbers beside it; .jsonl: an object each."""
        path = Path(path)
        if path.suffix in (".json", ".jsonl"):
            lines = [json.dumps(prediction, ensure_ascii=False) for prediction in predictions]
            write_whole(path, "".join(f"{line}\n" for line in lines))
            return
        rows, slots = ["sentence\tlabel"], []
        for prediction in predictions:
            intent = self.intents.names.index(prediction["intent"])
            rows.append(f"{' '.join(prediction['words'])}\t{intent}")
            numbers = [self.slots.names.index(label) for label in prediction["labels"]]
            slots.append(" ".join(map(str, numbers)))
        write_whole(path.with_name(f"{path.stem}_slots.tsv"), "".join(f"{s}\n" for s in slots))
        write_whole(path, "".join(f"{row}\n" for row in rows))

    def _logits(self, output: BertOutput) -> tuple[Tensor, Tensor]:
        """Of the intents [t, i] and of the slots [t, s]."""
        assert output.logits is not None
        logits = output.logits.float()
        return logits[:, : len(self.intents)], logits[:, len(self.intents) :]

    def _encode(self, source: str, utterances: list[Utterance], labelled: bool) -> Dataset:
        sentences = [utterance.sentence for utterance in utterances]
        windows, num_split = cut_sentences(sentences, self.tokenizer, self.max_seq_length, None)
        if labelled:
            seen: set[int] = set()
            for number, window in enumerate(windows):
                utterance = utterances[window.record]
                intents = [IGNORE_INDEX] * len(window)
                if window.record not in seen:
                    intents[0] = self.intents.names.index(utterance.intent or "")
                    seen.add(window.record)
                ids = [self.slots.names.index(label) for label in utterance.sentence.labels or ()]
                windows[number] = replace(window, labels=(intents, label_tokens(window, ids)))
        notes = []
        if num_split:
            notes.append(
                f"{source}: {num_split} sentence(s) longer than model.dataset.max_seq_length="
                f"{self.max_seq_length} tokens, split into overlapping windows"
            )
        return Dataset(source, utterances, windows, tuple(notes))


def _scheme(path: str | PathLike[str], slots: Labels) -> str:
    """The scheme of the slots' names, which a file has one a line."""
    return find_scheme([(lambda index: f"{path}:{index + 1}", slots.names)], OUTSIDE)


def _name(cell: str, labels: Labels, where: str, file: str) -> str:
    """The label that a number stands for."""
    if not is_integer(cell) or not 0 <= int(cell) < len(labels):
        raise DataError(f"{where}: {cell!r}; {file} names the numbers 0 to {len(labels) - 1}")
    return labels.names[int(cell)]
