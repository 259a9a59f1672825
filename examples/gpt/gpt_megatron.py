"""The same GPT as it is written against Megatron-LM and apex: [s, b, h], groups in the background.

Nothing but the imports tells that it runs on tpcore.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpt_config import Config
from torch import Tensor, nn

from tpcore.interop.megatron import parallel_state, tensor_parallel
from tpcore.interop.megatron.enums import AttnMaskType
from tpcore.interop.megatron.fusions.fused_bias_dropout import get_bias_dropout_add
from tpcore.interop.megatron.fusions.fused_bias_gelu import bias_gelu_impl
from tpcore.interop.megatron.fusions.fused_layer_norm import FusedLayerNorm
from tpcore.interop.megatron.fusions.fused_softmax import FusedScaleMaskSoftmax

Init = Callable[[Tensor], object]


def normal_init(std: float) -> Init:
    """Draws from N(0, std)."""
    return lambda tensor: nn.init.normal_(tensor, std=std)


class ParallelMLP(nn.Module):
    """h -> 4h -> h."""

    def __init__(self, config: Config, init: Init, output_init: Init) -> None:
        super().__init__()
        h = config.hidden_size
        self.dense_h_to_4h = tensor_parallel.ColumnParallelLinear(
            h, 4 * h, gather_output=False, init_method=init, skip_bias_add=True
        )
        self.dense_4h_to_h = tensor_parallel.RowParallelLinear(
            4 * h, h, input_is_parallel=True, init_method=output_init, skip_bias_add=True
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = self.dense_h_to_4h(x)
        return self.dense_4h_to_h(bias_gelu_impl(x, bias))


class ParallelAttention(nn.Module):
    """Causal self-attention, the heads split over the ranks."""

    def __init__(self, config: Config, init: Init, output_init: Init) -> None:
        super().__init__()
        h = config.hidden_size
        world = parallel_state.get_tensor_model_parallel_world_size()
        self.num_heads = config.num_heads // world
        self.head_size = h // config.num_heads
        self.dropout = config.attention_dropout
        self.query_key_value = tensor_parallel.ColumnParallelLinear(
            h, 3 * h, gather_output=False, init_method=init
        )
        self.softmax = FusedScaleMaskSoftmax(
            input_in_fp16=False,
            input_in_bf16=False,
            attn_mask_type=AttnMaskType.causal,
            scaled_masked_softmax_fusion=True,
            mask_func=None,
            softmax_in_fp32=True,
            scale=1 / math.sqrt(self.head_size),
        )
        self.dense = tensor_parallel.RowParallelLinear(
            h, h, input_is_parallel=True, init_method=output_init, skip_bias_add=True
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s, b, _ = x.shape
        qkv, _ = self.query_key_value(x)
        qkv = qkv.view(s, b, self.num_heads, 3 * self.head_size).permute(1, 2, 0, 3)
        q, k, v = tensor_parallel.split_tensor_along_last_dim(qkv, 3)
        probs = self.softmax(q @ k.transpose(-1, -2), None)
        if self.training and self.dropout > 0:
            # Every rank has other heads, so it draws from a stream of its own.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                probs = F.dropout(probs, self.dropout)
        return self.dense((probs @ v).permute(2, 0, 1, 3).reshape(s, b, -1))


class ParallelTransformerLayer(nn.Module):
    """Norm, attention, norm, MLP."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        init = normal_init(config.init_std)
        output_init = normal_init(config.init_std / math.sqrt(2 * config.num_layers))
        self.dropout = config.dropout
        self.input_layernorm = FusedLayerNorm(config.hidden_size)
        self.self_attention = ParallelAttention(config, init, output_init)
        self.post_attention_layernorm = FusedLayerNorm(config.hidden_size)
        self.mlp = ParallelMLP(config, init, output_init)

    def forward(self, x: Tensor) -> Tensor:
        bias_dropout_add = get_bias_dropout_add(self.training, True)
        x = bias_dropout_add(self.self_attention(self.input_layernorm(x)), x, self.dropout)
        return bias_dropout_add(self.mlp(self.post_attention_layernorm(x)), x, self.dropout)


class GPT(nn.Module):
    """Next-token loss of bytes."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        init = normal_init(config.init_std)
        self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, init_method=init
        )
        self.position_embeddings = nn.Parameter(torch.empty(config.max_length, config.hidden_size))
        init(self.position_embeddings.data)
        self.layers = nn.ModuleList(
            ParallelTransformerLayer(config) for _ in range(config.num_layers)
        )
        self.final_layernorm = FusedLayerNorm(config.hidden_size)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of tokens int64 [b, s], whose successors are targets int64 [b, s]."""
        x = self.word_embeddings(tokens) + self.position_embeddings[: tokens.shape[1]]
        x = F.dropout(x.transpose(0, 1), self.config.dropout, self.training).contiguous()
        for layer in self.layers:
            x = layer(x)
        logits = tensor_parallel.linear_with_grad_accumulation_and_async_allreduce(
            self.final_layernorm(x),
            self.word_embeddings.weight,
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=True,
            sequence_parallel=False,
        )
        return tensor_parallel.vocab_parallel_cross_entropy(logits, targets.t()).mean()
