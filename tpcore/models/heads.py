"""Task heads. Each takes the encoder's packed output and returns it with its own part filled in.

A head is small beside the encoder, so its weights are replicated; only the decoder of the
masked-LM head, which is the word-embedding table, is sharded over the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpcore.kernels import bias_dropout_residual, bias_gelu
from tpcore.layers.embedding import VocabParallelEmbedding
from tpcore.layers.loss import vocab_parallel_cross_entropy
from tpcore.layers.norm import LayerNorm
from tpcore.layers.rounded_rows import on_rounded_rows
from tpcore.models.config import BertConfig, padded_vocab_size_for
from tpcore.models.output import BertOutput
from tpcore.models.packing import PackedBatch
from tpcore.parallel.collectives import copy_to, gather_from
from tpcore.parallel.group import TensorParallelGroup, divide
from tpcore.parallel.random import DropoutContext, Site, dropout_stream
from tpcore.parallel.sharding import Sharded, Sharding

IGNORE_INDEX = -100
"""A token label that takes no part in the loss."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
"""Between the layers of a classifier that has more than one."""

MAX_HEAD_LAYERS = 5


@dataclass(frozen=True)
class MaskedTokens:
    """Labels of a pretraining head that name the predicted tokens; nothing else is computed."""

    index: Tensor
    """int64 [m]: places among the packed tokens."""
    targets: Tensor | None = None
    """int64 [m]; None: no loss."""


class PreTrainingHead(nn.Module):
    """Masked-LM and, optionally, sentence-relation logits.

    `prediction_logits = LN(gelu(x W^T + b)) E^T + bias` with the word embeddings E [v/tp, h] as
    decoder; `seq_relationship_logits = pooled W^T + b`. Labels: int [b, s] with -100 where there
    is none, or a pair of those and int [b] sentence labels; the loss is the sum of both means.

    With `MaskedTokens` as packed labels the vocabulary is computed for those tokens alone:
    `token_losses` fp32 [m], and outside of training `prediction_logits` [m, padded vocabulary].
    """

    labels_are_per_token = True
    logits_are_per_token = False

    def __init__(
        self,
        config: BertConfig,
        *,
        tp: TensorParallelGroup,
        binary: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.lm = _MaskedLMHead(config, tp=tp, device=device, dtype=dtype)
        self.binary = _linear(config, 2, device, dtype) if binary else None

    def forward(
        self,
        output: BertOutput,
        packed: PackedBatch,
        labels: Any,
        dropout: DropoutContext | None,
        word_embeddings: VocabParallelEmbedding,
    ) -> BertOutput:
        if isinstance(labels, MaskedTokens):
            return self._masked(output, labels, word_embeddings)
        token_labels, sentence_labels = labels if isinstance(labels, tuple) else (labels, None)
        shard_logits = self.lm(output.last_hidden_state, word_embeddings)
        sentence_logits = None
        if self.binary is not None:
            sentence_logits = self.binary(_pooled(output, "pretraining"))
        loss = None
        if token_labels is not None:
            loss = self.lm.loss(shard_logits, token_labels)
        if sentence_labels is not None:
            if sentence_logits is None:
                raise ValueError("labels hold sentence labels, but this head has no binary part")
            sentence_loss = F.cross_entropy(sentence_logits.float(), sentence_labels)
            loss = sentence_loss if loss is None else loss + sentence_loss
        return dataclasses.replace(
            output,
            loss=loss,
            prediction_logits=gather_from(shard_logits, self.lm.tp),
            seq_relationship_logits=sentence_logits,
        )

    def _masked(
        self, output: BertOutput, labels: MaskedTokens, word_embeddings: VocabParallelEmbedding
    ) -> BertOutput:
        shard_logits = self.lm(output.last_hidden_state[labels.index], word_embeddings)
        losses = sentence_logits = None
        if labels.targets is not None:
            losses = self.lm.losses(shard_logits, labels.targets)
        if self.binary is not None:
            sentence_logits = self.binary(_pooled(output, "pretraining"))
        return dataclasses.replace(
            output,
            token_losses=losses,
            prediction_logits=None if self.training else gather_from(shard_logits, self.lm.tp),
            seq_relationship_logits=sentence_logits,
        )


class _MaskedLMHead(nn.Module):
    def __init__(
        self,
        config: BertConfig,
        *,
        tp: TensorParallelGroup,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        padded = config.padded_vocab_size or padded_vocab_size_for(config.vocab_size, tp.size)
        self.tp = tp
        self.num_classes = config.vocab_size
        self.loss_classes = None if config.loss_over_padding else config.vocab_size
        self.gelu = config.masked_lm_gelu
        self.dense = _linear(config, config.hidden_size, device, dtype)
        self.norm = LayerNorm(config.hidden_size, config.layernorm_eps, device=device, dtype=dtype)
        rows = divide(padded, tp.size, "padded_vocab_size")
        self.bias = nn.Parameter(torch.zeros(rows, device=device, dtype=dtype))

    def own_sharding(self) -> dict[str, Sharding]:
        return {"bias": Sharded(0)}

    def own_unpadded_sizes(self) -> dict[str, int]:
        return {"bias": self.num_classes}

    def forward(self, x: Tensor, word_embeddings: VocabParallelEmbedding) -> Tensor:
        """Logits of this rank's columns, `[t, v/tp]`."""
        return on_rounded_rows(partial(self._logits, word_embeddings), self.dense.weight, x)

    def _logits(self, word_embeddings: VocabParallelEmbedding, x: Tensor) -> Tensor:
        x = F.linear(x, self.dense.weight)
        x = self.norm(bias_gelu(x, self.dense.bias, self.gelu))
        return F.linear(copy_to(x, self.tp), word_embeddings.weight, self.bias)

    def losses(self, shard_logits: Tensor, labels: Tensor) -> Tensor:
        """Of each token, fp32; 0 where there is no label."""
        return vocab_parallel_cross_entropy(
            shard_logits,
            labels,
            tp=self.tp,
            num_classes=self.loss_classes,
            ignore_index=IGNORE_INDEX,
        )

    def loss(self, shard_logits: Tensor, labels: Tensor) -> Tensor:
        losses = self.losses(shard_logits, labels)
        return losses.sum() / (labels != IGNORE_INDEX).sum().clamp(min=1)


class SequenceClassificationHead(nn.Module):
    """`logits = mlp(dropout(pooled))`, [b, num_labels].

    The mlp is one linear layer, or with `num_layers` = k > 1 has k - 1 layers [h, h] with
    `activation` before it; without `pooler` it sees the first token itself. (NeMo 1.x: two
    layers, no pooler.)

    Loss: cross entropy with int labels [b]; with `regression` (one output) the mean squared
    error with float labels [b].
    """

    labels_are_per_token = False
    logits_are_per_token = False

    def __init__(
        self,
        config: BertConfig,
        num_labels: int,
        *,
        tp: TensorParallelGroup,
        dropout: float | None = None,
        regression: bool = False,
        num_layers: int = 1,
        activation: str = "relu",
        pooler: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if regression and num_labels != 1:
            raise ValueError(f"num_labels={num_labels} with regression=True; a regression has 1")
        self.regression = regression
        self.pooler = pooler
        self.dropout = _Dropout(config, dropout)
        self.hidden = HiddenLayers(config, num_layers, activation, device, dtype)
        self.classifier = _linear(config, num_labels, device, dtype)

    def forward(
        self,
        output: BertOutput,
        packed: PackedBatch,
        labels: Tensor | None,
        dropout: DropoutContext | None,
        word_embeddings: VocabParallelEmbedding,
    ) -> BertOutput:
        if self.pooler:
            pooled = _pooled(output, "sequence_classification")
        else:
            pooled = output.last_hidden_state[packed.first_tokens]
        pooled = self.dropout(pooled, packed.row_ids[packed.first_tokens], dropout)
        logits = self.classifier(self.hidden(pooled))
        loss = None
        if labels is not None and self.regression:
            loss = F.mse_loss(logits.float().squeeze(-1), labels.float())
        elif labels is not None:
            loss = F.cross_entropy(logits.float(), labels)
        return dataclasses.replace(output, logits=logits, loss=loss)


class TokenClassificationHead(nn.Module):
    """`logits = mlp(dropout(x))`, [b, s, num_labels]; int labels [b, s], -100 = none.

    The mlp: as in `SequenceClassificationHead`.
    """

    labels_are_per_token = True
    logits_are_per_token = True

    def __init__(
        self,
        config: BertConfig,
        num_labels: int,
        *,
        tp: TensorParallelGroup,
        dropout: float | None = None,
        num_layers: int = 1,
        activation: str = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dropout = _Dropout(config, dropout)
        self.hidden = HiddenLayers(config, num_layers, activation, device, dtype)
        self.classifier = _linear(config, num_labels, device, dtype)

    def forward(
        self,
        output: BertOutput,
        packed: PackedBatch,
        labels: Tensor | None,
        dropout: DropoutContext | None,
        word_embeddings: VocabParallelEmbedding,
    ) -> BertOutput:
        hidden = self.dropout(output.last_hidden_state, packed.row_ids, dropout)
        logits = self.classifier(self.hidden(hidden))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX)
        return dataclasses.replace(output, logits=logits, loss=loss)


class QuestionAnsweringHead(nn.Module):
    """Start and end logits of an answer span, [b, s] each.

    The mlp: as in `SequenceClassificationHead`, with two outputs.
    Labels: int [b, 2], the columns of the first and the last answer token. The loss is the mean
    of the two cross entropies over a sequence's own tokens; columns outside it are ignored.
    """

    labels_are_per_token = False
    logits_are_per_token = False

    def __init__(
        self,
        config: BertConfig,
        *,
        tp: TensorParallelGroup,
        dropout: float = 0.0,
        num_layers: int = 1,
        activation: str = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dropout = _Dropout(config, dropout)
        self.hidden = HiddenLayers(config, num_layers, activation, device, dtype)
        self.outputs = _linear(config, 2, device, dtype)

    def forward(
        self,
        output: BertOutput,
        packed: PackedBatch,
        labels: Tensor | None,
        dropout: DropoutContext | None,
        word_embeddings: VocabParallelEmbedding,
    ) -> BertOutput:
        hidden = self.dropout(output.last_hidden_state, packed.row_ids, dropout)
        start_logits, end_logits = self.outputs(self.hidden(hidden)).unbind(-1)
        loss = None
        if labels is not None:
            if labels.dim() != 2 or labels.shape[1] != 2:
                raise ValueError(
                    f"labels has shape {list(labels.shape)}; expected [batch, 2], the first and "
                    "the last token of each answer"
                )
            start = _span_loss(start_logits, labels[:, 0], packed)
            loss = (start + _span_loss(end_logits, labels[:, 1], packed)) / 2
        return dataclasses.replace(
            output, start_logits=start_logits, end_logits=end_logits, loss=loss
        )


Head = (
    PreTrainingHead | SequenceClassificationHead | TokenClassificationHead | QuestionAnsweringHead
)

HEADS: dict[str, type[nn.Module]] = {
    "pretraining": PreTrainingHead,
    "sequence_classification": SequenceClassificationHead,
    "token_classification": TokenClassificationHead,
    "question_answering": QuestionAnsweringHead,
}


def build_head(name: str, config: BertConfig, *, tp: TensorParallelGroup, **kwargs: Any) -> Head:
    """A new head by its name.

    Raises:
        ValueError: the name is not one of `HEADS`.
    """
    if name not in HEADS:
        raise ValueError(f"head={name!r} is unknown; use one of {', '.join(HEADS)}")
    return HEADS[name](config, tp=tp, **kwargs)  # type: ignore[return-value]


class _Dropout(nn.Module):
    """The dropout before a classifier, keyed like every other by seed, site and token."""

    def __init__(self, config: BertConfig, p: float | None) -> None:
        super().__init__()
        self.p = config.hidden_dropout if p is None else p
        self.stream = dropout_stream(config.num_layers, Site.HEAD)

    def forward(self, x: Tensor, row_ids: Tensor, dropout: DropoutContext | None) -> Tensor:
        if dropout is None or not self.training or self.p == 0:
            return x
        return bias_dropout_residual(
            x, p=self.p, seed=dropout.seed, stream=self.stream, row_ids=row_ids
        )


class HiddenLayers(nn.ModuleList):
    """All but the last linear layer of a classifier, each followed by an activation."""

    def __init__(
        self,
        config: BertConfig,
        num_layers: int,
        activation: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}"
            )
        if not 1 <= num_layers <= MAX_HEAD_LAYERS:
            raise ValueError(f"num_layers={num_layers} is not a number from 1 to {MAX_HEAD_LAYERS}")
        layers = (_linear(config, config.hidden_size, device, dtype) for _ in range(1, num_layers))
        super().__init__(layers)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = ACTIVATIONS[self.activation](layer(x))
        return x


class _Linear(nn.Linear):
    """nn.Linear for numbers of rows that are others in each batch."""

    def forward(self, x: Tensor) -> Tensor:
        return on_rounded_rows(super().forward, self.weight, x)


def _linear(
    config: BertConfig,
    out_features: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Linear:
    """A replicated linear layer, drawn on the CPU so that every device starts alike."""
    linear = _Linear(config.hidden_size, out_features, device="meta", dtype=dtype)
    weight = torch.empty(out_features, config.hidden_size).normal_(std=config.init_std)
    linear.weight = nn.Parameter(weight.to(device=device, dtype=dtype))
    linear.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
    return linear


def _pooled(output: BertOutput, head: str) -> Tensor:
    if output.pooler_output is None:
        raise ValueError(f"the {head} head needs a pooler; build the model with add_pooler=True")
    return output.pooler_output


def _span_loss(logits: Tensor, columns: Tensor, packed: PackedBatch) -> Tensor:
    losses, counted = span_losses(logits, columns, packed)
    return losses.sum() / counted.sum().clamp(min=1)


def span_losses(logits: Tensor, columns: Tensor, packed: PackedBatch) -> tuple[Tensor, Tensor]:
    """Cross entropy of each sequence's target token over its own tokens: fp32 [b].

    Args:
        logits: [t], one for each token.
        columns: int [b], the target's position in its sequence; outside of it: no loss, 0.
        packed: where the sequences are.

    Returns:
        The losses, and which of the sequences have one: bool [b].
    """
    table = token_table(logits, packed)
    inside = (columns >= 0) & (columns < table.shape[1])
    targets = torch.where(inside, columns, IGNORE_INDEX)
    losses = F.cross_entropy(table, targets, ignore_index=IGNORE_INDEX, reduction="none")
    return losses, inside


def token_table(logits: Tensor, packed: PackedBatch) -> Tensor:
    """[t] to fp32 [b, longest], by position in the sequence; -inf where there is no token."""
    lengths = torch.tensor(packed.sequences.lengths, device=logits.device)
    rows = torch.arange(len(lengths), device=logits.device).repeat_interleave(lengths)
    width = int(packed.position_ids.max()) + 1
    table = logits.new_full((len(lengths), width), -torch.inf, dtype=torch.float32)
    return table.index_put((rows, packed.position_ids), logits.float())
