"""One rank, its groups made as torchrun would: every collective, a layer, and a gradient.

    python -m tests.gpu.one_rank nccl|gloo

A group of one has nothing to exchange, and tpcore.parallel leaves its communicator alone; here the
transports are called all the same, so that NCCL, or gloo, does what it does for more ranks.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn

from tpcore.layers import ColumnParallelLinear
from tpcore.parallel import collectives
from tpcore.parallel.group import destroy_parallel, init_parallel


def main(backend: str) -> None:
    tp, dp = init_parallel(1, backend=None if backend == "nccl" else backend, timeout_s=60)
    assert tp.process_group._get_backend(torch.device("cuda")).name() == backend
    x = torch.arange(12.0, device="cuda").view(4, 3)
    for group in (tp, dp):
        transport = collectives._transport(x, group)
        assert type(transport) is (
            collectives._Functional if backend == "nccl" else collectives._Staged
        )
        for op in ("sum", "max"):
            assert torch.equal(transport.all_reduce(x, op), x)
            assert torch.equal(collectives.wait(transport.start_all_reduce(x, op)), x)
        in_place = x.clone()
        transport.all_reduce_in_place(in_place, "sum")
        for result in (
            in_place,
            transport.all_gather(x),
            transport.reduce_scatter(x),
            transport.broadcast(x, 0),
            collectives.wait(transport.start_all_gather(x)),
            collectives.wait(transport.start_reduce_scatter(x)),
        ):
            assert result.device == x.device
            assert torch.equal(result, x)
    collectives.barrier(tp)

    torch.manual_seed(0)
    layer = ColumnParallelLinear(3, 5, tp=tp, device="cuda")
    plain = nn.Linear(3, 5, device="cuda")
    plain.load_state_dict(layer.state_dict())
    for module in (layer, plain):
        module(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    destroy_parallel()
    assert not dist.is_initialized()
    print(f"{backend}: ok")


if __name__ == "__main__":
    main(sys.argv[1])
