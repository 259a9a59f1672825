"""What a `.nemo` file says beside its weights: model_config.yaml and the files that it names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpcore.checkpoint.errors import CheckpointError, shown
from tpcore.checkpoint.untrusted.archive import Archive, UnpackedArchive
from tpcore.checkpoint.untrusted.fields import Fields
from tpcore.checkpoint.untrusted.plain_yaml import parse_yaml

MODEL_CONFIG = "model_config.yaml"
VERSION_FILE = "megatron_checkpoint_version.json"
VOCABULARY = "tokenizer.vocab_file"
VOCABULARY_DICT = "tokenizer_vocab_dict.json"
OWN_FACTS = "tpcore_model.json"
"""Written beside NeMo's files: what none of them can say. NeMo does not look at it."""

# Nodes of model_config.yaml that only the models of one task have.
_TASK_NODES = {
    "classifier_head": "sequence_classification",
    "head": "token_classification",
    "token_classifier": "question_answering",
}
_TARGETS = {
    "TextClassificationModel": "sequence_classification",
    "GLUEModel": "sequence_classification",
    "TokenClassificationModel": "token_classification",
    "QAModel": "question_answering",
}
_ENCODER_FACTS = (
    *("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"),
    *("ffn_hidden_size", "kv_channels", "layernorm_epsilon", "hidden_dropout", "attention_dropout"),
    *("bias_gelu_fusion", "openai_gelu", "onnx_safe", "init_method_std", "normalization"),
    *("apply_residual_connection_post_layernorm", "position_embedding_type", "bert_binary_head"),
)


@dataclass(frozen=True)
class NemoContents:
    """What a `.nemo` file holds beside its weights."""

    config: Mapping[str, Any]
    """model_config.yaml, as it is; nothing in it is ever instantiated."""
    task: str | None = None
    """What the classifier is for: a name of `state.HEADS`."""
    encoder: Mapping[str, Any] = field(default_factory=dict)
    """Sizes and switches of the encoder, under the names of Megatron's arguments."""
    checkpoint_version: Any = None
    labels: tuple[str, ...] | None = None
    vocabulary: tuple[str, ...] | None = None
    lowercase: bool | None = None
    own_facts: Mapping[str, Any] | None = None


def read_contents(archive: Archive | UnpackedArchive) -> NemoContents:
    """Everything but the weights.

    Raises:
        CheckpointError: a file is missing or damaged; names it.
    """
    where = str(archive.path)
    if MODEL_CONFIG not in archive:
        raise CheckpointError(f"{where}: is an archive without {MODEL_CONFIG}, so no .nemo file")
    config = parse_yaml(archive.read(MODEL_CONFIG), f"{where}: {MODEL_CONFIG}")
    about = contents_of(config)
    file = _member(archive, _node(config, "language_model").get("config_file"))
    encoder = {**about.encoder, **(_json(archive, file) if file else {})}
    tokenizer = _node(config, "tokenizer")
    version_file = _member(archive, VERSION_FILE)
    version = _json(archive, version_file).get("checkpoint_version") if version_file else None
    vocabulary_file = _member(archive, tokenizer.get("vocab_file")) or _member(archive, VOCABULARY)
    labels_file = _member(archive, _node(config, "class_labels").get("class_labels_file"))
    own_file = OWN_FACTS if OWN_FACTS in archive else None
    return dataclasses.replace(
        about,
        encoder=encoder,
        checkpoint_version=version,
        labels=_lines(archive, labels_file),
        vocabulary=_lines(archive, vocabulary_file),
        own_facts=_json(archive, own_file) if own_file else None,
    )


def contents_of(config: Mapping[str, Any]) -> NemoContents:
    """What a configuration says without the files that it names."""
    language_model, tokenizer = _node(config, "language_model"), _node(config, "tokenizer")
    # Later releases have the encoder's settings at the root.
    encoder = {name: config[name] for name in _ENCODER_FACTS if name in config}
    encoder |= _node(language_model, "config")
    name = f"{tokenizer.get('tokenizer_name')} {language_model.get('pretrained_model_name')}"
    lowercase = False if "-cased" in name else True if "uncased" in name else None
    return NemoContents(config=config, task=_task(config), encoder=encoder, lowercase=lowercase)


def args_of(contents: NemoContents, where: str) -> dict[str, Any]:
    """The facts of a file under the names of Megatron's arguments."""
    if contents.own_facts is not None:
        args = contents.own_facts.get("args")
        if not isinstance(args, dict):
            raise CheckpointError(f"{where}: {OWN_FACTS} has no args")
        return dict(args)
    fields = Fields(contents.encoder, where, prefix="")
    args = {name: fields.values[name] for name in _ENCODER_FACTS if name in fields.values}
    types = fields.integer("num_tokentypes")
    if types is not None:
        args["tpcore_num_token_types"] = types
    head = {
        "sequence_classification": _node(contents.config, "classifier_head"),
        "token_classification": _node(contents.config, "head"),
        "question_answering": _node(contents.config, "token_classifier"),
    }.get(contents.task or "", {})
    options: dict[str, Any] = {"dropout": head.get("fc_dropout", head.get("dropout"))}
    if contents.task == "sequence_classification":
        options["pooler"] = False
        options["activation"] = "relu"
    elif head.get("activation"):
        options["activation"] = head["activation"]
    if contents.task is not None:
        args |= {"tpcore_head": contents.task, "tpcore_head_kwargs": options}
    if contents.labels is not None:
        args["tpcore_labels"] = list(contents.labels)
    if contents.lowercase is not None:
        args["tpcore_lowercase"] = contents.lowercase
    return args


def _task(config: Mapping[str, Any]) -> str | None:
    target = config.get("target")
    if isinstance(target, str) and target.rpartition(".")[2] in _TARGETS:
        return _TARGETS[target.rpartition(".")[2]]
    found = {task for node, task in _TASK_NODES.items() if isinstance(config.get(node), dict)}
    return found.pop() if len(found) == 1 else None


def _node(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _member(archive: Archive | UnpackedArchive, value: Any) -> str | None:
    """The file that a configuration names: plain, by a `nemo:` link, or with an id before it."""
    if not isinstance(value, str) or not value:
        return None
    name = Path(value.removeprefix("nemo:")).name
    if name in archive:
        return name
    found = [member for member in archive.members if member.endswith(f"_{name}")]
    if len(found) > 1:
        raise CheckpointError(f"{archive.path}: {len(found)} members are called {name:.80}")
    return found[0] if found else None


def _json(archive: Archive | UnpackedArchive, name: str) -> dict[str, Any]:
    try:
        values = json.loads(archive.read(name))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{archive.path}: {name} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{archive.path}: {name} holds {shown(values)}, not an object")
    return values


def _lines(archive: Archive | UnpackedArchive, name: str | None) -> tuple[str, ...] | None:
    if name is None:
        return None
    try:
        text = archive.read(name).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{archive.path}: {name} is not UTF-8 ({error})") from error
    return tuple(line.rstrip("\r") for line in text.removesuffix("\n").split("\n"))
