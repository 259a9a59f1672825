from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.ranks import run_mesh, run_ranks
from tpcore.parallel.collectives import all_reduce
from tpcore.parallel.group import (
    DataParallelGroup,
    TensorParallelGroup,
    destroy_parallel,
    divide,
    init_parallel,
)

ROOT = str(Path(__file__).parents[2])
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def no_torchrun(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("kind", [TensorParallelGroup, DataParallelGroup])
def test_single_survives_everything(kind):
    group = kind.single()
    assert (group.rank, group.size, group.process_group, group.ranks) == (0, 1, None, (0,))
    for clone in (pickle.loads(pickle.dumps(group)), copy.deepcopy(group), copy.copy(group)):
        assert clone == group
        assert type(clone) is kind


def test_a_group_is_frozen_and_consistent():
    with pytest.raises(AttributeError):
        TensorParallelGroup.single().rank = 1
    with pytest.raises(ValueError, match="rank=2 is not a rank of a group of size=2"):
        TensorParallelGroup(None, 2, 2)
    with pytest.raises(ValueError, match="process_group=None cannot connect size=2 ranks"):
        TensorParallelGroup(None, 0, 2)


def test_divide_lists_the_sizes_that_would_do():
    assert divide(16, 4, "num_attention_heads") == 4
    with pytest.raises(ValueError) as error:
        divide(16, 3, "num_attention_heads")
    assert str(error.value) == (
        "num_attention_heads=16 cannot be split over a tensor-parallel size of 3; "
        "use 1, 2, 4, 8 or 16"
    )
    with pytest.raises(ValueError, match=r"vocab_size=30522 cannot .* use 1, 2, 3 or 6$"):
        divide(30522, 4, "vocab_size")


class _Holder(nn.Module):
    def __init__(self, tp):
        super().__init__()
        self.tp = tp


def _check_copies(tp):
    module = _Holder(tp)
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert clone.tp == tp
        assert all_reduce(torch.ones(1), clone.tp).item() == tp.size
    return pickle.dumps(tp)


def test_group_survives_deepcopy_and_pickle_inside_its_process():
    pickled = run_ranks(_check_copies, 2)
    with pytest.raises(ValueError) as error:
        pickle.loads(pickled[0])
    assert "pickled in a group of the global ranks [0, 1]" in str(error.value)
    assert "init_parallel(tensor_parallel_size=2)" in str(error.value)


def _check_unpickle_elsewhere(tp, dp, pickled):
    if dp.rank == 0:
        assert pickle.loads(pickled) == tp
    else:
        with pytest.raises(ValueError, match="this process is in no such group"):
            pickle.loads(pickled)


def test_a_group_of_other_ranks_does_not_unpickle():
    (pickled, _) = run_ranks(_check_copies, 2)
    run_mesh(_check_unpickle_elsewhere, 2, 2, pickled)


def _check_init_on_an_existing_world(_tp, tensor_parallel_size):
    tp, dp = init_parallel(tensor_parallel_size)
    size = tensor_parallel_size
    rank = tp.rank + dp.rank * size
    assert tp.ranks == tuple(range(rank - tp.rank, rank - tp.rank + size))
    assert dp.ranks == tuple(range(tp.rank, 4, size))
    assert all_reduce(torch.tensor([rank]), tp).item() == sum(tp.ranks)
    assert all_reduce(torch.tensor([rank]), dp).item() == sum(dp.ranks)
    # A group of one rank is a real one under a larger world: None would mean the world to
    # DistributedDataParallel.
    assert dp.process_group is not None
    if tp.size == 1:
        assert pickle.loads(pickle.dumps(tp)) == tp
    with pytest.raises(ValueError) as error:
        init_parallel(3)
    assert str(error.value) == (
        "tensor_parallel_size=3 does not divide the world size of 4; use 1, 2 or 4"
    )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_init_parallel_makes_rows_and_columns(size):
    run_ranks(_check_init_on_an_existing_world, 4, size)


def test_init_parallel_alone(no_torchrun):
    tp, dp = init_parallel()
    assert (tp, dp) == (TensorParallelGroup.single(), DataParallelGroup.single())
    destroy_parallel()


@pytest.mark.parametrize(
    ("size", "environment", "message"),
    [
        (0, {}, "tensor_parallel_size=0 is not a group size"),
        (2, {}, "start it with `torchrun --nproc-per-node 2 ...`"),
        (1, {"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not"),
        (1, {"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not an integer"),
        (3, {"WORLD_SIZE": "4"}, "tensor_parallel_size=3 does not divide the world size of 4"),
    ],
)
def test_init_parallel_refuses(no_torchrun, size, environment, message):
    complete = len(environment) != 2
    if environment and complete:
        for name in TORCHRUN:
            no_torchrun.setenv(name, "1")
    for name, value in environment.items():
        no_torchrun.setenv(name, value)
    with pytest.raises(ValueError) as error:
        init_parallel(size)
    assert message in str(error.value)


_TORCHRUN_SCRIPT = """
import pathlib, sys, torch
from tpcore.parallel import all_reduce, destroy_parallel, init_parallel
tp, dp = init_parallel(2, timeout_s=60)
result = f"{all_reduce(torch.ones(1), tp).item()} {tp.size} {dp.size}"
pathlib.Path(sys.argv[1], f"rank-{tp.rank}").write_text(result)
destroy_parallel()
destroy_parallel()
"""


def test_init_parallel_under_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_TORCHRUN_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": ROOT, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert (tmp_path / f"rank-{rank}").read_text() == "2.0 2 1"
