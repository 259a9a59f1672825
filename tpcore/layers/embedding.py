"""Embedding whose rows (the vocabulary) are split over a tensor-parallel group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpcore.layers.initialization import InitMethod, draw_whole_then_shard
from tpcore.parallel.collectives import reduce_from, reduce_scatter_to_sequence
from tpcore.parallel.group import TensorParallelGroup, divide
from tpcore.parallel.sharding import Sharded, Sharding


class VocabParallelEmbedding(nn.Module):
    """y = E[ids] with the rows of E [v, h] split over the ranks: E_r [v/tp, h].

    Each rank looks up the ids that fall into its rows, writes zeros for the others, and an
    all-reduce adds the ranks up: one of them has the row, so the sum is exact in every dtype
    (arXiv 1909.08053, section 3).

    Args:
        num_embeddings: number of ids that may occur.
        embedding_dim: h.
        tp: the ranks that share the table.
        padded_num_embeddings: rows of the full table, num_embeddings or more and a multiple of the
            group's size; None: num_embeddings.
        init_method: fills the full table [num_embeddings, h] in place; None: standard normal, as
            torch.nn.Embedding. Padding rows repeat the last row, so the values do not depend on how
            much padding a tensor-parallel size asks for.
        sequence_parallel: keep this rank's share of dim 0 of the output: [t] ids, the same on every
            rank, -> [t/tp, h], by a reduce-scatter in place of the all-reduce.

    Raises:
        ValueError: the group's size does not divide the number of rows, or there are fewer rows
            than ids.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        tp: TensorParallelGroup,
        padded_num_embeddings: int | None = None,
        init_method: InitMethod | None = None,
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "num_embeddings" if padded_num_embeddings is None else "padded_num_embeddings"
        padded = num_embeddings if padded_num_embeddings is None else padded_num_embeddings
        if padded < num_embeddings:
            raise ValueError(
                f"padded_num_embeddings={padded} is smaller than num_embeddings={num_embeddings}; "
                "padding can only add rows"
            )
        self.num_embeddings, self.padded_num_embeddings = num_embeddings, padded
        self.embedding_dim = embedding_dim
        self.tp = tp
        self.init_method = init_method
        self.sequence_parallel = sequence_parallel
        rows = divide(padded, tp.size, name)
        self.vocab_start = tp.rank * rows
        self.weight = nn.Parameter(torch.empty(rows, embedding_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the full table, repeat its last row as padding, keep this rank's rows."""
        draw_whole_then_shard(
            self.weight,
            (self.padded_num_embeddings, self.embedding_dim),
            Sharded(0),
            self.tp,
            self._init_padded,
        )

    def own_sharding(self) -> dict[str, Sharding]:
        """Rows are split."""
        return {"weight": Sharded(0)}

    def own_unpadded_sizes(self) -> dict[str, int]:
        """Rows that stand for an id; the others fill up the split (tpcore.checkpoint.sharded)."""
        return {"weight": self.num_embeddings}

    def forward(self, ids: Tensor) -> Tensor:
        """Ids, an integer tensor [...], -> [..., h]; sequence-parallel [t, ...] -> [t/tp, ..., h].

        Raises:
            ValueError: an id lies outside 0 .. num_embeddings - 1 (checked on the CPU; on other
                devices reading the ids back would stall the device), or a sequence-parallel t is
                not a multiple of the group's size.
        """
        if not torch.compiler.is_compiling():
            self.check_ids(ids)
        if self.tp.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.vocab_start
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0)
        return (reduce_scatter_to_sequence if self.sequence_parallel else reduce_from)(
            rows, self.tp
        )

    def extra_repr(self) -> str:
        return (
            f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, "
            f"padded_num_embeddings={self.padded_num_embeddings}, tp_size={self.tp.size}"
        )

    def _init_padded(self, full: Tensor) -> None:
        init = self.init_method or nn.init.normal_
        init(full[: self.num_embeddings])
        full[self.num_embeddings :] = full[self.num_embeddings - 1]

    def check_ids(self, ids: Tensor) -> None:
        """What `forward` checks of ids; a compiled graph of it does not.

        Raises:
            ValueError: an id lies outside 0 .. num_embeddings - 1, on the CPU.
        """
        if ids.device.type != "cpu" or not ids.numel():
            return
        low, high = (int(value) for value in torch.aminmax(ids))
        if low < 0 or high >= self.num_embeddings:
            bad = low if low < 0 else high
            raise ValueError(
                f"ids contain {bad}; expected 0 to {self.num_embeddings - 1} (num_embeddings="
                f"{self.num_embeddings}): the tokenizer and the model disagree about the vocabulary"
            )
