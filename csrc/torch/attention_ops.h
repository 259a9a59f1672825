// SPDX-License-Identifier: Apache-2.0
// Attention over packed sequences as raw ops of the CPU; registered in cpu_ops.cpp.
#pragma once

#include <tuple>

#include "checks.h"

namespace tpcore {

std::tuple<Tensor, Tensor, Tensor> packed_attention_forward(
    const Tensor& qkv, const Tensor& cu_seqlens, int64_t num_heads, double scale, bool causal,
    double dropout_p, const OptionalTensor& seed, int64_t stream, const OptionalTensor& row_ids,
    int64_t head_offset);
Tensor packed_attention_backward(const Tensor& grad_context, const Tensor& qkv, const Tensor& max,
                                 const Tensor& sum_exp, const Tensor& cu_seqlens, double scale,
                                 bool causal, double dropout_p, const OptionalTensor& seed,
                                 int64_t stream, const OptionalTensor& row_ids,
                                 int64_t head_offset);

}  // namespace tpcore
