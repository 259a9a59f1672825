"""The pool must show the rank and the line that failed, whatever happens to the others."""

from __future__ import annotations

import os
import time

import pytest

from tests.helpers.ranks import run_mesh, run_ranks
from tpcore.parallel.collectives import barrier


def _rank_and_arguments(tp, *args):
    return tp.rank, args


def _fail_on_rank_1(tp):
    assert tp.rank != 1, "the cause"
    barrier(tp)


def _die_on_rank_1(tp):
    if tp.rank == 1:
        os._exit(3)
    barrier(tp)


def _hang_on_rank_1(tp):
    if tp.rank == 1:
        time.sleep(1000)


def _skip(tp):
    pytest.skip("not here")


def _mesh(tp, dp):
    return tp.ranks, dp.ranks


def test_results_come_back_in_rank_order():
    assert run_ranks(_rank_and_arguments, 2, "a", 1) == [(0, ("a", 1)), (1, ("a", 1))]


def test_mesh():
    assert run_mesh(_mesh, 2, 2) == [
        ((0, 1), (0, 2)),
        ((0, 1), (1, 3)),
        ((2, 3), (0, 2)),
        ((2, 3), (1, 3)),
    ]


def test_the_first_failure_is_the_one_shown():
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2 failed first:.*the cause"):
        run_ranks(_fail_on_rank_1, 2)
    assert len(run_ranks(_rank_and_arguments, 2)) == 2, "the pool was not rebuilt"


def test_a_skip_is_passed_on():
    with pytest.raises(pytest.skip.Exception, match="not here"):
        run_ranks(_skip, 2)


def test_a_local_function_is_refused():
    with pytest.raises(ValueError, match="must be a module-level function"):
        run_ranks(lambda tp: None, 1)


@pytest.mark.slow
def test_a_dead_and_a_hung_rank():
    with pytest.raises(AssertionError, match="rank 1 of 2 failed first:\nthe process died with"):
        run_ranks(_die_on_rank_1, 2)
    run_ranks(_rank_and_arguments, 2)
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2 did not finish.*in _hang_on_rank_1"):
        run_ranks(_hang_on_rank_1, 2, timeout_s=3)
