"""The configuration of an encoder: frozen, validated once, free of torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Gelu = Literal["none", "tanh", "erf_1.41421"]

VOCAB_DIVISOR = 128
"""Megatron pads a vocabulary to a multiple of this times the tensor-parallel size."""


def padded_vocab_size_for(vocab_size: int, tp_size: int = 1, divisor: int = VOCAB_DIVISOR) -> int:
    """The smallest multiple of `divisor * tp_size` that is at least `vocab_size`.

    Megatron-LM's rule (`make_vocab_size_divisible_by`): 30522 becomes 30592 at size 1 and 30720
    at sizes 2, 4 and 8, so the padded size belongs to a tensor-parallel size, the true one to
    the model.
    """
    multiple = divisor * tp_size
    return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes and switches of a BERT encoder. The defaults are Megatron's 345m model.

    Raises:
        ValueError: a size is not positive, a probability is not in [0, 1), the heads do not
            divide `hidden_size`, or `gelu` is unknown.
    """

    vocab_size: int
    """Rows of the vocabulary without padding."""
    hidden_size: int = 1024
    num_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int | None = None
    """Width of the feed-forward layer; None means `4 * hidden_size`."""
    max_position_embeddings: int = 512
    num_token_types: int = 2
    layernorm_eps: float = 1e-5
    """1e-5 in Megatron, 1e-12 in Hugging Face checkpoints."""
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    gelu: Gelu = "none"
    """`none`: exact, with erf; `tanh`: Megatron's fused kernel; `erf_1.41421`: NeMo <= 1.4."""
    lm_head_gelu: Gelu | None = None
    """GeLU of the masked-LM head; None means `gelu`. Megatron's fused tanh never reached it."""
    post_layernorm: bool = False
    """The residual is taken after the norm (original BERT) instead of before it (Megatron)."""
    embedding_dropout_after_norm: bool = False
    """The embedding dropout follows the first norm (original BERT) instead of preceding it."""
    padded_vocab_size: int | None = None
    """Rows that the embedding table has; None: `padded_vocab_size_for(vocab_size, tp.size)`."""
    loss_over_padding: bool = False
    """Whether the masked-LM loss has the padded columns in its softmax, as Megatron's own has."""
    add_pooler: bool = True
    """Whether there is a dense + tanh on the first token of each sequence."""
    init_std: float = 0.02
    """Standard deviation of new weights; output layers get `init_std / sqrt(2 num_layers)`."""

    def __post_init__(self) -> None:
        if self.intermediate_size is None and isinstance(self.hidden_size, int):
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        if self.lm_head_gelu is None:
            object.__setattr__(self, "lm_head_gelu", self.gelu)
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} is not a positive integer")
            if value > _LARGEST:
                raise ValueError(f"{name}={value!r} is too large; at most {_LARGEST} is supported")
        types = self.num_token_types
        if not isinstance(types, int) or isinstance(types, bool) or not 0 <= types <= _LARGEST:
            kind = "negative" if isinstance(types, int) and types < 0 else "no such number"
            raise ValueError(f"num_token_types={types!r} is {kind}; use 0 for none")
        for name in ("hidden_dropout", "attention_dropout"):
            value = getattr(self, name)
            if not (_is_number(value) and 0.0 <= value < 1.0):
                raise ValueError(f"{name}={value!r} is not a probability in [0, 1)")
        if not (_is_number(self.layernorm_eps) and 0 < self.layernorm_eps < math.inf):
            raise ValueError(f"layernorm_eps={self.layernorm_eps!r} is not positive")
        if not (_is_number(self.init_std) and 0 <= self.init_std < math.inf):
            raise ValueError(f"init_std={self.init_std!r} is not zero or a positive number")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is neither true nor false")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} cannot be split over "
                f"num_attention_heads={self.num_attention_heads}; use a divisor of the hidden size"
            )
        for name in ("gelu", "lm_head_gelu"):
            if getattr(self, name) not in get_args(Gelu):
                known = ", ".join(get_args(Gelu))
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {known}")
        padded = self.padded_vocab_size
        if padded is not None and (not isinstance(padded, int) or isinstance(padded, bool)):
            raise ValueError(f"padded_vocab_size={padded!r} is not an integer, or None")
        if padded is not None and padded < self.vocab_size:
            raise ValueError(
                f"padded_vocab_size={self.padded_vocab_size} is below vocab_size={self.vocab_size}"
            )

    @property
    def masked_lm_gelu(self) -> Gelu:
        """`lm_head_gelu`, never None."""
        assert self.lm_head_gelu is not None
        return self.lm_head_gelu

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def feed_forward_size(self) -> int:
        """`intermediate_size`, never None."""
        assert self.intermediate_size is not None
        return self.intermediate_size

    def replace(self, **changes: Any) -> BertConfig:
        """A copy with some fields changed; an unknown name is a ValueError."""
        _check_names(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BertConfig:
        """The inverse of `to_dict`. Unknown names are refused, with the nearest known one."""
        _check_names(values)
        if "vocab_size" not in values:
            raise ValueError("vocab_size is missing from the model configuration")
        return cls(**values)


_SWITCHES = (
    "post_layernorm",
    "embedding_dropout_after_norm",
    "loss_over_padding",
    "add_pooler",
)
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)


_LARGEST = 2**24
"""Of any size: beyond every model, and below what makes an allocator overflow."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_names(values: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(BertConfig)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{name} is not a field of the model configuration; {hint}")


PRESETS = {
    "megatron-bert-345m-uncased": BertConfig(vocab_size=30522),
    "megatron-bert-345m-cased": BertConfig(vocab_size=28996),
}
"""Configurations of released models whose files carry none."""
