"""Softmax of scaled, masked attention scores: one kernel for every size, mask and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tpcore.interop.megatron.enums import AttnMaskType
from tpcore.kernels import masked_softmax


def attention_mask_func(attention_scores: Tensor, attention_mask: Tensor) -> Tensor:
    """Scores with -10000 where the mask is True; a copy."""
    return attention_scores.masked_fill(attention_mask, -10000.0)


class FusedScaleMaskSoftmax(nn.Module):
    """softmax(scale * scores) over the keys that the mask, or causality, leaves.

    Masks of bool or uint8 are applied in the kernel, True or 1 meaning masked, and a query without
    any key gets zeros (the originals fill with -10000, so that it attends to everything). A mask of
    floating-point numbers goes through ``mask_func``.

    Args:
        input_in_fp16: kept for compatibility: dtypes are seen.
        input_in_bf16: likewise.
        attn_mask_type: a member of AttnMaskType, or of another enumeration with these names;
            ``causal`` and ``padding_causal`` also mask the keys after the query.
        scaled_masked_softmax_fusion: kept for compatibility: the kernel has no limits.
        mask_func: applies a mask that is neither bool nor uint8.
        softmax_in_fp32: statistics always are; the result has the dtype of the input.
        scale: multiplies the scores; None: 1.
        window_size: None.

    Raises:
        ValueError: both half precisions, a scale without softmax_in_fp32, or a window.
    """

    def __init__(
        self,
        input_in_fp16: bool,
        input_in_bf16: bool,
        attn_mask_type: Any,
        scaled_masked_softmax_fusion: bool,
        mask_func: Callable[[Tensor, Tensor], Tensor] | None,
        softmax_in_fp32: bool,
        scale: float | None,
        window_size: Any = None,
    ) -> None:
        super().__init__()
        if input_in_fp16 and input_in_bf16:
            raise ValueError("input_in_fp16 and input_in_bf16 exclude each other")
        if scale is not None and not softmax_in_fp32:
            raise ValueError("scale needs softmax_in_fp32=True")
        if window_size is not None:
            raise ValueError("window_size: windows of attention are not supported")
        self.input_in_fp16, self.input_in_bf16 = input_in_fp16, input_in_bf16
        self.input_in_float16 = input_in_fp16 or input_in_bf16
        self.attn_mask_type = attn_mask_type
        self.scaled_masked_softmax_fusion = scaled_masked_softmax_fusion
        self.mask_func = mask_func
        self.softmax_in_fp32 = softmax_in_fp32
        self.scale = scale
        self._causal = getattr(attn_mask_type, "name", "") in ("causal", "padding_causal")

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores [b, n, sq, sk] and a mask that broadcasts to them -> probabilities."""
        scale = 1.0 if self.scale is None else self.scale
        if mask is not None and mask.dtype not in (torch.bool, torch.uint8):
            if self.mask_func is None:
                raise ValueError(
                    f"mask is {mask.dtype} and there is no mask_func; pass bool, True = masked"
                )
            scores = input.float() if self.softmax_in_fp32 else input
            scores = self.mask_func(scores * scale, mask)
            return masked_softmax(scores, causal=self._causal).to(input.dtype)
        mask = None if mask is None else mask.bool()
        return masked_softmax(input, mask, scale, self._causal)

    def forward_fused_softmax(self, input: Tensor, mask: Tensor | None) -> Tensor:
        """The same as ``forward``."""
        return self(input, mask)

    def forward_torch_softmax(self, input: Tensor, mask: Tensor | None) -> Tensor:
        """The same as ``forward``: there is one kernel."""
        return self(input, mask)

    def is_kernel_available(self, mask: Tensor | None, b: int, np: int, sq: int, sk: int) -> bool:
        """True: sizes and dtypes decide nothing here."""
        return True


class GenericFusedScaleMaskSoftmax(FusedScaleMaskSoftmax):
    """apex's variant for masks of padding and any size; the same."""

    def __init__(
        self,
        input_in_fp16: bool,
        input_in_bf16: bool,
        mask_func: Callable[[Tensor, Tensor], Tensor] | None,
        softmax_in_fp32: bool,
        scale: float | None,
        scaled_masked_softmax_fusion: bool = True,
    ) -> None:
        super().__init__(
            input_in_fp16,
            input_in_bf16,
            AttnMaskType.padding,
            scaled_masked_softmax_fusion,
            mask_func,
            softmax_in_fp32,
            scale,
        )
