from __future__ import annotations

import pytest
import torch

from tests.kernels.harness import DEVICE, require
from tpcore._native import attention_dropout_keep_mask, dropout_keep_mask
from tpcore._philox import dropout_threshold, philox4x32, philox_keep_mask

# Known answers of philox4x32 with ten rounds, published with Random123 (kat_vectors).
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def _signed(high: int, low: int) -> int:
    """Two 32-bit words as a signed 64-bit number."""
    value = high << 32 | low
    return value - (1 << 64) if value >> 63 else value


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["0", "f", "pi"])
def test_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize("native", [False, True], ids=["torch", "cpu"])
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["0", "f", "pi"])
def test_mask_reproduces_the_known_answers(native, counter, key, expected):
    """The threshold just at, and just above, each known word tells whether it is that word."""
    if native:
        require(DEVICE)
    function = torch.ops.tpcore.dropout_keep_mask if native else philox_keep_mask
    c0, c1, c2, c3 = counter
    seed = torch.tensor([_signed(key[1], key[0])])
    row_ids = torch.tensor([[_signed(c2, c1)]])
    for column, word in enumerate(expected):
        for threshold, kept in ((word, True), (word + 1, False)):
            p = threshold / 2.0**32
            arguments = (c3 & 0xFFFF, 1, 4 * c0 + column, c3 >> 16, 1)
            assert bool(function(seed, row_ids, p, *arguments)) is kept


def test_native_and_torch_agree_bit_for_bit():
    require(DEVICE)
    seed = torch.tensor([-(2**63) + 12345])
    row_ids = torch.randint(-(2**63), 2**63 - 1, (2, 5))
    for p in (0.0, 1e-9, 0.1, 0.5, 0.999999):
        for offset, columns in ((0, 1), (0, 768), (1, 2), (3, 130), (6, 61), (2**33, 9), (5, 0)):
            arguments = (seed, row_ids, p, 65535, columns, offset, 65533, 3)
            native = torch.ops.tpcore.dropout_keep_mask(*arguments)
            assert torch.equal(native, philox_keep_mask(*arguments)), (p, offset, columns)


def test_heads_and_offsets_are_global_coordinates():
    seed, row_ids = torch.tensor([7]), torch.arange(6).reshape(2, 3) << 20
    whole = attention_dropout_keep_mask(0.3, seed, 4, row_ids, 8, 50)
    part = attention_dropout_keep_mask(0.3, seed, 4, row_ids, 2, 50, head_offset=5)
    assert torch.equal(part, whole[:, 5:7])
    flat = dropout_keep_mask(0.3, seed, 4, row_ids[1], 41, column_offset=9, head=2)
    assert torch.equal(flat, whole[1, 2, :, 9:])


def test_rate_of_dropping():
    mask = dropout_keep_mask(0.1, torch.tensor([3]), 0, torch.arange(500), 2000)
    # One million draws: five standard deviations are 0.0015.
    assert abs(mask.float().mean().item() - 0.9) < 0.0015
    assert dropout_keep_mask(0.0, torch.tensor([3]), 0, torch.arange(5), 20).all()


def test_threshold():
    assert dropout_threshold(0.0) == 0
    assert dropout_threshold(0.5) == 2**31
    assert dropout_threshold(1.0 - 2**-40) == 2**32 - 1


def test_does_not_depend_on_threads():
    require("cpu")
    before = torch.get_num_threads()
    try:
        masks = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            masks.append(dropout_keep_mask(0.5, torch.tensor([3]), 0, torch.arange(999), 333))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*masks)


def test_opcheck():
    require(DEVICE)
    row_ids = torch.arange(12).reshape(3, 4)
    for ids in (row_ids, row_ids.t(), row_ids[:0]):
        arguments = (torch.tensor([1]), ids, 0.2, 3, 17, 2, 0, 2)
        torch.library.opcheck(torch.ops.tpcore.dropout_keep_mask, arguments)


def test_errors_name_the_argument():
    seed, row_ids = torch.tensor([1]), torch.arange(3)
    for arguments, options, message in (
        ((1.0, seed, 0, row_ids, 4), {}, "probability is 1.0"),
        ((0.1, seed, -1, row_ids, 4), {}, "stream=-1"),
        ((0.1, seed, 0, row_ids, 4), {"column_offset": -1}, "column_offset=-1"),
        ((0.1, seed, 0, row_ids, 4), {"head": 1 << 16}, "outside 0..65535"),
        ((0.1, torch.tensor([1, 2]), 0, row_ids, 4), {}, r"seed is .* \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            dropout_keep_mask(*arguments, **options)
