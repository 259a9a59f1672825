"""What `inspect` finds in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpcore.checkpoint.errors import printable
from tpcore.checkpoint.names import VOCABULARY_PARAMETERS
from tpcore.checkpoint.state import CanonicalState, sharding_of
from tpcore.models.config import BertConfig
from tpcore.parallel.sharding import Sharded

_EXACT_GELU = "erf"
"""What `BertConfig.gelu` calls "none", after torch's `approximate`: exact, with erf."""


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter under its canonical name, with the shape it has unsharded."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sharding: str
    """`rows` or `columns` where ranks hold slices of it, `replicated` where each holds it whole."""
    padding: int = 0
    """How many of its rows only pad the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """Format, sizes, configuration and parameters of a checkpoint; print it for a readable form."""

    path: str
    format: str
    version: str
    iteration: int | None
    tensor_parallel_size: int
    pipeline_parallel_size: int
    qkv_layout: str
    config: BertConfig
    vocab_rows: int
    head: str | None
    head_kwargs: Mapping[str, Any]
    labels: tuple[str, ...] | None
    notes: tuple[str, ...]
    parameters: tuple[ParameterInfo, ...]

    @classmethod
    def from_state(cls, state: CanonicalState) -> CheckpointInfo:
        """The facts of a state; reads no tensor."""
        source = state.source
        padding = state.vocab_rows - state.config.vocab_size
        return cls(
            path=str(source.path),
            format=source.format,
            version=source.version,
            iteration=source.iteration,
            tensor_parallel_size=source.tensor_parallel_size,
            pipeline_parallel_size=source.pipeline_parallel_size,
            qkv_layout=source.qkv_layout,
            config=state.config,
            vocab_rows=state.vocab_rows,
            head=state.head,
            head_kwargs=dict(state.head_kwargs),
            labels=state.labels,
            notes=source.notes,
            parameters=tuple(
                ParameterInfo(
                    name,
                    tensor.shape,
                    str(tensor.dtype).removeprefix("torch."),
                    _in_words(name),
                    padding if name in VOCABULARY_PARAMETERS else 0,
                )
                for name, tensor in state.tensors.items()
            ),
        )

    @property
    def num_parameters(self) -> int:
        """Numbers in the file, padding of the vocabulary included."""
        total = 0
        for entry in self.parameters:
            size = 1
            for dim in entry.shape:
                size *= dim
            total += size
        return total

    @property
    def missing(self) -> tuple[str, ...]:
        """Parts of a pre-trained model that the file does not hold."""
        names = {entry.name for entry in self.parameters}
        parts = {
            "pooler": "pooler.dense.weight",
            "token type embeddings": "embeddings.token_type_embeddings.weight",
            "masked-LM head": "head.lm.bias",
            "binary head": "head.binary.weight",
        }
        return tuple(part for part, name in parts.items() if name not in names)

    @property
    def possible_tensor_parallel_sizes(self) -> tuple[int, ...]:
        """The sizes up to 64 that this model can be split over."""
        heads, columns = self.config.num_attention_heads, self.config.feed_forward_size
        return tuple(n for n in range(1, 65) if heads % n == 0 and columns % n == 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "path": self.path,
            "format": self.format,
            "version": self.version,
            "iteration": self.iteration,
            "tensor_parallel_size": self.tensor_parallel_size,
            "pipeline_parallel_size": self.pipeline_parallel_size,
            "possible_tensor_parallel_sizes": list(self.possible_tensor_parallel_sizes),
            "qkv_layout": self.qkv_layout,
            "config": self.config.to_dict(),
            "vocab_rows": self.vocab_rows,
            "head": self.head,
            "head_kwargs": dict(self.head_kwargs),
            "labels": None if self.labels is None else list(self.labels),
            "notes": list(self.notes),
            "missing": list(self.missing),
            "num_parameters": self.num_parameters,
            "parameters": [
                {
                    "name": entry.name,
                    "shape": list(entry.shape),
                    "dtype": entry.dtype,
                    "sharding": entry.sharding,
                    "padding": entry.padding,
                }
                for entry in self.parameters
            ],
        }

    def __str__(self) -> str:
        """Facts in two columns, then the configuration, then one line per parameter."""
        padding = self.vocab_rows - self.config.vocab_size
        rows = f"{self.vocab_rows} rows"
        if padding:
            rows += f", {padding} of them padding"
        head = self.head or "none"
        if self.head_kwargs:
            head += " (" + ", ".join(f"{k}={v}" for k, v in self.head_kwargs.items()) + ")"
        megatron = self.format.startswith("Megatron")
        facts = {
            "path": self.path,
            "format": f"{self.format} {self.version}".strip(),
            "iteration": str(self.iteration or "release") if megatron else "",
            "written for": f"tensor-parallel size {self.tensor_parallel_size}, "
            f"pipeline-parallel size {self.pipeline_parallel_size}"
            if megatron
            else "",
            "splits over": ", ".join(map(str, self.possible_tensor_parallel_sizes)),
            "q/k/v rows": self.qkv_layout,
            "vocabulary": rows,
            "head": head,
            "labels": ", ".join(self.labels or ()),
            "not in the file": ", ".join(self.missing),
            "notes": "; ".join(self.notes),
            "parameters": f"{self.num_parameters:,}",
        }
        lines = [f"{key:<16}{value}" for key, value in facts.items() if value]
        lines += ["", "configuration"]
        lines += [
            f"  {key:<30}{_EXACT_GELU if 'gelu' in key and value == 'none' else value}"
            for key, value in self.config.to_dict().items()
        ]
        lines += ["", "parameters"]
        width = max(len(entry.name) for entry in self.parameters) + 2
        lines += [
            f"  {entry.name:<{width}}{list(entry.shape)!s:<16}{entry.dtype:<10}{entry.sharding}"
            + (f", the last {entry.padding} padding" if entry.padding else "")
            for entry in self.parameters
        ]
        return "\n".join(map(printable, lines))  # labels and names are the file's


def _in_words(name: str) -> str:
    sharding = sharding_of(name)
    if isinstance(sharding, Sharded):
        return "rows" if sharding.dim == 0 else "columns"
    return "replicated"
