"""Hugging Face's config.json <-> BertConfig, and the kind of head."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tpcore.checkpoint import names
from tpcore.checkpoint.errors import CheckpointError, shown
from tpcore.checkpoint.state import CanonicalState
from tpcore.checkpoint.stored import StoredTensor
from tpcore.checkpoint.untrusted.fields import Fields
from tpcore.models.config import BertConfig

logger = logging.getLogger(__name__)

TABLES = {"bert": names.BERT, "megatron-bert": names.MEGATRON_BERT}
CLASSES = {"bert": "Bert", "megatron-bert": "MegatronBert"}

_ACTIVATIONS = {
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
}
_ACTIVATION_OF = {"none": "gelu", "tanh": "gelu_new", "erf_1.41421": "gelu"}
_SUFFIXES = {
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
# What transformers has no word for, under names that it keeps but does not read.
_GELU, _LM_HEAD_GELU = "tpcore_gelu", "tpcore_lm_head_gelu"
_DROPOUT_AFTER_NORM = "tpcore_embedding_dropout_after_norm"
_MAX_JSON_BYTES = 16 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: is far too large for what it should hold")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, not an object")
    return values


def model_type_from_fields(fields: Fields, keys: Mapping[str, str], where: str) -> str:
    """A key of `TABLES`.

    Raises:
        CheckpointError: the folder holds another model, or a BERT with parts that are not BERT's.
    """
    model_type = fields.text("model_type")
    if model_type is None:
        # The oldest folders do not say; only original BERT normalises its embeddings.
        model_type = "bert" if "embeddings.LayerNorm.weight" in keys else "megatron-bert"
    if model_type not in TABLES:
        raise CheckpointError(
            f"{where}: model_type={model_type!r} is not supported; {' and '.join(TABLES)} are"
        )
    for name, harmless in (
        ("is_decoder", (None, False)),
        ("add_cross_attention", (None, False)),
        ("position_embedding_type", (None, "absolute")),
        ("pruned_heads", (None, {})),
        ("quantization_config", (None,)),
    ):
        if fields.values.get(name) not in harmless:
            raise CheckpointError(
                f"{fields.where}: {name}={shown(fields.values[name])} makes another model than the "
                "encoder that is supported"
            )
    return model_type


def model_type_of(config: BertConfig) -> str:
    """A key of `TABLES`: which of the two models a configuration is."""
    return "bert" if config.post_layernorm else "megatron-bert"


def config_from_fields(
    fields: Fields, model_type: str, sizes: Mapping[str, int], has_pooler: bool
) -> BertConfig:
    """The configuration of a folder, from config.json and the shapes of its tensors.

    Raises:
        CheckpointError: the two contradict each other, or a value is not supported.
    """
    if sizes["num_token_types"] == 0:
        raise CheckpointError(
            f"{fields.where}: missing parameters: embeddings.token_type_embeddings.weight"
        )
    for name, key in (
        ("vocab_size", "vocab_size"),
        ("hidden_size", "hidden_size"),
        ("num_hidden_layers", "num_layers"),
        ("intermediate_size", "intermediate_size"),
        ("max_position_embeddings", "max_position_embeddings"),
        ("type_vocab_size", "num_token_types"),
    ):
        claimed = fields.integer(name)
        if claimed is not None and claimed != sizes[key]:
            raise CheckpointError(
                f"{fields.where}: {name}={claimed}, but the tensors in the folder say {sizes[key]}"
            )
    num_heads = fields.integer("num_attention_heads")
    if num_heads is None:
        raise CheckpointError(f"{fields.where}: num_attention_heads is missing")
    activation = fields.text("hidden_act") or "gelu"
    if activation not in _ACTIVATIONS:
        raise CheckpointError(
            f"{fields.where}: hidden_act={activation!r} is not supported; "
            f"{', '.join(_ACTIVATIONS)} are"
        )
    gelu = fields.text(_GELU) or _ACTIVATIONS[activation]
    post_layernorm = model_type == "bert"
    after_norm = post_layernorm
    if _DROPOUT_AFTER_NORM in fields:
        after_norm = fields.flag(_DROPOUT_AFTER_NORM)
    try:
        return BertConfig(
            **sizes,
            num_attention_heads=num_heads,
            layernorm_eps=fields.number("layer_norm_eps", 1e-12),
            hidden_dropout=fields.number("hidden_dropout_prob", 0.1),
            attention_dropout=fields.number("attention_probs_dropout_prob", 0.1),
            gelu=gelu,  # type: ignore[arg-type]  # BertConfig checks it
            lm_head_gelu=fields.text(_LM_HEAD_GELU) or gelu,  # type: ignore[arg-type]
            post_layernorm=post_layernorm,
            embedding_dropout_after_norm=after_norm,
            loss_over_padding=False,  # such a file has no padding
            add_pooler=has_pooler,
            init_std=fields.number("initializer_range", 0.02),
        )
    except CheckpointError:
        raise  # it names the file already
    except ValueError as error:
        raise CheckpointError(f"{fields.where}: {error}") from error


def architecture_from_fields(fields: Fields) -> str | None:
    """The class that wrote the folder, where it says."""
    architectures = fields.values.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return architectures[0]
    return None


def head_from_fields(
    fields: Fields, head: str | None, tensors: Mapping[str, StoredTensor]
) -> tuple[str | None, dict[str, Any]]:
    """Which head a classifier is, and its options; the names of parameters do not tell."""
    if head == "pretraining":
        return head, {"binary": "head.binary.weight" in tensors}
    if head != "sequence_classification":
        return head, {}
    architecture = architecture_from_fields(fields)
    if architecture is None:
        kind = "sequence" if "pooler.dense.weight" in tensors else "token"
        head = f"{kind}_classification"
    elif architecture.endswith("ForTokenClassification"):
        head = "token_classification"
    elif not architecture.endswith("ForSequenceClassification"):
        head = architecture
    shape = tensors["head.classifier.weight"].shape
    kwargs: dict[str, Any] = {"num_labels": shape[0] if shape else 0}
    if "classifier_dropout" in fields:
        kwargs["dropout"] = fields.number("classifier_dropout", 0.0)
    problem = fields.text("problem_type")
    if head == "sequence_classification" and (
        problem == "regression" or (problem is None and kwargs["num_labels"] == 1)
    ):
        kwargs["regression"] = True
    if problem == "multi_label_classification":
        logger.warning(
            "%s: problem_type is multi_label_classification; the logits are the same, but tpcore's "
            "loss is for one label each",
            fields.where,
        )
    return head, kwargs


def labels_from_fields(fields: Fields, num_labels: int | None) -> tuple[str, ...] | None:
    """The names of a classifier's labels, unless they are the default LABEL_0, LABEL_1, ..."""
    table = fields.values.get("id2label")
    if num_labels is None or table is None:
        return None
    wanted = {str(i) for i in range(num_labels)}
    if not isinstance(table, dict) or set(table) != wanted:
        raise CheckpointError(
            f"{fields.where}: id2label does not name labels 0 to {num_labels - 1}"
        )
    labels = tuple(str(table[str(i)]) for i in range(num_labels))
    unnamed = tuple(f"LABEL_{i}" for i in range(num_labels))
    return None if labels == unnamed else labels


def config_values(state: CanonicalState, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says of a state; warns of what transformers would compute differently."""
    config, kwargs = state.config, state.head_kwargs
    model_type = model_type_of(config)
    if state.head is None:
        suffix = "Model"
    elif state.head == "pretraining":
        suffix = "ForPreTraining" if kwargs.get("binary") else "ForMaskedLM"
    else:
        suffix = _SUFFIXES[state.head]
    values: dict[str, Any] = {
        "architectures": [CLASSES[model_type] + suffix],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.feed_forward_size,
        "hidden_act": _ACTIVATION_OF[config.gelu],
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.num_token_types,
        "initializer_range": config.init_std,
        "layer_norm_eps": config.layernorm_eps,
        "position_embedding_type": "absolute",
        "pad_token_id": 0,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if "num_labels" in kwargs:
        labels = state.labels or tuple(f"LABEL_{i}" for i in range(kwargs["num_labels"]))
        values["id2label"] = {str(i): label for i, label in enumerate(labels)}
        values["label2id"] = {label: i for i, label in enumerate(labels)}
        values["classifier_dropout"] = kwargs.get("dropout")
    if state.head == "sequence_classification":
        regression = kwargs.get("regression")
        values["problem_type"] = "regression" if regression else "single_label_classification"
    lost = []
    if config.gelu == "erf_1.41421":
        values[_GELU] = config.gelu
        lost.append("its GeLU is erf with 1.41421, which transformers computes with sqrt(2)")
    if config.lm_head_gelu != config.gelu:
        values[_LM_HEAD_GELU] = config.lm_head_gelu
        if suffix in ("ForPreTraining", "ForMaskedLM"):
            lost.append(f"its LM head uses GeLU {config.lm_head_gelu}, not {config.gelu}")
    if config.embedding_dropout_after_norm != config.post_layernorm:
        values[_DROPOUT_AFTER_NORM] = config.embedding_dropout_after_norm
        lost.append("in training, its embedding dropout is on the other side of the first norm")
    if lost:
        logger.warning("in transformers this model will differ: %s", "; ".join(lost))
    return values
