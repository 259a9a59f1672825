"""How ranks that torchrun has started again tell each other from those that were there before.

The key-value store of torchrun's agent outlives its ranks. A rank that is started again finds the
addresses of ranks that have ended, and may connect to nobody. So the ranks of a round first agree
on a prefix that no other round has:

    rank r > 0    hello/<r> = own name                    rank 0    for every new name in hello/<r>:
                  wait for welcome/<own name> = prefix              welcome/<name> = prefix
                  ready/<prefix> += 1                               until ready/<prefix> = size - 1

Names and the prefix are drawn at random; nobody of an earlier round is there to answer.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store

_POLL_S = 0.02


def store_of_this_round(store: Store, rank: int, world_size: int, timeout_s: float) -> Store:
    """A store with only what the ranks of this round put there.

    Args:
        store: of the launcher, with what earlier rounds have left.
        rank: of this process in the world.
        world_size: how many ranks there are.
        timeout_s: how long to wait for the others.

    Raises:
        RuntimeError: the others have not come in time.
    """
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"tpcore/hello/{rank}", name)
        store.wait([f"tpcore/welcome/{name}"], timedelta(seconds=timeout_s))
        prefix = store.get(f"tpcore/welcome/{name}").decode()
        store.add(f"tpcore/ready/{prefix}", 1)
        return PrefixStore(prefix, store)
    deadline = time.monotonic() + timeout_s
    welcomed: dict[int, bytes] = {}
    while store.add(f"tpcore/ready/{name}", 0) < world_size - 1:
        for other in range(1, world_size):
            key = f"tpcore/hello/{other}"
            found = store.get(key) if store.check([key]) else None
            if found is not None and welcomed.get(other) != found:
                store.set(f"tpcore/welcome/{found.decode()}", name)
                welcomed[other] = found
        if time.monotonic() > deadline:
            ready = store.add(f"tpcore/ready/{name}", 0)
            raise RuntimeError(
                f"{world_size - 1 - ready} of {world_size} ranks have not come within "
                f"{timeout_s:g} s; see whether all launchers were started"
            )
        time.sleep(_POLL_S)
    return PrefixStore(name, store)
