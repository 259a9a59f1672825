// SPDX-License-Identifier: Apache-2.0
// From the dtypes of a launcher's arguments to C++ types, and from a matrix to its rows.
#pragma once

#include "simd.h"
#include "tpcore/kernels.h"

namespace tpcore {
namespace TPCORE_ISA {

template <class T>
using Acc = typename Accumulation<T>::type;

template <class T>
TPCORE_INLINE T* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<T*>(matrix.data) + row * matrix.row_stride;
}

template <class T, class P>
struct Types {
  using Activation = T;
  using Parameter = P;
};

// Calls function(Types<T, P>{}); parameters have the dtype of the activations or, next to half
// precision, float32.
template <class Function>
void dispatch_types(DType dtype, DType parameter_dtype, const Function& function) {
  const bool same = dtype == parameter_dtype;
  switch (dtype) {
    case DType::kFloat32:
      return function(Types<float, float>{});
    case DType::kFloat64:
      return function(Types<double, double>{});
    case DType::kBFloat16:
      return same ? function(Types<BFloat16, BFloat16>{}) : function(Types<BFloat16, float>{});
    case DType::kFloat16:
      return same ? function(Types<Float16, Float16>{}) : function(Types<Float16, float>{});
  }
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
