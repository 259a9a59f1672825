"""Masked language modelling on plain text: an encoder learns the language of a domain.

    head        masked-LM head, its decoder tied to the word embeddings; with a sentence loss also
                a linear layer on the pooled first token (Megatron's binary head)
    loss        sum of -log softmax(logits)[token] over the masked positions alone, in fp32 over
                the sharded vocabulary; with a sentence loss a second term, its cross entropy
    decoding    the most probable tokens at each [MASK]
    metrics     perplexity = exp(mean loss of a masked token), masked_accuracy, sentence_accuracy

Files are plain text (see `passages`). What is masked changes with every epoch in training and is
always the same in evaluation, so that perplexities of one file can be compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcore.models.heads import IGNORE_INDEX, MaskedTokens
from tpcore.models.output import BertOutput
from tpcore.parallel.random import step_seed
from tpcore.tasks.passages import MaskedExamples, Masking, read_passages
from tpcore.tasks.sections import Source
from tpcore.tasks.task import (
    DataError,
    Dataset,
    Example,
    Monitor,
    TaskBatch,
    numbered_texts,
    pack_examples,
    sample_limit,
)
from tpcore.tasks.text_file import read_lines, write_whole
from tpcore.tokenizer import WordPieceTokenizer

_MASK_STREAM = 1 << 33
"""Added to the epoch: masks, data order and dropout use different seeds."""
_EVALUATION_SEED = 0


class TextLine(NamedTuple):
    """One line of a file whose [MASK] tokens are to be filled."""

    line: int
    text: str


class MaskedLM:
    """See the module.

    Args:
        tokenizer: of the encoder.
        max_seq_length: longest sequence, special tokens included.
        masked_lm_prob: part of the tokens that is predicted.
        whole_word_masking: choose whole words.
        sentence_loss: None, `order` or `next`; see `passages.Masking`.
        top_k: how many tokens are told of each [MASK].
    """

    name: ClassVar[str] = "masked_lm"
    head_name: ClassVar[str] = "pretraining"
    monitor: ClassVar[Monitor] = Monitor("perplexity", "min")

    def __init__(
        self,
        tokenizer: WordPieceTokenizer,
        *,
        max_seq_length: int = 256,
        masked_lm_prob: float = 0.15,
        whole_word_masking: bool = False,
        sentence_loss: str | None = None,
        top_k: int = 5,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self.masked_lm_prob = masked_lm_prob
        self.whole_word_masking = whole_word_masking
        self.sentence_loss = sentence_loss
        self.top_k = top_k
        self.masking = Masking(
            tokenizer,
            probability=masked_lm_prob,
            whole_words=whole_word_masking,
            sentence_loss=sentence_loss,
        )

    @classmethod
    def create(
        cls, config: Any, tokenizer: WordPieceTokenizer, train_path: Source | None
    ) -> MaskedLM:
        """A task for a new run; text has no labels to find."""
        data = config.dataset
        return cls(
            tokenizer,
            max_seq_length=data.max_seq_length,
            masked_lm_prob=data.masked_lm_prob,
            whole_word_masking=data.whole_word_masking,
            sentence_loss=data.sentence_loss,
            top_k=data.top_k,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tokenizer: WordPieceTokenizer) -> MaskedLM:
        """The task that `to_config` wrote down."""
        return cls(tokenizer, **config)

    def to_config(self) -> dict[str, Any]:
        return {
            "max_seq_length": self.max_seq_length,
            "masked_lm_prob": self.masked_lm_prob,
            "whole_word_masking": self.whole_word_masking,
            "sentence_loss": self.sentence_loss,
            "top_k": self.top_k,
        }

    def head_kwargs(self) -> dict[str, Any]:
        return {"binary": self.sentence_loss is not None}

    def load(self, path: Source, *, num_samples: int = -1, labelled: bool = True) -> Dataset:
        """Read plain text as passages; without labels, as lines whose [MASK] is to be filled.

        Raises:
            DataError: the file cannot be used.
        """
        assert not isinstance(path, tuple)
        end = sample_limit(num_samples)
        if not labelled:
            lines = [TextLine(x.number, x.text) for x in read_lines(path) if x.text.strip()]
            return self._lines(str(path), lines[:end])
        num_special = 2 if self.sentence_loss is None else 3
        passages, notes = read_passages(path, self.tokenizer, self.max_seq_length - num_special)
        passages = passages[:end]
        if self.sentence_loss is not None:
            num_single = sum(len(passage.sentences) < 2 for passage in passages)
            if num_single == len(passages):
                raise DataError(
                    f"{path}: no document has two lines that fit into {self.max_seq_length} "
                    f"tokens, so there is nothing for sentence_loss={self.sentence_loss}; put one "
                    "sentence in a line, or use model.dataset.sentence_loss=null"
                )
            if self.sentence_loss == "next" and len({p.document for p in passages}) < 2:
                raise DataError(
                    f"{path} is one document, and sentence_loss=next needs others; put a blank "
                    "line between documents, or use model.dataset.sentence_loss=order"
                )
            if num_single:
                notes.append(f"{path}: {num_single} passage(s) of one line have no sentence loss")
        examples = MaskedExamples(
            self.masking, passages, lambda index: step_seed(_EVALUATION_SEED, index)
        )
        return Dataset(str(path), passages, examples[:], tuple(notes))

    def examples_at(self, dataset: Dataset, seed: int, epoch: int) -> Sequence[Example]:
        """The examples of an epoch: a function of the seed, the epoch and each one's place."""
        own = step_seed(seed, _MASK_STREAM + epoch)
        return MaskedExamples(self.masking, dataset.records, lambda index: step_seed(own, index))

    def from_inputs(self, inputs: Iterable[Any]) -> Dataset:
        """Texts with [MASK] in them.

        Raises:
            TypeError: an input is no string.
        """
        lines = [TextLine(number, text) for number, text in numbered_texts(inputs)]
        return self._lines("input", lines)

    def parse_line(self, line: str, where: str) -> Any:
        return line

    def collate(
        self, examples: Sequence[Example], device: torch.device | str | None = None
    ) -> TaskBatch:
        """Packed tokens and the positions to predict; `labels["token"]` [m], `["sentence"]` [b]."""
        packed = pack_examples(examples, device)
        positions: list[int] = []
        start = 0
        for example in examples:
            positions += [start + position for position in self._positions(example)]
            start += len(example)
        index = torch.tensor(positions, dtype=torch.int64, device=device)
        if any(example.labels is None for example in examples):
            return TaskBatch(tuple(examples), packed, {}, MaskedTokens(index))
        targets = [token for example in examples for token in example.labels.targets]
        labels = {"token": torch.tensor(targets, dtype=torch.int64, device=device)}
        if self.sentence_loss is not None:
            sentences = [example.labels.sentence for example in examples]
            labels["sentence"] = torch.tensor(sentences, dtype=torch.int64, device=device)
        return TaskBatch(tuple(examples), packed, labels, MaskedTokens(index, labels["token"]))

    def label_counts(self, batch: TaskBatch) -> tuple[float, ...]:
        masked = float(sum(len(example.labels.targets) for example in batch.examples))
        if self.sentence_loss is None:
            return (masked,)
        pairs = sum(example.labels.sentence != IGNORE_INDEX for example in batch.examples)
        return masked, float(pairs)

    def loss_sums(self, output: BertOutput, batch: TaskBatch) -> Tensor:
        assert output.token_losses is not None
        token_loss = output.token_losses.sum().reshape(1)
        if self.sentence_loss is None:
            return token_loss
        assert output.seq_relationship_logits is not None
        logits, labels = output.seq_relationship_logits.float(), batch.labels["sentence"]
        sentence_loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        return torch.cat([token_loss, sentence_loss.reshape(1)])

    def decode(self, output: BertOutput, batch: TaskBatch) -> list[Any]:
        """With labels sums for the metrics, without them the likeliest tokens at each [MASK]."""
        assert output.prediction_logits is not None
        logits = output.prediction_logits[:, : self.tokenizer.vocab_size].float()
        counts = [len(self._positions(example)) for example in batch.examples]
        if not batch.labels:
            top = logits.softmax(dim=-1).topk(min(self.top_k, logits.shape[1]), dim=-1)
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            tops = [list(zip(ids, values, strict=True)) for ids, values in pairs]
            ends = torch.tensor(counts).cumsum(0).tolist()
            return [tops[end - count : end] for end, count in zip(ends, counts, strict=True)]
        assert output.token_losses is not None
        losses = output.token_losses.split(counts)
        hits = (logits.argmax(dim=-1) == batch.labels["token"]).split(counts)
        results = [
            {"loss": loss.double().sum().item(), "masked": len(hit), "correct": int(hit.sum())}
            for loss, hit in zip(losses, hits, strict=True)
        ]
        if self.sentence_loss is not None:
            assert output.seq_relationship_logits is not None
            guesses = output.seq_relationship_logits.argmax(dim=-1).tolist()
            for result, guess, example in zip(results, guesses, batch.examples, strict=True):
                truth = example.labels.sentence
                result["sentence"] = None if truth == IGNORE_INDEX else guess == truth
        return results

    def predictions(self, dataset: Dataset, decoded: Sequence[Any]) -> list[Any]:
        """Of text to be filled: the text, and for each [MASK] the likeliest tokens."""
        assert len(decoded) == len(dataset.records)
        if dataset.examples and dataset.examples[0].labels is not None:
            return list(decoded)
        vocabulary = self.tokenizer.vocabulary
        results = []
        for record, tops in zip(dataset.records, decoded, strict=True):
            masks = [[{"token": vocabulary[i], "probability": p} for i, p in top] for top in tops]
            text = record.text
            for top in masks:
                text = text.replace("[MASK]", top[0]["token"].removeprefix("##"), 1)
            results.append({"text": text, "masks": masks})
        return results

    def metrics(self, dataset: Dataset, predictions: Sequence[Any]) -> dict[str, float]:
        self._check_labelled(dataset)
        masked = sum(prediction["masked"] for prediction in predictions)
        loss = sum(prediction["loss"] for prediction in predictions) / masked
        metrics = {
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "masked_accuracy": sum(prediction["correct"] for prediction in predictions) / masked,
        }
        if self.sentence_loss is not None:
            known = [p["sentence"] for p in predictions if p["sentence"] is not None]
            metrics["sentence_accuracy"] = sum(known) / len(known)
        return metrics

    def report(self, dataset: Dataset, predictions: Sequence[Any]) -> str:
        """There is nothing but the metrics."""
        return ""

    def write_predictions(
        self, path: str | PathLike[str], dataset: Dataset, predictions: Sequence[Any]
    ) -> None:
        """JSON lines in a .json or .jsonl file; else the filled texts, or a table of losses."""
        is_text = bool(dataset.examples) and dataset.examples[0].labels is None
        if str(path).endswith((".json", ".jsonl")):
            pairs = zip(dataset.records, predictions, strict=True)
            lines = [
                json.dumps({"line": record.line, **prediction}, ensure_ascii=False)
                for record, prediction in pairs
            ]
        elif is_text:
            lines = [prediction["text"] for prediction in predictions]
        else:
            lines = ["line\tmasked\tcorrect\tloss"]
            for record, p in zip(dataset.records, predictions, strict=True):
                lines.append(f"{record.line}\t{p['masked']}\t{p['correct']}\t{p['loss']:.6f}")
        write_whole(path, "".join(f"{line}\n" for line in lines))

    def _lines(self, source: str, lines: Sequence[TextLine]) -> Dataset:
        encodings = self.tokenizer.encode_batch(
            [line.text for line in lines], max_length=self.max_seq_length
        )
        examples = [
            Example(index, encoding.ids, encoding.type_ids, record=index)
            for index, encoding in enumerate(encodings)
        ]
        notes = []
        mask = self.tokenizer.mask_id
        num_without = sum(mask not in encoding.ids for encoding in encodings)
        if num_without:
            notes.append(f"{source}: {num_without} text(s) hold no [MASK] to fill")
        num_cut = sum(encoding.num_truncated > 0 for encoding in encodings)
        if num_cut:
            notes.append(
                f"{source}: {num_cut} text(s) cut to model.dataset.max_seq_length="
                f"{self.max_seq_length} tokens"
            )
        return Dataset(source, list(lines), examples, tuple(notes))

    def _positions(self, example: Example) -> Sequence[int]:
        if example.labels is not None:
            positions: Sequence[int] = example.labels.positions
            return positions
        mask = self.tokenizer.mask_id
        return [position for position, token in enumerate(example.input_ids) if token == mask]

    def _check_labelled(self, dataset: Dataset) -> None:
        if any(example.labels is None for example in dataset.examples):
            raise ValueError(f"{dataset.source} was loaded without masks; use labelled=True")
