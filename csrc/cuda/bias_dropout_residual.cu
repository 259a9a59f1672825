// SPDX-License-Identifier: Apache-2.0
// Bias, dropout and residual: formulas in tpcore/kernels.h.
//
// Forward moves 3 s bytes per element (2 s without a residual), backward 2 s: the mask is made
// again from the key, about 17 instructions per element. A thread owns the columns of one 16-byte
// vector, holds their bias in registers, and walks down the rows.
#include "columns.cuh"
#include "dropout.cuh"

namespace tpcore {
namespace cuda {
namespace {

template <class T, class P>
__global__ void __launch_bounds__(kTileThreads, 4)
    forward(BiasDropoutResidualForward args, DropoutKey key) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  const int64_t begin = first_column<N>();
  if (begin >= args.columns) return;
  const Lanes lanes = lanes_at<N>(begin, args.columns);
  const Vector<A, N> bias = load_or<N>(static_cast<const P*>(args.bias), begin, lanes, A(0));

  for_each_row_of_run(args.rows, [&](int64_t row) {
    const Packed<T, N> x = load<N>(row_of<T>(args.x, row) + begin, lanes);
    Packed<T, N> residual = {};
    if (args.residual.data) residual = load<N>(row_of<T>(args.residual, row) + begin, lanes);
    Vector<A, N> value;
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = x[i] + bias[i];
    if (drops(key)) {
      const uint32_t bits = keep_bits<N>(row_key(key, row, 0), key.column_offset + begin);
      drop(value, bits, static_cast<A>(args.scale));
    }
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] += residual[i];
    store(static_cast<T*>(args.y) + row * args.columns + begin, lanes, narrow<T>(value));
  });
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, 4)
    backward(BiasDropoutResidualBackward args, DropoutKey key) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ A scratch[kTileThreads * N];
  const int64_t begin = first_column<N>();
  const Lanes lanes = lanes_at<N>(begin, args.columns);
  T* grad_x = static_cast<T*>(args.grad_x);
  Vector<A, N> sums = filled<A, N>(0);

  for_each_row_of_run(begin < args.columns ? args.rows : 0, [&](int64_t row) {
    Vector<A, N> grad = widen(load<N>(row_of<T>(args.grad_y, row) + begin, lanes));
    if (drops(key)) {
      const uint32_t bits = keep_bits<N>(row_key(key, row, 0), key.column_offset + begin);
      drop(grad, bits, static_cast<A>(args.scale));
    }
    if (grad_x != nullptr) store(grad_x + row * args.columns + begin, lanes, narrow<T>(grad));
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] += grad[i];
  });
  if (args.grad_bias == nullptr) return;
  A* partial = static_cast<A*>(args.partials) + blockIdx.y * args.columns;
  add_over_rows(sums, scratch, partial, begin, args.columns);
}

}  // namespace

Status bias_dropout_residual_forward(const BiasDropoutResidualForward& args, Stream stream) {
  if (args.rows == 0 || args.columns == 0) return cudaSuccess;
  return dispatch_types(args.dtype, args.parameter_dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    using P = typename decltype(types)::Parameter;
    const ColumnGrid shape = column_grid(args.rows, args.columns, kVector<T>, kBlocksPerSm);
    return launch(forward<T, P>, shape.grid, shape.block, stream, args, key_or_none(args.key));
  });
}

Status bias_dropout_residual_backward(const BiasDropoutResidualBackward& args, Stream stream) {
  if (args.columns == 0) return cudaSuccess;
  return dispatch_types(args.dtype, args.dtype, [&](auto types) -> Status {
    using T = typename decltype(types)::Activation;
    int64_t sums = 0;
    if (args.rows > 0) {
      const ColumnGrid shape = column_grid(args.rows, args.columns, kVector<T>, kPartialsPerSm);
      const Status status =
          launch(backward<T>, shape.grid, shape.block, stream, args, key_or_none(args.key));
      if (status != cudaSuccess) return status;
      sums = shape.grid.y;
    }
    return launch_add_partials<Acc<T>>(args.partials, sums, args.columns, args.grad_bias, nullptr,
                                       false, stream);
  });
}

}  // namespace cuda
}  // namespace tpcore
