"""The BERT encoder: embeddings, blocks, final norm, pooler, and a head on top."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpcore.kernels import bias_dropout_residual
from tpcore.layers.block import ActivationCheckpointing, TransformerBlock
from tpcore.layers.embedding import VocabParallelEmbedding
from tpcore.layers.norm import LayerNorm
from tpcore.layers.rounded_rows import missing_rows, row_step
from tpcore.models import compiled
from tpcore.models.config import BertConfig, padded_vocab_size_for
from tpcore.models.heads import Head, SequenceClassificationHead
from tpcore.models.output import BertOutput
from tpcore.models.packing import PackedBatch, pack, unpack
from tpcore.parallel.collectives import copy_all_to, gather_from, own_slice
from tpcore.parallel.group import TensorParallelGroup
from tpcore.parallel.random import DropoutContext, Site, dropout_stream
from tpcore.parallel.sharding import Sharding, sharding_table


class BertModel(nn.Module):
    """A tensor-parallel BERT on packed tokens (arXiv 1810.04805; arXiv 1909.08053, figure 7).

    Megatron-BERT (pre-layernorm) and original BERT (`post_layernorm`) are the same module: the
    embedding norm of BERT is the input norm of block 0, its output norm of block i the input norm
    of block i + 1, its last one the final norm.

    With `tp` of more than one rank every rank builds this model and calls it with the same batch;
    weights are drawn whole from torch's default generator and then sharded, so equal seeds on all
    ranks give the same model at every size.

    Args:
        config: sizes and switches.
        tp: the ranks that share the weights; None: this process alone.
        head: what comes on top of the encoder.
        device: where the parameters live.
        dtype: of the parameters.
        sequence_parallel: outside of attention and the matrix products each rank computes its
            share of the tokens, [t/tp, h], and keeps that share alone for the backward. The number
            of tokens is filled up to a multiple of the group's size by a dummy sequence that
            nothing returned depends on, unless `pack` has done so. Outputs are whole, as without.
        activation_checkpointing: what the blocks compute again in the backward; see
            TransformerBlock.
        accumulate_main_grad: the linear layers of the blocks add their weight gradients to
            `weight.main_grad`; see ColumnParallelLinear.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        tp: TensorParallelGroup | None = None,
        head: Head | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        sequence_parallel: bool = False,
        activation_checkpointing: ActivationCheckpointing = None,
        accumulate_main_grad: bool = False,
    ) -> None:
        super().__init__()
        tp = TensorParallelGroup.single() if tp is None else tp
        self.config = config
        self.tp = tp
        self.sequence_parallel = sequence_parallel
        self.embeddings = Embeddings(
            config, tp=tp, sequence_parallel=sequence_parallel, device=device, dtype=dtype
        )
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config.hidden_size,
                config.num_attention_heads,
                config.feed_forward_size,
                layer_number=i,
                tp=tp,
                layernorm_eps=config.layernorm_eps,
                gelu=config.gelu,
                hidden_dropout=config.hidden_dropout,
                attention_dropout=config.attention_dropout,
                post_layernorm=config.post_layernorm,
                input_dropout=config.embedding_dropout_after_norm and i == 0,
                num_layers=config.num_layers,
                init_std=config.init_std,
                sequence_parallel=sequence_parallel,
                accumulate_main_grad=accumulate_main_grad,
                activation_checkpointing=activation_checkpointing,
                device=device,
                dtype=dtype,
            )
            for i in range(config.num_layers)
        )
        self.final_norm = LayerNorm(
            config.hidden_size,
            config.layernorm_eps,
            tp=tp,
            sequence_parallel=sequence_parallel,
            device=device,
            dtype=dtype,
        )
        self.pooler = Pooler(config, device=device, dtype=dtype) if config.add_pooler else None
        self.head = head
        self.is_compiled = False

    def compile_encoder(self) -> None:
        """From now on run embeddings, blocks and final norm as one graph of torch.compile.

        Results, dropout included, are those of before. Batches whose attention no fused kernel
        serves (`tpcore.models.compiled`) still run without a graph.

        Raises:
            ValueError: the model has an option that cannot be in a graph.
        """
        reason = compiled.refusal(self)
        if reason:
            raise ValueError(f"the encoder cannot be compiled with {reason}")
        self.is_compiled = True

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Any = None,
        *,
        sample_ids: Tensor | None = None,
        seed: Tensor | int | None = None,
    ) -> BertOutput:
        """Encode a padded batch.

        Args:
            input_ids: int [b, s].
            attention_mask: [b, s], 1 = attend, 0 = padding; None: all tokens are real.
            token_type_ids: int [b, s]; None: zeros.
            labels: what the head asks for; None: no loss.
            sample_ids: int64 [b], the samples' names in the dropout key; None: 0 .. b-1.
            seed: seeds the dropout of this call in training, the same on every rank of `tp`;
                None: drawn from torch's default CPU generator.
        """
        packed = pack(input_ids, attention_mask, token_type_ids, sample_ids)
        if labels is not None and self.head is not None and self.head.labels_are_per_token:
            labels = _pack_labels(labels, packed)
        output = self.forward_packed(packed, labels, seed)
        return _unpack_output(output, packed, self.head)

    def forward_packed(
        self,
        packed: PackedBatch,
        labels: Any = None,
        seed: Tensor | int | None = None,
        *,
        hidden_states: bool = True,
    ) -> BertOutput:
        """Encode packed tokens; per-token results, and labels, stay packed, `[t, ...]`.

        A dummy sequence at the end of the batch is no part of them.

        Args:
            packed: the batch.
            labels: what the head asks for; None: no loss.
            seed: as in `forward`.
            hidden_states: False: only what the head computes is wanted. Where that depends on the
                first tokens alone (a sequence classification head with a pooler), the last block
                computes no others behind its attention, and `last_hidden_state` is theirs, [b, h].
        """
        if labels is not None and self.head is None:
            raise ValueError("labels were given, but this model has no head; build it with one")
        packed = packed.padded_to(self._token_multiple(packed))
        self.embeddings.check_lengths(packed)
        rows = None
        if self.reads_first_tokens and not hidden_states:
            rows = packed.first_tokens
            rows = F.pad(rows, (0, missing_rows(self._some_weight, len(rows))))
        as_graph = self.is_compiled and compiled.takes(self, packed)
        if as_graph:
            packed = compiled.with_symbolic_sizes(packed)
        dropout = self._dropout_context(packed, seed)
        if as_graph:
            x = compiled.encode(self, packed, dropout, rows)
        else:
            x = self.encode(packed, dropout, rows)
        if self.sequence_parallel:
            x = gather_from(x, self.tp, dim=0)
        x = x[: packed.num_real_tokens if rows is None else len(packed.first_tokens)]
        packed = packed.without_padding()
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(x if rows is not None else x[packed.first_tokens])
        output = BertOutput(last_hidden_state=x, pooler_output=pooled)
        if self.head is None:
            return output
        return self.head(output, packed, labels, dropout, self.embeddings.word_embeddings)

    def encode(
        self, packed: PackedBatch, dropout: DropoutContext | None, rows: Tensor | None = None
    ) -> Tensor:
        """The normed output of the last block, [t, h]; sequence-parallel [t/tp, h].

        With `rows`, int64 [r], it is that of these tokens, [r, h].
        All tensors, no check of them: this is what `compile_encoder` makes a graph of.
        """
        x = self.embeddings(packed, dropout)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = block(x, packed.sequences, dropout, rows=rows if i == last else None)
        return self.final_norm(x)

    @property
    def reads_first_tokens(self) -> bool:
        """Whether the head reads no other tokens, and the last block can do without them."""
        first_only = isinstance(self.head, SequenceClassificationHead) and self.head.pooler
        return bool(first_only) and not self.sequence_parallel

    def sharding_table(self) -> dict[str, Sharding]:
        """How each parameter is split over the tensor-parallel ranks, by name."""
        return sharding_table(self)

    def _token_multiple(self, packed: PackedBatch) -> int:
        """What the number of tokens has to be a multiple of, or had better be."""
        multiple = self.tp.size if self.sequence_parallel else 1
        return math.lcm(multiple, row_step(self._some_weight, packed.num_real_tokens))

    @property
    def _some_weight(self) -> Tensor:
        """For its device and dtype, which are those of all."""
        return self.embeddings.position_embeddings.weight

    def _dropout_context(
        self, packed: PackedBatch, seed: Tensor | int | None
    ) -> DropoutContext | None:
        if not self.training:
            return None
        if seed is None:
            seed = torch.randint(2**62, (1,))
        if not isinstance(seed, Tensor):
            seed = torch.tensor([seed], dtype=torch.int64)
        device = packed.row_ids.device
        return DropoutContext(seed=seed.reshape(1).to(device), row_ids=packed.row_ids)


class Embeddings(nn.Module):
    """word + position + token type, then dropout unless the first norm comes before it."""

    def __init__(
        self,
        config: BertConfig,
        *,
        tp: TensorParallelGroup,
        sequence_parallel: bool = False,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.sequence_parallel = sequence_parallel
        hidden, std = config.hidden_size, config.init_std
        self.dropout = 0.0 if config.embedding_dropout_after_norm else config.hidden_dropout
        self.stream = dropout_stream(config.num_layers, Site.EMBEDDING)
        self.word_embeddings = VocabParallelEmbedding(
            config.vocab_size,
            hidden,
            tp=tp,
            padded_num_embeddings=config.padded_vocab_size
            or padded_vocab_size_for(config.vocab_size, tp.size),
            init_method=partial(nn.init.normal_, std=std),
            sequence_parallel=sequence_parallel,
            device=device,
            dtype=dtype,
        )
        self.position_embeddings = _table(
            config.max_position_embeddings, hidden, std, device, dtype
        )
        self.token_type_embeddings = (
            _table(config.num_token_types, hidden, std, device, dtype)
            if config.num_token_types
            else None
        )

    def check_lengths(self, packed: PackedBatch) -> None:
        """That there is a position for every token.

        Raises:
            ValueError: a sequence is too long.
        """
        positions = self.position_embeddings.num_embeddings
        lengths = packed.sequences.lengths
        longest = max(lengths[:-1] if packed.num_padding else lengths)
        if longest > positions:
            raise ValueError(
                f"a sequence of {longest} tokens exceeds max_position_embeddings={positions}; "
                "truncate it or split it into windows"
            )

    def forward(self, packed: PackedBatch, dropout: DropoutContext | None) -> Tensor:
        x = self.word_embeddings(packed.input_ids)
        position_ids, type_ids = packed.position_ids, packed.token_type_ids
        row_ids = packed.row_ids
        types = self.token_type_embeddings
        tables = [self.position_embeddings.weight, None if types is None else types.weight]
        if self.sequence_parallel:
            # x is this rank's share of the tokens already.
            position_ids, type_ids, row_ids = (
                own_slice(ids, self.tp, 0) for ids in (position_ids, type_ids, row_ids)
            )
            tables = copy_all_to(tables, self.tp)
        for ids, table in zip((position_ids, type_ids), tables, strict=True):
            if table is not None:
                x = x + F.embedding(ids, table)
        if dropout is None or self.dropout == 0:
            return x
        return bias_dropout_residual(
            x, p=self.dropout, seed=dropout.seed, stream=self.stream, row_ids=row_ids
        )


class Pooler(nn.Module):
    """`tanh(x W^T + b)` on the first token of each sequence."""

    def __init__(
        self,
        config: BertConfig,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        hidden = config.hidden_size
        weight = torch.empty(hidden, hidden).normal_(std=config.init_std)
        self.dense = nn.Linear(hidden, hidden, device="meta", dtype=dtype)
        self.dense.weight = nn.Parameter(weight.to(device=device, dtype=dtype))
        self.dense.bias = nn.Parameter(torch.zeros(hidden, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x))


def _table(
    rows: int,
    columns: int,
    std: float,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Embedding:
    weight = torch.empty(rows, columns).normal_(std=std).to(device=device, dtype=dtype)
    return nn.Embedding.from_pretrained(weight, freeze=False)


def _pack_labels(labels: Any, packed: PackedBatch) -> Any:
    if isinstance(labels, tuple):
        return (_pack_labels(labels[0], packed), *labels[1:])
    if labels.shape != packed.shape:
        raise ValueError(
            f"labels has shape {list(labels.shape)}; expected that of input_ids, "
            f"{list(packed.shape or ())}"
        )
    return labels.reshape(-1)[packed.padded_index]


def _unpack_output(output: BertOutput, packed: PackedBatch, head: Head | None) -> BertOutput:
    per_token = ["last_hidden_state", "prediction_logits"]
    if head is not None and head.logits_are_per_token:
        per_token.append("logits")
    changes: dict[str, Tensor] = {}
    for name in per_token:
        value = getattr(output, name)
        if value is not None:
            changes[name] = unpack(value, packed)
    for name in ("start_logits", "end_logits"):
        value = getattr(output, name)
        if value is not None:
            padding = unpack(torch.ones_like(packed.row_ids), packed) == 0
            changes[name] = unpack(value, packed).masked_fill(padding, -torch.inf)
    return dataclasses.replace(output, **changes)
