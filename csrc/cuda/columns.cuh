// SPDX-License-Identifier: Apache-2.0
// Kernels whose threads own columns and walk down the rows, and sums over rows. The sums go in two
// stages, both in an order that the launch alone decides: each block of rows writes a partial sum,
// then the partial sums are added.
#pragma once

#include "common.cuh"

namespace tpcore {
namespace cuda {

constexpr int kTileThreads = 256;

// Tiles of columns along x of the grid, runs of rows along y.
struct ColumnGrid {
  dim3 grid, block;
};

inline ColumnGrid column_grid(int64_t rows, int64_t columns, int vector, int blocks_per_sm) {
  const int64_t vectors = divide_up(columns, vector);
  const int64_t tiles = divide_up(vectors, kTileThreads / 2);
  const int64_t x = divide_up(vectors, tiles), y = kTileThreads / x;
  const int64_t wanted = larger(blocks_per_sm * multiprocessors() / tiles, 1);
  const int64_t runs = smaller(divide_up(rows, y), wanted);
  return {dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(runs)),
          dim3(static_cast<unsigned>(x), static_cast<unsigned>(y))};
}

// The first column of this thread, of N.
template <int N>
TPCORE_DEVICE int64_t first_column() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
}

template <class Body>
TPCORE_DEVICE void for_each_row_of_run(int64_t rows, const Body& body) {
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
  for (; row < rows; row += step) body(row);
}

// out[begin + i] = sum of sums[i] over the y of the block, as a tree of halves: few steps, and few
// roundings on the way of each. For all threads of the block to call.
template <class A, int N>
TPCORE_DEVICE void add_over_rows(const Vector<A, N>& sums, A (&scratch)[kTileThreads * N], A* out,
                                 int64_t begin, int64_t columns) {
  const auto at = [&](unsigned y, int i) -> A& {
    return scratch[(y * N + i) * blockDim.x + threadIdx.x];
  };
  Vector<A, N> total = sums;
  if (blockDim.y > 1) block_barrier();  // the scratch of the call before has been read
  for (unsigned rows = blockDim.y; rows > 1;) {
    const unsigned half = (rows + 1) / 2;  // a step writes what no later one touches
    if (threadIdx.y >= half && threadIdx.y < rows) {
#pragma unroll
      for (int i = 0; i < N; ++i) at(threadIdx.y, i) = total[i];
    }
    block_barrier();
    if (threadIdx.y + half < rows) {
#pragma unroll
      for (int i = 0; i < N; ++i) total[i] += at(threadIdx.y + half, i);
    }
    rows = half;
  }
  if (threadIdx.y == 0 && begin < columns) {
    store(out + begin, lanes_at<N>(begin, columns), narrow<A>(total));
  }
}

namespace {

constexpr int kAddRows = kTileThreads / kWarp;

// out[c] = sum over s < count of partials[s * stride + c]; blockIdx.y picks one of two such sums.
template <class A>
__global__ void __launch_bounds__(kTileThreads)
    add_partials(const A* partials, int64_t count, int64_t stride, int64_t columns, A* first,
                 A* second) {
  __shared__ A scratch[kTileThreads];
  const int64_t column = first_column<1>();
  A* out = blockIdx.y == 0 ? first : second;
  if (blockIdx.y == 1) partials += columns;
  Vector<A, 1> sum = {0};
  if (column < columns && out != nullptr) {
    for (int64_t s = threadIdx.y; s < count; s += kAddRows) {
      sum[0] += partials[s * stride + column];
    }
  }
  add_over_rows(sum, scratch, out, column, out != nullptr ? columns : 0);
}

// The second stage; a null pointer is a sum that is not wanted. With `second`, a partial sum is
// [2, columns].
template <class A>
Status launch_add_partials(const void* partials, int64_t count, int64_t columns, void* first,
                           void* second, bool pair, Stream stream) {
  if (first == nullptr && second == nullptr) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(divide_up(columns, kWarp)), pair ? 2 : 1);
  return launch(add_partials<A>, grid, dim3(kWarp, kAddRows), stream,
                static_cast<const A*>(partials), count, pair ? 2 * columns : columns, columns,
                static_cast<A*>(first), static_cast<A*>(second));
}

}  // namespace
}  // namespace cuda
}  // namespace tpcore
