"""The names of parameters in every format, as tables.

`PARAMETERS` holds tpcore's own ("canonical") names, which are those of `BertModel.state_dict()`.
Each format has one table from its names to canonical ones; `{}` stands for a layer number, None for
a name that is known and dropped. A table is one-to-one apart from its Nones, so it also writes.
Other spellings of the same name are listed as aliases beside it, and a name that no table knows is
an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tpcore.checkpoint.errors import CheckpointError
from tpcore.parallel.sharding import Replicated, Sharded, Sharding

MAX_HIDDEN_LAYERS = 4
"""Of a head, before its last linear layer."""

MAX_LAYERS = 1024
"""More layers than any BERT has; a damaged or hostile file may claim any number."""


@dataclass(frozen=True)
class Parameter:
    """Dimensions of a full tensor, as letters, and how it is sharded.

    v vocabulary rows, p positions, y token types, h hidden, f feed-forward, 3h query-key-value
    rows, l labels; a number stands for itself.
    """

    dims: tuple[str, ...]
    sharding: Sharding


_ROWS, _COLUMNS, _ALL = Sharded(0), Sharded(1), Replicated()


def _linear(name: str, out: str, inside: str, weight: Sharding, bias: Sharding) -> dict:
    return {
        f"{name}.weight": Parameter((out, inside), weight),
        f"{name}.bias": Parameter((out,), bias),
    }


def _norm(name: str) -> dict:
    return {f"{name}.weight": Parameter(("h",), _ALL), f"{name}.bias": Parameter(("h",), _ALL)}


PARAMETERS: dict[str, Parameter] = {
    "embeddings.word_embeddings.weight": Parameter(("v", "h"), _ROWS),
    "embeddings.position_embeddings.weight": Parameter(("p", "h"), _ALL),
    "embeddings.token_type_embeddings.weight": Parameter(("y", "h"), _ALL),
    **_norm("blocks.{}.input_norm"),
    **_linear("blocks.{}.attention.qkv", "3h", "h", _ROWS, _ROWS),
    **_linear("blocks.{}.attention.dense", "h", "h", _COLUMNS, _ALL),
    **_norm("blocks.{}.post_attention_norm"),
    **_linear("blocks.{}.mlp.dense_in", "f", "h", _ROWS, _ROWS),
    **_linear("blocks.{}.mlp.dense_out", "h", "f", _COLUMNS, _ALL),
    **_norm("final_norm"),
    **_linear("pooler.dense", "h", "h", _ALL, _ALL),
    **_linear("head.lm.dense", "h", "h", _ALL, _ALL),
    **_norm("head.lm.norm"),
    "head.lm.bias": Parameter(("v",), _ROWS),
    **_linear("head.binary", "2", "h", _ALL, _ALL),
    **{
        name: entry
        for n in range(MAX_HIDDEN_LAYERS)
        for name, entry in _linear(f"head.hidden.{n}", "h", "h", _ALL, _ALL).items()
    },
    **_linear("head.classifier", "l", "h", _ALL, _ALL),
    **_linear("head.outputs", "2", "h", _ALL, _ALL),
    **_linear("head.multichoice", "1", "h", _ALL, _ALL),
}

VOCABULARY_PARAMETERS = ("embeddings.word_embeddings.weight", "head.lm.bias")
"""Those whose rows are the vocabulary, and change with its padding."""


def parameter(name: str) -> Parameter:
    """The entry of `PARAMETERS` for a canonical name with a layer number in it."""
    return PARAMETERS[re.sub(r"^blocks\.\d+\.", "blocks.{}.", name)]


def is_canonical(name: str) -> bool:
    """Whether `parameter` knows the name."""
    return re.sub(r"^blocks\.\d+\.", "blocks.{}.", name) in PARAMETERS


def head_part(name: str) -> str:
    """The part of a head that a name belongs to: `lm`, `classifier`, `hidden.0`, ..."""
    match = re.match(r"head\.(hidden\.\d+|\w+)", name)
    assert match, name
    return match.group(1)


def shift_layer(name: str, offset: int) -> str:
    """A canonical name with `offset` added to its layer number, if it has one."""
    match = re.match(r"blocks\.(\d+)\.", name)
    if match is None:
        return name
    return f"blocks.{int(match.group(1)) + offset}.{name[match.end() :]}"


def _both(source: str, target: str) -> dict[str, str | None]:
    return {f"{source}.weight": f"{target}.weight", f"{source}.bias": f"{target}.bias"}


def _own_heads() -> dict[str, str | None]:
    """Heads of fine-tuned models. Megatron has the first two; only tpcore writes the others."""
    table = {
        **_both("classification_head", "head.classifier"),
        **_both("multichoice_head", "head.multichoice"),
        **_both("question_answering_head", "head.outputs"),
    }
    for n in range(MAX_HIDDEN_LAYERS):
        table.update(_both(f"head_hidden.{n}", f"head.hidden.{n}"))
    return table


Table = Mapping[str, "str | None"]

# Megatron-LM as written since 2021 (version 3), flattened with dots.
_LM = "language_model"
_LAYER = f"{_LM}.encoder.layers.{{}}"
MEGATRON: dict[str, str | None] = {
    f"{_LM}.embedding.word_embeddings.weight": "embeddings.word_embeddings.weight",
    f"{_LM}.embedding.position_embeddings.weight": "embeddings.position_embeddings.weight",
    f"{_LM}.embedding.tokentype_embeddings.weight": "embeddings.token_type_embeddings.weight",
    **_both(f"{_LAYER}.input_layernorm", "blocks.{}.input_norm"),
    **_both(f"{_LAYER}.self_attention.query_key_value", "blocks.{}.attention.qkv"),
    **_both(f"{_LAYER}.self_attention.dense", "blocks.{}.attention.dense"),
    **_both(f"{_LAYER}.post_attention_layernorm", "blocks.{}.post_attention_norm"),
    **_both(f"{_LAYER}.mlp.dense_h_to_4h", "blocks.{}.mlp.dense_in"),
    **_both(f"{_LAYER}.mlp.dense_4h_to_h", "blocks.{}.mlp.dense_out"),
    **_both(f"{_LM}.encoder.final_layernorm", "final_norm"),
    **_both(f"{_LM}.pooler.dense", "pooler.dense"),
    **_both("lm_head.dense", "head.lm.dense"),
    **_both("lm_head.layernorm", "head.lm.norm"),
    "lm_head.bias": "head.lm.bias",
    **_both("binary_head", "head.binary"),
    **_own_heads(),
    # The last pipeline stage's copy of the word embeddings.
    "word_embeddings_for_head.weight": None,
}
MEGATRON_ALIASES = (
    (r"^module\.", ""),
    (rf"^{_LM}\.transformer\.", f"{_LM}.encoder."),  # until 2021-01
    (rf"^{_LM}\.(\w+_embeddings)\.", rf"{_LM}.embedding.\1."),  # the oldest, flat files
    (r"(layers\.\d+)\.attention\.", r"\1.self_attention."),
    (r"(layers\.\d+)\.(input|post_attention)_norm\.", r"\1.\2_layernorm."),  # 2023-09 on
    (r"encoder\.final_norm\.", "encoder.final_layernorm."),
    (r"^lm_head\.norm\.", "lm_head.layernorm."),
)
MEGATRON_TIED = {"word_embeddings_for_head.weight": "embeddings.word_embeddings.weight"}

# Megatron-Core's BertModel in the `torch` container.
_LAYER = "encoder.layers.{}"
MEGATRON_CORE: dict[str, str | None] = {
    "embedding.word_embeddings.weight": "embeddings.word_embeddings.weight",
    "embedding.position_embeddings.weight": "embeddings.position_embeddings.weight",
    "embedding.tokentype_embeddings.weight": "embeddings.token_type_embeddings.weight",
    **_both(f"{_LAYER}.input_layernorm", "blocks.{}.input_norm"),
    **_both(f"{_LAYER}.self_attention.linear_qkv", "blocks.{}.attention.qkv"),
    **_both(f"{_LAYER}.self_attention.linear_proj", "blocks.{}.attention.dense"),
    **_both(f"{_LAYER}.pre_mlp_layernorm", "blocks.{}.post_attention_norm"),
    **_both(f"{_LAYER}.mlp.linear_fc1", "blocks.{}.mlp.dense_in"),
    **_both(f"{_LAYER}.mlp.linear_fc2", "blocks.{}.mlp.dense_out"),
    **_both("encoder.final_layernorm", "final_norm"),
    **_both("pooler.dense", "pooler.dense"),
    **_both("lm_head.dense", "head.lm.dense"),
    **_both("lm_head.layer_norm", "head.lm.norm"),
    "output_layer.bias": "head.lm.bias",
    **_both("binary_head", "head.binary"),
    # Megatron-Core's BERT has no other head; only tpcore writes these names.
    **_own_heads(),
    "output_layer.weight": None,
    # State of Transformer Engine's low-precision kernels: pickles in bytes, never opened.
    **{
        f"{name}._extra_state": None
        for name in (
            f"{_LAYER}.input_layernorm",
            f"{_LAYER}.pre_mlp_layernorm",
            f"{_LAYER}.self_attention.linear_qkv",
            f"{_LAYER}.self_attention.linear_proj",
            f"{_LAYER}.self_attention.core_attention",
            f"{_LAYER}.mlp.linear_fc1",
            f"{_LAYER}.mlp.linear_fc2",
            "encoder.final_layernorm",
            "output_layer",
        )
    },
}
MEGATRON_CORE_ALIASES = (
    (r"^module\.", ""),
    (r"self_attention\.linear_qkv\.layer_norm_(weight|bias)$", r"input_layernorm.\1"),
    (r"mlp\.linear_fc1\.layer_norm_(weight|bias)$", r"pre_mlp_layernorm.\1"),
)
MEGATRON_CORE_TIED = {"output_layer.weight": "embeddings.word_embeddings.weight"}

# Hugging Face, without the `bert.` prefix that encoders carry inside models with a head. There
# q, k and v are parameters of their own: the parts of the canonical qkv.
QKV_PARTS = ("query", "key", "value")
_LAYER = "encoder.layer.{}"
_HUGGINGFACE: dict[str, str | None] = {
    "embeddings.word_embeddings.weight": "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight": "embeddings.position_embeddings.weight",
    "embeddings.token_type_embeddings.weight": "embeddings.token_type_embeddings.weight",
    **_both(f"{_LAYER}.attention.self.query", "blocks.{}.attention.qkv.query"),
    **_both(f"{_LAYER}.attention.self.key", "blocks.{}.attention.qkv.key"),
    **_both(f"{_LAYER}.attention.self.value", "blocks.{}.attention.qkv.value"),
    **_both(f"{_LAYER}.attention.output.dense", "blocks.{}.attention.dense"),
    **_both(f"{_LAYER}.intermediate.dense", "blocks.{}.mlp.dense_in"),
    **_both(f"{_LAYER}.output.dense", "blocks.{}.mlp.dense_out"),
    **_both("pooler.dense", "pooler.dense"),
    **_both("cls.predictions.transform.dense", "head.lm.dense"),
    **_both("cls.predictions.transform.LayerNorm", "head.lm.norm"),
    "cls.predictions.bias": "head.lm.bias",
    **_both("cls.seq_relationship", "head.binary"),
    **_both("classifier", "head.classifier"),
    **_both("qa_outputs", "head.outputs"),
    "cls.predictions.decoder.weight": None,
    "cls.predictions.decoder.bias": None,
    "embeddings.position_ids": None,
    "embeddings.token_type_ids": None,
}
HUGGINGFACE_ALIASES = (
    (r"^bert\.", ""),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
)
HUGGINGFACE_TIED = {
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "head.lm.bias",
}
MEGATRON_BERT: dict[str, str | None] = {
    **_HUGGINGFACE,
    **_both(f"{_LAYER}.attention.ln", "blocks.{}.input_norm"),
    **_both(f"{_LAYER}.ln", "blocks.{}.post_attention_norm"),
    **_both("encoder.ln", "final_norm"),
}
# Original BERT has its norms after the residual. Counted from there, each belongs to the block
# that follows: {+1} is the layer number plus one, and past the last block it is the final norm.
BERT: dict[str, str | None] = {
    **_HUGGINGFACE,
    **_both("embeddings.LayerNorm", "blocks.0.input_norm"),
    **_both(f"{_LAYER}.attention.output.LayerNorm", "blocks.{}.post_attention_norm"),
    **_both(f"{_LAYER}.output.LayerNorm", "blocks.{+1}.input_norm"),
}


def expand(table: Table, num_layers: int) -> dict[str, str | None]:
    """A table with the layer numbers 0 .. num_layers - 1 filled in."""
    names: dict[str, str | None] = {}
    for source, target in table.items():
        if "{}" not in source:
            names[source] = target
            continue
        for layer in range(num_layers):
            name = target
            if name is not None:
                name = name.replace("{}", str(layer)).replace("{+1}", str(layer + 1))
                name = re.sub(rf"^blocks\.{num_layers}\.input_norm\.", "final_norm.", name)
            names[source.replace("{}", str(layer))] = name
    return names


def apply_aliases(
    keys: Iterable[str], aliases: Iterable[tuple[str, str]], where: str
) -> dict[str, str]:
    """Each key in the spelling of the table -> the key as it is in the file.

    Raises:
        CheckpointError: two keys of the file are the same parameter.
    """
    patterns = [(re.compile(pattern), replacement) for pattern, replacement in aliases]
    spelled: dict[str, str] = {}
    for key in keys:
        name = key
        for pattern, replacement in patterns:
            name = pattern.sub(replacement, name)
        if name in spelled:
            raise CheckpointError(
                f"{where}: {spelled[name]!r} and {key!r} are the same parameter; the file is "
                "damaged or was merged from two"
            )
        spelled[name] = key
    return spelled


def count_layers(keys: Iterable[str], where: str) -> int:
    """One more than the highest layer number in the keys of any format."""
    highest = -1
    for key in keys:
        match = re.search(r"(?:^|\.)layers?\.(\d{1,9})\.", key)
        if match:
            highest = max(highest, int(match.group(1)))
    if highest >= MAX_LAYERS:
        raise CheckpointError(
            f"{where}: claims {highest + 1} layers; at most {MAX_LAYERS} are read"
        )
    return highest + 1


def translate(
    spelled: Mapping[str, str], known: Mapping[str, str | None], where: str
) -> dict[str, str]:
    """Canonical name -> key in the file, for every key that is not dropped.

    Args:
        spelled: as `apply_aliases` returns it.
        known: an expanded table.
        where: the file, for errors.

    Raises:
        CheckpointError: the table does not know a key; lists all such keys, and the known name
            that the first resembles.
    """
    unknown = sorted(key for key in spelled if key not in known)
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.8)
        hint = f"; {unknown[0]} resembles {near[0]}" if near else ""
        raise CheckpointError(f"{where}: unknown parameters: {listing(unknown)}{hint}")
    translated: dict[str, str] = {}
    for name, key in spelled.items():
        target = known[name]
        if target is not None:
            translated[target] = key
    return translated


def listing(names: Iterable[str], limit: int = 12) -> str:
    """Names joined by commas; beyond `limit`, a count of the rest."""
    names = list(names)
    text = ", ".join(names[:limit])
    return f"{text} and {len(names) - limit} more" if len(names) > limit else text
