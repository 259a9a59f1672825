"""What a checkpoint holds beside the weights, and both at another tensor-parallel size.

Optimizer state is stored by the names of the parameters. A tensor of the shape of its parameter is
split as the parameter is, so that the same algebra takes weights and moments from any size to any.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.names import VOCABULARY_PARAMETERS
from tpcore.checkpoint.state import resize_vocabulary
from tpcore.models.bert import BertModel
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.parallel.sharding import Replicated, Sharded, Sharding, shard, unshard
from tpcore.train.precision import Weights

OptimizerState = dict[str, dict[str, Any]]
"""By parameter: tensors of its shape, and numbers."""


def sharded_dims(shardings: Mapping[str, Sharding], names: Sequence[str]) -> dict[str, int | None]:
    """The dimension that each parameter is split along; None where every rank has all of it."""
    return {name: _dim(shardings[name]) for name in names}


def _dim(sharding: Sharding) -> int | None:
    if isinstance(sharding, Replicated):
        return None
    assert isinstance(sharding, Sharded)
    return sharding.dim


# --- optimizer ----------------------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer, weights: Weights) -> OptimizerState:
    """The state of every parameter that has been stepped, on the CPU; all ranks call it."""
    state: OptimizerState = {}
    for name, parameter in weights.main.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                value = value.detach()
                value = weights.whole(name, value) if value.shape == parameter.shape else value
                value = value.cpu()
            state.setdefault(name, {})[key] = value
    return state


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, weights: Weights, state: OptimizerState
) -> None:
    """Put back what `optimizer_state` gave."""
    optimizer.state.clear()
    for name, entries in state.items():
        parameter, own = weights.main[name], {}
        for key, value in entries.items():
            if isinstance(value, Tensor):
                value = weights.own_part(name, value) if value.ndim else value
                value = value.to(parameter.device, copy=True)
            own[key] = value
        optimizer.state[parameter] = own


def group_steps(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The step counters of optimizers that have one for each group, as apex has."""
    return [group.get("step") for group in optimizer.param_groups]


def load_group_steps(optimizer: torch.optim.Optimizer, steps: Sequence[Any]) -> None:
    """Put back what `group_steps` gave."""
    for group, step in zip(optimizer.param_groups, steps, strict=True):
        if step is not None:
            group["step"] = step


# --- random streams -----------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The generators of torch and Python in this process.

    Training draws from none of them: order and dropout are functions of seed and step. A task or a
    module of the user's may.
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def random_states_of(dp: DataParallelGroup) -> list[dict[str, Any]]:
    """Those of all data-parallel ranks, of which the first one writes."""
    states = [random_state()] * dp.size
    if dp.size > 1:
        dist.all_gather_object(states, random_state(), group=dp.process_group)
    return states


# --- from the files of any size -----------------------------------------------------------------


def own_weights(
    files: Sequence[Mapping[str, Any]], model: BertModel, target: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """This rank's part of the weights.

    Args:
        files: of all ranks that wrote, in order.
        model: says the size, the rank and the vocabulary.
        target: tensors of the model's shapes, by name.
        where: for messages.

    Raises:
        CheckpointError: names or shapes are not those of the model.
    """
    names = set(files[0]["state_dict"])
    if names != set(target):
        difference = ", ".join(sorted(names ^ set(target)))
        raise CheckpointError(f"{where}: parameters do not match the model: {difference}")
    weights = {}
    for name, tensor in target.items():
        parts = [content["state_dict"][name] for content in files]
        part = _own_part(parts, files[0]["sharded_dim"][name], name, model, tensor.shape[:1])
        if part.shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(part.shape)}; expected {list(tensor.shape)}"
            )
        weights[name] = part
    return weights


def own_optimizer_state(
    files: Sequence[Mapping[str, Any]], model: BertModel, target: Mapping[str, Tensor]
) -> OptimizerState:
    """This rank's part of the optimizer's state, of files whose weights have fitted."""
    states = [content["training"]["optimizer"] for content in files]
    result: OptimizerState = {}
    for name, entries in states[0].items():
        result[name] = {}
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.shape == files[0]["state_dict"][name].shape:
                parts = [state[name][key] for state in states]
                dim, rows = files[0]["sharded_dim"][name], target[name].shape[:1]
                value = _own_part(parts, dim, name, model, rows, padding_is_zero=True)
            result[name][key] = value
    return result


def _own_part(
    parts: Sequence[Tensor],
    dim: int | None,
    name: str,
    model: BertModel,
    rows: torch.Size,
    *,
    padding_is_zero: bool = False,
) -> Tensor:
    tp: TensorParallelGroup = model.tp
    if len(parts) == tp.size and parts[tp.rank].shape[:1] == rows:
        return parts[tp.rank]  # as it was, rows that only fill up the vocabulary included
    sharding: Sharding = Replicated() if dim is None else Sharded(dim)
    full = unshard(list(parts), sharding, name=name)
    if name in VOCABULARY_PARAMETERS:
        # Padding depends on the size: cut to the true vocabulary, then pad for this one.
        full = full[: model.config.vocab_size]
        missing = rows[0] * tp.size - full.shape[0]
        if padding_is_zero:
            full = torch.cat([full, full.new_zeros(missing, *full.shape[1:])])
        else:
            full = resize_vocabulary(full, rows[0] * tp.size)
    return shard(full, sharding, tp.rank, tp.size, name=name)
