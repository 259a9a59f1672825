// SPDX-License-Identifier: Apache-2.0
// The transpose: check, allocate, launch. The schema stands in tpcore/_native.py.
#include "transpose_ops.h"

#include "launch.h"

namespace tpcore {

// Rows begin on cache lines, an odd number of them apart, so that the lines of a column spread over
// all sets of a cache. Between rows there are zeros: oneDNN's products on AMX tiles multiply one
// number beyond an odd depth by zero, and by whatever would be there a NaN can come about. There
// are some always: results that are contiguous for some sizes would need graphs of their own.
Tensor transpose16(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, "x has shape ", shape_string(x), "; expected two dimensions");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "x has an unsupported dtype; expected bfloat16 or float16");
  Transpose16 args;
  args.rows = x.size(0);
  args.columns = x.size(1);
  args.x = matrix_of(x, "x", args.rows, args.columns, type);
  constexpr int64_t kLine = 32;
  const int64_t stride = ((args.rows / kLine + 1) | 1) * kLine;
  Tensor y = new_empty(x, {args.columns, stride});
  args.y = {y.mutable_data_ptr(), stride};
  kernels().transpose16(args, parallel_for);
  return torch::stable::narrow(y, 1, 0, args.rows);
}

}  // namespace tpcore
