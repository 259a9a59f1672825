// SPDX-License-Identifier: Apache-2.0
// Layer norm: formulas in tpcore/kernels.h.
//
// Forward reads a row three times, from the cache after the first: sum, centred sum of squares,
// result. Two passes for the variance are as fast as a running one on a cached row, and lose no
// digits where the mean is large. Backward takes four rows at a time, so that the running sums of
// the parameter gradients are loaded and stored once for four rows.
#include "parallel.h"
#include "simd.h"
#include "types.h"

namespace tpcore {
namespace TPCORE_ISA {
namespace {

template <class T>
void add_row(const T* x, const T* residual, T* total, int64_t columns) {
  using V = Vec<Acc<T>>;
  for_each_vector<V>(columns, [&](int64_t i, int, auto lanes) TPCORE_INLINE_LAMBDA {
    prefetch(x + i);
    prefetch(residual + i);
    prefetch_to_write(total + i);
    (V::load(x + i, lanes) + V::load(residual + i, lanes)).store(total + i, lanes);
  });
}

template <class T>
void row_statistics(const T* x, int64_t columns, double eps, Acc<T>* mean, Acc<T>* rstd) {
  using A = Acc<T>;
  using V = Vec<A>;
  V sums[4];
  for_each_vector<V>(columns, [&](int64_t i, int slot, auto lanes) TPCORE_INLINE_LAMBDA {
    prefetch(x + i);
    sums[slot] = sums[slot] + V::load(x + i, lanes);
  });
  *mean = total(sums).sum() / static_cast<A>(columns);

  const V centre(*mean);
  V squares[4];
  for_each_vector<V>(columns, [&](int64_t i, int slot, auto lanes) TPCORE_INLINE_LAMBDA {
    const V difference = only(V::load(x + i, lanes) - centre, lanes);
    squares[slot] = multiply_add(difference, difference, squares[slot]);
  });
  const A square_sum = total(squares).sum();
  *rstd = A(1) / square_root(square_sum / static_cast<A>(columns) + static_cast<A>(eps));
}

template <bool streaming, class T, class P>
void normalize_row(const T* x, const P* weight, const P* bias, T* y, int64_t columns, Acc<T> mean,
                   Acc<T> rstd) {
  using V = Vec<Acc<T>>;
  const V centre(mean), scale(rstd);
  for_each_vector<V>(columns, [&](int64_t i, int, auto lanes) TPCORE_INLINE_LAMBDA {
    if (!streaming) prefetch_to_write(y + i);
    V value = (V::load(x + i, lanes) - centre) * scale;
    if (weight != nullptr) value = value * V::load(weight + i, lanes);
    if (bias != nullptr) value = value + V::load(bias + i, lanes);
    write<streaming>(value, y + i, lanes);
  });
}

// The sums over columns that grad_x needs, and the rows' contribution to the parameter gradients.
template <int R, bool streaming, class T, class P>
void backward_rows(const LayerNormBackward& args, int64_t row, Acc<T>* weight_sums,
                   Acc<T>* bias_sums) {
  using A = Acc<T>;
  using V = Vec<A>;
  const P* weight = static_cast<const P*>(args.weight);
  const T* grad_y[R];
  const T* x[R];
  V mean[R], rstd[R], sum_g[R], sum_g_xhat[R];
  for (int r = 0; r < R; ++r) {
    grad_y[r] = row_of<T>(args.grad_y, row + r);
    x[r] = row_of<T>(args.x, row + r);
    mean[r] = V(static_cast<const A*>(args.mean)[row + r]);
    rstd[r] = V(static_cast<const A*>(args.rstd)[row + r]);
  }
  for_each_vector<V>(args.columns, [&](int64_t i, int, auto lanes) TPCORE_INLINE_LAMBDA {
    const V w = weight != nullptr ? V::load(weight + i, lanes) : V(A(1));
    V weight_sum, bias_sum;
    for (int r = 0; r < R; ++r) {
      const V dy = V::load(grad_y[r] + i, lanes);
      const V xhat = (V::load(x[r] + i, lanes) - mean[r]) * rstd[r];
      const V g = dy * w;
      sum_g[r] = sum_g[r] + g;
      sum_g_xhat[r] = multiply_add(g, xhat, sum_g_xhat[r]);
      weight_sum = multiply_add(dy, xhat, weight_sum);
      bias_sum = bias_sum + dy;
    }
    if (weight_sums != nullptr) {
      (V::load(weight_sums + i, lanes) + weight_sum).store(weight_sums + i, lanes);
    }
    if (bias_sums != nullptr) {
      (V::load(bias_sums + i, lanes) + bias_sum).store(bias_sums + i, lanes);
    }
  });
  if (args.grad_x == nullptr) return;
  for (int r = 0; r < R; ++r) {
    const V mean_g(sum_g[r].sum() / static_cast<A>(args.columns));
    const V mean_g_xhat(sum_g_xhat[r].sum() / static_cast<A>(args.columns));
    const T* extra = args.grad_total.data ? row_of<T>(args.grad_total, row + r) : nullptr;
    T* grad_x = static_cast<T*>(args.grad_x) + (row + r) * args.columns;
    for_each_vector<V>(args.columns, [&](int64_t i, int, auto lanes) TPCORE_INLINE_LAMBDA {
      prefetch(x[r] + i, R * args.x.row_stride);
      prefetch(grad_y[r] + i, R * args.grad_y.row_stride);
      if (!streaming) prefetch_to_write(grad_x + i);
      const V w = weight != nullptr ? V::load(weight + i, lanes) : V(A(1));
      const V xhat = (V::load(x[r] + i, lanes) - mean[r]) * rstd[r];
      const V g = V::load(grad_y[r] + i, lanes) * w;
      V value = (g - mean_g - xhat * mean_g_xhat) * rstd[r];
      if (extra != nullptr) value = value + V::load(extra + i, lanes);
      write<streaming>(value, grad_x + i, lanes);
    });
  }
}

}  // namespace

void layer_norm_forward(const LayerNormForward& args, ParallelFor parallel_for) {
  dispatch_types(args.dtype, args.parameter_dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    using P = typename decltype(types)::Parameter;
    using A = Acc<T>;
    const int64_t columns = args.columns;
    const int64_t bytes = 2 * columns * static_cast<int64_t>(sizeof(T));
    with_constant(worth_streaming<T>(args.y, args.rows, columns), [&](auto streaming) {
      parallel_rows(parallel_for, args.rows, bytes, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const T* x = row_of<T>(args.x, row);
          if (args.residual.data != nullptr) {
            T* total = static_cast<T*>(args.total) + row * columns;
            add_row(x, row_of<T>(args.residual, row), total, columns);
            x = total;
          }
          A* mean = static_cast<A*>(args.mean) + row;
          A* rstd = static_cast<A*>(args.rstd) + row;
          row_statistics(x, columns, args.eps, mean, rstd);
          normalize_row<streaming>(x, static_cast<const P*>(args.weight),
                                   static_cast<const P*>(args.bias),
                                   static_cast<T*>(args.y) + row * columns, columns, *mean, *rstd);
        }
        if (streaming) streaming_fence();
      });
    });
  });
}

void layer_norm_backward(const LayerNormBackward& args, ParallelFor parallel_for) {
  dispatch_types(args.dtype, args.parameter_dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    using P = typename decltype(types)::Parameter;
    using A = Acc<T>;
    const int64_t columns = args.columns;
    A* partials = static_cast<A*>(args.partials);
    with_constant(worth_streaming<T>(args.grad_x, args.rows, columns), [&](auto streaming) {
      parallel_sums(parallel_for, args.rows, [&](int64_t sum, int64_t begin, int64_t end) {
        A* weight_sums = args.grad_weight ? partials + 2 * sum * columns : nullptr;
        A* bias_sums = args.grad_bias ? partials + (2 * sum + 1) * columns : nullptr;
        if (weight_sums) memset(weight_sums, 0, static_cast<size_t>(columns) * sizeof(A));
        if (bias_sums) memset(bias_sums, 0, static_cast<size_t>(columns) * sizeof(A));
        int64_t row = begin;
        for (; row + 4 <= end; row += 4) {
          backward_rows<4, streaming, T, P>(args, row, weight_sums, bias_sums);
        }
        for (; row < end; ++row) {
          backward_rows<1, streaming, T, P>(args, row, weight_sums, bias_sums);
        }
        if (streaming) streaming_fence();
      });
    });
    const int64_t sums = partial_sums(args.rows);
    add_partial_sums(parallel_for, partials, sums, 2 * columns, columns,
                     static_cast<A*>(args.grad_weight));
    add_partial_sums(parallel_for, partials + columns, sums, 2 * columns, columns,
                     static_cast<A*>(args.grad_bias));
  });
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
