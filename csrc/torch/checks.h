// SPDX-License-Identifier: Apache-2.0
// Checks at the border between torch and the kernels. Messages name the argument, what came and
// what was expected.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>

#include "tpcore/kernels.h"

namespace tpcore {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Each library says where its tensors have to be.
bool is_here(const Tensor& tensor);
extern const char* const kHere;  // "on the CPU"

inline std::string shape_string(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, name,
                      " has an unsupported dtype; expected float32, bfloat16, float16 or float64");
  }
  return DType::kFloat32;
}

// A contiguous tensor beside `like`, in its dtype or another. Not torch::stable::new_empty, which
// goes by way of the dispatcher: four results of a small kernel took longer to make than to fill.
inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                        std::optional<ScalarType> dtype = std::nullopt) {
  int64_t strides[4];
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    const int64_t size = sizes.begin()[i];
    strides[i] = stride;
    stride *= size > 1 ? size : 1;
  }
  int32_t device_type, device_index, type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  type = torch::stable::detail::to<int32_t>(
      torch::stable::detail::from(dtype.value_or(like.scalar_type())));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                  strides, type, device_type, device_index,
                                                  &handle));
  return Tensor(handle);
}

inline ScalarType accumulation_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A [rows, columns] tensor of the given dtype whose columns are contiguous.
inline Matrix matrix_of(const Tensor& tensor, const char* name, int64_t rows, int64_t columns,
                        ScalarType type) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name,
                  " has shape ", shape_string(tensor), "; expected [", rows, ", ", columns, "]");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " differs from x in dtype");
  STD_TORCH_CHECK(is_here(tensor), name, " is not ", kHere);
  STD_TORCH_CHECK(rows == 0 || columns <= 1 || tensor.stride(1) == 1, name,
                  " has columns that are not contiguous; its last stride is ", tensor.stride(1));
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0)};
}

inline Matrix matrix_of(const std::optional<Tensor>& tensor, const char* name, int64_t rows,
                        int64_t columns, ScalarType type) {
  return tensor.has_value() ? matrix_of(*tensor, name, rows, columns, type) : Matrix{};
}

// The data and the strides of a [batch, heads, queries, keys] tensor of the shape and dtype of
// `model`, whose keys are contiguous.
inline const void* scores_of(const Tensor& tensor, const char* name, const Tensor& model,
                             int64_t strides[3]) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, " has shape ", shape_string(tensor),
                  "; expected four dimensions");
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(tensor.size(i) == model.size(i), name, " has shape ", shape_string(tensor),
                    "; expected ", shape_string(model));
    if (i < 3) strides[i] = tensor.stride(i);
  }
  STD_TORCH_CHECK(tensor.scalar_type() == model.scalar_type(), name, " has an unexpected dtype");
  STD_TORCH_CHECK(is_here(tensor), name, " is not ", kHere);
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.size(3) == 1 || tensor.stride(3) == 1, name,
                  " has keys that are not contiguous; its last stride is ", tensor.stride(3));
  return tensor.const_data_ptr();
}

// The data of a contiguous vector of `size` elements.
inline const void* vector_of(const Tensor& tensor, const char* name, int64_t size,
                             ScalarType type) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, " has shape ",
                  shape_string(tensor), "; expected [", size, "]");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has an unexpected dtype");
  STD_TORCH_CHECK(is_here(tensor), name, " is not ", kHere);
  STD_TORCH_CHECK(size <= 1 || tensor.stride(0) == 1, name, " is not contiguous; its stride is ",
                  tensor.stride(0));
  return tensor.const_data_ptr();
}

inline const void* vector_of(const std::optional<Tensor>& tensor, const char* name, int64_t size,
                             ScalarType type) {
  return tensor.has_value() ? vector_of(*tensor, name, size, type) : nullptr;
}

// The dtype of weight and bias: that of x, or float32 next to half precision.
inline ScalarType parameter_type(const Tensor& x, const std::optional<Tensor>& weight,
                                 const std::optional<Tensor>& bias) {
  const ScalarType own = x.scalar_type();
  const ScalarType type = weight.has_value() ? weight->scalar_type()
                          : bias.has_value() ? bias->scalar_type()
                                             : own;
  STD_TORCH_CHECK(type == own || (type == ScalarType::Float && own != ScalarType::Double),
                  "weight and bias have an unexpected dtype; expected that of x, or float32 next "
                  "to half precision");
  return type;
}

// An element is kept if and only if its random word is at least round(p * 2^32), ties to even as
// Python rounds.
inline uint32_t dropout_threshold(double p) {
  const double scaled = std::nearbyint(p * 4294967296.0);
  return scaled >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(scaled);
}

// Checks the seed and the row ids (contiguous, int64, one per row) and makes the key.
inline DropoutKey dropout_key(const Tensor& seed, const Tensor& row_ids, int64_t rows, double p,
                              int64_t stream, int64_t column_offset, int64_t head_offset) {
  STD_TORCH_CHECK(is_here(seed) && seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "seed is a tensor of ", seed.numel(), " elements; expected one int64 ", kHere);
  STD_TORCH_CHECK(
      is_here(row_ids) && row_ids.scalar_type() == ScalarType::Long && row_ids.is_contiguous(),
      "row_ids is not a contiguous int64 tensor ", kHere);
  STD_TORCH_CHECK(row_ids.numel() == rows, "row_ids has shape ", shape_string(row_ids),
                  "; expected ", rows, " ids, one per row");
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "the dropout probability is ", p, "; expected 0 <= p < 1");
  STD_TORCH_CHECK(stream >= 0 && stream < 65536, "stream=", stream, " is outside 0..65535");
  STD_TORCH_CHECK(column_offset >= 0 && head_offset >= 0,
                  "column_offset and head_offset may not be negative");
  DropoutKey key;
  key.device_seed = seed.const_data_ptr<int64_t>();
  if (seed.is_cpu()) key.seed = static_cast<uint64_t>(*key.device_seed);
  key.threshold = dropout_threshold(p);
  key.stream = static_cast<uint32_t>(stream);
  key.row_ids = row_ids.const_data_ptr<int64_t>();
  key.column_offset = column_offset;
  key.head_offset = head_offset;
  return key;
}

// The optional dropout of an op: the key of p > 0, or none.
class Dropout {
 public:
  Dropout(double p, const std::optional<Tensor>& seed, int64_t stream,
          const std::optional<Tensor>& row_ids, int64_t rows, int64_t column_offset,
          int64_t head_offset)
      : scale_(1.0 / (1.0 - p)) {
    if (p == 0.0) return;
    STD_TORCH_CHECK(seed.has_value() && row_ids.has_value(), "dropout with p=", p,
                    " needs seed and row_ids");
    row_ids_ = torch::stable::contiguous(*row_ids);
    key_ = dropout_key(*seed, *row_ids_, rows, p, stream, column_offset, head_offset);
  }

  const DropoutKey* key() const { return row_ids_.has_value() ? &key_ : nullptr; }
  double scale() const { return scale_; }

 private:
  double scale_;
  std::optional<Tensor> row_ids_;  // keeps the memory alive that key_ points to
  DropoutKey key_;
};

}  // namespace tpcore
