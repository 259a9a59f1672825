// SPDX-License-Identifier: Apache-2.0
// Bias, dropout and residual: formulas in tpcore/kernels.h.
//
// Ten rounds of Philox cost more than all the rest, so a row goes in blocks: first the bits of a
// block, as bytes in the first-level cache, then the arithmetic on it. Backward makes the same bits
// again.
#include "parallel.h"
#include "philox.h"
#include "types.h"

namespace tpcore {
namespace TPCORE_ISA {
namespace {

constexpr int64_t kBlock = 1024;

// function(begin, columns, keep) for the blocks of a row; keep is null without dropout.
template <class Function>
TPCORE_INLINE void for_each_block(const DropoutKey* key, int64_t row, int64_t columns,
                                  const Function& function) {
  uint8_t keep[kBlock];
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t count = columns - begin < kBlock ? columns - begin : kBlock;
    if (key != nullptr) {
      keep_columns(row_key(*key, row, 0), key->column_offset + begin, count, keep);
    }
    function(begin, count, key != nullptr ? keep : nullptr);
  }
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
    const int64_t bytes = args.columns * (3 * static_cast<int64_t>(sizeof(T)) + (args.key ? 8 : 0));
    with_constant(worth_streaming<T>(args.y, args.rows, args.columns), [&](auto streaming) {
      parallel_rows(parallel_for, args.rows, bytes, [&](int64_t begin_row, int64_t end_row) {
        for (int64_t row = begin_row; row < end_row; ++row) {
          for_each_block(
              args.key, row, args.columns, [&](int64_t begin, int64_t count, const uint8_t* keep) {
                const T* x = row_of<T>(args.x, row) + begin;
                const P* bias = args.bias ? static_cast<const P*>(args.bias) + begin : nullptr;
                const T* residual =
                    args.residual.data ? row_of<T>(args.residual, row) + begin : nullptr;
                T* y = static_cast<T*>(args.y) + row * args.columns + begin;
                for_each_vector<V>(count, [&](int64_t i, int, auto lanes) TPCORE_INLINE_LAMBDA {
                  V value = V::load(x + i, lanes);
                  if (bias != nullptr) value = value + V::load(bias + i, lanes);
                  if (keep != nullptr)
                    value = select(V::nonzero(keep + i, lanes), value * scale, V());
                  if (residual != nullptr) value = value + V::load(residual + i, lanes);
                  write<streaming>(value, y + i, lanes);
                });
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
    using V = Vec<A>;
    const V scale(static_cast<A>(args.scale));
    A* partials = static_cast<A*>(args.partials);
    with_constant(worth_streaming<T>(args.grad_x, args.rows, args.columns), [&](auto streaming) {
      parallel_sums(parallel_for, args.rows, [&](int64_t sum, int64_t begin_row, int64_t end_row) {
        A* bias_sums = args.grad_bias ? partials + sum * args.columns : nullptr;
        if (bias_sums) memset(bias_sums, 0, static_cast<size_t>(args.columns) * sizeof(A));
        for (int64_t row = begin_row; row < end_row; ++row) {
          for_each_block(
              args.key, row, args.columns, [&](int64_t begin, int64_t count, const uint8_t* keep) {
                const T* grad_y = row_of<T>(args.grad_y, row) + begin;
                T* grad_x = args.grad_x ? static_cast<T*>(args.grad_x) + row * args.columns + begin
                                        : nullptr;
                A* sums = bias_sums ? bias_sums + begin : nullptr;
                for_each_vector<V>(count, [&](int64_t i, int, auto lanes) TPCORE_INLINE_LAMBDA {
                  V grad = V::load(grad_y + i, lanes);
                  if (keep != nullptr)
                    grad = select(V::nonzero(keep + i, lanes), grad * scale, V());
                  if (grad_x != nullptr) write<streaming>(grad, grad_x + i, lanes);
                  if (sums != nullptr) (V::load(sums + i, lanes) + grad).store(sums + i, lanes);
                });
              });
        }
        if (streaming) streaming_fence();
      });
    });
    add_partial_sums(parallel_for, partials, partial_sums(args.rows), args.columns, args.columns,
                     static_cast<A*>(args.grad_bias));
  });
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
