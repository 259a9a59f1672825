"""One rank reads the data, the others of its tensor-parallel group get the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tpcore.interop.megatron.parallel_state import resolve_group
from tpcore.interop.megatron.tensor_parallel.mappings import Group
from tpcore.parallel.collectives import broadcast

MAX_DIMS = 5


def broadcast_data(
    keys: Sequence[str],
    data: Mapping[str, Tensor] | None,
    datatype: torch.dtype,
    tp_group: Group = None,
) -> dict[str, Tensor]:
    """The tensors of the first rank of the tensor-parallel group, on every rank of it.

    Args:
        keys: what to send; the same on every rank.
        data: the tensors, of at most five dimensions; read on the first rank only.
        datatype: the dtype of all of them.
        tp_group: None: the group of this process.

    Returns:
        The tensors by key, on the current CUDA device if there is one, else on the CPU.

    Raises:
        ValueError: on every rank, if the first one lacks a key or holds a tensor that cannot be
            sent.
    """
    tp = resolve_group(tp_group)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # One message says what comes, so that a mistake on one rank is an error on all of them.
    header = torch.zeros(len(keys), 2 + MAX_DIMS, dtype=torch.int64, device="cpu")
    problem = ""
    if tp.rank == 0:
        problem = _problem(keys, data, datatype)
        if problem:
            header[:, 0] = 1
        else:
            for row, key in zip(header, keys, strict=True):
                shape = data[key].shape  # type: ignore[index]
                row[1] = len(shape)
                row[2 : 2 + len(shape)] = torch.tensor(shape, device="cpu")
    header = broadcast(header.to(device), tp).cpu()
    if header[:, 0].any():
        raise ValueError(problem or "broadcast_data failed on the first rank of the group")
    shapes = [torch.Size(row[2 : 2 + int(row[1])].tolist()) for row in header]
    sizes = [shape.numel() for shape in shapes]
    if tp.rank == 0:
        assert data is not None
        flat = torch.cat([data[key].reshape(-1).to(device) for key in keys])
    else:
        flat = torch.empty(sum(sizes), dtype=datatype, device=device)
    parts = broadcast(flat, tp).split(sizes)
    return {key: part.view(s) for key, part, s in zip(keys, parts, shapes, strict=True)}


def _problem(keys: Sequence[str], data: Mapping[str, Tensor] | None, dtype: torch.dtype) -> str:
    if data is None:
        return "data is None on the first rank of the tensor-parallel group, which sends it"
    for key in keys:
        if key not in data:
            return f"data has no {key!r}; it has {', '.join(map(repr, data))}"
        if not isinstance(data[key], Tensor):
            return f"data[{key!r}] is a {type(data[key]).__name__}; expected a tensor"
        if data[key].dtype != dtype:
            return f"data[{key!r}] is {data[key].dtype}; expected datatype={dtype}"
        if data[key].dim() > MAX_DIMS:
            return f"data[{key!r}] has {data[key].dim()} dimensions; at most {MAX_DIMS} are sent"
    return ""
