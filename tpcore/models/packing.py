"""Padded `[b, s]` batches to packed tokens `[t]` and back.

The encoder runs on packed tokens: the real tokens of all sequences, one after the other, with
the boundaries beside them. Padding exists only at the border, for callers who want rectangles.

One exception: where the number of tokens must be a multiple of something (sequence parallelism
splits the tokens over ranks; a compiled graph takes two at least) or had better be (products in
half precision, see `tpcore.layers.rounded_rows`), one dummy sequence is added at the end. The
encoder computes it, and nothing that a model returns depends on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpcore.layers.attention import PackedSequences
from tpcore.parallel.random import make_row_ids


@dataclass(frozen=True)
class PackedBatch:
    """The tokens of a batch without padding, sequence after sequence.

    `row_ids` names each token globally, by (sample, position): dropout bits are keyed by it, so
    they do not depend on how a batch was packed, split or ordered.
    """

    input_ids: Tensor  # int64 [t]
    token_type_ids: Tensor  # int64 [t]
    position_ids: Tensor  # int64 [t]
    row_ids: Tensor  # int64 [t]
    sequences: PackedSequences
    shape: tuple[int, int] | None = None
    """(b, s) of the rectangle this came from, None when it never was one."""
    padded_index: Tensor | None = None
    """int64, for each real token: where it stands in the flattened rectangle."""
    num_padding: int = 0
    """Tokens of the dummy sequence, which is the last one; 0: there is none."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_real_tokens(self) -> int:
        """Tokens without those of the dummy sequence."""
        return len(self) - self.num_padding

    @property
    def first_tokens(self) -> Tensor:
        """int64 [b]: the packed index of each real sequence's first token."""
        return self.sequences.cu_seqlens[: -2 if self.num_padding else -1].long()

    def without_padding(self) -> PackedBatch:
        """The same batch without the dummy sequence."""
        if not self.num_padding:
            return self
        real = self.num_real_tokens
        return dataclasses.replace(
            self,
            input_ids=self.input_ids[:real],
            token_type_ids=self.token_type_ids[:real],
            position_ids=self.position_ids[:real],
            row_ids=self.row_ids[:real],
            sequences=PackedSequences(self.sequences.cu_seqlens[:-1], self.sequences.lengths[:-1]),
            num_padding=0,
        )

    def padded_to(self, multiple: int) -> PackedBatch:
        """The same batch with a number of tokens that is a multiple of ``multiple``.

        The dummy sequence repeats token id 0 at position 0; a batch that fits gets none.

        Raises:
            ValueError: ``multiple`` is no positive number.
        """
        if multiple < 1:
            raise ValueError(f"pad_to_multiple={multiple}; expected 1 or more")
        if len(self) % multiple == 0:
            return self
        batch = self.without_padding()
        missing = -len(batch) % multiple
        if missing == 0:
            return batch

        def extended(x: Tensor) -> Tensor:
            return torch.cat((x, x.new_zeros(missing)))

        return dataclasses.replace(
            batch,
            input_ids=extended(batch.input_ids),
            token_type_ids=extended(batch.token_type_ids),
            position_ids=extended(batch.position_ids),
            row_ids=extended(batch.row_ids),
            sequences=PackedSequences.from_lengths(
                (*batch.sequences.lengths, missing), batch.input_ids.device
            ),
            num_padding=missing,
        )


def pack(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    sample_ids: Tensor | None = None,
    *,
    pad_to_multiple: int = 1,
) -> PackedBatch:
    """Drop the padding of a rectangular batch.

    Args:
        input_ids: int [b, s].
        attention_mask: [b, s], 1 or True = a real token, 0 or False = padding; None: all are
            real. Padding may stand anywhere in a row; a token keeps the position of its column.
        token_type_ids: int [b, s]; None: zeros.
        sample_ids: int64 [b], names of the samples for the dropout key; None: 0 .. b-1.
        pad_to_multiple: what the number of tokens must be a multiple of; a dummy sequence fills it
            up. Sequence parallelism needs a multiple of the group's size.

    Raises:
        ValueError: shapes do not match, ids are no integers, `attention_mask` holds other values
            than 0 and 1, or a row of it has no token.
    """
    if input_ids.dim() != 2:
        raise ValueError(
            f"input_ids has shape {list(input_ids.shape)}; expected [batch, sequence]: "
            "add a batch dimension with input_ids[None]"
        )
    for name, tensor in (("input_ids", input_ids), ("token_type_ids", token_type_ids)):
        if tensor is not None and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected integers")
    batch, length = input_ids.shape
    for name, tensor in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; expected that of input_ids, "
                f"{list(input_ids.shape)}"
            )
    device = input_ids.device
    if attention_mask is None:
        real = torch.ones(batch, length, dtype=torch.bool, device=device)
    else:
        real = attention_mask == 1
        # An additive mask (0 and -10000) would mean the opposite of what it says.
        if not (real | (attention_mask == 0)).all():
            raise ValueError(
                "attention_mask holds other values than 0 and 1; expected 1 = a real token, 0 = "
                "padding: of an additive mask pass (mask == 0)"
            )
    lengths = real.sum(dim=1).tolist()
    if 0 in lengths:
        raise ValueError(
            f"attention_mask row {lengths.index(0)} has no token; drop that row from the batch"
        )
    padded_index = real.reshape(-1).nonzero().squeeze(1)
    rows, positions = padded_index // length, padded_index % length
    if sample_ids is None:
        sample_ids = torch.arange(batch, device=device)
    types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
    return PackedBatch(
        input_ids=input_ids.reshape(-1)[padded_index].long(),
        token_type_ids=types.reshape(-1)[padded_index].long(),
        position_ids=positions,
        row_ids=make_row_ids(sample_ids.to(device)[rows], positions),
        sequences=PackedSequences.from_lengths(lengths, device),
        shape=(batch, length),
        padded_index=padded_index,
    ).padded_to(pad_to_multiple)


def pack_sequences(
    input_ids: Sequence[Sequence[int]],
    token_type_ids: Sequence[Sequence[int]] | None = None,
    sample_ids: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    *,
    pad_to_multiple: int = 1,
) -> PackedBatch:
    """Pack lists of token ids; the batch never is a rectangle.

    Args:
        input_ids: one list of ids for each sequence, none of them empty.
        token_type_ids: lists of the same lengths; None: zeros.
        sample_ids: one integer for each sequence, its name in the dropout key; None: 0, 1, ...
        device: where the packed tensors live; None: torch's default device.
        pad_to_multiple: as in ``pack``.

    Raises:
        ValueError: no sequence, an empty one, or lengths that differ.
    """
    lengths = [len(ids) for ids in input_ids]
    if not lengths or 0 in lengths:
        what = f"sequence {lengths.index(0)} is empty" if lengths else "there is no sequence"
        raise ValueError(f"input_ids: {what}; every sequence needs at least one token")
    if token_type_ids is None:
        flat_types = torch.zeros(sum(lengths), dtype=torch.int64)
    else:
        type_lengths = [len(ids) for ids in token_type_ids]
        if type_lengths != lengths:
            raise ValueError(
                f"token_type_ids has lengths {type_lengths}; expected those of input_ids, {lengths}"
            )
        flat_types = torch.tensor([i for ids in token_type_ids for i in ids], dtype=torch.int64)
    samples = torch.arange(len(lengths)) if sample_ids is None else torch.tensor(list(sample_ids))
    if samples.shape[0] != len(lengths):
        raise ValueError(f"sample_ids has {samples.shape[0]} entries for {len(lengths)} sequences")
    counts = torch.tensor(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])
    row_ids = make_row_ids(samples.repeat_interleave(counts), positions)
    flat_ids = torch.tensor([i for ids in input_ids for i in ids], dtype=torch.int64)
    return PackedBatch(
        input_ids=flat_ids.to(device),
        token_type_ids=flat_types.to(device),
        position_ids=positions.to(device),
        row_ids=row_ids.to(device),
        sequences=PackedSequences.from_lengths(lengths, device),
    ).padded_to(pad_to_multiple)


def unpack(x: Tensor, packed: PackedBatch) -> Tensor:
    """Packed `[t, ...]` back to the rectangle `[b, s, ...]`, with zeros at padding.

    `x` has the real tokens alone, as all that a model returns.

    Raises:
        ValueError: `packed` did not come from a rectangle.
    """
    if packed.shape is None or packed.padded_index is None:
        raise ValueError("this batch was packed from lists and has no rectangle to return to")
    batch, length = packed.shape
    flat = x.new_zeros(batch * length, *x.shape[1:])
    return flat.index_copy(0, packed.padded_index, x).reshape(batch, length, *x.shape[1:])
