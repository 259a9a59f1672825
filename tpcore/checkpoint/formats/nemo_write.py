"""Writing `.nemo` files in the layout of NeMo 1.x, with heads, labels and vocabulary.

Each rank puts its weights into a folder, rank 0 adds the rest and packs it: gzip without
compression, which every release of NeMo opens (those before 1.7 open nothing else).
"""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tpcore.checkpoint import names, torch_file
from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.formats import nemo_names
from tpcore.checkpoint.formats.megatron_args import args_from_state
from tpcore.checkpoint.formats.nemo import WEIGHTS
from tpcore.checkpoint.formats.nemo_config import (
    MODEL_CONFIG,
    OWN_FACTS,
    VERSION_FILE,
    VOCABULARY,
    VOCABULARY_DICT,
)
from tpcore.checkpoint.state import (
    HEADS,
    CanonicalState,
    check_head,
    check_tensor_parallel_size,
)

LABELS = "label_ids.csv"


def check_writable(state: CanonicalState, tensor_parallel_size: int) -> dict[str, str]:
    """Canonical name -> key in the file, or an error before anything is written.

    Raises:
        CheckpointError: the size does not fit the model, or NeMo has no place for its head.
    """
    check_tensor_parallel_size(state.config, tensor_parallel_size)
    check_head(state, HEADS)
    layers = state.head_kwargs.get("num_layers", 1)
    expanded = names.expand(names.MEGATRON, state.config.num_layers)
    return {
        target: nemo_names.key_of(key, layers)
        for key, target in expanded.items()
        if target is not None and target in state.tensors
    }


def save_rank(
    state: CanonicalState, folder: Path, size: int, rank: int, *, write: bool = True
) -> None:
    """Put one rank's weights where NeMo looks for them.

    ``write=False`` only takes part in reading, as in `torch_file.save`.

    Raises:
        CheckpointError: as `check_writable`.
        OSError: the file cannot be written.
    """
    keys, rows = check_writable(state, size), state.padded_rows(size)
    content = {keys[name]: state.described_shard(name, rank, size, rows) for name in state.tensors}
    target = folder / WEIGHTS if size == 1 else folder / f"mp_rank_{rank:02d}" / WEIGHTS
    if write:
        target.parent.mkdir(parents=True, exist_ok=True)
    torch_file.save(content, target, write=write)


def save_extras(
    state: CanonicalState,
    folder: Path,
    size: int,
    *,
    tokenizer_files: Iterable[Path] = (),
    config: Mapping[str, Any] | None = None,
) -> None:
    """Everything but the weights.

    Args:
        state: the model, with its labels.
        folder: where to put the files.
        size: the tensor-parallel size.
        tokenizer_files: of these vocab.txt is taken.
        config: model_config.yaml's own content; nodes that it lacks are added.
    """
    config = dict(config or {})
    name = _encoder_name(state, config)
    encoder_file = f"{name}_encoder_config.json"
    vocabulary = next((file for file in tokenizer_files if file.name == "vocab.txt"), None)
    if vocabulary is not None:
        tokens = vocabulary.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        shutil.copyfile(vocabulary, folder / VOCABULARY)
        ids = {token: index for index, token in enumerate(tokens)}
        _write_json(folder / VOCABULARY_DICT, ids)
    if state.labels is not None:
        (folder / LABELS).write_text("".join(f"{label}\n" for label in state.labels))
    _write_json(folder / encoder_file, _encoder_config(state))
    _write_json(folder / VERSION_FILE, {"checkpoint_version": 3.0})
    dtype = next(iter(state.tensors.values())).dtype
    args = args_from_state(state, size, state.padded_rows(size), dtype)
    args["params_dtype"] = str(dtype).removeprefix("torch.")
    _write_json(folder / OWN_FACTS, {"args": args})
    named = {"config_file": encoder_file, "pretrained_model_name": name, "lm_checkpoint": None}
    _merge(config, "language_model", named)
    tokenizer: dict[str, Any] = {"tokenizer_name": name}
    if vocabulary is not None:
        tokenizer |= {"vocab_file": VOCABULARY, "tokenizer_model": None, "special_tokens": None}
    _merge(config, "tokenizer", tokenizer)
    if state.labels is not None:
        _merge(config, "class_labels", {"class_labels_file": LABELS})
    node = _head_node(state)
    if node is not None and not isinstance(config.get(node[0]), Mapping):
        config[node[0]] = node[1]
    config.setdefault("target", _TARGETS.get(state.head or ""))
    (folder / MODEL_CONFIG).write_text(_yaml(config), encoding="utf-8")


def pack(folder: Path, file: Path) -> None:
    """Put a folder's files into an archive with the root `.`; equal files make equal archives."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        member.mode = 0o755 if member.isdir() else 0o644
        return member

    with (
        file.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=0, fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive,
    ):
        archive.add(folder, arcname=".", filter=plain, recursive=False)
        for path in sorted(folder.rglob("*")):
            if path != file:
                name = f"./{path.relative_to(folder).as_posix()}"
                archive.add(path, arcname=name, filter=plain, recursive=False)


_TARGETS = {
    "sequence_classification": "nemo.collections.nlp.models.text_classification."
    "text_classification_model.TextClassificationModel",
    "token_classification": "nemo.collections.nlp.models.token_classification."
    "token_classification_model.TokenClassificationModel",
    "question_answering": "nemo.collections.nlp.models.question_answering.qa_model.QAModel",
}


def _encoder_name(state: CanonicalState, config: Mapping[str, Any]) -> str:
    node = config.get("language_model")
    name = node.get("pretrained_model_name") if isinstance(node, Mapping) else None
    if isinstance(name, str) and name:
        if Path(name).name != name:
            raise CheckpointError(f"pretrained_model_name={name!r} cannot be part of a file's name")
        return name
    return "megatron-bert-cased" if state.source.lowercase is False else "megatron-bert-uncased"


def _encoder_config(state: CanonicalState) -> dict[str, Any]:
    config = state.config
    return {
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "ffn_hidden_size": config.feed_forward_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_tokentypes": config.num_token_types,
        "layernorm_epsilon": config.layernorm_eps,
        "apply_residual_connection_post_layernorm": config.post_layernorm,
        "bias_gelu_fusion": config.gelu == "tanh",
        "onnx_safe": config.gelu == "erf_1.41421",
        "vocab_file": VOCABULARY,
        "tokenizer_type": "BertWordPieceLowerCase",
        "lazy_mpu_init": True,
    }


def _head_node(state: CanonicalState) -> tuple[str, dict[str, Any]] | None:
    """The node of model_config.yaml that describes the classifier."""
    kwargs = state.head_kwargs
    layers, dropout = kwargs.get("num_layers", 1), kwargs.get("dropout", 0.0)
    activation = kwargs.get("activation", "relu")
    if state.head == "sequence_classification":
        return "classifier_head", {"num_output_layers": layers, "fc_dropout": dropout}
    if state.head == "token_classification":
        head = {"num_fc_layers": layers, "fc_dropout": dropout, "activation": activation}
        return "head", {**head, "use_transformer_init": True}
    if state.head == "question_answering":
        head = {"num_layers": layers, "dropout": dropout, "activation": activation}
        return "token_classifier", {**head, "num_classes": 2, "log_softmax": False}
    return None


def _merge(config: dict[str, Any], name: str, values: Mapping[str, Any]) -> None:
    """Put values into a node; what the file itself decides wins over what was there."""
    node = config.get(name)
    config[name] = {**(node if isinstance(node, Mapping) else {}), **values}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _yaml(values: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(values, default=str))
    try:
        import yaml
    except ImportError:
        return json.dumps(plain, indent=2, sort_keys=True) + "\n"  # JSON is YAML
    return yaml.safe_dump(plain, sort_keys=True, allow_unicode=True)
