"""A checkpoint as every format gives it and takes it: canonical names, full tensors, a config.

Tensors are not held but described (`stored.StoredTensor`): what a rank needs of one is read from
the files when it is asked for, so that a rank needs memory for its own shard and one tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.names import (
    PARAMETERS,
    VOCABULARY_PARAMETERS,
    Parameter,
    head_part,
    listing,
    parameter,
)
from tpcore.checkpoint.stored import StoredTensor
from tpcore.models.config import BertConfig, padded_vocab_size_for
from tpcore.parallel.group import divide
from tpcore.parallel.sharding import Sharded, Sharding

HEAD_PARTS = {
    frozenset(): None,
    frozenset({"lm"}): "pretraining",
    frozenset({"lm", "binary"}): "pretraining",
    frozenset({"classifier"}): "sequence_classification",
    frozenset({"outputs"}): "question_answering",
}
"""Which parts of `head.*` make which head; a file may say that a classifier is per token."""

HEADS = (
    "pretraining",
    "sequence_classification",
    "token_classification",
    "question_answering",
)
"""Heads that tpcore has; the names of `tpcore.models.heads.HEADS`, known here without its code."""

SIZES = frozenset(
    ("hidden_size", "num_layers", "intermediate_size", "max_position_embeddings", "num_token_types")
)
"""Fields of the configuration that the shapes of the tensors say."""

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a state came from: the facts that `inspect` prints and writers carry along."""

    path: Path
    format: str
    version: str = ""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    iteration: int | None = None
    qkv_layout: str = ""
    lowercase: bool | None = None
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    """All files that hold weights or settings."""
    parts: tuple[tuple[Path, int, int, str], ...] = ()
    """Torch files inside of other files: the file, offset and size there, what errors call it."""
    tokenizer_files: tuple[Path, ...] = ()
    stated: frozenset[str] = SIZES
    """Fields of the configuration that the file itself says; the others are defaults."""
    settings: Mapping[str, Any] | None = None
    """What a .nemo file's model_config.yaml says."""
    keep: object = None
    """Whatever must live as long as tensors are read: a folder that files were unpacked into."""


@dataclass(frozen=True, kw_only=True)
class CanonicalState:
    """Everything that a checkpoint says about a model.

    `config.padded_vocab_size` is the number of rows in the file where the format pads the
    vocabulary, else None. `head` is one of `HEADS`, None, or the file's own
    word for a head that tpcore does not have. `copies` are second copies of tensors, which a file
    of a model with a tied decoder may hold; they must be equal.
    """

    config: BertConfig
    head: str | None
    head_kwargs: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    tensors: Mapping[str, StoredTensor]
    copies: Mapping[str, StoredTensor] = field(default_factory=dict)
    source: Source

    @property
    def vocab_rows(self) -> int:
        """Rows of the vocabulary in the file, padding included."""
        return self.tensors["embeddings.word_embeddings.weight"].shape[0]

    def padded_rows(self, tensor_parallel_size: int) -> int:
        """Rows that a file of Megatron's has at this size, by Megatron's rule."""
        return padded_vocab_size_for(self.config.vocab_size, tensor_parallel_size)

    def full(self, name: str, vocab_rows: int | None = None) -> Tensor:
        """The full tensor, with the vocabulary grown or cut to `vocab_rows`."""
        stored = self.tensors[name]
        tensor = stored.read()
        if name in self.copies:
            self._check_copy(name, tensor, self.copies[name].read())
        if vocab_rows is not None and name in VOCABULARY_PARAMETERS:
            tensor = resize_vocabulary(tensor, vocab_rows)
        return tensor

    def holds(self, rank: int, size: int, vocab_rows: int) -> bool:
        """Whether this process has that shard in memory already."""
        return False

    def shard(self, name: str, rank: int, size: int, vocab_rows: int) -> Tensor:
        """What `rank` of `size` holds of a tensor; owns its memory, and reads little else."""
        stored, sharding = self.tensors[name], sharding_of(name)
        if not isinstance(sharding, Sharded):
            return self.full(name).clone(memory_format=torch.contiguous_format)
        dim = sharding.dim
        rows = stored.shape[dim]
        total = vocab_rows if name in VOCABULARY_PARAMETERS else rows
        length = divide(total, size, name)
        # A rank that holds nothing but padding reads the last row, which padding repeats.
        start, stop = min(rank * length, rows - 1), min((rank + 1) * length, rows)
        piece = stored.narrow(dim, start, stop)
        if name in self.copies:
            self._check_copy(name, piece, self.copies[name].narrow(dim, start, stop))
        return piece if total == rows else resize_vocabulary(piece, length)

    def described_shard(self, name: str, rank: int, size: int, vocab_rows: int) -> StoredTensor:
        """As `shard`, read when it is asked for."""
        stored, sharding = self.tensors[name], sharding_of(name)
        shape = list(stored.shape)
        if isinstance(sharding, Sharded):
            if name in VOCABULARY_PARAMETERS:
                shape[sharding.dim] = vocab_rows
            shape[sharding.dim] = divide(shape[sharding.dim], size, name)
        read = partial(self.shard, name, rank, size, vocab_rows)
        return StoredTensor(tuple(shape), stored.dtype, read)

    def _check_copy(self, name: str, tensor: Tensor, copy: Tensor) -> None:
        if not torch.equal(tensor, copy):
            raise CheckpointError(
                f"{self.source.path}: the decoder's copy of {name} differs from it; models whose "
                "decoder is not tied to the word embeddings are not supported (head=None loads "
                "the encoder alone)"
            )

    def without_head(self) -> CanonicalState:
        """The encoder alone, with its pooler."""
        tensors = {k: v for k, v in self.tensors.items() if not k.startswith("head.")}
        return dataclasses.replace(
            self, head=None, head_kwargs={}, labels=None, tensors=tensors, copies={}
        )


TOKENIZER_FILES = (
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Files of a tokenizer that may lie beside a checkpoint, and travel with it."""


def tokenizer_files(folders: Iterable[Path]) -> tuple[Path, ...]:
    """The tokenizer's files in the first of the folders that has any."""
    for folder in folders:
        found = tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
        if found:
            return found
    return ()


def sharding_of(name: str) -> Sharding:
    """How the full tensor of this canonical name is split over tensor-parallel ranks."""
    return parameter(name).sharding


def resize_vocabulary(tensor: Tensor, rows: int) -> Tensor:
    """Cut to `rows`, or grow by repeating the last row, as Megatron's own converter does."""
    missing = rows - tensor.shape[0]
    if missing <= 0:
        return tensor if missing == 0 else tensor[:rows].clone()
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])


def find_head(names: Iterable[str]) -> str | None:
    """The head that canonical names make up, or the parts of one that tpcore does not have."""
    parts = {head_part(name) for name in names if name.startswith("head.")}
    last = frozenset(part for part in parts if not part.startswith("hidden."))
    if parts != last and not last & {"classifier", "outputs"}:
        last = frozenset(parts)
    return HEAD_PARTS.get(last, "+".join(sorted(parts)))


def head_layers(names: Iterable[str]) -> int:
    """How many linear layers a classifier has."""
    hidden = {head_part(name) for name in names if name.startswith("head.hidden.")}
    return 1 + len(hidden)


def has_pooler(names: Iterable[str]) -> bool:
    """Whether canonical names hold a pooler, or a part of one."""
    return any(name.startswith("pooler.") for name in names)


def sizes_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], num_layers: int, where: str
) -> dict[str, int]:
    """The sizes of a BertConfig that shapes alone give: all but the number of heads.

    Raises:
        CheckpointError: a parameter that no encoder is without is missing or not a matrix.
    """

    def matrix(name: str) -> tuple[int, int]:
        if name not in shapes:
            raise CheckpointError(
                f"{where}: missing parameters: {name}; this is no complete BERT encoder"
            )
        shape = shapes[name]
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"{where}: {name} has shape {list(shape)}; expected a matrix")
        return shape[0], shape[1]

    if num_layers == 0:
        raise CheckpointError(f"{where}: holds no transformer layers; this is no BERT encoder")
    rows, hidden_size = matrix("embeddings.word_embeddings.weight")
    token_types = "embeddings.token_type_embeddings.weight"
    return {
        "vocab_size": rows,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "intermediate_size": matrix("blocks.0.mlp.dense_in.weight")[0],
        "max_position_embeddings": matrix("embeddings.position_embeddings.weight")[0],
        "num_token_types": matrix(token_types)[0] if token_types in shapes else 0,
    }


def expected_shapes(state: CanonicalState) -> dict[str, tuple[int, ...]]:
    """Every parameter that a file with this config and head has, with its full shape."""
    config = state.config
    head_parts = {head_part(name) for name in state.tensors if name.startswith("head.")}
    sizes = {
        "v": state.vocab_rows,
        "p": config.max_position_embeddings,
        "y": config.num_token_types,
        "h": config.hidden_size,
        "3h": 3 * config.hidden_size,
        "f": config.feed_forward_size,
        "l": state.head_kwargs.get("num_labels", 0),
    }

    def shape_of(entry: Parameter) -> tuple[int, ...]:
        return tuple(sizes[dim] if dim in sizes else int(dim) for dim in entry.dims)

    blocks = {name: entry for name, entry in PARAMETERS.items() if name.startswith("blocks.")}
    shapes: dict[str, tuple[int, ...]] = {}
    for pattern, entry in PARAMETERS.items():
        part = pattern.partition(".")[0]
        if part == "blocks":
            # All of layer 0, then all of layer 1, ...: at the first of the block's names.
            for layer in range(config.num_layers):
                name = pattern.replace("{}", str(layer))
                if name in shapes:
                    break
                shapes.update(
                    {
                        key.replace("{}", str(layer)): shape_of(value)
                        for key, value in blocks.items()
                    }
                )
            continue
        absent = (
            (part == "pooler" and not config.add_pooler)
            or (part == "head" and head_part(pattern) not in head_parts)
            or ("y" in entry.dims and config.num_token_types == 0)
        )
        if not absent:
            shapes[pattern] = shape_of(entry)
    return shapes


StateT = TypeVar("StateT", bound=CanonicalState)


def check_complete(state: StateT) -> StateT:
    """Account for every parameter: none missing, none left over, each of the expected shape.

    Returns the state with its tensors in the order of the model.

    Raises:
        CheckpointError: lists what does not fit.
    """
    where = str(state.source.path)
    expected = expected_shapes(state)
    missing = [name for name in expected if name not in state.tensors]
    if missing:
        raise CheckpointError(
            f"{where}: missing parameters: {listing(missing)}; the checkpoint is incomplete"
        )
    extra = [name for name in state.tensors if name not in expected]
    if extra:
        raise CheckpointError(
            f"{where}: parameters that a model of this configuration does not have: "
            f"{listing(extra)}; check num_layers={state.config.num_layers}, "
            f"num_token_types={state.config.num_token_types}, add_pooler={state.config.add_pooler}"
        )
    for name, shape in expected.items():
        stored = state.tensors[name]
        if stored.shape != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(stored.shape)}; expected {list(shape)}"
            )
        if stored.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{where}: {name} has dtype {stored.dtype}; expected floating point"
            )
    ordered = {name: state.tensors[name] for name in expected}
    return dataclasses.replace(state, tensors=ordered)


def check_vocabulary(vocab_size: int, rows: int, where: str, stated: int | None = None) -> None:
    """Refuse a vocabulary that cannot be the one the file was trained with.

    A file that states a size below its rows means that one. Any other has `vocab_size` rows, or as
    many as padding makes of it: up to a multiple of 128 times a tensor-parallel size of up to 8.

    Raises:
        ValueError: names the likely cause.
    """
    if stated is not None and stated < rows:
        if vocab_size == stated:
            return
        raise CheckpointError(
            f"{where}: vocab_size={vocab_size}, but the file says that its vocabulary has {stated} "
            f"entries (the other rows of {rows} are padding): the vocabulary belongs to another "
            "model, or is incomplete"
        )
    padded = {padded_vocab_size_for(vocab_size, size) for size in (1, 2, 4, 8)}
    if vocab_size <= rows < vocab_size + 128 or rows in padded:
        return
    hint = "the vocabulary belongs to another model"
    for known, kind in ((30522, "uncased"), (28996, "cased")):
        if rows == known or rows in {padded_vocab_size_for(known, size) for size in (1, 2, 4, 8)}:
            hint += f"; {rows} rows are those of the {kind} BERT vocabulary ({known} entries)"
    raise CheckpointError(f"{where}: vocab_size={vocab_size}, but the file has {rows} rows: {hint}")


def check_head(state: CanonicalState, writable: Iterable[str]) -> None:
    """Refuse to write a head that a format has no way to say.

    Raises:
        CheckpointError: names the head and what can be written.
    """
    if state.head is not None and state.head not in writable:
        raise CheckpointError(
            f"{state.source.path}: its head ({state.head}) cannot be written there; "
            f"{listing(writable)} can"
        )


def check_tensor_parallel_size(config: BertConfig, size: int) -> None:
    """Refuse a size that heads or feed-forward columns cannot be split over.

    Raises:
        CheckpointError: lists the sizes that would do.
    """
    if not isinstance(size, int) or size < 1:
        raise CheckpointError(f"tensor_parallel_size={size} is not a positive integer")
    try:
        divide(config.num_attention_heads, size, "num_attention_heads")
        divide(config.feed_forward_size, size, "intermediate_size")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
