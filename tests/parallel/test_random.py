from __future__ import annotations

import pytest
import torch

from tpcore.parallel.random import (
    DropoutContext,
    Site,
    dropout_stream,
    make_row_ids,
    step_seed,
)


def test_step_seed_known_values():
    # splitmix64 from state 0 gives 0xe220a8397b1dcdaf (its published first output); the second mix
    # starts from there.
    assert step_seed(0, 0) == 6017775124710473527
    assert step_seed(0, 1) == 1534736266818221247
    assert step_seed(1234, 5) == 8283773070198799620


def test_step_seeds_are_distinct_and_fit_int64():
    seeds = {step_seed(seed, step) for seed in range(-20, 20) for step in range(500)}
    assert len(seeds) == 40 * 500
    assert min(seeds) >= 0
    assert torch.tensor(sorted(seeds), dtype=torch.int64).tolist() == sorted(seeds)
    # Neighbours differ in about half of their 63 bits.
    flips = [bin(step_seed(7, k) ^ step_seed(7, k + 1)).count("1") for k in range(500)]
    assert 30 < sum(flips) / len(flips) < 33


def test_streams_are_distinct():
    streams = [dropout_stream(layer, site) for layer in range(200) for site in Site]
    assert len(set(streams)) == len(streams)
    assert dropout_stream(3, Site.MLP_OUTPUT) == 27
    assert dropout_stream(8191, Site.HEAD) < 1 << 16


@pytest.mark.parametrize("layer_number", [-1, 8192])
def test_a_stream_outside_its_16_bits_is_refused(layer_number):
    with pytest.raises(ValueError, match=f"layer_number={layer_number} has no dropout stream"):
        dropout_stream(layer_number, Site.EMBEDDING)


def test_row_ids():
    ids = make_row_ids(torch.tensor([0, 0, 3], dtype=torch.int32), torch.tensor([0, 5, 1]))
    assert ids.dtype == torch.int64
    assert ids.tolist() == [0, 5, (3 << 20) + 1]
    assert make_row_ids(torch.tensor(1 << 40), torch.tensor(2)).item() == (1 << 60) + 2


def test_dropout_context_refuses_what_would_fail_later():
    row_ids = torch.arange(3)
    with pytest.raises(ValueError, match="seed must be an int64 tensor of one element"):
        DropoutContext(torch.tensor([1.0]), row_ids)
    with pytest.raises(ValueError, match="row_ids must be an int64 tensor"):
        DropoutContext(torch.tensor([1]), row_ids.int())
