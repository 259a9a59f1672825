"""A small GPT from tpcore's own layers: packed tokens, the group as an argument, keyed dropout."""

from __future__ import annotations

from functools import partial

import torch
from gpt_config import Config
from torch import Tensor, nn

from tpcore.kernels import bias_dropout_residual
from tpcore.layers import (
    LayerNorm,
    PackedSequences,
    TransformerBlock,
    VocabParallelEmbedding,
    column_parallel_linear,
    vocab_parallel_cross_entropy,
)
from tpcore.parallel import (
    DropoutContext,
    Site,
    TensorParallelGroup,
    dropout_stream,
    make_row_ids,
)


class GPT(nn.Module):
    """Next-token loss of bytes. Dropout has the same masks at every tensor-parallel size."""

    def __init__(self, config: Config, tp: TensorParallelGroup) -> None:
        super().__init__()
        self.config, self.tp = config, tp
        init = partial(nn.init.normal_, std=config.init_std)
        self.word_embeddings = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, tp=tp, init_method=init
        )
        self.position_embeddings = nn.Parameter(torch.empty(config.max_length, config.hidden_size))
        init(self.position_embeddings.data)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config.hidden_size,
                config.num_heads,
                4 * config.hidden_size,
                tp=tp,
                layer_number=i,
                num_layers=config.num_layers,
                gelu="tanh",
                causal=True,
                hidden_dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                init_std=config.init_std,
            )
            for i in range(config.num_layers)
        )
        self.final_norm = LayerNorm(config.hidden_size)

    def forward(self, tokens: Tensor, targets: Tensor, sample_ids: Tensor, seed: int) -> Tensor:
        """Mean loss of a batch.

        Args:
            tokens: int64 [b, s].
            targets: int64 [b, s], the tokens that follow.
            sample_ids: int64 [b], the names of the samples in the dropout keys.
            seed: of the dropout of this step; the same on every rank.
        """
        b, s = tokens.shape
        device = tokens.device
        sequences = PackedSequences.from_lengths([s] * b, device)
        positions = torch.arange(s, device=device)
        row_ids = make_row_ids(sample_ids[:, None], positions).reshape(-1)
        seeds = torch.tensor([seed], device=device)
        dropout = DropoutContext(seeds, row_ids) if self.training else None
        x = self.word_embeddings(tokens) + self.position_embeddings[:s]
        x = x.view(b * s, -1)
        if dropout is not None and self.config.dropout > 0:
            stream = dropout_stream(self.config.num_layers, Site.EMBEDDING)
            x = bias_dropout_residual(
                x, p=self.config.dropout, seed=dropout.seed, stream=stream, row_ids=row_ids
            )
        for block in self.blocks:
            x = block(x, sequences, dropout)
        logits = column_parallel_linear(
            self.final_norm(x), self.word_embeddings.weight, None, self.tp
        )
        return vocab_parallel_cross_entropy(logits, targets.reshape(-1), tp=self.tp).mean()
