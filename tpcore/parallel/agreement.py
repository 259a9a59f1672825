"""Whether all ranks are about to call the same collective over gloo.

gloo itself does not ask: where the sizes differ, the rank that expects less is ended by an
exception in a thread of gloo, and the others return whatever has arrived. So before a collective
that blocks anyway, the ranks tell each other what they are going to call: one more message of 32
bytes from each. Shared memory says so in the same message as the data
(csrc/cpu/shm_channel.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcore.parallel.group import ParallelGroup

# Numbered in this order in the messages.
_CALLS = ("sum", "max", "all_gather", "reduce_scatter", "broadcast")
_DTYPES = tuple(
    dict.fromkeys(d for d in vars(torch).values() if isinstance(d, torch.dtype)),
)


def check_same_call(group: ParallelGroup, call: str, x: Tensor, source: int = 0) -> None:
    """Collective over the group, whose CPU backend is gloo.

    Raises:
        RuntimeError: on every rank, if one of them has come with another collective, number of
            elements, dtype or source; the message says what each is about to call.
    """
    words = [_CALLS.index(call), x.numel(), _DTYPES.index(x.dtype), source]
    own = torch.tensor(words, device="cpu")
    assert group.process_group is not None
    ops = torch.ops._c10d_functional
    every = ops.wait_tensor(
        ops.all_gather_into_tensor(own[None], group.size, group.process_group.group_name)
    )
    if bool((every == own).all()):
        return
    told = "; ".join(f"rank {rank}: {_told(*row)}" for rank, row in enumerate(every.tolist()))
    raise RuntimeError(
        f"the ranks of the group are about to call different collectives: {told} (this is rank "
        f"{group.rank}; the global ranks of the group are {list(group.ranks)})"
    )


def _told(call: int, numel: int, dtype: int, source: int) -> str:
    name = f"all_reduce {_CALLS[call]}" if call < 2 else _CALLS[call]
    origin = f" from rank {source}" if _CALLS[call] == "broadcast" else ""
    return f"{name} of {numel} elements of {_DTYPES[dtype]}{origin}"
