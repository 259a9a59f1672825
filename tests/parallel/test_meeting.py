"""Ranks of a round find each other in a store that is full of what earlier rounds have left."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from tpcore.parallel.meeting import store_of_this_round


def _meet(store: HashStore, world_size: int) -> list[object]:
    """All ranks of one round, each in a thread; their stores."""
    stores: list[object] = [None] * world_size

    def run(rank: int) -> None:
        stores[rank] = store_of_this_round(store, rank, world_size, 20.0)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return stores


def test_rounds_do_not_see_each_other() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=20))
    for number in range(3):
        stores = _meet(store, 4)
        assert all(stores)
        for rank, own in enumerate(stores):
            assert not own.check(["address"])  # type: ignore[attr-defined]
            own.set(f"from/{rank}", str(number))  # type: ignore[attr-defined]
        for own in stores:
            for rank in range(4):
                assert own.get(f"from/{rank}") == str(number).encode()  # type: ignore[attr-defined]
        stores[0].set("address", "of this round")  # type: ignore[attr-defined]


def test_a_rank_that_ended_while_meeting_is_not_waited_for() -> None:
    store = HashStore()
    # It said hello in the round before, and nobody will answer for it.
    store.set("tpcore/hello/1", "a-rank-that-has-ended")
    assert all(_meet(store, 2))


def test_ranks_that_do_not_come_are_counted() -> None:
    with pytest.raises(RuntimeError, match=r"2 of 3 ranks have not come within 0\.2 s"):
        store_of_this_round(HashStore(), 0, 3, 0.2)
