// SPDX-License-Identifier: Apache-2.0
// Bias and GeLU: formulas in tpcore/kernels.h, their evaluation in tpcore/math.h.
#include "parallel.h"
#include "types.h"
#include "vector_math.h"

namespace tpcore {
namespace TPCORE_ISA {
namespace {

template <Gelu kind>
struct Kind {
  static constexpr Gelu value = kind;
};

template <class Function>
void dispatch_gelu(Gelu gelu, const Function& function) {
  switch (gelu) {
    case Gelu::kErf:
      return function(Kind<Gelu::kErf>{});
    case Gelu::kTanh:
      return function(Kind<Gelu::kTanh>{});
    case Gelu::kOldErf:
      return function(Kind<Gelu::kOldErf>{});
  }
}

template <class T, class P, Gelu kind>
void forward_row(const T* x, const P* bias, T* y, int64_t columns) {
  using V = Vec<Acc<T>>;
  for_each_vector<V>(columns, [&](int64_t i, int, auto lanes) TPCORE_INLINE_LAMBDA {
    prefetch(x + i);
    prefetch_to_write(y + i);
    V z = V::load(x + i, lanes);
    if (bias != nullptr) z = z + V::load(bias + i, lanes);
    gelu<kind, PrecisionOf<T>>(z).store(y + i, lanes);
  });
}

template <class T, class P, Gelu kind>
void backward_row(const T* grad_y, const T* x, const P* bias, T* grad_x, Acc<T>* bias_sums,
                  int64_t columns) {
  using V = Vec<Acc<T>>;
  for_each_vector<V>(columns, [&](int64_t i, int, auto lanes) TPCORE_INLINE_LAMBDA {
    prefetch(x + i);
    prefetch(grad_y + i);
    if (grad_x != nullptr) prefetch_to_write(grad_x + i);
    V z = V::load(x + i, lanes);
    if (bias != nullptr) z = z + V::load(bias + i, lanes);
    const V grad = V::load(grad_y + i, lanes) * gelu_slope<kind, PrecisionOf<T>>(z);
    if (grad_x != nullptr) grad.store(grad_x + i, lanes);
    if (bias_sums != nullptr) (V::load(bias_sums + i, lanes) + grad).store(bias_sums + i, lanes);
  });
}

}  // namespace

void bias_gelu_forward(const BiasGeluForward& args, ParallelFor parallel_for) {
  dispatch_types(args.dtype, args.parameter_dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    using P = typename decltype(types)::Parameter;
    dispatch_gelu(args.gelu, [&](auto kind) {
      const int64_t columns = args.columns;
      const int64_t bytes = columns * (2 * static_cast<int64_t>(sizeof(T)) + 8);
      parallel_rows(parallel_for, args.rows, bytes, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          forward_row<T, P, decltype(kind)::value>(
              row_of<T>(args.x, row), static_cast<const P*>(args.bias),
              static_cast<T*>(args.y) + row * columns, columns);
        }
      });
    });
  });
}

void bias_gelu_backward(const BiasGeluBackward& args, ParallelFor parallel_for) {
  dispatch_types(args.dtype, args.parameter_dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    using P = typename decltype(types)::Parameter;
    using A = Acc<T>;
    const int64_t columns = args.columns;
    A* partials = static_cast<A*>(args.partials);
    dispatch_gelu(args.gelu, [&](auto kind) {
      parallel_sums(parallel_for, args.rows, [&](int64_t sum, int64_t begin, int64_t end) {
        A* bias_sums = args.grad_bias ? partials + sum * columns : nullptr;
        if (bias_sums) memset(bias_sums, 0, static_cast<size_t>(columns) * sizeof(A));
        for (int64_t row = begin; row < end; ++row) {
          backward_row<T, P, decltype(kind)::value>(
              row_of<T>(args.grad_y, row), row_of<T>(args.x, row), static_cast<const P*>(args.bias),
              args.grad_x ? static_cast<T*>(args.grad_x) + row * columns : nullptr, bias_sums,
              columns);
        }
      });
    });
    add_partial_sums(parallel_for, partials, partial_sums(args.rows), columns, columns,
                     static_cast<A*>(args.grad_bias));
  });
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
