from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpcore.models.packing import pack, pack_sequences, unpack


@settings(deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda b: st.integers(1, 7).flatmap(
            lambda s: st.lists(
                st.lists(st.booleans(), min_size=s, max_size=s).filter(any),
                min_size=b,
                max_size=b,
            )
        )
    )
)
def test_unpack_inverts_pack_for_padding_anywhere(mask_rows):
    mask = torch.tensor(mask_rows)
    ids = torch.arange(1, mask.numel() + 1).reshape(mask.shape)
    packed = pack(ids, mask, token_type_ids=ids % 2)
    assert len(packed) == int(mask.sum())
    assert torch.equal(unpack(packed.input_ids, packed), ids * mask)
    assert torch.equal(unpack(packed.token_type_ids, packed), (ids % 2) * mask)
    columns = torch.arange(mask.shape[1]).expand_as(mask)
    assert torch.equal(unpack(packed.position_ids, packed), columns * mask)


def test_lists_and_rectangles_pack_alike():
    lists = [[5, 6, 7], [8], [9, 10]]
    types = [[0, 1, 1], [0], [0, 0]]
    ids = torch.tensor([[5, 6, 7], [8, 0, 0], [9, 10, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    type_ids = torch.tensor([[0, 1, 1], [0, 0, 0], [0, 0, 0]])
    samples = [40, 7, 3]
    a = pack_sequences(lists, types, samples)
    b = pack(ids, mask, type_ids, torch.tensor(samples))
    for name in ("input_ids", "token_type_ids", "position_ids", "row_ids", "first_tokens"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.sequences.lengths == b.sequences.lengths == (3, 1, 2)
    assert a.first_tokens.tolist() == [0, 3, 4]


def test_row_ids_name_the_token_not_its_place():
    one = pack_sequences([[1, 2], [3, 4, 5]], sample_ids=[11, 22])
    other = pack_sequences([[3, 4, 5], [1, 2]], sample_ids=[22, 11])
    assert sorted(one.row_ids.tolist()) == sorted(other.row_ids.tolist())
    assert one.row_ids[2:].tolist() == other.row_ids[:3].tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack(torch.ones(3, dtype=torch.long)), r"input_ids has shape \[3\]"),
        (
            lambda: pack(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 2)),
            r"attention_mask has shape \[2, 2\]",
        ),
        (
            lambda: pack(torch.ones(2, 2, dtype=torch.long), torch.tensor([[1, 1], [0, 0]])),
            "attention_mask row 1 has no token",
        ),
        (lambda: pack_sequences([]), "there is no sequence"),
        (lambda: pack_sequences([[1], []]), "sequence 1 is empty"),
        (lambda: pack_sequences([[1, 2]], [[0]]), "token_type_ids has lengths"),
        (lambda: pack_sequences([[1, 2]], sample_ids=[1, 2]), "sample_ids has 2 entries for 1"),
        (
            lambda: unpack(torch.ones(2, 3), pack_sequences([[1, 2]])),
            "no rectangle to return to",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_zeros_and_ones_of_any_dtype(dtype):
    mask = torch.tensor([[1, 1, 0]]).to(dtype)
    assert pack(torch.tensor([[5, 6, 7]]), mask).input_ids.tolist() == [5, 6]


@pytest.mark.parametrize(
    "mask", [[0.0, 0.0, -10000.0], [1.0, 0.5, 0.0], [1, 2, 0], [0.0, 1, -torch.inf]]
)
def test_other_masks_are_refused(mask):
    with pytest.raises(ValueError, match="attention_mask holds other values than 0 and 1"):
        pack(torch.tensor([[5, 6, 7]]), torch.tensor([mask]))


@pytest.mark.parametrize("name", ["input_ids", "token_type_ids"])
def test_ids_are_integers(name):
    ids = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match=f"{name} has dtype torch.float32; expected integers"):
        pack(**{"input_ids": ids, name: ids.float()})


def test_a_dummy_sequence_fills_up_to_a_multiple():
    lists, types = [[5, 6, 7], [8], [9, 10]], [[0, 1, 1], [0], [0, 0]]
    plain = pack_sequences(lists, types, sample_ids=[40, 7, 3])
    padded = pack_sequences(lists, types, sample_ids=[40, 7, 3], pad_to_multiple=4)
    assert padded.sequences.lengths == (3, 1, 2, 2)
    assert padded.sequences.cu_seqlens.tolist() == [0, 3, 4, 6, 8]
    assert (len(padded), padded.num_padding, padded.num_real_tokens) == (8, 2, 6)
    assert torch.equal(padded.first_tokens, plain.first_tokens)
    assert not padded.position_ids[6:].any()
    real = padded.without_padding()
    for name in ("input_ids", "token_type_ids", "position_ids", "row_ids", "first_tokens"):
        assert torch.equal(getattr(real, name), getattr(plain, name)), name
    assert torch.equal(real.sequences.cu_seqlens, plain.sequences.cu_seqlens)
    assert (real.num_padding, real.without_padding()) == (0, real)
    # Never two dummies, and none where none is needed.
    assert padded.padded_to(16).sequences.lengths == (3, 1, 2, 10)
    assert padded.padded_to(2) is padded
    assert padded.padded_to(6).sequences.lengths == (3, 1, 2)
    assert pack_sequences(lists, pad_to_multiple=3).num_padding == 0
    rectangle = pack(torch.tensor([[5, 6, 7]]), pad_to_multiple=4)
    assert rectangle.sequences.lengths == (3, 1)
    assert unpack(rectangle.without_padding().input_ids, rectangle).tolist() == [[5, 6, 7]]
    with pytest.raises(ValueError, match="pad_to_multiple=0; expected 1 or more"):
        pack_sequences(lists, pad_to_multiple=0)
