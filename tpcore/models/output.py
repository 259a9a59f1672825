"""What a model returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BertOutput:
    """The encoder's results and what the head adds; None where the model has no such part.

    From `forward`, per-token tensors are rectangles `[b, s, ...]`; from `forward_packed` they
    stay packed, `[t, ...]`.
    """

    last_hidden_state: Tensor  # [b, s, h], zeros at padding
    pooler_output: Tensor | None = None  # [b, h]
    loss: Tensor | None = None  # scalar, fp32
    logits: Tensor | None = None  # [b, num_labels], or [b, s, num_labels] for token heads
    prediction_logits: Tensor | None = None  # [b, s, padded vocabulary]
    token_losses: Tensor | None = None  # fp32 [m], of `heads.MaskedTokens` with targets
    seq_relationship_logits: Tensor | None = None  # [b, 2]
    start_logits: Tensor | None = None  # [b, s], -inf at padding
    end_logits: Tensor | None = None  # [b, s], -inf at padding
