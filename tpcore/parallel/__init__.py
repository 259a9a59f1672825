"""Tensor parallelism without kernels: groups, collectives, sharding algebra, random streams."""

from __future__ import annotations

from tpcore.parallel.collectives import (
    all_gather,
    all_reduce,
    barrier,
    broadcast,
    copy_to,
    gather_from,
    gather_from_sequence,
    reduce_from,
    reduce_scatter_to_sequence,
    scatter_to,
    scatter_to_sequence,
)
from tpcore.parallel.group import (
    DataParallelGroup,
    ParallelGroup,
    TensorParallelGroup,
    destroy_parallel,
    divide,
    init_parallel,
)
from tpcore.parallel.random import DropoutContext, Site, dropout_stream, make_row_ids, step_seed
from tpcore.parallel.sharding import (
    Replicated,
    Sharded,
    ShardedQKV,
    Sharding,
    full_shape,
    reshard,
    shard,
    shard_shape,
    sharding_table,
    unshard,
)

__all__ = [
    "DataParallelGroup",
    "DropoutContext",
    "ParallelGroup",
    "Replicated",
    "Sharded",
    "ShardedQKV",
    "Sharding",
    "Site",
    "TensorParallelGroup",
    "all_gather",
    "all_reduce",
    "barrier",
    "broadcast",
    "copy_to",
    "destroy_parallel",
    "divide",
    "dropout_stream",
    "full_shape",
    "gather_from",
    "gather_from_sequence",
    "init_parallel",
    "make_row_ids",
    "reduce_from",
    "reduce_scatter_to_sequence",
    "reshard",
    "scatter_to",
    "scatter_to_sequence",
    "shard",
    "shard_shape",
    "sharding_table",
    "step_seed",
    "unshard",
]
