// SPDX-License-Identifier: Apache-2.0
// Products of small matrices that lie in the caches, summed in accumulation type A. Elements E are
// of that type, or pairs of bfloat16 (pairs.h), where an element of the depth stands for two
// numbers.
//
// A right-hand side consists of whole vectors: matrices are padded to them with zeros, so that no
// product has to know where a row ends.
#pragma once

#include "simd.h"
#include "tpcore/kernels.h"

namespace tpcore {
namespace TPCORE_ISA {

// left[m, k] = data[m * row + k * depth]
template <class E>
struct Left {
  const E* data;
  int64_t row, depth;
};

// Vector n of row k of the right-hand side starts at data[n * vector + k * depth].
template <class E>
struct Right {
  const E* data;
  int64_t vector, depth;
};

// The tile of the result that registers hold: 6 x 4 accumulators and a row of the right-hand side
// are 28 of 32 registers, 6 x 2 are 14 of 16.
constexpr int kTileRows = 6;
#if defined(TPCORE_ISA_AVX512) || defined(__ARM_NEON)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

// result[m, n] = (add ? result[m, n] : 0) + sum over k of left[m, k] * right[k, n] for M rows and N
// vectors.
template <int M, int N, class E, class A>
TPCORE_INLINE void multiply_tile(int64_t depth, Left<E> left, Right<E> right, A* result,
                                 int64_t result_row, bool add) {
  using V = Vec<A>;
  V sums[M][N];
  if (add) {
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) {
        sums[m][n] = V::load(result + m * result_row + n * V::size, Full{});
      }
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<E> row[N];
    for (int n = 0; n < N; ++n) row[n] = Vec<E>::load(right.data + n * right.vector, Full{});
    for (int m = 0; m < M; ++m) {
      const Vec<E> factor(left.data[m * left.row]);
      for (int n = 0; n < N; ++n) sums[m][n] = multiply_add(factor, row[n], sums[m][n]);
    }
    left.data += left.depth;
    right.data += right.depth;
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      sums[m][n].store(result + m * result_row + n * V::size, Full{});
    }
  }
}

template <int M, int N, class E, class A>
TPCORE_INLINE void multiply_tile(int64_t rows, int64_t vectors, int64_t depth, Left<E> left,
                                 Right<E> right, A* result, int64_t result_row, bool add) {
  if constexpr (N > 1) {
    if (vectors < N) {
      return multiply_tile<M, N - 1>(rows, vectors, depth, left, right, result, result_row, add);
    }
  }
  if constexpr (M > 1) {
    if (rows < M) {
      return multiply_tile<M - 1, N>(rows, vectors, depth, left, right, result, result_row, add);
    }
  }
  multiply_tile<M, N>(depth, left, right, result, result_row, add);
}

// result[rows, vectors] = (add ? result : 0) + left[rows, depth] * right[depth, vectors]
template <class E, class A>
void multiply_tiles(int64_t rows, int64_t vectors, int64_t depth, Left<E> left, Right<E> right,
                    A* result, int64_t result_row, bool add) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t n = 0; n < vectors; n += kTileVectors) {
    const Right<E> columns{right.data + n * right.vector, right.vector, right.depth};
    // Tiles of nearly equal height: a tile of one row would wait for its own sums.
    for (int64_t tile = 0, m = 0; tile < tiles; ++tile) {
      const int64_t height = (rows - m + tiles - tile - 1) / (tiles - tile);
      multiply_tile<kTileRows, kTileVectors, E>(
          height, vectors - n, depth, {left.data + m * left.row, left.row, left.depth}, columns,
          result + m * result_row + n * Vec<A>::size, result_row, add);
      m += height;
    }
  }
}

template <class E, class A>
void multiply(int64_t rows, int64_t vectors, int64_t depth, Left<E> left, Right<E> right, A* result,
              int64_t result_row) {
  multiply_tiles<E>(rows, vectors, depth, left, right, result, result_row, false);
}

template <class E, class A>
void accumulate(int64_t rows, int64_t vectors, int64_t depth, Left<E> left, Right<E> right,
                A* result, int64_t result_row) {
  multiply_tiles<E>(rows, vectors, depth, left, right, result, result_row, true);
}

template <class A>
constexpr int64_t vectors_of(int64_t columns) {
  return (columns + Vec<A>::size - 1) / Vec<A>::size;
}

// packed[r, c] = x[r, c], rows padded to whole vectors.
template <class T, class A>
void pack(const T* x, int64_t x_row, int64_t rows, int64_t columns, A* packed) {
  using V = Vec<A>;
  const int64_t stride = vectors_of<A>(columns) * V::size;
  for (int64_t r = 0; r < rows; ++r) {
    for_each_vector<V>(columns, [&](int64_t c, int, auto lanes) TPCORE_INLINE_LAMBDA {
      V::load(x + r * x_row + c, lanes).store(packed + r * stride + c, Full{});
    });
  }
}

// x[r, c] = factor * packed[r, c]
template <class T, class A>
void unpack(const A* packed, A factor, int64_t rows, int64_t columns, T* x, int64_t x_row) {
  using V = Vec<A>;
  const int64_t stride = vectors_of<A>(columns) * V::size;
  for (int64_t r = 0; r < rows; ++r) {
    for_each_vector<V>(columns, [&](int64_t c, int, auto lanes) TPCORE_INLINE_LAMBDA {
      (V::load(packed + r * stride + c, Full{}) * V(factor)).store(x + r * x_row + c, lanes);
    });
  }
}

// Columns become rows in log2(size) shuffles of all rows: each moves one bit of the row number into
// the column number and one the other way.
template <class A>
TPCORE_INLINE void transpose(Vec<A> (&rows)[Vec<A>::size]) {
  constexpr int64_t kSize = Vec<A>::size;
  for (int64_t step = 1; step < kSize; step *= 2) {
    Vec<A> shuffled[kSize];
    for (int64_t r = 0; r < kSize / 2; ++r) {
      Vec<A> low = rows[r], high = rows[r + kSize / 2];
      interleave(low, high);
      shuffled[2 * r] = low;
      shuffled[2 * r + 1] = high;
    }
    for (int64_t r = 0; r < kSize; ++r) rows[r] = shuffled[r];
  }
}

// The transpose of x [rows, columns] as a right-hand side of vectors_of(rows) vectors and a depth
// of `columns`: packed[r / size][c][r % size] = x[r, c], zeros for r beyond rows. Room for
// vectors_of(rows) * vectors_of(columns) * size * size.
template <class T, class A>
Right<A> pack_transposed(const T* x, int64_t x_row, int64_t rows, int64_t columns, A* packed) {
  using V = Vec<A>;
  constexpr int64_t kSize = V::size;
  const int64_t panel = vectors_of<A>(columns) * kSize * kSize;
  for (int64_t first = 0; first < rows; first += kSize, packed += panel) {
    const int64_t count = rows - first < kSize ? rows - first : kSize;
    for_each_vector<V>(columns, [&](int64_t c, int, auto lanes) TPCORE_INLINE_LAMBDA {
      V block[kSize];
      for (int64_t r = 0; r < count; ++r) block[r] = V::load(x + (first + r) * x_row + c, lanes);
      transpose(block);
      for (int64_t r = 0; r < kSize; ++r) block[r].store(packed + (c + r) * kSize, Full{});
    });
  }
  return {packed - vectors_of<A>(rows) * panel, panel, kSize};
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
