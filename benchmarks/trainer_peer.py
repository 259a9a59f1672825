"""The peer of time_to_accuracy.py: transformers' own Trainer on the same data and settings.

    python -m benchmarks.trainer_peer sms_spam|wnut17 MODEL TRAIN HELD_OUT [--bf16] [--epochs 2]
        [--lr 5e-5] [--eval-steps 32] [--seed 1]

Batches of 32 grouped by length and padded to their longest, fused AdamW, linear warm-up over a
tenth of the steps and decay to 0, gradients clipped to 1, dropout 0.1; --bf16 is autocast. Prints
a line after each evaluation: the step and accuracy, or F1 of entities.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from seqeval.metrics import f1_score
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    BertTokenizerFast,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

BATCH, EVALUATION_BATCH, LENGTH = 32, 64, 128
Row = dict[str, Any]


def sms_spam(path: Path, tokenizer: Any) -> list[Row]:
    """`label<TAB>text` in each line."""
    pairs = [line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    ids = tokenizer([text for _, text in pairs], truncation=True, max_length=LENGTH)["input_ids"]
    return [
        {"input_ids": i, "labels": int(label == "spam")}
        for i, (label, _) in zip(ids, pairs, strict=True)
    ]


def sentences(path: Path) -> list[list[tuple[str, str]]]:
    """`token<TAB>tag` in each line, blank lines between sentences."""
    found: list[list[tuple[str, str]]] = [[]]
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            word, tag = line.split("\t")
            found[-1].append((word, tag.strip()))
        elif found[-1]:
            found.append([])
    return [sentence for sentence in found if sentence]


def wnut17(path: Path, tokenizer: Any, names: list[str]) -> list[Row]:
    """The first piece of each word has its label."""
    rows = []
    for sentence in sentences(path):
        words = tokenizer(
            [word for word, _ in sentence],
            is_split_into_words=True,
            truncation=True,
            max_length=LENGTH,
        )
        seen: set[int | None] = {None}
        labels = []
        for word in words.word_ids():
            labels.append(-100 if word in seen else names.index(sentence[word][1]))
            seen.add(word)
        rows.append({"input_ids": words["input_ids"], "labels": labels})
    return rows


def tags(path: Path) -> list[str]:
    return sorted({tag for sentence in sentences(path) for _, tag in sentence})


def accuracy(prediction: Any) -> dict[str, float]:
    return {"metric": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def entity_f1(names: list[str]) -> Any:
    def metric(prediction: Any) -> dict[str, float]:
        chosen = prediction.predictions.argmax(-1)
        found, expected = [], []
        for row, labels in zip(chosen, prediction.label_ids, strict=True):
            places = numpy.flatnonzero(labels != -100)
            found.append([names[i] for i in row[places]])
            expected.append([names[i] for i in labels[places]])
        return {"metric": float(f1_score(expected, found))}

    return metric


class Report(TrainerCallback):
    """A line for each evaluation."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        print(f"step {state.global_step} metric {metrics['eval_metric']:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["sms_spam", "wnut17"])
    parser.add_argument("model", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--eval-steps", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(options.seed)
    tokenizer = BertTokenizerFast(str(options.model / "vocab.txt"), do_lower_case=True)
    if options.task == "sms_spam":
        kind, collator, metric = BertForSequenceClassification, DataCollatorWithPadding, accuracy
        train, held_out = (sms_spam(p, tokenizer) for p in (options.train, options.held_out))
        num_labels = 2
    else:
        names = tags(options.train)
        kind, collator, metric = (
            BertForTokenClassification,
            DataCollatorForTokenClassification,
            entity_f1(names),
        )
        train, held_out = (wnut17(p, tokenizer, names) for p in (options.train, options.held_out))
        num_labels = len(names)
    model = kind.from_pretrained(options.model, num_labels=num_labels, attn_implementation="sdpa")
    if options.task == "sms_spam":
        # The file has a pooler that was never trained; tpcore draws a new one too.
        model.bert.pooler.dense.reset_parameters()
    steps = options.epochs * math.ceil(len(train) / BATCH)
    arguments = TrainingArguments(
        output_dir="unused",
        num_train_epochs=options.epochs,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=EVALUATION_BATCH,
        learning_rate=options.lr,
        weight_decay=0.01,
        warmup_steps=steps // 10,
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        bf16=options.bf16,
        use_cpu=True,
        train_sampling_strategy="group_by_length",
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        seed=options.seed,
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=collator(tokenizer),
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=metric,
        callbacks=[Report()],
    )
    trainer.train()
    if steps % options.eval_steps:
        trainer.evaluate()


if __name__ == "__main__":
    main()
