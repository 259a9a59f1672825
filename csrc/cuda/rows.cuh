// SPDX-License-Identifier: Apache-2.0
// Kernels that reduce along rows. A block is (x, y): x threads along a row, a power of two within
// a warp or whole warps; y rows. A row goes through its threads in steps of x vectors, so that
// neighbours in a warp read neighbours in memory.
#pragma once

#include "common.cuh"

namespace tpcore {
namespace cuda {

// The block for rows of so many vectors, at most `per_thread` of them to a thread as far as
// `max_threads` go; short rows share a block of `threads`.
inline dim3 row_block(int64_t vectors, int per_thread, int max_threads, int threads) {
  const int64_t wanted = divide_up(vectors, per_thread);
  int64_t x = 4;
  while (x < wanted && x < kWarp) x *= 2;
  if (wanted > kWarp) x = smaller(divide_up(wanted, kWarp) * kWarp, max_threads);
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(larger(threads / x, 1)));
}

// Calls body(row) for the rows of this thread; a row beyond the last is visited too, so that all
// threads of a block reach the same barriers.
template <class Body>
TPCORE_DEVICE void for_each_row(int64_t rows, const Body& body) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < rows; first += step) {
    body(first + threadIdx.y);
  }
}

// The vectors of a row that a thread holds: numbers k * blockDim.x + threadIdx.x.
template <class V, int K>
struct RegisterRow {
  static constexpr bool kRemembers = true;
  V held[K];

  static TPCORE_DEVICE int64_t number(int k) {
    return static_cast<int64_t>(k) * blockDim.x + threadIdx.x;
  }
  // Fetches produce(number) for each of them that the row has.
  template <class Produce>
  TPCORE_DEVICE void fill(int64_t vectors, const Produce& produce) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (number(k) < vectors) held[k] = produce(number(k));
    }
  }
  // visit(number, vector), which may change what is held.
  template <class Produce, class Visit>
  TPCORE_DEVICE void for_each(int64_t vectors, const Produce&, const Visit& visit) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (number(k) < vectors) visit(number(k), held[k]);
    }
  }
};

// A row that does not fit: it is produced anew on each visit, and forgotten.
template <class V>
struct MemoryRow {
  static constexpr bool kRemembers = false;

  template <class Produce>
  TPCORE_DEVICE void fill(int64_t, const Produce&) {}
  template <class Produce, class Visit>
  TPCORE_DEVICE void for_each(int64_t vectors, const Produce& produce, const Visit& visit) {
    for (int64_t number = threadIdx.x; number < vectors; number += blockDim.x) {
      V vector = produce(number);
      visit(number, vector);
    }
  }
};

// Reduces N numbers over the threads of each row, for all of them: by shuffles within a warp, and
// through shared memory between warps. The two halves of the scratch serve in turn: who overwrites
// one has passed the barrier of the other, which nobody reaches before he has read the first.
template <class A, int N>
class RowReducer {
 public:
  using Scratch = A[2][N][kMaxWarps];
  explicit TPCORE_DEVICE RowReducer(Scratch& scratch) : scratch_(scratch) {}

  template <class Operation>
  TPCORE_DEVICE void operator()(A (&values)[N], Operation operation) {
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] = warp_reduce(values[n], operation, blockDim.x);
    if (blockDim.x <= kWarp) return;
    const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
    const int first = threadIdx.y * warps;
    if (lane == 0) {
#pragma unroll
      for (int n = 0; n < N; ++n) scratch_[turn_][n][first + threadIdx.x / kWarp] = values[n];
    }
    block_barrier();
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const A part = lane < warps ? scratch_[turn_][n][first + lane] : operation.template none<A>();
      values[n] = warp_reduce(part, operation);
    }
    turn_ ^= 1;
  }

 private:
  Scratch& scratch_;
  int turn_ = 0;
};

}  // namespace cuda
}  // namespace tpcore
