"""One transformer layer: attention and MLP with norms, dropout and residual connections."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from tpcore.kernels import bias_dropout_residual
from tpcore.layers.attention import PackedSequences, SelfAttention
from tpcore.layers.mlp import MLP
from tpcore.layers.norm import LayerNorm
from tpcore.parallel.collectives import own_slice
from tpcore.parallel.group import TensorParallelGroup
from tpcore.parallel.random import DropoutContext, Site, dropout_stream
from tpcore.parallel.recompute import checkpoint_activations

ActivationCheckpointing: TypeAlias = Literal["full", "selective"] | None


class TransformerBlock(nn.Module):
    """A transformer layer on packed tokens x [t, h], in one of two orders.

        residual before the norm (default)         residual after the norm (post_layernorm)
        a = x + drop(attention(norm1(x)))          u = norm1(x);  a = u + drop(attention(u))
        y = a + drop(mlp(norm2(a)))                w = norm2(a);  y = w + drop(mlp(w))

    norm1 is ``input_norm``, norm2 ``post_attention_norm``. The second order is Megatron-LM's
    apply_residual_connection_post_layernorm; stacked, and closed by a final norm, it is the
    original BERT (arXiv 1810.04805) with its norms shifted by one. Biases of the two output
    projections are added by the kernel that also does dropout and the residual.

    Args:
        hidden_size: h.
        num_attention_heads: n; a multiple of the group's size.
        intermediate_size: f; a multiple of the group's size.
        tp: the ranks that share the weights.
        layer_number: counts from 0; numbers the dropout streams.
        num_layers: layers in the whole network; scales the initial output projections, and numbers
            the stream of ``input_dropout``.
        layernorm_eps: added to the variance.
        gelu: see MLP.
        hidden_dropout: probability for the two outputs (and the input).
        attention_dropout: probability for attention probabilities.
        post_layernorm: take the residual after the norm.
        input_dropout: dropout after ``input_norm`` (original BERT, where the embedding dropout
            comes after the embedding norm; layer 0 only).
        causal: see SelfAttention.
        init_std: weights are drawn from N(0, init_std), those of the two output projections from
            N(0, init_std / sqrt(2 num_layers)), as in Megatron-LM; biases are zero.
        sequence_parallel: x and y are this rank's share of the tokens, [t/tp, h], contiguous and in
            rank order: norms, dropout and residuals run on that share alone. t must be a multiple
            of the group's size.
        accumulate_main_grad: see ColumnParallelLinear.
        activation_checkpointing: "full" keeps x alone for the backward, which computes the block
            again; "selective" does so for the scores and probabilities of attention only; None
            keeps everything.

    Raises:
        ValueError: a size cannot be split over the group, or ``gelu`` or
            ``activation_checkpointing`` is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        intermediate_size: int,
        *,
        tp: TensorParallelGroup,
        layer_number: int,
        num_layers: int,
        layernorm_eps: float = 1e-5,
        gelu: str = "none",
        hidden_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        post_layernorm: bool = False,
        input_dropout: bool = False,
        causal: bool = False,
        init_std: float = 0.02,
        sequence_parallel: bool = False,
        accumulate_main_grad: bool = False,
        activation_checkpointing: ActivationCheckpointing = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation_checkpointing not in (None, "full", "selective"):
            raise ValueError(
                f"activation_checkpointing={activation_checkpointing!r} is unknown; expected "
                "'full', 'selective' or None"
            )
        self.activation_checkpointing = activation_checkpointing
        self.sequence_parallel, self.tp = sequence_parallel, tp
        self.hidden_dropout = hidden_dropout
        self.post_layernorm = post_layernorm
        self.input_dropout = input_dropout
        self.input_stream = dropout_stream(num_layers, Site.EMBEDDING)
        self.attention_stream = dropout_stream(layer_number, Site.ATTENTION_OUTPUT)
        self.mlp_stream = dropout_stream(layer_number, Site.MLP_OUTPUT)
        init_method = partial(nn.init.normal_, std=init_std)
        output_init_method = partial(nn.init.normal_, std=init_std / math.sqrt(2 * num_layers))

        def norm() -> LayerNorm:
            return LayerNorm(
                hidden_size,
                layernorm_eps,
                tp=tp,
                sequence_parallel=sequence_parallel,
                device=device,
                dtype=dtype,
            )

        self.input_norm = norm()
        self.attention = SelfAttention(
            hidden_size,
            num_attention_heads,
            tp=tp,
            attention_dropout=attention_dropout,
            layer_number=layer_number,
            causal=causal,
            init_method=init_method,
            output_init_method=output_init_method,
            sequence_parallel=sequence_parallel,
            accumulate_main_grad=accumulate_main_grad,
            recompute_probabilities=activation_checkpointing == "selective",
            device=device,
            dtype=dtype,
        )
        self.post_attention_norm = norm()
        self.mlp = MLP(
            hidden_size,
            intermediate_size,
            tp=tp,
            gelu=gelu,
            init_method=init_method,
            output_init_method=output_init_method,
            sequence_parallel=sequence_parallel,
            accumulate_main_grad=accumulate_main_grad,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        x: Tensor,
        sequences: PackedSequences,
        dropout: DropoutContext | None = None,
        *,
        rows: Tensor | None = None,
    ) -> Tensor:
        """X [t, h] -> y [t, h]; sequence-parallel [t/tp, h].

        Args:
            x: packed tokens.
            sequences: the grouping of all t tokens.
            dropout: seed and row ids of all t tokens; None, or a module in evaluation: no dropout.
            rows: int64 [r], tokens whose y is wanted: y is [r, h], and everything behind the
                products of attention is computed for these alone.

        Raises:
            ValueError: ``sequences`` has another number of tokens than x, or ``rows`` come with
                sequence parallelism.
        """
        if rows is not None and self.sequence_parallel:
            raise ValueError(
                "rows cannot be chosen with sequence_parallel, where no rank has all tokens; "
                "choose them from the gathered output"
            )
        if not self.training:
            dropout = None
        if self.activation_checkpointing == "full" and torch.is_grad_enabled():
            return checkpoint_activations(self._forward, x, sequences, dropout, rows)
        return self._forward(x, sequences, dropout, rows)

    def _forward(
        self,
        x: Tensor,
        sequences: PackedSequences,
        dropout: DropoutContext | None,
        rows: Tensor | None,
    ) -> Tensor:
        normed = self.input_norm(x)
        if self.input_dropout:
            normed = self._add(normed, None, None, self.input_stream, dropout)
        output, bias = self.attention(normed, sequences, dropout, rows=rows)
        residual = normed if self.post_layernorm else x
        if rows is not None:
            residual = residual.index_select(0, rows)
            if dropout is not None:
                dropout = replace(dropout, row_ids=dropout.row_ids.index_select(0, rows))
        x = self._add(output, bias, residual, self.attention_stream, dropout)
        normed = self.post_attention_norm(x)
        output, bias = self.mlp(normed)
        residual = normed if self.post_layernorm else x
        return self._add(output, bias, residual, self.mlp_stream, dropout)

    def _add(
        self,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        stream: int,
        dropout: DropoutContext | None,
    ) -> Tensor:
        if dropout is None or self.hidden_dropout == 0:
            return bias_dropout_residual(x, bias, residual)
        row_ids = dropout.row_ids
        if self.sequence_parallel:
            row_ids = own_slice(row_ids, self.tp, 0)
        return bias_dropout_residual(
            x,
            bias,
            residual,
            p=self.hidden_dropout,
            seed=dropout.seed,
            stream=stream,
            row_ids=row_ids,
        )
