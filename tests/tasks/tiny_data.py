"""Small data that can be learnt, for each task, and the settings of a run on it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.train import tiny
from tpcore.train.finetune import finetune
from tpcore.train.read_config import load_config

NAMES, OTHERS = tiny.GOOD, tiny.OTHER


def write_token_classification(folder: Path) -> dict[str, Any]:
    """Names are entities of one or two words; one sentence needs windows."""
    for name, count, seed in (("train", 24, 0), ("validation", 13, 1)):
        draw = random.Random(seed)
        lines = []
        for number in range(count):
            for _ in range(60 if number == 3 else draw.randint(2, 9)):
                if draw.random() < 0.3:
                    lines.append(f"{draw.choice(NAMES)}\tB-PER")
                    if draw.random() < 0.3:
                        lines.append(f"{draw.choice(NAMES)}s\tI-PER")
                else:
                    lines.append(f"{draw.choice(OTHERS)}\tO")
            lines.append("")
        (folder / f"{name}.conll").write_text("\n".join(lines))
    return {
        "model__train_ds__file_path": folder / "train.conll",
        "model__validation_ds__file_path": folder / "validation.conll",
    }


def write_question_answering(folder: Path) -> dict[str, Any]:
    """The answer is the one good word of the context; a third have none."""
    for name, count, seed in (("train", 24, 0), ("validation", 13, 1)):
        draw = random.Random(seed)
        paragraphs = []
        for number in range(count):
            words = [draw.choice(OTHERS) for _ in range(40 if number % 5 == 0 else 12)]
            answers = []
            if number % 3:
                at = draw.randrange(len(words))
                words[at] = draw.choice(NAMES)
                start = len(" ".join([*words[:at], ""]))
                answers = [{"text": words[at], "answer_start": start}]
            qa = {
                "id": str(number),
                "question": "the book",
                "answers": answers,
                "is_impossible": not answers,
            }
            paragraphs.append({"context": " ".join(words), "qas": [qa]})
        content = {"version": "v2.0", "data": [{"title": "x", "paragraphs": paragraphs}]}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {
        "model__train_ds__file": folder / "train.json",
        "model__validation_ds__file": folder / "validation.json",
        "model__train_ds__file_path": None,
        "model__validation_ds__file_path": None,
        "model__dataset__version_2_with_negative": True,
        "model__dataset__max_query_length": 8,
        "model__dataset__doc_stride": 8,
    }


def write_relation_extraction(folder: Path) -> dict[str, Any]:
    """The word between the entities is the relation."""
    for name, count, seed in (("train", 24, 0), ("validation", 13, 1)):
        draw = random.Random(seed)
        lines = []
        for number in range(count):
            label = ("likes", "hates", "none")[number % 3]
            between = draw.choice({"likes": tiny.GOOD, "hates": tiny.BAD}.get(label, OTHERS))
            before = " ".join(draw.choice(OTHERS) for _ in range(draw.randint(1, 6)))
            text = f"{before} << {draw.choice(OTHERS)} >> {between} [[ {draw.choice(OTHERS)} ]] ."
            lines.append(json.dumps({"text": text, "label": label}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return {
        "model__train_ds__file_path": folder / "train.jsonl",
        "model__validation_ds__file_path": folder / "validation.jsonl",
        "model__dataset__add_markers": True,
    }


def write_text_classification(folder: Path) -> dict[str, Any]:
    """Good or bad, decided by one word."""
    tiny.write_data(folder / "train.tsv", 24)
    tiny.write_data(folder / "validation.tsv", 13, seed=1)
    return {"model__dataset__class_balancing": "weighted_loss"}


def write_text_regression(folder: Path) -> dict[str, Any]:
    """How many of the words are good."""
    for name, count, seed in (("train", 24, 0), ("validation", 13, 1)):
        draw = random.Random(seed)
        lines = ["score,sentence1,sentence2"]
        for _ in range(count):
            words = [draw.choice(NAMES if draw.random() < 0.4 else OTHERS) for _ in range(8)]
            score = sum(word in NAMES for word in words) / 2
            lines.append(f'{score},"{" ".join(words[:5])}, a",{" ".join(words[5:])}')
        (folder / f"{name}.csv").write_text("\n".join(lines))
    return {
        "model__train_ds__file_path": folder / "train.csv",
        "model__validation_ds__file_path": folder / "validation.csv",
        "model__dataset__label_column": "score",
    }


def write_glue(folder: Path) -> dict[str, Any]:
    """RTE: entailment where the good words are the same."""
    for name, count, seed in (("train", 24, 0), ("dev", 13, 1)):
        draw = random.Random(seed)
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for number in range(count):
            good = draw.choice(NAMES)
            label = "entailment" if number % 2 else "not_entailment"
            other = good if number % 2 else draw.choice(tiny.BAD)
            lines.append(f"{number}\t{draw.choice(OTHERS)} {good}\t{other}\t{label}")
        (folder / f"{name}.tsv").write_text("\n".join(lines))
    return {
        "model__task_name": "rte",
        "model__dataset__data_dir": folder,
        "model__train_ds__ds_item": "train.tsv",
        "model__validation_ds__ds_item": "dev.tsv",
        "model__train_ds__file_path": None,
        "model__validation_ds__file_path": None,
    }


def write_punctuation_capitalization(folder: Path) -> dict[str, Any]:
    """A full stop after each good word, and a capital at the next one."""
    for name, count, seed in (("train", 24, 0), ("validation", 13, 1)):
        draw = random.Random(seed)
        texts, labels = [], []
        for number in range(count):
            length = 50 if number == 2 else draw.randint(3, 9)
            words = [draw.choice(NAMES if draw.random() < 0.3 else OTHERS) for _ in range(length)]
            starts = [True, *(word in NAMES for word in words[:-1])]
            texts.append(" ".join(words))
            pairs = zip(words, starts, strict=True)
            labels.append(" ".join(("." if w in NAMES else "O") + "OU"[up] for w, up in pairs))
        (folder / f"text_{name}.txt").write_text("\n".join(texts))
        (folder / f"labels_{name}.txt").write_text("\n".join(labels))
    return {
        "model__dataset__data_dir": folder,
        **{
            f"model__{part}__{kind}_file": f"{kind}_{name}.txt"
            for part, name in (("train_ds", "train"), ("validation_ds", "validation"))
            for kind in ("text", "labels")
        },
        "model__train_ds__file_path": None,
        "model__validation_ds__file_path": None,
    }


def write_intent_slot_classification(folder: Path) -> dict[str, Any]:
    """Good words are slots; whether there are two of them is the intent."""
    (folder / "dict.intents.csv").write_text("one\ntwo\n")
    (folder / "dict.slots.csv").write_text("B-good\nI-good\nO\n")
    for name, count, seed in (("train", 24, 0), ("validation", 13, 1)):
        draw = random.Random(seed)
        rows, slots = ["sentence\tlabel"], []
        for number in range(count):
            words = [draw.choice(OTHERS) for _ in range(40 if number == 2 else 6)]
            ids = [2] * len(words)
            words[1], ids[1] = draw.choice(NAMES), 0
            if number % 2:
                words[2], ids[2] = draw.choice(NAMES), 1
            rows.append(f"{' '.join(words)}\t{number % 2}")
            slots.append(" ".join(map(str, ids)))
        (folder / f"{name}.tsv").write_text("\n".join(rows))
        (folder / f"{name}_slots.tsv").write_text("\n".join(slots))
    return {
        "model__data_dir": folder,
        "model__train_ds__prefix": "train",
        "model__validation_ds__prefix": "validation",
        "model__train_ds__file_path": None,
        "model__validation_ds__file_path": None,
    }


def write_masked_lm(folder: Path) -> dict[str, Any]:
    """Documents of lines of words."""
    for name, count, seed in (("train", 24, 0), ("validation", 13, 1)):
        draw = random.Random(seed)
        lines = []
        for number in range(count):
            words = [draw.choice(NAMES + OTHERS) for _ in range(draw.randint(3, 9))]
            lines += [" ".join(words), *([""] if number % 4 == 3 else [])]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return {
        "model__train_ds__file_path": folder / "train.txt",
        "model__validation_ds__file_path": folder / "validation.txt",
    }


WRITERS = {
    "intent_slot_classification": write_intent_slot_classification,
    "punctuation_capitalization": write_punctuation_capitalization,
    "text_classification": write_text_classification,
    "text_regression": write_text_regression,
    "glue": write_glue,
    "relation_extraction": write_relation_extraction,
    "token_classification": write_token_classification,
    "question_answering": write_question_answering,
}
"""Task -> what writes its data below a folder and returns the keys that name it."""


def overrides(task: str, folder: Path, **values: Any) -> list[str]:
    """Dotted overrides of a run of `task` in `folder`, as `tiny.overrides`."""
    tiny.write_vocabulary(folder / "vocab.txt")
    write = write_masked_lm if task == "masked_lm" else WRITERS[task]
    keys = {"task": task, "trainer__max_epochs": 2, **write(folder), **values}
    # A key that the task does not have is not one of its run's.
    lines = tiny.overrides(folder, **keys)
    return [line for line in lines if not line.endswith(".file_path=null")]


def trained(task: str, folder: Path) -> tuple[Path, Any]:
    """The folder of a short run of `task`, and where its validation data are."""
    config = load_config(None, overrides(task, folder, trainer__max_steps=4))
    return finetune(config).path, config.model.source("validation_ds")
