"""Question answering: the answer is a span of the context, or there is none (SQuAD v1.1, v2.0).

    input       [CLS] question [SEP] window of the context [SEP]; windows overlap
    head        question answering: start and end logits of each token, one linear layer
    loss        per window (CE(start) + CE(end)) / 2 over its own tokens, in fp32; where the answer
                is not wholly inside of the window, or there is none, the target is [CLS]
    decoding    every span of at most `max_answer_length` tokens whose start has its most context
                in the window, by start logit + end logit; the best `n_best_size` over all windows,
                each different text once. In v2.0 mode "no answer" has the smallest start + end
                logit of [CLS] over the windows, and wins if it exceeds the best span by more than
                `null_score_diff_threshold`
    metrics     SQuAD's exact match and F1, in percent

An answer's text is cut out of the context by the offsets of its tokens, so it stands there
character for character.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypedDict

import torch
from torch import Tensor

from tpcore.models.heads import span_losses, token_table
from tpcore.models.output import BertOutput
from tpcore.tasks.json_lines import get_text, parse_object
from tpcore.tasks.sections import Source
from tpcore.tasks.squad_files import Question, read_questions
from tpcore.tasks.squad_metrics import SquadScores, score_answers
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
from tpcore.tasks.token_cache import TextTokens, cached_tokens, encode_texts
from tpcore.tasks.windows import best_windows, cut_windows
from tpcore.tokenizer import WordPieceTokenizer


@dataclass(frozen=True, slots=True)
class QuestionWindow(Example):
    """A question with a window of its context."""

    first: int = 0
    """Where the context begins in `input_ids`."""
    window: range = range(0)
    """Its tokens, in the context's."""
    text: str = ""
    """The context."""
    offsets: Sequence[tuple[int, int]] = ()
    """Of all its tokens."""
    starts: tuple[bool, ...] = ()
    """Whether an answer may start at each token of the window: no other sees it better."""


class SpanScore(NamedTuple):
    """Characters `start` to `end`, exclusive, of a context, and the logits for them."""

    start: int
    end: int
    start_logit: float
    end_logit: float


class WindowScores(NamedTuple):
    """What a window says."""

    null: tuple[float, float]
    """Start and end logit of [CLS]."""
    spans: list[SpanScore]
    """The best, in order."""


class NBestEntry(TypedDict):
    """One of the best answers; the empty text stands for no answer and has no place."""

    text: str
    probability: float
    start_logit: float
    end_logit: float
    start: int | None
    end: int | None


class AnswerPrediction(TypedDict):
    """The answer to one question; JSON as it is."""

    id: str
    question: str
    answer: str
    """Empty: none."""
    start: int | None
    """Its first character in the context."""
    end: int | None
    """One past its last."""
    null_score_diff: float | None
    """Score of no answer minus that of the best span; None in v1.1 mode."""
    nbest: list[NBestEntry]


class QuestionAnswering:
    """See the module.

    Args:
        tokenizer: of the encoder.
        version_2_with_negative: questions may have no answer.
        max_seq_length: longest input, special tokens included.
        doc_stride: tokens from a window's start to the next.
        max_query_length: longer questions are cut to so many tokens.
        max_answer_length: longest answer in tokens.
        n_best_size: how many answers `nbest` holds.
        null_score_diff_threshold: larger: fewer empty answers.
        use_cache: keep the tokens of a data file in a file beside it, see `token_cache`.
    """

    name: ClassVar[str] = "question_answering"
    head_name: ClassVar[str] = "question_answering"
    monitor: ClassVar[Monitor] = Monitor("f1", "max")

    def __init__(
        self,
        tokenizer: WordPieceTokenizer,
        *,
        version_2_with_negative: bool = False,
        max_seq_length: int = 384,
        doc_stride: int = 128,
        max_query_length: int = 64,
        max_answer_length: int = 30,
        n_best_size: int = 20,
        null_score_diff_threshold: float = 0.0,
        use_cache: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.version_2_with_negative = version_2_with_negative
        self.max_seq_length = max_seq_length
        self.doc_stride = doc_stride
        self.max_query_length = max_query_length
        self.max_answer_length = max_answer_length
        self.n_best_size = n_best_size
        self.null_score_diff_threshold = null_score_diff_threshold
        self.use_cache = use_cache

    @classmethod
    def create(
        cls, config: Any, tokenizer: WordPieceTokenizer, train_path: Source | None
    ) -> QuestionAnswering:
        """A task for a new run, from `dataset` of the `model` section; no file is needed."""
        data = config.dataset
        names = (
            "version_2_with_negative",
            "max_seq_length",
            "doc_stride",
            "max_query_length",
            "max_answer_length",
            "n_best_size",
            "null_score_diff_threshold",
            "use_cache",
        )
        return cls(tokenizer, **{name: getattr(data, name) for name in names})

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], tokenizer: WordPieceTokenizer
    ) -> QuestionAnswering:
        """The task that `to_config` wrote down."""
        return cls(tokenizer, **config)

    def to_config(self) -> dict[str, Any]:
        own = ("tokenizer", "use_cache")  # files to predict get no other beside them
        return {name: value for name, value in vars(self).items() if name not in own}

    def head_kwargs(self) -> dict[str, Any]:
        return {}

    def load(self, path: Source, *, num_samples: int = -1, labelled: bool = True) -> Dataset:
        """Read SQuAD JSON, or JSON lines.

        Raises:
            DataError: the file cannot be used.
        """
        end = sample_limit(num_samples)
        assert not isinstance(path, tuple)
        questions, notes = read_questions(path, labelled=labelled)
        questions = questions[:end]
        without = [question for question in questions if question.answers == ()]
        if without and not self.version_2_with_negative:
            raise DataError(
                f"{path}: {len(without)} question(s) have no answer, the first is "
                f"{without[0].id!r}; set model.dataset.version_2_with_negative=true"
            )
        if labelled:
            notes.append(
                f"{path}: {len(questions)} questions, {len(without)} of them without an answer, on "
                f"{len({question.context for question in questions})} contexts"
            )
        return self._encode(str(path), questions, notes, cache=self.use_cache)

    def from_inputs(self, inputs: Iterable[Any]) -> Dataset:
        """(question, context) pairs, or mappings with question, context and, if wished, id.

        Raises:
            TypeError: an input is neither.
            ValueError: a question or context is empty.
        """
        questions = []
        for number, value in enumerate(inputs, start=1):
            if isinstance(value, list | tuple) and len(value) == 2:
                value = dict(zip(("question", "context"), value, strict=True))
            if not isinstance(value, Mapping) or not all(
                isinstance(value.get(key), str) for key in ("question", "context")
            ):
                raise TypeError(
                    f"input {number} is {value!r:.60}; expected (question, context), or a mapping "
                    "with the keys question and context"
                )
            if not value["question"].strip() or not value["context"].strip():
                raise ValueError(f"input {number} has an empty question or context")
            key = str(value.get("id", number))
            questions.append(Question(key, value["question"], value["context"]))
        return self._encode("input", questions, [])

    def parse_line(self, line: str, where: str) -> Any:
        value = parse_object(line, where)
        for key in ("question", "context"):
            if not get_text(value, (key,), where).strip():
                raise DataError(f"{where}: the {key} is empty")
        return value

    def collate(
        self, examples: Sequence[Example], device: torch.device | str | None = None
    ) -> TaskBatch:
        """Packed tokens and, where all examples have one, `labels["span"]`: int64 [b, 2]."""
        packed = pack_examples(examples, device)
        labels = {}
        if all(example.labels is not None for example in examples):
            spans = [example.labels for example in examples]
            labels["span"] = torch.tensor(spans, dtype=torch.int64, device=device)
        return TaskBatch(tuple(examples), packed, labels)

    def label_counts(self, batch: TaskBatch) -> tuple[float, ...]:
        return (float(len(batch.examples)),)

    def loss_sums(self, output: BertOutput, batch: TaskBatch) -> Tensor:
        assert output.start_logits is not None
        assert output.end_logits is not None
        start, end = batch.labels["span"].unbind(1)
        starts, _ = span_losses(output.start_logits, start, batch.packed)
        ends, _ = span_losses(output.end_logits, end, batch.packed)
        return ((starts.sum() + ends.sum()) / 2).reshape(1)

    def decode(self, output: BertOutput, batch: TaskBatch) -> list[Any]:
        """`WindowScores` of each example."""
        assert output.start_logits is not None
        assert output.end_logits is not None
        starts = token_table(output.start_logits, batch.packed).cpu()
        ends = token_table(output.end_logits, batch.packed).cpu()
        return [
            self._decode_window(starts[row], ends[row], example)
            for row, example in enumerate(batch.examples)
        ]

    def _decode_window(self, start: Tensor, end: Tensor, example: Example) -> WindowScores:
        """The best spans of one window, from the logits of its tokens [s]."""
        assert isinstance(example, QuestionWindow)
        null = (start[0].item(), end[0].item())
        size = len(example.window)
        start = start[example.first : example.first + size]
        end = end[example.first : example.first + size]
        allowed = start.masked_fill(~torch.tensor(example.starts, dtype=torch.bool), -torch.inf)
        width = min(self.max_answer_length, size)
        if width == 0:
            return WindowScores(null, [])
        # Row i: spans that start at token i and end at i, i + 1, ... [size, width]
        padded = torch.cat([end, end.new_full((width - 1,), -torch.inf)])
        scores = (allowed[:, None] + padded.unfold(0, width, 1)).flatten()
        count = self.n_best_size
        while True:
            best = scores.topk(min(count, len(scores)))
            found: dict[str, SpanScore] = {}
            for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                first, last = index // width, index // width + index % width
                if math.isinf(score):
                    break
                span = SpanScore(
                    example.offsets[example.window[first]][0],
                    example.offsets[example.window[last]][1],
                    start[first].item(),
                    end[last].item(),
                )
                found.setdefault(example.text[span.start : span.end], span)
            if len(found) >= self.n_best_size or count >= len(scores):
                return WindowScores(null, list(found.values())[: self.n_best_size])
            count *= 4  # spans of equal text have taken places

    def predictions(self, dataset: Dataset, decoded: Sequence[Any]) -> list[AnswerPrediction]:
        """Windows joined: one prediction for each question."""
        of_record: list[list[WindowScores]] = [[] for _ in dataset.records]
        for example, scores in zip(dataset.examples, decoded, strict=True):
            of_record[example.record].append(scores)
        return [
            self._predict(question, windows)
            for question, windows in zip(dataset.records, of_record, strict=True)
        ]

    def _predict(self, question: Question, windows: Sequence[WindowScores]) -> AnswerPrediction:
        spans = [span for window in windows for span in window.spans]
        spans.sort(key=lambda span: (-(span.start_logit + span.end_logit), span.start, span.end))
        nbest: list[NBestEntry] = []
        for span in spans:
            text = question.context[span.start : span.end]
            if len(nbest) < self.n_best_size and all(entry["text"] != text for entry in nbest):
                nbest.append(_entry(text, span.start_logit, span.end_logit, span.start, span.end))
        best = nbest[0] if nbest else None
        difference = None
        if self.version_2_with_negative:
            null = min((window.null for window in windows), key=sum)
            if best is not None:
                difference = sum(null) - best["start_logit"] - best["end_logit"]
                if difference > self.null_score_diff_threshold:
                    best = None
            nbest = [*nbest[: self.n_best_size - 1], _entry("", *null, None, None)]
            nbest.sort(key=lambda entry: -(entry["start_logit"] + entry["end_logit"]))
        _add_probabilities(nbest)
        return AnswerPrediction(
            id=question.id,
            question=question.question,
            answer="" if best is None else best["text"],
            start=None if best is None else best["start"],
            end=None if best is None else best["end"],
            null_score_diff=difference,
            nbest=nbest,
        )

    def metrics(
        self, dataset: Dataset, predictions: Sequence[AnswerPrediction]
    ) -> dict[str, float]:
        return self._score(dataset, predictions).to_metrics()

    def report(self, dataset: Dataset, predictions: Sequence[AnswerPrediction]) -> str:
        return self._score(dataset, predictions).to_table()

    def write_predictions(
        self,
        path: str | PathLike[str],
        dataset: Dataset,
        predictions: Sequence[AnswerPrediction],
    ) -> None:
        """SQuAD's {id: answer}, and beside it {id: [best answers]}; .jsonl: an object a question.

        `predictions.json` gets `nbest.json` beside it, `other.json` `other.nbest.json`; in v2.0
        mode also `null_odds.json`, {id: null_score_diff}, which SQuAD's evaluation takes as
        --na-prob-file.
        """
        path = Path(path)
        if path.suffix == ".jsonl":
            lines = [json.dumps(prediction, ensure_ascii=False) for prediction in predictions]
            write_whole(path, "".join(f"{line}\n" for line in lines))
            return
        files: dict[str, dict[str, Any]] = {
            "nbest": {prediction["id"]: prediction["nbest"] for prediction in predictions}
        }
        if self.version_2_with_negative:
            files["null_odds"] = {p["id"]: p["null_score_diff"] for p in predictions}
        for name, content in files.items():
            beside = path.with_name(f"{path.stem}.{name}.json")
            if "predictions" in path.stem:
                beside = path.with_name(f"{path.stem.replace('predictions', name)}.json")
            write_whole(beside, json.dumps(content, indent=4, ensure_ascii=False) + "\n")
        answers = {prediction["id"]: prediction["answer"] for prediction in predictions}
        write_whole(path, json.dumps(answers, indent=4, ensure_ascii=False) + "\n")

    def _score(self, dataset: Dataset, predictions: Sequence[AnswerPrediction]) -> SquadScores:
        references = []
        for question in dataset.records:
            if question.answers is None:
                raise ValueError(
                    f"{dataset.source}: question {question.id!r} has no answers to compare with; "
                    "load the file with labelled=True"
                )
            references.append([answer.text for answer in question.answers])
        non_empty = no_answer = None
        if self.version_2_with_negative:
            non_empty = [
                next((entry["text"] for entry in prediction["nbest"] if entry["text"]), "")
                for prediction in predictions
            ]
            no_answer = [prediction["null_score_diff"] or 0.0 for prediction in predictions]
        answers = [prediction["answer"] for prediction in predictions]
        return score_answers(references, answers, non_empty, no_answer)

    def _encode(
        self, source: str, questions: list[Question], notes: list[str], *, cache: bool = False
    ) -> Dataset:
        texts = list(dict.fromkeys(text for q in questions for text in (q.context, q.question)))
        if cache:
            tokens, note = cached_tokens(self.tokenizer, texts, source)
            notes.append(f"{source}: {note}")
        else:
            tokens = encode_texts(self.tokenizer, texts, source)
        tokens_of = dict(zip(texts, tokens, strict=True))
        examples: list[QuestionWindow] = []
        num_cut = num_split = 0
        for record, question in enumerate(questions):
            query, context = tokens_of[question.question].ids, tokens_of[question.context]
            num_cut += len(query) > self.max_query_length
            windows = self._windows(question, query[: self.max_query_length], context, source)
            num_split += len(windows) > 1
            for values in windows:
                examples.append(QuestionWindow(index=len(examples), record=record, **values))
        if num_cut:
            notes.append(
                f"{source}: {num_cut} question(s) cut to model.dataset.max_query_length="
                f"{self.max_query_length} tokens"
            )
        if num_split:
            notes.append(f"{source}: {num_split} context(s) cut into overlapping windows")
        return Dataset(source, questions, examples, tuple(notes))

    def _windows(
        self, question: Question, query: list[int], context: TextTokens, source: str
    ) -> list[dict[str, Any]]:
        """The fields of `QuestionWindow` for one question."""
        tokenizer = self.tokenizer
        tokens, offsets = context
        answer = None
        if question.answers:
            answer = _tokens_of(offsets, question.answers[0].start, question.answers[0].text)
            if answer is None:
                raise DataError(
                    f"{source}: question {question.id!r}: its answer has no token, only characters "
                    "that the tokenizer drops; remove it"
                )
        head = [tokenizer.cls_id, *query, tokenizer.sep_id]
        room = self.max_seq_length - len(head) - 1
        cut = cut_windows(len(tokens), room, min(room, self.doc_stride))
        best = best_windows(cut, len(tokens))
        made = []
        for number, window in enumerate(cut):
            inner = tokens[window.start : window.stop]
            labels = None
            if question.answers is not None:
                labels = (0, 0)
                if answer is not None and answer[0] in window and answer[1] in window:
                    shift = len(head) - window.start
                    labels = (answer[0] + shift, answer[1] + shift)
            made.append(
                {
                    "input_ids": [*head, *inner, tokenizer.sep_id],
                    "type_ids": [0] * len(head) + [1] * (len(inner) + 1),
                    "labels": labels,
                    "first": len(head),
                    "window": window,
                    "text": question.context,
                    "offsets": offsets,
                    "starts": tuple(best[token] == number for token in window),
                }
            )
        return made


def _tokens_of(offsets: Sequence[tuple[int, int]], start: int, text: str) -> tuple[int, int] | None:
    """(first, last) token that has a character of `text`; None: no token has."""
    end = start + len(text)
    touched = [token for token, (first, last) in enumerate(offsets) if first < end and start < last]
    return (touched[0], touched[-1]) if touched else None


def _entry(
    text: str, start_logit: float, end_logit: float, start: int | None, end: int | None
) -> NBestEntry:
    return NBestEntry(
        text=text,
        probability=0.0,
        start_logit=start_logit,
        end_logit=end_logit,
        start=start,
        end=end,
    )


def _add_probabilities(nbest: Sequence[NBestEntry]) -> None:
    """Softmax of start + end logit over the entries."""
    scores = [entry["start_logit"] + entry["end_logit"] for entry in nbest]
    weights = [math.exp(score - max(scores)) for score in scores]
    for entry, weight in zip(nbest, weights, strict=True):
        entry["probability"] = weight / sum(weights)
