"""The task of a `.nemo` file that NeMo itself has written, from what the file says of it.

    model_config.yaml                tpcore
    target, the classifier's node    the task
    tokenizer, *vocab_file           the vocabulary, and whether it is of lower case
    class_labels, label_ids          the labels, in the order of their ids; else 0, 1, 2, ...
    dataset, *_ds, head              the keys that tpcore has too

What NeMo did with other keys, as `optim`, is over when a file is written.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.formats.nemo_config import NemoContents
from tpcore.tasks import Task, task_class
from tpcore.tokenizer import SHIPPED, WordPieceTokenizer
from tpcore.train.config import TrainConfig, config_class

_TASKS = {
    "sequence_classification": "text_classification",
    "token_classification": "token_classification",
    "question_answering": "question_answering",
}
"""By the head of the file."""
_OTHER = {
    "GLUEModel": "glue",
    "PunctuationCapitalizationModel": "punctuation_capitalization",
    "IntentSlotClassificationModel": "intent_slot_classification",
}
"""Models of NeMo whose heads differ from those of the same tasks here."""
_DECIDED = ("language_model", "tokenizer", "class_labels", "optim")
"""Sections that are no settings: the file has what they were about, and nothing is trained."""


def read_nemo(contents: NemoContents, path: Path) -> tuple[TrainConfig, Task]:
    """The configuration and the task of a file of NeMo's; reads no weights.

    Args:
        contents: all but the weights.
        path: the file, for messages.

    Raises:
        CheckpointError: it is of no task that NeMo and tpcore have alike, or does not say enough.
    """
    target = str(contents.config.get("target")).rpartition(".")[2]
    if target in _OTHER or contents.task not in _TASKS:
        what = f"of NeMo's {target}" if target in _OTHER else "of no task that tpcore knows"
        raise CheckpointError(
            f"{path} is {what}; evaluated are text classification, token classification and "
            f"question answering. Fine-tune from it with model.language_model.lm_checkpoint={path}"
        )
    name = _TASKS[contents.task]
    config = OmegaConf.to_object(OmegaConf.structured(config_class(name)(task=name)))
    assert isinstance(config, TrainConfig)
    _fill(config.model, contents.config, "", path)
    model: Any = config.model
    if hasattr(model.dataset, "class_balancing"):
        model.dataset.class_balancing = None  # weights of the training loss, which are not here
    with tempfile.TemporaryDirectory(prefix="tpcore-nemo-") as folder:
        tokenizer = _tokenizer(contents, Path(folder), path)
        if hasattr(model, "class_labels"):
            labels = _labels(contents, model, path)
            file = Path(folder) / "labels.csv"
            file.write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
            model.class_labels.class_labels_file = str(file)
            if name == "token_classification":
                model.dataset.pad_label = labels[0]
        try:
            for ok, key, expected in model.rules():
                if not ok:
                    raise CheckpointError(f"{path}: model.{key}: expected {expected}")
            task = task_class(name).create(model, tokenizer, None)
        except ValueError as error:
            message = str(error).replace(f"{folder}/", "")
            raise CheckpointError(f"{path}: {message.removeprefix(f'{path}: ')}") from error
    if hasattr(model, "class_labels"):
        model.class_labels.class_labels_file = None
    return config, task


def _fill(section: Any, values: Mapping[str, Any], prefix: str, path: Path) -> None:
    """Set the fields of a section that `values` has under the same names.

    Raises:
        CheckpointError: one is of another type.
    """
    hints = get_type_hints(type(section))
    for field in dataclasses.fields(section):
        value = values.get(field.name)
        if value is None or value == MISSING or f"{prefix}{field.name}" in _DECIDED:
            continue
        current = getattr(section, field.name)
        if dataclasses.is_dataclass(current):
            if isinstance(value, Mapping):
                _fill(current, value, f"{prefix}{field.name}.", path)
            continue
        checked = dataclasses.make_dataclass("_Field", [(field.name, hints[field.name], current)])
        try:
            merged = OmegaConf.merge(OmegaConf.structured(checked), {field.name: value})
            setattr(section, field.name, getattr(OmegaConf.to_object(merged), field.name))
        except (OmegaConfBaseException, ValueError) as error:
            raise CheckpointError(
                f"{path}: model.{prefix}{field.name}={value!r}: {str(error).splitlines()[0]}"
            ) from error


def _tokenizer(contents: NemoContents, folder: Path, path: Path) -> WordPieceTokenizer:
    node = contents.config.get("tokenizer")
    node = node if isinstance(node, Mapping) else {}
    lowercase = contents.lowercase
    if isinstance(node.get("do_lower_case"), bool):
        lowercase = node["do_lower_case"]
    if contents.vocabulary is None:
        name = node.get("tokenizer_name")
        if name in SHIPPED:
            return WordPieceTokenizer.from_name(name, lowercase=lowercase)
        raise CheckpointError(
            f"{path} holds no vocabulary, and its tokenizer_name={name!r} is not one of "
            f"{', '.join(SHIPPED)}"
        )
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("".join(f"{t}\n" for t in contents.vocabulary), encoding="utf-8")
    return WordPieceTokenizer.from_vocab_file(vocabulary, lowercase=lowercase)


def _labels(contents: NemoContents, model: Any, path: Path) -> list[str]:
    """Names in the order of their ids."""
    if contents.labels is not None:
        return list(contents.labels)
    ids = contents.config.get("label_ids")
    if isinstance(ids, Mapping) and ids:
        names = {index: str(name) for name, index in ids.items() if isinstance(index, int)}
        if sorted(names) == list(range(len(ids))):
            return [names[index] for index in range(len(ids))]
    count = getattr(model.dataset, "num_classes", None)
    if count is None:
        raise CheckpointError(
            f"{path} names no labels: it has no file that class_labels.class_labels_file names, "
            "no label_ids and no dataset.num_classes"
        )
    return [str(index) for index in range(count)]
