"""CanonicalState -> BertModel shards on each rank, and back."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.names import is_canonical, listing
from tpcore.checkpoint.state import (
    CanonicalState,
    Source,
    check_complete,
    check_tensor_parallel_size,
    check_vocabulary,
    sharding_of,
)
from tpcore.checkpoint.stored import StoredTensor
from tpcore.models.bert import BertModel, Pooler
from tpcore.models.config import BertConfig, padded_vocab_size_for
from tpcore.models.heads import (
    HEADS,
    Head,
    PreTrainingHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
    build_head,
)
from tpcore.parallel.collectives import all_gather
from tpcore.parallel.group import TensorParallelGroup
from tpcore.parallel.sharding import Sharded, full_shape

logger = logging.getLogger(__name__)

CLASSIFIERS = ("sequence_classification", "token_classification")
AUTO = "auto"
# What a stored head's arguments are where they are not said; these cannot be changed on loading.
_FIXED = {"num_labels": None, "binary": True, "num_layers": 1, "pooler": True}


def override_config(state: CanonicalState, overrides: Mapping[str, Any]) -> CanonicalState:
    """Apply the caller's own configuration values to what the file says.

    Raises:
        CheckpointError: an unknown name, or a value that the tensors contradict.
    """
    if not overrides:
        return state
    if isinstance(overrides.get("vocab_size"), int):
        check_vocabulary(
            overrides["vocab_size"],
            state.vocab_rows,
            str(state.source.path),
            state.config.vocab_size,
        )
    try:
        config = state.config.replace(**overrides)
    except ValueError as error:
        raise CheckpointError(f"{state.source.path}: {error}") from error
    tensors = state.tensors
    if state.config.add_pooler and not config.add_pooler:
        tensors = {name: t for name, t in tensors.items() if not name.startswith("pooler.")}
    return check_complete(dataclasses.replace(state, config=config, tensors=tensors))


def build_model(
    state: CanonicalState,
    *,
    tp: TensorParallelGroup,
    head: str | None = AUTO,
    num_labels: int | None = None,
    head_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    model_options: Mapping[str, Any] | None = None,
) -> BertModel:
    """This rank's shard of the model in a state, with the head that is asked for.

    ``model_options`` are further arguments of BertModel: how it computes, not what.

    Raises:
        CheckpointError: the model cannot be split so, or the file does not have that head.
    """
    check_tensor_parallel_size(state.config, tp.size)
    state, wanted, kwargs = _choose_head(state, head, num_labels, dict(head_kwargs or {}))
    config = _config_for(state, tp.size)
    new_pooler = wanted is not None and _needs_pooler(wanted, kwargs) and not config.add_pooler
    if new_pooler and state.head is not None:
        raise CheckpointError(
            f"{state.source.path}: missing parameters: pooler.dense.weight, pooler.dense.bias, "
            f"which its {state.head} head works on; pass head=None for the encoder alone"
        )
    if new_pooler:
        config = config.replace(add_pooler=True)
    # On the meta device no weight is drawn, and none is allocated before its values are read.
    with torch.device("meta"):
        model = BertModel(config, tp=tp, device="meta", dtype=dtype, **(model_options or {}))
        if state.head is not None:
            model.head = _new_head(state.head, config, kwargs, tp, "meta", dtype)
    names = list(model.state_dict())
    new: list[str] = []
    if wanted is not None and state.head is None:
        model.head = _new_head(wanted, config, kwargs, tp, device, dtype)
        new += [name for name in model.state_dict() if name.startswith("head.")]
    if new_pooler:
        model.pooler = Pooler(config, device=device, dtype=dtype)
        new += [name for name in names if name.startswith("pooler.")]
    _fill(model, state, [name for name in names if name not in new], tp, device)
    if new and tp.rank == 0:
        logger.warning("%s: new, not in the file: %s", state.source.path, listing(new))
    return model


def state_from_model(
    model: BertModel,
    *,
    labels: tuple[str, ...] | None = None,
    source: Source | None = None,
) -> CanonicalState:
    """Describe a live model as a state; reading a tensor gathers it from all ranks.

    Every rank must read the same tensors in the same order.
    """
    head, kwargs = describe_head(model.head)
    shards = dict(model.state_dict())
    foreign = [n for n in shards if not is_canonical(n)]
    if foreign:
        raise CheckpointError(
            f"the model has parameters that a checkpoint has no place for: {listing(foreign)}; "
            "remove those modules, or save them on their own"
        )
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in shards.items():
        sharding = sharding_of(name)
        tensors[name] = StoredTensor(
            full_shape(tensor.shape, sharding, model.tp.size, name=name),
            tensor.dtype,
            partial(_gather, tensor, sharding, model.tp),
        )
    return check_complete(
        _ModelState(
            config=model.config,
            head=head,
            head_kwargs=kwargs,
            labels=labels,
            tensors=tensors,
            source=source or Source(path=Path("model"), format="tpcore"),
            own_shards=shards,
            tp=model.tp,
        )
    )


def describe_head(head: Head | None) -> tuple[str | None, dict[str, Any]]:
    """A head's name and the arguments that build it."""
    if head is None:
        return None, {}
    names = {kind: name for name, kind in HEADS.items()}
    if type(head) not in names:
        raise CheckpointError(
            f"a {type(head).__name__} has no place in a checkpoint; heads are {', '.join(HEADS)}"
        )
    name = names[type(head)]
    if isinstance(head, PreTrainingHead):
        return name, {"binary": head.binary is not None}
    kwargs: dict[str, Any] = {}
    if isinstance(head, QuestionAnsweringHead):
        if head.dropout.p:
            kwargs["dropout"] = head.dropout.p
    else:
        assert isinstance(head, SequenceClassificationHead | TokenClassificationHead)
        kwargs |= {"num_labels": head.classifier.out_features, "dropout": head.dropout.p}
    if isinstance(head, SequenceClassificationHead):
        if head.regression:
            kwargs["regression"] = True
        if not head.pooler:
            kwargs["pooler"] = False
    if len(head.hidden):
        kwargs |= {"num_layers": 1 + len(head.hidden), "activation": head.hidden.activation}
    return name, kwargs


@dataclass(frozen=True, kw_only=True, eq=False)
class _ModelState(CanonicalState):
    """A state whose shards of the model's own size are taken from this rank, not gathered."""

    own_shards: Mapping[str, Tensor]
    tp: TensorParallelGroup

    def holds(self, rank: int, size: int, vocab_rows: int) -> bool:
        return (rank, size, vocab_rows) == (self.tp.rank, self.tp.size, self.vocab_rows)

    def shard(self, name: str, rank: int, size: int, vocab_rows: int) -> Tensor:
        if self.holds(rank, size, vocab_rows):
            return self.own_shards[name].detach().cpu().clone()
        return super().shard(name, rank, size, vocab_rows)


def _gather(tensor: Tensor, sharding: Any, tp: TensorParallelGroup) -> Tensor:
    with torch.no_grad():
        if isinstance(sharding, Sharded):
            tensor = all_gather(tensor.detach(), tp, sharding.dim)
        return tensor.detach().cpu()


def _choose_head(
    state: CanonicalState, head: str | None, num_labels: int | None, kwargs: dict[str, Any]
) -> tuple[CanonicalState, str | None, dict[str, Any]]:
    """The state with the head's tensors or without them, the head wanted, its arguments."""
    where = state.source.path
    if head is None:
        if num_labels is not None or kwargs:
            raise CheckpointError(f"{where}: num_labels and head_kwargs need a head")
        return state.without_head(), None, {}
    if head not in (AUTO, *HEADS):
        raise CheckpointError(
            f"head={head!r} is unknown; use one of {', '.join(HEADS)}, 'auto' or None"
        )
    if num_labels is not None:
        kwargs["num_labels"] = num_labels
    if head == AUTO:
        if state.head is None and kwargs:
            raise CheckpointError(
                f"{where}: holds no head, so num_labels and head_kwargs need the name of a new "
                "one; pass head='sequence_classification' or another"
            )
        head = state.head
    if head is not None and head == state.head:
        if head not in HEADS:
            raise CheckpointError(
                f"{where}: its head ({head}) is none that tpcore has ({', '.join(HEADS)}); pass "
                "head=None for the encoder alone, or the name of a new head"
            )
        for name, default in _FIXED.items():
            held = state.head_kwargs.get(name, default)
            if name in kwargs and kwargs[name] != held:
                raise CheckpointError(
                    f"{where}: {name}={kwargs[name]} was asked for, but its {head} head has "
                    f"{held}; load it with head=None and attach a new head "
                    "(tpcore.models.heads.build_head)"
                )
        return state, head, {**state.head_kwargs, **kwargs}
    if head in CLASSIFIERS and "num_labels" not in kwargs:
        raise CheckpointError(f"{where}: holds no {head} head; a new one needs num_labels=...")
    dropped = [name for name in state.tensors if name.startswith("head.")]
    if dropped:
        logger.info("%s: not used: %s", where, listing(dropped))
    return state.without_head(), head, kwargs


def _needs_pooler(head: str, kwargs: Mapping[str, Any]) -> bool:
    if head == "sequence_classification":
        return bool(kwargs.get("pooler", True))
    return head == "pretraining" and bool(kwargs.get("binary", True))


def _new_head(
    name: str,
    config: BertConfig,
    kwargs: Mapping[str, Any],
    tp: TensorParallelGroup,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Head:
    try:
        return build_head(name, config, tp=tp, device=device, dtype=dtype, **kwargs)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"head {name}: {error}") from error


def _config_for(state: CanonicalState, size: int) -> BertConfig:
    """The file's own padding of the vocabulary where it can be split, else Megatron's rule."""
    config = state.config
    padded = config.padded_vocab_size
    if padded is None or padded % size:
        padded = padded_vocab_size_for(config.vocab_size, size)
    return config.replace(padded_vocab_size=padded)


def _fill(
    model: BertModel,
    state: CanonicalState,
    names: list[str],
    tp: TensorParallelGroup,
    device: torch.device | str | None,
) -> None:
    """Read each of `names` once and keep this rank's part of it."""
    missing = [name for name in names if name not in state.tensors]
    unused = [name for name in state.tensors if name not in names]
    assert not missing, missing
    assert not unused, unused
    rows = model.config.padded_vocab_size
    assert rows is not None
    targets = model.state_dict()
    filled: dict[str, Tensor] = dict(targets)
    for name in names:
        piece = state.shard(name, tp.rank, tp.size, rows)
        target = targets[name]
        assert piece.shape == target.shape, (name, piece.shape, target.shape)
        filled[name] = piece.to(device=device, dtype=target.dtype)
    model.load_state_dict(filled, strict=True, assign=True)
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    left += [name for name, tensor in model.named_buffers() if tensor.is_meta]
    assert not left, left
