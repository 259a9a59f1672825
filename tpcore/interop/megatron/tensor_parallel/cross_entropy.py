"""Cross entropy of logits whose last dimension, the vocabulary, is split over the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcore.interop.megatron.parallel_state import resolve_group
from tpcore.interop.megatron.tensor_parallel.mappings import Group
from tpcore.layers.loss import vocab_parallel_cross_entropy as _cross_entropy

_IGNORED = -100


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    tp_group: Group = None,
) -> Tensor:
    """Loss of every token; the same on every rank, and the logits are as before.

        loss = (1 - e) (log sum exp z - z_target) + e / (V - 1) * (that, summed over the other ids)

    with V the size of the whole vocabulary, padding included.

    Args:
        vocab_parallel_logits: [..., V/tp], any floating dtype.
        target: int64 [...], ids; a token whose target is no id (-1, -100) has no loss and no
            gradient.
        label_smoothing: e, 0 <= e < (V - 1) / V.
        tp_group: None: the group of this process.

    Returns:
        Loss [...], float32 (float64 for float64 logits).
    """
    tp = resolve_group(tp_group)
    num_classes = vocab_parallel_logits.shape[-1] * tp.size
    rows = target.reshape(-1)
    rows = torch.where((rows < 0) | (rows >= num_classes), _IGNORED, rows)
    loss = _cross_entropy(
        vocab_parallel_logits.reshape(rows.shape[0], -1),
        rows,
        tp=tp,
        ignore_index=_IGNORED,
        # tpcore and torch spread the share e over all V ids, target included.
        label_smoothing=label_smoothing * num_classes / (num_classes - 1)
        if label_smoothing
        else 0.0,
    )
    return loss.view(target.shape)
