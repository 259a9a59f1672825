// SPDX-License-Identifier: Apache-2.0
// The raw ops for any device: check, allocate, launch. Schemas stand in tpcore/_native.py.
//
// A library includes this once and gives a class Device: its launchers, one static function each
// (TPCORE_LAUNCHERS), partial_sums, and a Guard that makes the device of a tensor the current one;
// besides what checks.h asks for.
#pragma once

#include <tuple>

#include "checks.h"

namespace tpcore {

using torch::stable::new_empty;

// clang-format off
#define TPCORE_LAUNCHERS(launcher)                                          \
  launcher(layer_norm_forward, LayerNormForward)                            \
  launcher(layer_norm_backward, LayerNormBackward)                          \
  launcher(bias_gelu_forward, BiasGeluForward)                              \
  launcher(bias_gelu_backward, BiasGeluBackward)                            \
  launcher(bias_dropout_residual_forward, BiasDropoutResidualForward)       \
  launcher(bias_dropout_residual_backward, BiasDropoutResidualBackward)     \
  launcher(masked_softmax_forward, MaskedSoftmaxForward)                    \
  launcher(masked_softmax_backward, MaskedSoftmaxBackward)                  \
  launcher(cross_entropy_statistics, CrossEntropyStatistics)                \
  launcher(cross_entropy_backward, CrossEntropyBackward)                    \
  launcher(dropout_mask, DropoutMask)

#define TPCORE_OPS(op)         \
  op(layer_norm_forward)       \
  op(add_layer_norm_forward)   \
  op(layer_norm_backward)      \
  op(bias_gelu_forward)        \
  op(bias_gelu_backward)       \
  op(masked_softmax_forward)   \
  op(masked_softmax_backward)  \
  op(cross_entropy_statistics) \
  op(cross_entropy_backward)   \
  op(dropout_keep_mask)
// clang-format on

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> normalize(const Tensor& x,
                                                     const OptionalTensor& residual,
                                                     const OptionalTensor& weight,
                                                     const OptionalTensor& bias, double eps) {
  const typename Device::Guard guard(x);
  STD_TORCH_CHECK(x.dim() == 2, "x has shape ", shape_string(x), "; expected two dimensions");
  const int64_t rows = x.size(0), columns = x.size(1);
  const ScalarType type = x.scalar_type(), statistics = accumulation_type(x);
  const ScalarType parameter = parameter_type(x, weight, bias);
  Tensor y = new_empty(x, {rows, columns});
  Tensor total = new_empty(x, {residual.has_value() ? rows : 0, columns});
  Tensor mean = new_empty(x, {rows}, statistics);
  Tensor rstd = new_empty(x, {rows}, statistics);
  LayerNormForward args;
  args.rows = rows;
  args.columns = columns;
  args.eps = eps;
  args.dtype = dtype_of(x, "x");
  args.parameter_dtype = parameter == type ? args.dtype : DType::kFloat32;
  args.x = matrix_of(x, "x", rows, columns, type);
  args.residual = matrix_of(residual, "residual", rows, columns, type);
  args.weight = vector_of(weight, "weight", columns, parameter);
  args.bias = vector_of(bias, "bias", columns, parameter);
  args.total = total.mutable_data_ptr();
  args.y = y.mutable_data_ptr();
  args.mean = mean.mutable_data_ptr();
  args.rstd = rstd.mutable_data_ptr();
  Device::layer_norm_forward(args);
  return {y, total, mean, rstd};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x, const OptionalTensor& weight,
                                                      const OptionalTensor& bias, double eps) {
  auto [y, total, mean, rstd] = normalize<Device>(x, std::nullopt, weight, bias, eps);
  return {y, mean, rstd};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(const Tensor& x,
                                                                  const Tensor& residual,
                                                                  const OptionalTensor& weight,
                                                                  const OptionalTensor& bias,
                                                                  double eps) {
  return normalize<Device>(x, residual, weight, bias, eps);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_y, const Tensor& x,
                                                       const Tensor& mean, const Tensor& rstd,
                                                       const OptionalTensor& weight,
                                                       const OptionalTensor& grad_total,
                                                       bool need_grad_x, bool need_grad_weight,
                                                       bool need_grad_bias) {
  const typename Device::Guard guard(grad_y);
  STD_TORCH_CHECK(x.dim() == 2, "x has shape ", shape_string(x), "; expected two dimensions");
  const int64_t rows = x.size(0), columns = x.size(1);
  const ScalarType type = x.scalar_type(), statistics = accumulation_type(x);
  const ScalarType parameter = parameter_type(x, weight, std::nullopt);
  Tensor grad_x = need_grad_x ? new_empty(x, {rows, columns}) : new_empty(x, {0});
  Tensor grad_weight = new_empty(x, {need_grad_weight ? columns : 0}, statistics);
  Tensor grad_bias = new_empty(x, {need_grad_bias ? columns : 0}, statistics);
  Tensor partials = new_empty(
      x, {need_grad_weight || need_grad_bias ? Device::partial_sums(rows) : 0, 2, columns},
      statistics);
  LayerNormBackward args;
  args.rows = rows;
  args.columns = columns;
  args.dtype = dtype_of(x, "x");
  args.parameter_dtype = parameter == type ? args.dtype : DType::kFloat32;
  args.grad_y = matrix_of(grad_y, "grad_y", rows, columns, type);
  args.x = matrix_of(x, "x", rows, columns, type);
  args.grad_total = matrix_of(grad_total, "grad_total", rows, columns, type);
  args.mean = vector_of(mean, "mean", rows, statistics);
  args.rstd = vector_of(rstd, "rstd", rows, statistics);
  args.weight = vector_of(weight, "weight", columns, parameter);
  args.grad_x = need_grad_x ? grad_x.mutable_data_ptr() : nullptr;
  args.grad_weight = need_grad_weight ? grad_weight.mutable_data_ptr() : nullptr;
  args.grad_bias = need_grad_bias ? grad_bias.mutable_data_ptr() : nullptr;
  args.partials = partials.mutable_data_ptr();
  Device::layer_norm_backward(args);
  return {grad_x, grad_weight, grad_bias};
}

inline Gelu gelu_of(const std::string& approximate) {
  if (approximate == "none") return Gelu::kErf;
  if (approximate == "tanh") return Gelu::kTanh;
  STD_TORCH_CHECK(approximate == "erf_1.41421", "approximate is ", approximate,
                  "; expected none, tanh or erf_1.41421");
  return Gelu::kOldErf;
}

template <class Device>
Tensor bias_gelu_forward(const Tensor& x, const OptionalTensor& bias, std::string approximate) {
  const typename Device::Guard guard(x);
  STD_TORCH_CHECK(x.dim() == 2, "x has shape ", shape_string(x), "; expected two dimensions");
  const int64_t rows = x.size(0), columns = x.size(1);
  const ScalarType type = x.scalar_type();
  const ScalarType parameter = parameter_type(x, bias, std::nullopt);
  Tensor y = new_empty(x, {rows, columns});
  BiasGeluForward args;
  args.rows = rows;
  args.columns = columns;
  args.dtype = dtype_of(x, "x");
  args.parameter_dtype = parameter == type ? args.dtype : DType::kFloat32;
  args.gelu = gelu_of(approximate);
  args.x = matrix_of(x, "x", rows, columns, type);
  args.bias = vector_of(bias, "bias", columns, parameter);
  args.y = y.mutable_data_ptr();
  Device::bias_gelu_forward(args);
  return y;
}

template <class Device>
std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& grad_y, const Tensor& x,
                                              const OptionalTensor& bias, std::string approximate,
                                              bool need_grad_x, bool need_grad_bias) {
  const typename Device::Guard guard(grad_y);
  STD_TORCH_CHECK(x.dim() == 2, "x has shape ", shape_string(x), "; expected two dimensions");
  const int64_t rows = x.size(0), columns = x.size(1);
  const ScalarType type = x.scalar_type(), sums = accumulation_type(x);
  const ScalarType parameter = parameter_type(x, bias, std::nullopt);
  Tensor grad_x = need_grad_x ? new_empty(x, {rows, columns}) : new_empty(x, {0});
  Tensor grad_bias = new_empty(x, {need_grad_bias ? columns : 0}, sums);
  Tensor partials = new_empty(x, {need_grad_bias ? Device::partial_sums(rows) : 0, columns}, sums);
  BiasGeluBackward args;
  args.rows = rows;
  args.columns = columns;
  args.dtype = dtype_of(x, "x");
  args.parameter_dtype = parameter == type ? args.dtype : DType::kFloat32;
  args.gelu = gelu_of(approximate);
  args.grad_y = matrix_of(grad_y, "grad_y", rows, columns, type);
  args.x = matrix_of(x, "x", rows, columns, type);
  args.bias = vector_of(bias, "bias", columns, parameter);
  args.grad_x = need_grad_x ? grad_x.mutable_data_ptr() : nullptr;
  args.grad_bias = need_grad_bias ? grad_bias.mutable_data_ptr() : nullptr;
  args.partials = partials.mutable_data_ptr();
  Device::bias_gelu_backward(args);
  return {grad_x, grad_bias};
}

// y, and with save_bits the decisions of the dropout.
template <class Device>
std::tuple<Tensor, Tensor> bias_dropout_residual(const Tensor& x, const OptionalTensor& bias,
                                                 const OptionalTensor& residual, double p,
                                                 const OptionalTensor& seed, int64_t stream,
                                                 const OptionalTensor& row_ids,
                                                 int64_t column_offset, bool save_bits) {
  const typename Device::Guard guard(x);
  STD_TORCH_CHECK(x.dim() == 2, "x has shape ", shape_string(x), "; expected two dimensions");
  const int64_t rows = x.size(0), columns = x.size(1);
  const ScalarType type = x.scalar_type();
  const ScalarType parameter = parameter_type(x, bias, std::nullopt);
  const Dropout dropout(p, seed, stream, row_ids, rows, column_offset, 0);
  Tensor y = new_empty(x, {rows, columns});
  Tensor keep;
  BiasDropoutResidualForward args;
  args.rows = rows;
  args.columns = columns;
  args.dtype = dtype_of(x, "x");
  args.parameter_dtype = parameter == type ? args.dtype : DType::kFloat32;
  args.x = matrix_of(x, "x", rows, columns, type);
  args.bias = vector_of(bias, "bias", columns, parameter);
  args.residual = matrix_of(residual, "residual", rows, columns, type);
  args.key = dropout.key();
  args.scale = dropout.scale();
  args.y = y.mutable_data_ptr();
  args.keep = nullptr;
  if (save_bits) {
    keep = new_empty(x, {args.key ? rows : 0, (columns + 7) / 8}, ScalarType::Byte);
    if (args.key) args.keep = static_cast<uint8_t*>(keep.mutable_data_ptr());
  }
  Device::bias_dropout_residual_forward(args);
  return {y, keep};
}

template <class Device>
Tensor bias_dropout_residual_forward(const Tensor& x, const OptionalTensor& bias,
                                     const OptionalTensor& residual, double p,
                                     const OptionalTensor& seed, int64_t stream,
                                     const OptionalTensor& row_ids, int64_t column_offset) {
  return std::get<0>(bias_dropout_residual<Device>(x, bias, residual, p, seed, stream, row_ids,
                                                   column_offset, false));
}

template <class Device>
std::tuple<Tensor, Tensor> bias_dropout_residual_cpu_forward(
    const Tensor& x, const OptionalTensor& bias, const OptionalTensor& residual, double p,
    const OptionalTensor& seed, int64_t stream, const OptionalTensor& row_ids,
    int64_t column_offset) {
  return bias_dropout_residual<Device>(x, bias, residual, p, seed, stream, row_ids, column_offset,
                                       true);
}

// Where the decisions of the dropout come from: a key, saved bits, or neither.
struct DropoutSource {
  const DropoutKey* key;
  const uint8_t* keep;
  double scale;
};

template <class Device>
std::tuple<Tensor, Tensor> dropout_backward(const Tensor& grad_y, const DropoutSource& source,
                                            bool need_grad_x, bool need_grad_bias) {
  const typename Device::Guard guard(grad_y);
  const int64_t rows = grad_y.size(0), columns = grad_y.size(1);
  const ScalarType sums = accumulation_type(grad_y);
  Tensor grad_x = need_grad_x ? new_empty(grad_y, {rows, columns}) : new_empty(grad_y, {0});
  Tensor grad_bias = new_empty(grad_y, {need_grad_bias ? columns : 0}, sums);
  Tensor partials =
      new_empty(grad_y, {need_grad_bias ? Device::partial_sums(rows) : 0, columns}, sums);
  BiasDropoutResidualBackward args;
  args.rows = rows;
  args.columns = columns;
  args.dtype = dtype_of(grad_y, "grad_y");
  args.grad_y = matrix_of(grad_y, "grad_y", rows, columns, grad_y.scalar_type());
  args.key = source.key;
  args.keep = source.keep;
  args.scale = source.scale;
  args.grad_x = need_grad_x ? grad_x.mutable_data_ptr() : nullptr;
  args.grad_bias = need_grad_bias ? grad_bias.mutable_data_ptr() : nullptr;
  args.partials = partials.mutable_data_ptr();
  Device::bias_dropout_residual_backward(args);
  return {grad_x, grad_bias};
}

inline void check_matrix(const Tensor& grad_y) {
  STD_TORCH_CHECK(grad_y.dim() == 2, "grad_y has shape ", shape_string(grad_y),
                  "; expected two dimensions");
}

template <class Device>
std::tuple<Tensor, Tensor> bias_dropout_residual_backward(
    const Tensor& grad_y, double p, const OptionalTensor& seed, int64_t stream,
    const OptionalTensor& row_ids, int64_t column_offset, bool need_grad_x, bool need_grad_bias) {
  const typename Device::Guard guard(grad_y);
  check_matrix(grad_y);
  const Dropout dropout(p, seed, stream, row_ids, grad_y.size(0), column_offset, 0);
  return dropout_backward<Device>(grad_y, {dropout.key(), nullptr, dropout.scale()}, need_grad_x,
                                  need_grad_bias);
}

template <class Device>
std::tuple<Tensor, Tensor> bias_dropout_residual_cpu_backward(const Tensor& grad_y,
                                                              const Tensor& keep, double p,
                                                              bool need_grad_x,
                                                              bool need_grad_bias) {
  check_matrix(grad_y);
  DropoutSource source{nullptr, nullptr, 1.0 / (1.0 - p)};
  if (p > 0.0) {
    STD_TORCH_CHECK(keep.is_contiguous(), "keep is not contiguous");
    const int64_t bytes = (grad_y.size(1) + 7) / 8;
    source.keep = static_cast<const uint8_t*>(
        matrix_of(keep, "keep", grad_y.size(0), bytes, ScalarType::Byte).data);
  }
  return dropout_backward<Device>(grad_y, source, need_grad_x, need_grad_bias);
}

// The strides of a mask along the dimensions of scores: 0 where it is broadcast.
inline void broadcast_strides(const Tensor& mask, const Tensor& scores, int64_t strides[4]) {
  STD_TORCH_CHECK(is_here(mask) && mask.scalar_type() == ScalarType::Bool,
                  "mask is not a bool tensor ", kHere);
  const int64_t missing = 4 - mask.dim();
  STD_TORCH_CHECK(missing >= 0, "mask has shape ", shape_string(mask),
                  "; expected at most four dimensions");
  for (int64_t i = 0; i < 4; ++i) {
    strides[i] = 0;
    if (i < missing || mask.size(i - missing) == 1) continue;
    STD_TORCH_CHECK(mask.size(i - missing) == scores.size(i), "mask of shape ", shape_string(mask),
                    " does not broadcast to scores ", shape_string(scores));
    strides[i] = mask.stride(i - missing);
  }
}

template <class Device>
std::tuple<Tensor, Tensor> masked_softmax_forward(const Tensor& scores, const OptionalTensor& mask,
                                                  double scale, bool causal, double dropout_p,
                                                  const OptionalTensor& seed, int64_t stream,
                                                  const OptionalTensor& row_ids,
                                                  int64_t head_offset) {
  const typename Device::Guard guard(scores);
  MaskedSoftmaxForward args;
  args.scores = scores_of(scores, "scores", scores, args.scores_strides);
  args.batch = scores.size(0);
  args.heads = scores.size(1);
  args.queries = scores.size(2);
  args.keys = scores.size(3);
  args.dtype = dtype_of(scores, "scores");
  Tensor dense_mask;
  args.mask = nullptr;
  if (mask.has_value()) {
    dense_mask = *mask;
    broadcast_strides(dense_mask, scores, args.mask_strides);
    if (args.mask_strides[3] > 1) {
      dense_mask = torch::stable::contiguous(dense_mask);
      broadcast_strides(dense_mask, scores, args.mask_strides);
    }
    args.mask = static_cast<const uint8_t*>(dense_mask.const_data_ptr());
  }
  args.scale = scale;
  args.causal = causal;
  const int64_t tokens = args.batch * args.queries;
  const Dropout dropout(dropout_p, seed, stream, row_ids, tokens, 0, head_offset);
  args.key = dropout.key();
  args.dropout_scale = dropout.scale();
  Tensor y = new_empty(scores, {args.batch, args.heads, args.queries, args.keys});
  Tensor probs = args.key ? torch::stable::empty_like(y) : new_empty(scores, {0});
  args.y = y.mutable_data_ptr();
  args.probs = args.key ? probs.mutable_data_ptr() : nullptr;
  Device::masked_softmax_forward(args);
  return {y, probs};
}

template <class Device>
Tensor masked_softmax_backward(const Tensor& grad_y, const Tensor& probs, double scale,
                               double dropout_p, const OptionalTensor& seed, int64_t stream,
                               const OptionalTensor& row_ids, int64_t head_offset) {
  const typename Device::Guard guard(grad_y);
  MaskedSoftmaxBackward args;
  args.probs = scores_of(probs, "probs", probs, args.probs_strides);
  args.grad_y = scores_of(grad_y, "grad_y", probs, args.grad_y_strides);
  args.batch = probs.size(0);
  args.heads = probs.size(1);
  args.queries = probs.size(2);
  args.keys = probs.size(3);
  args.dtype = dtype_of(probs, "probs");
  args.scale = scale;
  const int64_t tokens = args.batch * args.queries;
  const Dropout dropout(dropout_p, seed, stream, row_ids, tokens, 0, head_offset);
  args.key = dropout.key();
  args.dropout_scale = dropout.scale();
  Tensor grad_scores = new_empty(probs, {args.batch, args.heads, args.queries, args.keys});
  args.grad_scores = grad_scores.mutable_data_ptr();
  Device::masked_softmax_backward(args);
  return grad_scores;
}

inline VocabularyShard shard_of(const Tensor& logits, const Tensor& target, int64_t vocab_start,
                                int64_t num_classes, int64_t ignore_index) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits has shape ", shape_string(logits),
                  "; expected two dimensions");
  VocabularyShard shard;
  shard.tokens = logits.size(0);
  shard.columns = logits.size(1);
  const int64_t rest = num_classes - vocab_start;
  shard.live = rest < 0 ? 0 : rest < shard.columns ? rest : shard.columns;
  shard.vocab_start = vocab_start;
  shard.num_classes = num_classes;
  shard.ignore_index = ignore_index;
  shard.dtype = dtype_of(logits, "logits");
  shard.logits = matrix_of(logits, "logits", shard.tokens, shard.columns, logits.scalar_type());
  shard.target =
      static_cast<const int64_t*>(vector_of(target, "target", shard.tokens, ScalarType::Long));
  return shard;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_statistics(const Tensor& logits,
                                                                    const Tensor& target,
                                                                    int64_t vocab_start,
                                                                    int64_t num_classes,
                                                                    int64_t ignore_index) {
  const typename Device::Guard guard(logits);
  CrossEntropyStatistics args;
  args.shard = shard_of(logits, target, vocab_start, num_classes, ignore_index);
  const ScalarType type = accumulation_type(logits);
  Tensor max = new_empty(logits, {args.shard.tokens}, type);
  Tensor sum_exp = new_empty(logits, {args.shard.tokens}, type);
  Tensor target_logit = new_empty(logits, {args.shard.tokens}, type);
  Tensor sum_logits = new_empty(logits, {args.shard.tokens}, type);
  args.max = max.mutable_data_ptr();
  args.sum_exp = sum_exp.mutable_data_ptr();
  args.target_logit = target_logit.mutable_data_ptr();
  args.sum_logits = sum_logits.mutable_data_ptr();
  Device::cross_entropy_statistics(args);
  return {max, sum_exp, target_logit, sum_logits};
}

template <class Device>
Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                              const Tensor& max, const Tensor& sum_exp, int64_t vocab_start,
                              int64_t num_classes, int64_t ignore_index, double label_smoothing) {
  const typename Device::Guard guard(grad_loss);
  CrossEntropyBackward args;
  args.shard = shard_of(logits, target, vocab_start, num_classes, ignore_index);
  args.label_smoothing = label_smoothing;
  const ScalarType type = accumulation_type(logits);
  const int64_t tokens = args.shard.tokens;
  args.grad_loss = vector_of(grad_loss, "grad_loss", tokens, type);
  args.max = vector_of(max, "max", tokens, type);
  args.sum_exp = vector_of(sum_exp, "sum_exp", tokens, type);
  Tensor grad_logits = new_empty(logits, {tokens, args.shard.columns});
  args.grad_logits = grad_logits.mutable_data_ptr();
  Device::cross_entropy_backward(args);
  return grad_logits;
}

template <class Device>
Tensor dropout_keep_mask(const Tensor& seed, const Tensor& row_ids, double p, int64_t stream,
                         int64_t num_columns, int64_t column_offset, int64_t head_offset,
                         int64_t num_heads) {
  const typename Device::Guard guard(seed);
  STD_TORCH_CHECK(row_ids.dim() == 2, "row_ids has shape ", shape_string(row_ids),
                  "; expected two dimensions");
  const Tensor ids = torch::stable::contiguous(row_ids);
  DropoutMask args;
  args.batch = ids.size(0);
  args.heads = num_heads;
  args.queries = ids.size(1);
  args.columns = num_columns;
  args.key = dropout_key(seed, ids, ids.numel(), p, stream, column_offset, head_offset);
  Tensor keep =
      new_empty(ids, {args.batch, args.heads, args.queries, args.columns}, ScalarType::Bool);
  args.keep = static_cast<bool*>(keep.mutable_data_ptr());
  Device::dropout_mask(args);
  return keep;
}

}  // namespace tpcore
