"""Megatron's training arguments <-> BertConfig.

A checkpoint of Megatron's carries the arguments of the run that wrote it, as an argparse.Namespace.
They decide what the weights alone cannot say: the number of heads, the GeLU, the epsilon, where the
residual is taken. Fields that a release did not have yet fall back to what it did.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tpcore.checkpoint.errors import CheckpointError, shown
from tpcore.checkpoint.state import HEADS, SIZES, CanonicalState
from tpcore.checkpoint.untrusted.fields import Fields
from tpcore.models.config import PRESETS, VOCAB_DIVISOR, BertConfig

# Fields that change the architecture into something this encoder is not, with the values that
# leave it alone.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "swiglu": (None, False),
    "squared_relu": (None, False),
    "quick_geglu": (None, False),
    "apply_layernorm_1p": (None, False),
    "layernorm_zero_centered_gamma": (None, False),
    "normalization": (None, "LayerNorm"),
    "qk_layernorm": (None, False),
    "qk_l2_norm": (None, False),
    "position_embedding_type": (None, "learned_absolute"),
    "use_rotary_position_embeddings": (None, False),
    "add_position_embedding": (None, True),
    "add_bias_linear": (None, True),
    "group_query_attention": (None, False),
    "multi_latent_attention": (None, False),
    "untie_embeddings_and_output_weights": (None, False),
    "num_experts": (None, 0),
}

# What no argument of Megatron's can say, under names that Megatron ignores.
_DROPOUT_AFTER_NORM = "tpcore_embedding_dropout_after_norm"
_LOSS_OVER_PADDING = "tpcore_loss_over_padding"
_LM_HEAD_GELU = "tpcore_lm_head_gelu"
_NUM_TOKEN_TYPES = "tpcore_num_token_types"
_HEAD = "tpcore_head"
_HEAD_KWARGS = "tpcore_head_kwargs"
_LABELS = "tpcore_labels"
_LOWERCASE = "tpcore_lowercase"


def config_from_args(
    args: Fields,
    sizes: Mapping[str, int],
    has_pooler: bool,
    overrides: Mapping[str, Any] | None = None,
) -> BertConfig:
    """The configuration of a file, from its arguments and the shapes of its tensors.

    Args:
        args: the file's arguments; empty where it has none.
        sizes: as `sizes_from_shapes` returns them.
        has_pooler: whether the file holds a pooler.
        overrides: the caller's values, for what a file without args does not say.

    Raises:
        CheckpointError: an argument contradicts the shapes, asks for another architecture, or the
            number of heads is nowhere to be found.
    """
    overrides = overrides or {}
    _check_supported(args, sizes)
    _check_token_types(args, sizes, overrides)
    rows = sizes["vocab_size"]
    for name, size in (
        ("num_layers", sizes["num_layers"]),
        ("hidden_size", sizes["hidden_size"]),
        ("ffn_hidden_size", sizes["intermediate_size"]),
        ("max_position_embeddings", sizes["max_position_embeddings"]),
        ("padded_vocab_size", rows),
    ):
        claimed = args.integer(name)
        if claimed is not None and claimed != size:
            raise CheckpointError(
                f"{args.where}: args.{name}={claimed}, but the tensors in the file say {size}"
            )
    vocab_size = args.integer("vocab_size") or rows
    if vocab_size > rows:
        raise CheckpointError(
            f"{args.where}: args.vocab_size={vocab_size}, but the file has only {rows} rows"
        )
    gelu, lm_head_gelu = _gelu(args)
    values: dict[str, Any] = {
        **sizes,
        "vocab_size": vocab_size,
        "padded_vocab_size": rows,
        "num_attention_heads": _num_heads(args, sizes, overrides.get("num_attention_heads")),
        "layernorm_eps": args.number("layernorm_epsilon", 1e-5),
        "hidden_dropout": args.number("hidden_dropout", 0.1),
        "attention_dropout": args.number("attention_dropout", 0.1),
        "gelu": gelu,
        "lm_head_gelu": args.text(_LM_HEAD_GELU) or lm_head_gelu,
        "post_layernorm": args.flag("apply_residual_connection_post_layernorm"),
        "embedding_dropout_after_norm": args.flag(_DROPOUT_AFTER_NORM),
        "loss_over_padding": args.flag(_LOSS_OVER_PADDING),
        "add_pooler": has_pooler,
        "init_std": args.number("init_method_std", 0.02),
    }
    try:
        return BertConfig(**values)
    except ValueError as error:
        raise CheckpointError(f"{args.where}: {error}") from error


def stated_fields(args: Fields) -> frozenset[str]:
    """Fields of the configuration that the file itself says, by its shapes or its arguments."""
    stated = set(SIZES)
    for name, field in (
        ("num_attention_heads", "num_attention_heads"),
        ("layernorm_epsilon", "layernorm_eps"),
        ("hidden_dropout", "hidden_dropout"),
        ("attention_dropout", "attention_dropout"),
        ("init_method_std", "init_std"),
        ("apply_residual_connection_post_layernorm", "post_layernorm"),
    ):
        if name in args:
            stated.add(field)
    if any(name in args for name in ("bias_gelu_fusion", "openai_gelu", "onnx_safe")):
        stated |= {"gelu", "lm_head_gelu"}
    return frozenset(stated)


def _check_supported(args: Fields, sizes: Mapping[str, int]) -> None:
    for name, harmless in _UNSUPPORTED.items():
        value = args.values.get(name)
        if value not in harmless:
            raise CheckpointError(
                f"{args.where}: args.{name}={shown(value)} makes another architecture than BERT's; "
                f"supported: {harmless[-1]!r}"
            )
    channels, heads = args.integer("kv_channels"), args.integer("num_attention_heads")
    if channels and heads and channels * heads != sizes["hidden_size"]:
        raise CheckpointError(
            f"{args.where}: args.kv_channels={channels} times args.num_attention_heads={heads} is "
            f"not the hidden size of {sizes['hidden_size']}; such heads are not supported"
        )


def _check_token_types(
    args: Fields, sizes: Mapping[str, int], overrides: Mapping[str, Any]
) -> None:
    """A table of token types may be absent only from a run that had none."""
    found = sizes["num_token_types"]
    claimed = args.integer(_NUM_TOKEN_TYPES)
    if claimed is None and (found or "bert_binary_head" in args):
        # Megatron makes the table together with the binary head.
        claimed = 0 if not found and not args.flag("bert_binary_head") else found or 2
    if claimed is None:
        claimed = overrides.get("num_token_types", 2)
    if claimed != found:
        raise CheckpointError(
            f"{args.where}: missing parameters: the run had {claimed} token types, but their table "
            f"has {found} rows in the file (if the model has none, pass num_token_types=0)"
        )


def _num_heads(args: Fields, sizes: Mapping[str, int], given: int | None) -> int:
    claimed = args.integer("num_attention_heads")
    if claimed:
        if given is not None and given != claimed:
            raise CheckpointError(
                f"{args.where}: num_attention_heads={given} was asked for, but the file was "
                f"written with {claimed}; leave it out"
            )
        return claimed
    if given is not None:
        return given
    # Released files without arguments are the 345m model; no shape gives the heads of another.
    for preset in PRESETS.values():
        if (preset.hidden_size, preset.num_layers) == (sizes["hidden_size"], sizes["num_layers"]):
            return preset.num_attention_heads
    raise CheckpointError(
        f"{args.where}: the file does not say how many attention heads the model has; pass "
        "num_attention_heads=..."
    )


def _gelu(args: Fields) -> tuple[str, str]:
    """GeLU of the feed-forward layers and of the LM head, which the fused kernel never reached."""
    unfused = "none"
    if args.flag("openai_gelu"):
        unfused = "tanh"
    elif args.flag("onnx_safe"):
        unfused = "erf_1.41421"
    return ("tanh" if args.flag("bias_gelu_fusion") else unfused), unfused


def head_from_args(
    args: Fields, head: str | None, num_layers: int = 1
) -> tuple[str | None, dict[str, Any]]:
    """What the file says about its head beyond the parameters' names: kind and options.

    Args:
        args: the file's arguments.
        head: what the names of the parameters make up.
        num_layers: linear layers of a classifier.
    """
    stored = args.text(_HEAD)
    if head is None and stored is not None and stored not in HEADS:
        return stored, {}  # one that tpcore does not have, and whose parameters were left out
    if head not in ("sequence_classification", "question_answering"):
        return head, {}
    if head == "sequence_classification" and stored == "token_classification":
        head = stored
    options = args.values.get(_HEAD_KWARGS)
    stated = Fields(options if isinstance(options, dict) else {}, args.where, f"{_HEAD_KWARGS}.")
    kwargs: dict[str, Any] = {}
    if "dropout" in stated:
        kwargs["dropout"] = stated.number("dropout", 0.0)
    for name in ("regression", "pooler"):
        if name in stated:
            kwargs[name] = stated.flag(name)
    if num_layers > 1:
        kwargs["num_layers"] = num_layers
        if "activation" in stated:
            kwargs["activation"] = stated.text("activation")
    return head, kwargs


def labels_from_args(args: Fields) -> tuple[str, ...] | None:
    """The label names of a classifier that tpcore wrote."""
    labels = args.values.get(_LABELS)
    if isinstance(labels, list) and all(isinstance(label, str) for label in labels):
        return tuple(labels)
    return None


def lowercase_from_args(args: Fields) -> bool | None:
    """Whether the run's tokenizer lower-cases, where the file says."""
    if _LOWERCASE in args:
        return args.flag(_LOWERCASE)
    kinds = {"BertWordPieceLowerCase": True, "BertWordPieceCase": False}
    kind = args.values.get("tokenizer_type")
    return kinds.get(kind) if isinstance(kind, str) else None


def args_from_state(
    state: CanonicalState, tensor_parallel_size: int, padded_vocab_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The arguments that Megatron itself checks on load, and those that give the config back."""
    config = state.config
    # Only a cased vocabulary is worth telling apart; Megatron refuses to load without a type.
    cased = state.source.lowercase is False
    args: dict[str, Any] = {
        "num_layers": config.num_layers,
        "encoder_num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.feed_forward_size,
        "num_attention_heads": config.num_attention_heads,
        "kv_channels": config.head_size,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "encoder_seq_length": config.max_position_embeddings,
        "make_vocab_size_divisible_by": VOCAB_DIVISOR,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "tokenizer_type": "BertWordPieceCase" if cased else "BertWordPieceLowerCase",
        "layernorm_epsilon": config.layernorm_eps,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "init_method_std": config.init_std,
        "apply_residual_connection_post_layernorm": config.post_layernorm,
        "bias_gelu_fusion": config.gelu == "tanh" and config.lm_head_gelu != "tanh",
        "openai_gelu": config.lm_head_gelu == "tanh",
        "onnx_safe": config.lm_head_gelu == "erf_1.41421",
        "apply_query_key_layer_scaling": False,
        "bert_binary_head": "head.binary.weight" in state.tensors,
        "tensor_model_parallel_size": tensor_parallel_size,
        "pipeline_model_parallel_size": 1,
        "params_dtype": dtype,
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
    }
    args[_NUM_TOKEN_TYPES] = config.num_token_types
    if config.embedding_dropout_after_norm:
        args[_DROPOUT_AFTER_NORM] = True
    if config.loss_over_padding:
        args[_LOSS_OVER_PADDING] = True
    if _gelu(Fields(args, "written")) != (config.gelu, config.lm_head_gelu):
        # Pairs that no switch of Megatron's makes: the MLP's by switch, the head's by name.
        args.update(
            bias_gelu_fusion=config.gelu == "tanh",
            openai_gelu=False,
            onnx_safe=config.gelu == "erf_1.41421",
        )
        args[_LM_HEAD_GELU] = config.lm_head_gelu
    if state.head in ("sequence_classification", "token_classification", "question_answering"):
        args[_HEAD] = state.head
        args[_HEAD_KWARGS] = {k: v for k, v in state.head_kwargs.items() if k != "num_labels"}
        if state.labels is not None:
            args[_LABELS] = list(state.labels)
    if state.source.lowercase is not None:
        args[_LOWERCASE] = state.source.lowercase
    return args
