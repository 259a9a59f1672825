// SPDX-License-Identifier: Apache-2.0
// Bias, dropout and residual: formulas in tpcore/kernels.h.
//
// Ten rounds of Philox cost more than all the rest. Forward draws the bits of a row into the memory
// that backward reads them from.
#include "parallel.h"
#include "philox.h"
#include "types.h"

namespace tpcore {
namespace TPCORE_ISA {
namespace {

template <int R, bool streaming, class T>
void backward_rows(const BiasDropoutResidualBackward& args, int64_t row, Acc<T>* bias_sums) {
  using V = Vec<Acc<T>>;
  const V scale(static_cast<Acc<T>>(args.scale));
  const T* grad_y[R];
  T* grad_x[R];
  const uint8_t* keep[R];
  for (int r = 0; r < R; ++r) {
    grad_y[r] = row_of<T>(args.grad_y, row + r);
    grad_x[r] = args.grad_x ? static_cast<T*>(args.grad_x) + (row + r) * args.columns : nullptr;
    keep[r] = args.keep ? args.keep + (row + r) * bit_bytes(args.columns) : nullptr;
  }
  for_each_vector<V>(args.columns, [&](int64_t i, int, auto lanes) TPCORE_INLINE_LAMBDA {
    V sum;
    for (int r = 0; r < R; ++r) {
      prefetch(grad_y[r] + i);
      if (!streaming && args.grad_x != nullptr) prefetch_to_write(grad_x[r] + i);
      V grad = V::load(grad_y[r] + i, lanes);
      if (args.keep != nullptr) grad = select(V::bits(keep[r], i, lanes), grad * scale, V());
      if (args.grad_x != nullptr) write<streaming>(grad, grad_x[r] + i, lanes);
      sum = sum + grad;
    }
    if (bias_sums != nullptr) (V::load(bias_sums + i, lanes) + sum).store(bias_sums + i, lanes);
  });
}

}  // namespace

void bias_dropout_residual_forward(const BiasDropoutResidualForward& args,
                                   ParallelFor parallel_for) {
  dispatch_types(args.dtype, args.parameter_dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    using P = typename decltype(types)::Parameter;
    using A = Acc<T>;
    using V = Vec<A>;
    const V scale(static_cast<A>(args.scale));
    const P* bias = static_cast<const P*>(args.bias);
    const int64_t bytes = args.columns * (3 * static_cast<int64_t>(sizeof(T)) + (args.key ? 8 : 0));
    with_constant(worth_streaming<T>(args.y, args.rows, args.columns), [&](auto streaming) {
      parallel_rows(parallel_for, args.rows, bytes, [&](int64_t begin, int64_t end) {
        const KeepBits bits(args.key);
        for (int64_t row = begin; row < end; ++row) {
          uint8_t* keep = bits ? args.keep + row * bit_bytes(args.columns) : nullptr;
          if (bits) bits.row(row, 0, args.columns, keep);
          const T* x = row_of<T>(args.x, row);
          const T* residual = args.residual.data ? row_of<T>(args.residual, row) : nullptr;
          T* y = static_cast<T*>(args.y) + row * args.columns;
          for_each_vector<V>(args.columns, [&](int64_t i, int, auto lanes) TPCORE_INLINE_LAMBDA {
            prefetch(x + i);
            if (residual != nullptr) prefetch(residual + i);
            if (!streaming) prefetch_to_write(y + i);
            V value = V::load(x + i, lanes);
            if (bias != nullptr) value = value + V::load(bias + i, lanes);
            if (keep != nullptr) value = select(V::bits(keep, i, lanes), value * scale, V());
            if (residual != nullptr) value = value + V::load(residual + i, lanes);
            write<streaming>(value, y + i, lanes);
          });
        }
        if (streaming) streaming_fence();
      });
    });
  });
}

void bias_dropout_residual_backward(const BiasDropoutResidualBackward& args,
                                    ParallelFor parallel_for) {
  dispatch_types(args.dtype, args.dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    using A = Acc<T>;
    A* partials = static_cast<A*>(args.partials);
    with_constant(worth_streaming<T>(args.grad_x, args.rows, args.columns), [&](auto streaming) {
      parallel_sums(parallel_for, args.rows, [&](int64_t sum, int64_t begin, int64_t end) {
        A* bias_sums = args.grad_bias ? partials + sum * args.columns : nullptr;
        if (bias_sums) memset(bias_sums, 0, static_cast<size_t>(args.columns) * sizeof(A));
        int64_t row = begin;
        // Four rows at a time, so that their sums are loaded and stored once.
        for (; row + 4 <= end; row += 4) backward_rows<4, streaming, T>(args, row, bias_sums);
        for (; row < end; ++row) backward_rows<1, streaming, T>(args, row, bias_sums);
        if (streaming) streaming_fence();
      });
    });
    add_partial_sums(parallel_for, partials, partial_sums(args.rows), args.columns, args.columns,
                     static_cast<A*>(args.grad_bias));
  });
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
