// SPDX-License-Identifier: Apache-2.0
// The CPU implementation of attention over packed sequences: check, allocate, launch.
#include "attention_ops.h"

#include "launch.h"

namespace tpcore {
namespace {

// Everything but the dropout; raises unless the sequences are exactly the tokens.
PackedAttention packed(const Tensor& qkv, const Tensor& cu_seqlens, int64_t num_heads, double scale,
                       bool causal) {
  STD_TORCH_CHECK(qkv.dim() == 2 && num_heads > 0 && qkv.size(1) % (3 * num_heads) == 0,
                  "qkv has shape ", shape_string(qkv), "; expected [tokens, ", num_heads,
                  " heads * 3 * head size]");
  PackedAttention input;
  input.tokens = qkv.size(0);
  input.heads = num_heads;
  input.head_size = qkv.size(1) / (3 * num_heads);
  input.dtype = dtype_of(qkv, "qkv");
  input.qkv = matrix_of(qkv, "qkv", input.tokens, qkv.size(1), qkv.scalar_type());
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "cu_seqlens has shape ",
                  shape_string(cu_seqlens), "; expected [sequences + 1]");
  input.sequences = cu_seqlens.size(0) - 1;
  input.cu_seqlens = static_cast<const int32_t*>(
      vector_of(cu_seqlens, "cu_seqlens", input.sequences + 1, ScalarType::Int));
  input.longest = 0;
  STD_TORCH_CHECK(input.cu_seqlens[0] == 0 && input.cu_seqlens[input.sequences] == input.tokens,
                  "cu_seqlens runs from ", input.cu_seqlens[0], " to ",
                  input.cu_seqlens[input.sequences], "; expected 0 to ", input.tokens,
                  ", the number of tokens");
  for (int64_t i = 0; i < input.sequences; ++i) {
    const int64_t length = int64_t{input.cu_seqlens[i + 1]} - input.cu_seqlens[i];
    STD_TORCH_CHECK(length >= 0, "cu_seqlens decreases at ", i + 1);
    input.longest = length > input.longest ? length : input.longest;
  }
  input.scale = scale;
  input.causal = causal;
  return input;
}

// The data of a contiguous [heads, tokens] tensor in accumulation type.
const void* statistics_of(const Tensor& tensor, const char* name, const PackedAttention& input) {
  const ScalarType type = input.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
  return matrix_of(tensor, name, input.heads, input.tokens, type).data;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> packed_attention_forward(
    const Tensor& qkv, const Tensor& cu_seqlens, int64_t num_heads, double scale, bool causal,
    double dropout_p, const OptionalTensor& seed, int64_t stream, const OptionalTensor& row_ids,
    int64_t head_offset) {
  PackedAttentionForward args;
  args.input = packed(qkv, cu_seqlens, num_heads, scale, causal);
  const PackedAttention& input = args.input;
  const Dropout dropout(dropout_p, seed, stream, row_ids, input.tokens, 0, head_offset);
  args.input.key = dropout.key();
  args.input.dropout_scale = dropout.scale();
  Tensor context = new_empty(qkv, {input.tokens, input.heads * input.head_size});
  Tensor max = new_empty(qkv, {input.heads, input.tokens}, accumulation_type(qkv));
  Tensor sum_exp = new_empty(qkv, {input.heads, input.tokens}, accumulation_type(qkv));
  args.context = context.mutable_data_ptr();
  args.max = max.mutable_data_ptr();
  args.sum_exp = sum_exp.mutable_data_ptr();
  kernels().packed_attention_forward(args, parallel_for);
  return {context, max, sum_exp};
}

Tensor packed_attention_backward(const Tensor& grad_context, const Tensor& qkv, const Tensor& max,
                                 const Tensor& sum_exp, const Tensor& cu_seqlens, double scale,
                                 bool causal, double dropout_p, const OptionalTensor& seed,
                                 int64_t stream, const OptionalTensor& row_ids,
                                 int64_t head_offset) {
  PackedAttentionBackward args;
  STD_TORCH_CHECK(max.dim() == 2, "max has shape ", shape_string(max),
                  "; expected [heads, tokens]");
  args.input = packed(qkv, cu_seqlens, max.size(0), scale, causal);
  const PackedAttention& input = args.input;
  const Dropout dropout(dropout_p, seed, stream, row_ids, input.tokens, 0, head_offset);
  args.input.key = dropout.key();
  args.input.dropout_scale = dropout.scale();
  args.grad_context = matrix_of(grad_context, "grad_context", input.tokens,
                                input.heads * input.head_size, qkv.scalar_type());
  args.max = statistics_of(max, "max", input);
  args.sum_exp = statistics_of(sum_exp, "sum_exp", input);
  Tensor grad_qkv = new_empty(qkv, {input.tokens, qkv.size(1)});
  args.grad_qkv = grad_qkv.mutable_data_ptr();
  kernels().packed_attention_backward(args, parallel_for);
  return grad_qkv;
}

}  // namespace tpcore
