"""NCCL where there is one GPU: a communicator of one rank carries every collective we call."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers.device import DEVICE

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cuda", reason="needs TPCORE_TEST_DEVICE=cuda"),
]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_collectives_and_a_layer_in_a_group_of_one(backend):
    """The gloo case shows that the program itself is right, where there is no NCCL too."""
    if backend == "nccl" and not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    torchrun = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    environment = {k: str(v) for k, v in {**torchrun, "MASTER_PORT": _free_port()}.items()}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.one_rank", backend],
        cwd=ROOT,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "TPCORE_SHARED_MEMORY": "0", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{backend}: ok\n")
