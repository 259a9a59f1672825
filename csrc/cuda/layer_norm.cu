// SPDX-License-Identifier: Apache-2.0
// Layer norm: formulas in tpcore/kernels.h.
//
// A row of up to 64 KiB stays in the registers of its threads, so that forward moves 2 s bytes per
// element (4 s with a residual: two read, two written), s = sizeof(T), and the variance can be
// centred: no digits are lost where the mean is large. Backward moves 3 s (4 s with grad_total): a
// block walks over rows, keeps its columns' sums for the parameter gradients in registers, and
// writes one partial sum at the end. Longer rows are read again instead.
#include "columns.cuh"
#include "rows.cuh"

namespace tpcore {
namespace cuda {
namespace {

constexpr int kForwardVectors = 4;  // of 16 bytes, in the registers of a thread

template <class T, class P, class Row>
__global__ void __launch_bounds__(kMaxThreads) forward(LayerNormForward args) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ typename RowReducer<A, 1>::Scratch scratch;
  RowReducer<A, 1> reduce(scratch);
  const P* weight = static_cast<const P*>(args.weight);
  const P* bias = static_cast<const P*>(args.bias);
  const int64_t columns = args.columns;

  for_each_row(args.rows, [&](int64_t row) {
    const int64_t vectors = row < args.rows ? divide_up(columns, N) : 0;
    const T* x = row_of<T>(args.x, row);
    const T* residual = args.residual.data ? row_of<T>(args.residual, row) : nullptr;
    T* total = static_cast<T*>(args.total) + row * columns;
    T* y = static_cast<T*>(args.y) + row * columns;
    const auto produce = [&](int64_t number) {
      const int64_t begin = number * N;
      const Lanes lanes = lanes_at<N>(begin, columns);
      Packed<T, N> vector = load<N>(x + begin, lanes);
      if (residual != nullptr) {
        Vector<A, N> sum = widen(load<N>(residual + begin, lanes));
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += vector[i];
        vector = narrow<T>(sum);
        store(total + begin, lanes, vector);
      }
      return vector;
    };
    Row held;
    held.fill(vectors, produce);

    A sum[1] = {0};
    held.for_each(vectors, produce, [&](int64_t, const Packed<T, N>& vector) {
#pragma unroll
      for (int i = 0; i < N; ++i) sum[0] += vector[i];  // missing elements are 0
    });
    reduce(sum, Plus());
    const A mean = sum[0] / static_cast<A>(columns);

    A squares[1] = {0};
    held.for_each(vectors, produce, [&](int64_t number, const Packed<T, N>& vector) {
      const Lanes lanes = lanes_at<N>(number * N, columns);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const A difference = i < lanes.last ? vector[i] - mean : A(0);
        squares[0] = multiply_add(difference, difference, squares[0]);
      }
    });
    reduce(squares, Plus());
    const A variance = squares[0] / static_cast<A>(columns);
    const A rstd = A(1) / square_root(variance + static_cast<A>(args.eps));

    held.for_each(vectors, produce, [&](int64_t number, const Packed<T, N>& vector) {
      const int64_t begin = number * N;
      const Lanes lanes = lanes_at<N>(begin, columns);
      const Vector<A, N> w = load_or<N>(weight, begin, lanes, A(1));
      const Vector<A, N> b = load_or<N>(bias, begin, lanes, A(0));
      Vector<A, N> result;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        result[i] = multiply_add((vector[i] - mean) * rstd, w[i], b[i]);
      }
      store(y + begin, lanes, narrow<T>(result));
    });
    if (threadIdx.x == 0 && row < args.rows) {
      static_cast<A*>(args.mean)[row] = mean;
      static_cast<A*>(args.rstd)[row] = rstd;
    }
  });
}

constexpr int kBackwardThreads = 512;  // leaves 128 registers to a thread

// 16 columns per thread, 4 in double precision: their sums take 32 or 16 registers.
template <class T>
constexpr int kBackwardVectors = sizeof(T) == 4 ? 4 : 2;

template <class A>
struct RowStatistics {
  A mean = 0, rstd = 0;
  TPCORE_DEVICE RowStatistics(const LayerNormBackward& args, int64_t row) {
    if (row >= args.rows) return;
    mean = static_cast<const A*>(args.mean)[row];
    rstd = static_cast<const A*>(args.rstd)[row];
  }
};

template <class A>
struct RowMeans {
  A g, g_xhat;
  TPCORE_DEVICE RowMeans(const A (&sums)[2], int64_t columns)
      : g(sums[0] / static_cast<A>(columns)), g_xhat(sums[1] / static_cast<A>(columns)) {}
};

// grad_x of one vector.
template <class T, class P, int N>
TPCORE_DEVICE void store_grad_x(const LayerNormBackward& args, int64_t row, int64_t begin,
                                const Packed<T, N>& grad_y, const Packed<T, N>& x,
                                const RowStatistics<Acc<T>>& of, const RowMeans<Acc<T>>& means) {
  using A = Acc<T>;
  const Lanes lanes = lanes_at<N>(begin, args.columns);
  const T* grad_total = args.grad_total.data ? row_of<T>(args.grad_total, row) : nullptr;
  const Vector<A, N> w = load_or<N>(static_cast<const P*>(args.weight), begin, lanes, A(1));
  Vector<A, N> result = load_or<N>(grad_total, begin, lanes, A(0));
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const A xhat = (x[i] - of.mean) * of.rstd;
    const A g = grad_y[i] * w[i];
    result[i] = multiply_add(g - means.g - xhat * means.g_xhat, of.rstd, result[i]);
  }
  store(static_cast<T*>(args.grad_x) + row * args.columns + begin, lanes, narrow<T>(result));
}

template <class T, class P>
__global__ void __launch_bounds__(kBackwardThreads) backward(LayerNormBackward args) {
  using A = Acc<T>;
  constexpr int N = kVector<T>, K = kBackwardVectors<T>;
  __shared__ typename RowReducer<A, 2>::Scratch scratch;
  __shared__ A add_scratch[kTileThreads * N];
  RowReducer<A, 2> reduce(scratch);
  const P* weight = static_cast<const P*>(args.weight);
  Vector<A, N> weight_sums[K], bias_sums[K];
#pragma unroll
  for (int k = 0; k < K; ++k) weight_sums[k] = bias_sums[k] = filled<A, N>(0);

  for_each_row(args.rows, [&](int64_t row) {
    const int64_t vectors = row < args.rows ? divide_up(args.columns, N) : 0;
    const RowStatistics<A> of(args, row);
    RegisterRow<Packed<T, N>, K> x, grad_y;
    x.fill(vectors, [&](int64_t number) {
      const int64_t begin = number * N;
      return load<N>(row_of<T>(args.x, row) + begin, lanes_at<N>(begin, args.columns));
    });
    grad_y.fill(vectors, [&](int64_t number) {
      const int64_t begin = number * N;
      return load<N>(row_of<T>(args.grad_y, row) + begin, lanes_at<N>(begin, args.columns));
    });
    A sums[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t begin = x.number(k) * N;
      if (x.number(k) >= vectors) continue;
      const Vector<A, N> w = load_or<N>(weight, begin, lanes_at<N>(begin, args.columns), A(1));
#pragma unroll
      for (int i = 0; i < N; ++i) {  // where an element is missing, dy is 0
        const A xhat = (x.held[k][i] - of.mean) * of.rstd;
        const A dy = grad_y.held[k][i], g = dy * w[i];
        sums[0] += g;
        sums[1] = multiply_add(g, xhat, sums[1]);
        weight_sums[k][i] = multiply_add(dy, xhat, weight_sums[k][i]);
        bias_sums[k][i] += dy;
      }
    }
    if (args.grad_x == nullptr) return;
    reduce(sums, Plus());
    const RowMeans<A> means(sums, args.columns);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (x.number(k) >= vectors) continue;
      store_grad_x<T, P>(args, row, x.number(k) * N, grad_y.held[k], x.held[k], of, means);
    }
  });

  A* partial = static_cast<A*>(args.partials) + 2 * blockIdx.x * args.columns;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t begin = RegisterRow<Packed<T, N>, K>::number(k) * N;
    if (args.grad_weight) add_over_rows(weight_sums[k], add_scratch, partial, begin, args.columns);
    if (args.grad_bias) {
      add_over_rows(bias_sums[k], add_scratch, partial + args.columns, begin, args.columns);
    }
  }
}

// Rows that do not fit: grad_x by reading them twice, ...
template <class T, class P>
__global__ void __launch_bounds__(kMaxThreads) backward_long_rows(LayerNormBackward args) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ typename RowReducer<A, 2>::Scratch scratch;
  RowReducer<A, 2> reduce(scratch);
  const P* weight = static_cast<const P*>(args.weight);
  const int64_t vectors = divide_up(args.columns, N);
  for_each_row(args.rows, [&](int64_t row) {
    const RowStatistics<A> of(args, row);
    const T* grad_y = row_of<T>(args.grad_y, row);
    const auto produce = [&](int64_t number) {
      const int64_t begin = number * N;
      return load<N>(row_of<T>(args.x, row) + begin, lanes_at<N>(begin, args.columns));
    };
    A sums[2] = {0, 0};
    MemoryRow<Packed<T, N>> held;
    held.for_each(vectors, produce, [&](int64_t number, const Packed<T, N>& x) {
      const int64_t begin = number * N;
      const Lanes lanes = lanes_at<N>(begin, args.columns);
      const Packed<T, N> dy = load<N>(grad_y + begin, lanes);
      const Vector<A, N> w = load_or<N>(weight, begin, lanes, A(1));
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const A g = dy[i] * w[i];
        sums[0] += g;
        sums[1] = multiply_add(g, (x[i] - of.mean) * of.rstd, sums[1]);
      }
    });
    reduce(sums, Plus());
    const RowMeans<A> means(sums, args.columns);
    held.for_each(vectors, produce, [&](int64_t number, const Packed<T, N>& x) {
      const int64_t begin = number * N;
      const Packed<T, N> dy = load<N>(grad_y + begin, lanes_at<N>(begin, args.columns));
      store_grad_x<T, P>(args, row, begin, dy, x, of, means);
    });
  });
}

// ... and the parameter gradients by reading them a third time, column by column.
template <class T>
__global__ void __launch_bounds__(kTileThreads) backward_parameters(LayerNormBackward args) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ A scratch[kTileThreads * N];
  const int64_t begin = first_column<N>();
  const Lanes lanes = lanes_at<N>(begin, args.columns);
  Vector<A, N> weight_sums = filled<A, N>(0), bias_sums = filled<A, N>(0);
  for_each_row_of_run(begin < args.columns ? args.rows : 0, [&](int64_t row) {
    const RowStatistics<A> of(args, row);
    const Packed<T, N> x = load<N>(row_of<T>(args.x, row) + begin, lanes);
    const Packed<T, N> dy = load<N>(row_of<T>(args.grad_y, row) + begin, lanes);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A xhat = (x[i] - of.mean) * of.rstd;
      weight_sums[i] = multiply_add(dy[i], xhat, weight_sums[i]);
      bias_sums[i] += dy[i];
    }
  });
  A* partial = static_cast<A*>(args.partials) + 2 * blockIdx.y * args.columns;
  if (args.grad_weight) add_over_rows(weight_sums, scratch, partial, begin, args.columns);
  if (args.grad_bias) {
    add_over_rows(bias_sums, scratch, partial + args.columns, begin, args.columns);
  }
}

}  // namespace

Status layer_norm_forward(const LayerNormForward& args, Stream stream) {
  if (args.rows == 0) return cudaSuccess;
  return dispatch_types(args.dtype, args.parameter_dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    using P = typename decltype(types)::Parameter;
    const int64_t vectors = divide_up(args.columns, kVector<T>);
    const dim3 block = row_block(vectors, kForwardVectors, kMaxThreads, 128);
    const dim3 grid(static_cast<unsigned>(grid_for(divide_up(args.rows, block.y))));
    const bool fits = vectors <= kForwardVectors * kMaxThreads;
    using V = Packed<T, kVector<T>>;
    const auto kernel =
        fits ? forward<T, P, RegisterRow<V, kForwardVectors>> : forward<T, P, MemoryRow<V>>;
    return launch(kernel, grid, block, stream, args);
  });
}

Status layer_norm_backward(const LayerNormBackward& args, Stream stream) {
  const bool parameters = args.grad_weight != nullptr || args.grad_bias != nullptr;
  return dispatch_types(args.dtype, args.parameter_dtype, [&](auto types) -> Status {
    using T = typename decltype(types)::Activation;
    using P = typename decltype(types)::Parameter;
    const int64_t rows = args.rows, columns = args.columns;
    const int64_t vectors = divide_up(columns, kVector<T>);
    int64_t sums = 0;
    Status status = cudaSuccess;
    if (rows > 0 && vectors <= kBackwardVectors<T> * kBackwardThreads) {
      const dim3 block = row_block(vectors, kBackwardVectors<T>, kBackwardThreads, kTileThreads);
      sums = smaller(divide_up(rows, block.y), partial_sums(rows));
      status = launch(backward<T, P>, dim3(static_cast<unsigned>(sums)), block, stream, args);
    } else if (rows > 0) {
      if (args.grad_x != nullptr) {
        const dim3 grid(static_cast<unsigned>(grid_for(rows)));
        status = launch(backward_long_rows<T, P>, grid, dim3(kMaxThreads), stream, args);
      }
      if (parameters && status == cudaSuccess) {
        const ColumnGrid shape = column_grid(rows, columns, kVector<T>, kPartialsPerSm);
        sums = shape.grid.y;
        status = launch(backward_parameters<T>, shape.grid, shape.block, stream, args);
      }
    }
    if (status != cudaSuccess) return status;
    return launch_add_partials<Acc<T>>(args.partials, sums, columns, args.grad_weight,
                                       args.grad_bias, true, stream);
  });
}

}  // namespace cuda
}  // namespace tpcore
