"""A configuration that comes beside a checkpoint, as NeMo's users pass it: JSON, or a YAML node.

It says what a file without arguments cannot: the number of heads, the GeLU, the epsilon. Where the
file says so itself, the two must agree.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcore.checkpoint.errors import CheckpointError, shown
from tpcore.checkpoint.formats.huggingface_config import read_json
from tpcore.checkpoint.state import CanonicalState
from tpcore.models.config import PRESETS, BertConfig

_ALIASES = {
    "max_seq_length": "max_position_embeddings",
    "num_tokentypes": "num_token_types",
    "ffn_hidden_size": "intermediate_size",
    "layernorm_epsilon": "layernorm_eps",
    "apply_residual_connection_post_layernorm": "post_layernorm",
    "init_method_std": "init_std",
}
_GELUS = ("bias_gelu_fusion", "openai_gelu", "onnx_safe")
# The vocabulary is counted in the checkpoint, the rest is about other things than the encoder.
_WITHOUT_MEANING = (
    *("vocab_size", "vocab_file", "tokenizer_type", "lazy_mpu_init", "padded_vocab_size"),
    *("make_vocab_size_divisible_by", "bias_dropout_fusion", "masked_softmax_fusion"),
    *("scaled_masked_softmax_fusion", "apply_query_key_layer_scaling", "fp16", "bf16"),
)


@dataclass(frozen=True)
class Stated:
    """Fields of BertConfig, and where they were written."""

    fields: Mapping[str, Any]
    where: str


def stated_config(
    config_file: str | Path | None = None, config: Mapping[str, Any] | str | None = None
) -> Stated | None:
    """What a configuration says.

    Args:
        config_file: JSON, with hyphens or underscores in its names; wins over `config`, as in NeMo.
        config: the same names in a mapping, or the name of a preset.

    Raises:
        CheckpointError: the file cannot be read, or a name is unknown.
    """
    if config_file is not None:
        where, values = f"config_file={str(config_file)!r}", read_json(Path(config_file))
    elif isinstance(config, str):
        if config not in PRESETS:
            raise CheckpointError(f"config={config!r} is unknown; presets are {', '.join(PRESETS)}")
        preset = PRESETS[config].to_dict()
        where = f"config={config!r}"
        names = ("hidden_size", "num_layers", "num_attention_heads", "max_position_embeddings")
        values = {name: preset[name] for name in names}
    elif config is not None:
        where, values = "config", dict(config)
    else:
        return None
    known = set(BertConfig.__dataclass_fields__)
    fields: dict[str, Any] = {}
    switches: dict[str, bool] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        name = _ALIASES.get(name, name)
        if name in _WITHOUT_MEANING or value is None:
            continue
        if name in _GELUS:
            switches[name] = bool(value)
        elif name in known:
            fields[name] = value
        else:
            near = difflib.get_close_matches(name, sorted(known | {*_ALIASES, *_GELUS}), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise CheckpointError(f"unknown key {shown(key)} in {where}; {hint}")
    if switches:
        unfused = "tanh" if switches.get("openai_gelu") else "none"
        if switches.get("onnx_safe") and unfused == "none":
            unfused = "erf_1.41421"
        fields["gelu"] = "tanh" if switches.get("bias_gelu_fusion") else unfused
        fields["lm_head_gelu"] = unfused
    return Stated(fields, where)


def apply_stated(state: CanonicalState, stated: Stated) -> CanonicalState:
    """Take from a configuration what the file does not say.

    Raises:
        CheckpointError: the two contradict each other; shows both values.
    """
    have = state.config.to_dict()
    changes: dict[str, Any] = {}
    for name, value in stated.fields.items():
        if have[name] == value:
            continue
        if name in state.source.stated:
            raise CheckpointError(
                f"{state.source.path}: the file says {name}={have[name]!r}, but {stated.where} "
                f"says {name}={shown(value)}; use the configuration of the file, or none"
            )
        changes[name] = value
    try:
        return dataclasses.replace(state, config=state.config.replace(**changes))
    except ValueError as error:
        raise CheckpointError(f"{stated.where}: {error}") from error
