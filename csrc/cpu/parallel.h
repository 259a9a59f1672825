// SPDX-License-Identifier: Apache-2.0
// Rows over the caller's thread pool, and sums over rows whose bits do not depend on it.
#pragma once

#include <cstdlib>
#include <type_traits>

#include "simd.h"
#include "tpcore/kernels.h"

namespace tpcore {
namespace TPCORE_ISA {

// Below this many bytes of traffic a task costs more to hand out than to do.
constexpr int64_t kTaskBytes = 16 * 1024;

// function(begin, end) for pieces of [0, count).
template <class Function>
void parallel_pieces(ParallelFor parallel_for, int64_t count, int64_t grain,
                     const Function& function) {
  if (count == 0) return;
  parallel_for(count, grain, &function, [](const void* closure, int64_t begin, int64_t end) {
    (*static_cast<const Function*>(closure))(begin, end);
  });
}

// function(begin, end) for pieces of [0, rows) that are worth a task.
template <class Function>
void parallel_rows(ParallelFor parallel_for, int64_t rows, int64_t bytes_per_row,
                   const Function& function) {
  const int64_t grain = bytes_per_row < 1 ? rows : (kTaskBytes + bytes_per_row - 1) / bytes_per_row;
  parallel_pieces(parallel_for, rows, grain, function);
}

// function(sum, begin, end) for each partial sum over rows; see partial_sums.
template <class Function>
void parallel_sums(ParallelFor parallel_for, int64_t rows, const Function& function) {
  const int64_t each = rows_per_partial_sum(rows);
  parallel_pieces(parallel_for, partial_sums(rows), 1, [&](int64_t first, int64_t last) {
    for (int64_t sum = first; sum < last; ++sum) {
      const int64_t begin = sum * each;
      function(sum, begin, begin + each < rows ? begin + each : rows);
    }
  });
}

// out[c] = sum over s of partials[s * stride + c], in the order of s; nothing if out is null.
template <class A>
void add_partial_sums(ParallelFor parallel_for, const A* partials, int64_t sums, int64_t stride,
                      int64_t columns, A* out) {
  using V = Vec<A>;
  if (out == nullptr) return;
  parallel_pieces(parallel_for, columns, 1024, [&](int64_t begin, int64_t end) {
    for_each_vector<V>(end - begin, [&](int64_t i, int, auto lanes) TPCORE_INLINE_LAMBDA {
      V total;
      for (int64_t s = 0; s < sums; ++s) {
        total = total + V::load(partials + s * stride + begin + i, lanes);
      }
      total.store(out + begin + i, lanes);
    });
  });
}

// Memory of a task: pieces that start on a cache line and live as long as this.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch() {
    while (count_ > 0) free(pieces_[--count_]);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class A>
  A* take(int64_t size) {
    const size_t lines = (static_cast<size_t>(size) * sizeof(A) + kLine - 1) / kLine;
    void* piece = count_ < kMost ? aligned_alloc(kLine, (lines + (lines == 0)) * kLine) : nullptr;
    if (piece == nullptr) out_of_memory();
    pieces_[count_++] = piece;
    return static_cast<A*>(piece);
  }

 private:
  static constexpr size_t kLine = 64;
  static constexpr int kMost = 16;
  void* pieces_[kMost];
  int count_ = 0;
};

// A result too large to be found in the cache by whoever reads it next is better written past the
// cache: an ordinary store first reads the line that it is going to overwrite.
#if defined(TPCORE_ISA_AVX512) || defined(TPCORE_ISA_AVX2)
template <class T>
bool worth_streaming(const void* result, int64_t rows, int64_t columns) {
  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(T));
  return std::is_same_v<T, float> && rows * row_bytes >= streaming_bytes() && row_bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(result) % 64 == 0;
}
// Stores that streamed are seen by others after the fence.
TPCORE_INLINE void streaming_fence() { _mm_sfence(); }
#else
template <class T>
bool worth_streaming(const void*, int64_t, int64_t) {
  return false;
}
TPCORE_INLINE void streaming_fence() {}
#endif

template <bool streaming, class V, class T, class Lanes>
TPCORE_INLINE void write(V value, T* p, Lanes lanes) {
#if defined(TPCORE_ISA_AVX512) || defined(TPCORE_ISA_AVX2)
  if constexpr (streaming && std::is_same_v<T, float> && std::is_same_v<Lanes, Full>) {
    return value.stream(p);
  }
#endif
  value.store(p, lanes);
}

// function(std::bool_constant): as a constant, so that the loops are compiled for either.
template <class Function>
void with_constant(bool value, const Function& function) {
  if (value) return function(std::true_type{});
  function(std::false_type{});
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
