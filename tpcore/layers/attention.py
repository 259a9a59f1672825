"""Self-attention over packed sequences, with the heads split over a tensor-parallel group.

The tokens of all sequences lie one after the other, x [t, h], without padding. Where a fused kernel
serves the call, it reads them as they lie. Everywhere else scores need rectangles, so sequences of
similar length are put together into buckets [b, s], and only there padding exists. The unit that
moves between the two orders is one head of one token, d numbers, since nothing larger stays
together on the way from [t, n, 3, d] to [3, b, n, s, d].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tpcore import _native
from tpcore.kernels import has_kernel, masked_softmax, packed_attention
from tpcore.layers.initialization import InitMethod
from tpcore.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpcore.parallel.group import TensorParallelGroup, divide
from tpcore.parallel.random import DropoutContext, Site, dropout_stream
from tpcore.parallel.recompute import checkpoint_activations

# A bucket is closed when its scores, padding included, would exceed the real ones by this factor
# and by more than so many scores per head, which is about what one more bucket costs in time.
MAX_PADDED_WORK = 1.25
FREE_PADDED_SCORES = 1 << 12
# Bounds the memory of one bucket: 4M scores per head are 16 sequences of 512 tokens.
MAX_BUCKET_SCORES = 1 << 22


# In half precision torch's matrix products run on instructions for it. The fused kernel has them
# for bfloat16 on AMX; elsewhere, where a query sees more keys than this on average, torch's
# products win (docs/attention.md).
MAX_FUSED_HALF_KEYS = 160


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length as a rectangle.

    Attributes:
        index: int64 [b, s], the packed token in each place; padding repeats the last token of its
            sequence.
        key_mask: bool [b, 1, 1, s], True at padding; None where there is none.
    """

    index: Tensor
    key_mask: Tensor | None


@dataclass(frozen=True)
class PackedSequences:
    """Where the sequences of a packed batch begin and end, and how attention groups them.

    Attributes:
        cu_seqlens: int32 [num_sequences + 1], first token of each sequence, then t.
        lengths: number of tokens of each sequence.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    _head_rows: dict[int, _HeadRows] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], device: torch.device | str | None = None
    ) -> PackedSequences:
        """Sequences of these lengths.

        Args:
            lengths: tokens of each sequence, in packed order.
            device: where the index tensors live; None: torch's default device.

        Raises:
            ValueError: there is no sequence, or one has no token.
        """
        sizes = tuple(int(length) for length in lengths)
        if not sizes:
            raise ValueError("lengths is empty; expected one or more sequences")
        if min(sizes) < 1:
            raise ValueError(
                f"lengths[{sizes.index(min(sizes))}]={min(sizes)}; expected sequences of one or "
                "more tokens: leave empty ones out"
            )
        device = torch.get_default_device() if device is None else device
        ends = torch.tensor((0, *sizes), device="cpu").cumsum(0)
        return cls(ends.to(device=device, dtype=torch.int32), sizes)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Sequences of similar length together; every one is in exactly one bucket.

        The grouping depends on the lengths alone. Made when first asked for: fused kernels need
        none.
        """
        device = self.cu_seqlens.device
        counts = torch.tensor(self.lengths, device="cpu")
        starts = counts.cumsum(0) - counts
        buckets = []
        for members in _group_by_length(self.lengths):
            chosen = torch.tensor(members, device="cpu")
            last = counts[chosen, None] - 1
            column = torch.arange(self.lengths[members[0]], device="cpu")
            index = starts[chosen, None] + torch.minimum(column, last)
            padding = column > last
            mask = padding[:, None, None, :].to(device) if padding.any() else None
            buckets.append(Bucket(index.to(device), mask))
        return tuple(buckets)

    @cached_property
    def mean_keys(self) -> float:
        """How many keys a query sees on average: sum of length^2 over sum of length."""
        return sum(length**2 for length in self.lengths) / self.num_tokens

    @property
    def num_tokens(self) -> int:
        """Number of packed tokens, t."""
        return sum(self.lengths)

    def head_rows(self, num_heads: int) -> _HeadRows:
        """Index tensors at the granularity of heads; made once, used by every layer."""
        if num_heads not in self._head_rows:
            self._head_rows[num_heads] = _HeadRows.build(self, num_heads)
        return self._head_rows[num_heads]


def _group_by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Sequence numbers of each bucket, longest first; ties keep their order."""
    members: list[int] = []
    longest = real_scores = 0
    for sequence in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        scores = lengths[sequence] ** 2
        padded = (len(members) + 1) * longest**2
        allowed = max(
            MAX_PADDED_WORK * (real_scores + scores), real_scores + scores + FREE_PADDED_SCORES
        )
        if members and (padded > allowed or padded > MAX_BUCKET_SCORES):
            yield members
            members, real_scores = [], 0
        if not members:
            longest = lengths[sequence]
        members.append(sequence)
        real_scores += scores
    yield members


@dataclass(frozen=True)
class _HeadRows:
    """The way of n heads from packed order into the buckets and back, in rows of d numbers.

    Attributes:
        qkv: int64, for each row of the buckets' [3, b, n, s] the packed row of [t, n, 3].
        qkv_inverse: int64 [t * n * 3], back, padding left out.
        context_inverse: int64 [t * n], for each packed row of [t, n] the row of the buckets'
            [b, n, s].
    """

    qkv: Tensor
    qkv_inverse: Tensor
    context_inverse: Tensor

    @classmethod
    def build(cls, sequences: PackedSequences, num_heads: int) -> _HeadRows:
        device = sequences.cu_seqlens.device
        head = torch.arange(num_heads, device=device)[:, None]
        part = torch.arange(3, device=device).view(3, 1, 1, 1)
        rows, is_padding = [], []
        for bucket in sequences.buckets:
            rows.append(bucket.index[:, None, :] * num_heads + head)
            mask = torch.zeros_like(rows[-1], dtype=torch.bool)
            is_padding.append(mask if bucket.key_mask is None else mask | bucket.key_mask[:, :, 0])
        context = torch.cat([r.flatten() for r in rows])
        context_padding = torch.cat([m.flatten() for m in is_padding])
        qkv = torch.cat([(r * 3 + part).flatten() for r in rows])
        qkv_padding = torch.cat([m.expand(3, *m.shape).flatten() for m in is_padding])
        num_rows = sequences.num_tokens * num_heads
        return cls(
            qkv,
            _invert(qkv, qkv_padding, 3 * num_rows),
            _invert(context, context_padding, num_rows),
        )


def _invert(index: Tensor, is_padding: Tensor, num_rows: int) -> Tensor:
    # Padding writes to one row too many, which is cut off: no waiting for a count from the device.
    inverse = index.new_empty(num_rows + 1)
    inverse[index.masked_fill(is_padding, num_rows)] = torch.arange(
        index.numel(), device=index.device
    )
    return inverse[:num_rows]


class _ToBuckets(torch.autograd.Function):
    """y[i] = x[rows[i]]. No gradient reaches padding, so the inverse need not read it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _FromBuckets(torch.autograd.Function):
    """y[i] = x[inverse[i]], where no row of x is taken twice; rows not taken get zero gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        # Only padding needs the zeros.
        new = grad.new_empty if ctx.num_rows == inverse.shape[0] else grad.new_zeros
        return new(ctx.num_rows, grad.shape[1]).index_copy_(0, inverse, grad), None


def fuses_attention(sequences: PackedSequences, qkv: Tensor) -> bool:
    """Whether attention of these sequences is the fused kernel; of qkv dtype and device count."""
    converts = qkv.dtype == torch.float16 or (qkv.dtype == torch.bfloat16 and not _native.has_amx())
    suits = not converts or sequences.mean_keys <= MAX_FUSED_HALF_KEYS
    return suits and has_kernel("packed_attention", qkv)


class SelfAttention(nn.Module):
    """Multi-head attention of each sequence over itself (arXiv 1706.03762), n/tp heads per rank.

        [q | k | v] = x A^T + a                         x [t, h], A_r [3h/tp, h]
        p = dropout(softmax(q k^T / sqrt(d)))           per sequence and head, [s, s]
        y = concatenate(p v) B^T                        B_r [h, h/tp], summed over the ranks

    Rows of A are ordered (head, q/k/v, d), as in Megatron-LM checkpoints of version 3, so that a
    rank's heads are one block of rows. Dropout bits are keyed by the query's row id, the global
    head and the key's index in its sequence: they depend neither on the size of the group nor on
    the bucket.

    Args:
        hidden_size: h; a multiple of the number of heads.
        num_attention_heads: n; a multiple of the group's size.
        tp: the ranks that share the heads.
        attention_dropout: probability of dropping an attention probability.
        layer_number: counts from 0; numbers the dropout stream.
        causal: each token attends to itself and to earlier tokens only.
        init_method: fills the full weight of qkv; None: as torch.nn.Linear.
        output_init_method: fills the full weight of dense; None: as init_method.
        sequence_parallel: x and y are this rank's share of the tokens, [t/tp, h]; attention itself
            sees all tokens.
        accumulate_main_grad: see ColumnParallelLinear.
        recompute_probabilities: keep q, k and v alone for the backward, and compute scores and
            probabilities again. The fused kernel never stores them and is left as it is.

    Raises:
        ValueError: the heads do not divide the hidden size, or cannot be split over the group.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        *,
        tp: TensorParallelGroup,
        attention_dropout: float = 0.0,
        layer_number: int = 0,
        causal: bool = False,
        bias: bool = True,
        init_method: InitMethod | None = None,
        output_init_method: InitMethod | None = None,
        sequence_parallel: bool = False,
        accumulate_main_grad: bool = False,
        recompute_probabilities: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size={hidden_size} is not a multiple of num_attention_heads="
                f"{num_attention_heads}; every head needs the same size"
            )
        self.head_size = hidden_size // num_attention_heads
        self.num_own_heads = divide(num_attention_heads, tp.size, "num_attention_heads")
        self.head_offset = tp.rank * self.num_own_heads
        self.attention_dropout = attention_dropout
        self.stream = dropout_stream(layer_number, Site.ATTENTION_PROBS)
        self.causal = causal
        self.num_shares = tp.size if sequence_parallel else 1
        self.recompute_probabilities = recompute_probabilities
        self.qkv = ColumnParallelLinear(
            hidden_size,
            3 * hidden_size,
            tp=tp,
            bias=bias,
            init_method=init_method,
            sequence_parallel=sequence_parallel,
            accumulate_main_grad=accumulate_main_grad,
            device=device,
            dtype=dtype,
        )
        self.dense = RowParallelLinear(
            hidden_size,
            hidden_size,
            tp=tp,
            bias=bias,
            skip_bias_add=True,
            init_method=output_init_method or init_method,
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
    ) -> tuple[Tensor, Tensor | None]:
        """X [t, h] -> (y [t, h] without bias, bias [h] or None).

        Args:
            x: packed tokens, the same on every rank; sequence-parallel: its share, [t/tp, h].
            sequences: the grouping of all t tokens.
            dropout: seed and row ids of all t tokens; None, or a module in evaluation: no dropout.
            rows: int64 [r], tokens whose y is wanted: y is [r, h], of dense for these alone. Not
                together with sequence parallelism.

        Raises:
            ValueError: ``sequences`` has another number of tokens than x.
        """
        assert rows is None or self.num_shares == 1
        t, d, n = sequences.num_tokens, self.head_size, self.num_own_heads
        if x.shape[0] * self.num_shares != t:
            shares = "" if self.num_shares == 1 else f" on each of {self.num_shares} ranks"
            raise ValueError(
                f"x has {x.shape[0]} tokens{shares}, but sequences has {t} in its lengths"
            )
        qkv = self.qkv(x).view(t, n, 3, d)
        dropout = dropout if self.training and self.attention_dropout > 0 else None
        if fuses_attention(sequences, qkv):
            context = packed_attention(
                qkv, sequences.cu_seqlens, causal=self.causal, **self._key(dropout)
            )
        elif self.recompute_probabilities and torch.is_grad_enabled():
            context = checkpoint_activations(self._by_buckets, qkv, sequences, dropout)
        else:
            context = self._by_buckets(qkv, sequences, dropout)
        context = context.view(t, n * d)
        return self.dense(context if rows is None else context.index_select(0, rows))

    def _key(self, dropout: DropoutContext | None, index: Tensor | None = None) -> dict[str, Any]:
        """The dropout of the probabilities of all queries, or of those at index."""
        if dropout is None:
            return {}
        return {
            "dropout_p": self.attention_dropout,
            "seed": dropout.seed,
            "stream": self.stream,
            "row_ids": dropout.row_ids if index is None else dropout.row_ids[index],
            "head_offset": self.head_offset,
        }

    def _by_buckets(
        self, qkv: Tensor, sequences: PackedSequences, dropout: DropoutContext | None
    ) -> Tensor:
        """The same by matrix products and masked_softmax, on any device: [t * n, d]."""
        t, n, _, d = qkv.shape
        rows = sequences.head_rows(n)
        qkv = _ToBuckets.apply(qkv.view(t * n * 3, d), rows.qkv, rows.qkv_inverse)
        contexts = []
        sizes = [3 * n * bucket.index.numel() for bucket in sequences.buckets]
        for bucket, own_qkv in zip(sequences.buckets, qkv.split(sizes), strict=True):
            b, s = bucket.index.shape
            q, k, v = own_qkv.view(3, b * n, s, d).unbind()
            scores = torch.bmm(q, k.transpose(1, 2)).view(b, n, s, s)
            probs = masked_softmax(
                scores,
                bucket.key_mask,
                1.0 / math.sqrt(d),
                self.causal,
                **self._key(dropout, bucket.index),
            )
            contexts.append(torch.bmm(probs.view(b * n, s, s), v).view(b * n * s, d))
        context = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
        return _FromBuckets.apply(context, rows.context_inverse)
