// SPDX-License-Identifier: Apache-2.0
// Products of bfloat16 matrices that lie in the caches, summed in float32, by the instructions for
// them: vdpbf16ps of AVX512-BF16, or the tiles of AMX.
//
// Both take two numbers of the depth at a time, a Pair. As a left-hand side a row of numbers is a
// row of pairs as it lies; a right-hand side has pairs in place of numbers, in panels of 16
// columns. Tiles are whole: matrices are padded with zeros to 32 numbers along the depth, and have
// room for 16 rows. Numbers below 2^-126 count as 0, in both sets of instructions.
#pragma once

#include "matrix_blocks.h"

namespace tpcore {
namespace TPCORE_ISA {

struct Pair {
  BFloat16 even, odd;
};

template <>
struct Vec<Pair> {
  static constexpr int64_t size = 16;
  __m512i v;

  TPCORE_INLINE Vec() : v(_mm512_setzero_si512()) {}
  TPCORE_INLINE Vec(__m512i raw) : v(raw) {}
  TPCORE_INLINE explicit Vec(Pair pair) {
    int32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    v = _mm512_set1_epi32(bits);
  }
  static TPCORE_INLINE Vec load(const Pair* p, Full) { return _mm512_loadu_si512(p); }
};
TPCORE_INLINE Vec<float> multiply_add(Vec<Pair> a, Vec<Pair> b, Vec<float> c) {
  return _mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v));
}

constexpr int64_t kPanel = Vec<Pair>::size;
constexpr int64_t kDepth = 2 * kPanel;  // numbers that a row of a tile holds

inline int64_t whole_depths(int64_t numbers) { return (numbers + kDepth - 1) / kDepth * kDepth; }
inline int64_t pairs_of(int64_t numbers) { return (numbers + 1) / 2; }

#if defined(TPCORE_ISA_AMX)
// Eight tiles of 16 rows of 64 bytes, on this thread, as long as this lives.
class Tiles {
 public:
  Tiles() {
    alignas(64) uint8_t config[64] = {1};  // palette 1; bytes a row from 16 on, rows from 48 on
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = 16;
    }
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// M x N tiles of the result. The intrinsics take the number of a tile as a literal.
template <int M, int N>
void multiply_amx(int64_t depth, Left<Pair> left, Right<Pair> right, float* result,
                  int64_t result_row, bool add) {
  const int64_t left_bytes = left.row * 4, right_bytes = kPanel * 4, row_bytes = result_row * 4;
  const Pair* const lower_left = left.data + 16 * left.row;
  const Pair* const next_right = right.data + right.vector;
  float* const lower = result + 16 * result_row;
  if (add) {
    _tile_loadd(0, result, row_bytes);
    if constexpr (N > 1) _tile_loadd(1, result + kPanel, row_bytes);
    if constexpr (M > 1) _tile_loadd(2, lower, row_bytes);
    if constexpr (M > 1 && N > 1) _tile_loadd(3, lower + kPanel, row_bytes);
  } else {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (M > 1) _tile_zero(2);
    if constexpr (M > 1 && N > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kPanel) {
    _tile_loadd(4, left.data + k, left_bytes);
    _tile_loadd(6, right.data + k * kPanel, right_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) {
      _tile_loadd(7, next_right + k * kPanel, right_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M > 1) {
      _tile_loadd(5, lower_left + k, left_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, result, row_bytes);
  if constexpr (N > 1) _tile_stored(1, result + kPanel, row_bytes);
  if constexpr (M > 1) _tile_stored(2, lower, row_bytes);
  if constexpr (M > 1 && N > 1) _tile_stored(3, lower + kPanel, row_bytes);
}

// The compiler does not know that the intrinsics read and write memory.
TPCORE_INLINE void memory_as_written() { __asm__ volatile("" ::: "memory"); }
#else
struct Tiles {
  Tiles() {}
};
#endif

// result[rows, vectors] = (add ? result : 0) + left[rows, depth] * right[depth, vectors]; depth in
// pairs.
inline void multiply_pairs(int64_t rows, int64_t vectors, int64_t depth, Left<Pair> left,
                           Right<Pair> right, float* result, int64_t result_row, bool add) {
#if defined(TPCORE_ISA_AMX)
  memory_as_written();
  for (int64_t m = 0; m < rows; m += 32) {
    const Left<Pair> a{left.data + m * left.row, left.row, 1};
    const bool low = m + 16 < rows;
    for (int64_t n = 0; n < vectors; n += 2) {
      const Right<Pair> b{right.data + n * right.vector, right.vector, kPanel};
      float* c = result + m * result_row + n * kPanel;
      const bool wide = n + 1 < vectors;
      if (low && wide) {
        multiply_amx<2, 2>(depth, a, b, c, result_row, add);
      } else if (low) {
        multiply_amx<2, 1>(depth, a, b, c, result_row, add);
      } else if (wide) {
        multiply_amx<1, 2>(depth, a, b, c, result_row, add);
      } else {
        multiply_amx<1, 1>(depth, a, b, c, result_row, add);
      }
    }
  }
  memory_as_written();
#else
  multiply_tiles<Pair>(rows, vectors, depth, left, right, result, result_row, add);
#endif
}

// --- Packing ---

// 32 numbers of a row from column c on, zeros beyond its end.
TPCORE_INLINE __m512i load_row(const BFloat16* row, int64_t c, int64_t columns) {
  const int64_t left = columns - c;
  const __mmask32 mask = left < kDepth ? (1u << left) - 1u : ~0u;
  return _mm512_maskz_loadu_epi16(mask, row + c);
}

// 16 numbers of two rows from column c on, as pairs; `count` of the rows exist.
TPCORE_INLINE __m512i load_pairs(const BFloat16* rows, int64_t row_stride, int64_t count, int64_t c,
                                 int64_t columns) {
  const int64_t left = columns - c;
  const __mmask16 mask = left < kPanel ? static_cast<__mmask16>((1u << left) - 1u) : 0xffff;
  const auto words = [&](int64_t r) TPCORE_INLINE_LAMBDA {
    if (r >= count) return _mm512_setzero_si512();
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, rows + r * row_stride + c));
  };
  return _mm512_or_si512(words(0), _mm512_slli_epi32(words(1), 16));
}

// left[r, c / 2] = (x[r, c], x[r, c + 1])
inline void pack_left(const BFloat16* x, int64_t x_row, int64_t rows, int64_t columns, Pair* packed,
                      int64_t packed_row) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kDepth) {
      _mm512_storeu_si512(packed + r * packed_row + c / 2, load_row(x + r * x_row, c, columns));
    }
  }
}

// left[c, r / 2] = (x[r, c], x[r + 1, c])
inline void pack_left_transposed(const BFloat16* x, int64_t x_row, int64_t rows, int64_t columns,
                                 Pair* packed, int64_t packed_row) {
  for (int64_t r = 0; r < rows; r += kDepth) {
    for (int64_t c = 0; c < columns; c += kPanel) {
      Vec<float> block[kPanel];
      for (int64_t i = 0; i < kPanel; ++i) {
        const int64_t row = r + 2 * i;
        block[i] = _mm512_castsi512_ps(load_pairs(x + row * x_row, x_row, rows - row, c, columns));
      }
      transpose(block);
      for (int64_t i = 0; i < kPanel; ++i) {
        _mm512_storeu_ps(packed + (c + i) * packed_row + r / 2, block[i].v);
      }
    }
  }
}

// right[r / 2, c] = (x[r, c], x[r + 1, c])
inline Right<Pair> pack_right(const BFloat16* x, int64_t x_row, int64_t rows, int64_t columns,
                              Pair* packed) {
  const int64_t depth = whole_depths(rows) / 2, panel = depth * kPanel;
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t c = 0; c < columns; c += kPanel) {
      _mm512_storeu_si512(packed + c / kPanel * panel + k * kPanel,
                          load_pairs(x + 2 * k * x_row, x_row, rows - 2 * k, c, columns));
    }
  }
  return {packed, panel, kPanel};
}

// right[c / 2, r] = (x[r, c], x[r, c + 1])
inline Right<Pair> pack_right_transposed(const BFloat16* x, int64_t x_row, int64_t rows,
                                         int64_t columns, Pair* packed) {
  const int64_t panel = whole_depths(columns) / 2 * kPanel;
  for (int64_t r = 0; r < rows; r += kPanel) {
    for (int64_t c = 0; c < columns; c += kDepth) {
      Vec<float> block[kPanel];
      for (int64_t i = 0; i < kPanel && r + i < rows; ++i) {
        block[i] = _mm512_castsi512_ps(load_row(x + (r + i) * x_row, c, columns));
      }
      transpose(block);
      for (int64_t i = 0; i < kPanel; ++i) {
        _mm512_storeu_ps(packed + r / kPanel * panel + (c / 2 + i) * kPanel, block[i].v);
      }
    }
  }
  return {packed, panel, kPanel};
}

// x[r, c] = factor * packed[c, r]
inline void unpack_transposed(const float* packed, int64_t packed_row, float factor, int64_t rows,
                              int64_t columns, BFloat16* x, int64_t x_row) {
  using V = Vec<float>;
  for (int64_t r = 0; r < rows; r += V::size) {
    for_each_vector<V>(columns, [&](int64_t c, int, auto lanes) TPCORE_INLINE_LAMBDA {
      V block[V::size];
      for (int64_t i = 0; i < V::size; ++i) {
        block[i] = V::load(packed + (c + i) * packed_row + r, Full{});
      }
      transpose(block);
      for (int64_t i = 0; i < V::size && r + i < rows; ++i) {
        (block[i] * V(factor)).store(x + (r + i) * x_row + c, lanes);
      }
    });
  }
}

// 16 numbers of two rows, rounded to bfloat16.
struct RowPair {
  __m512i v;

  TPCORE_INLINE RowPair(Vec<float> first, Vec<float> second)
      : v(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second.v, first.v))) {}
  TPCORE_INLINE void store_rows(BFloat16* first, BFloat16* second) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm512_castsi512_si256(v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(second), _mm512_extracti64x4_epi64(v, 1));
  }
  TPCORE_INLINE void store_pairs(Pair* p) const {
    const __m512i even = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(v));
    const __m512i odd = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1));
    _mm512_storeu_si512(p, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
};
TPCORE_INLINE void store_rounded(Vec<float> value, BFloat16* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value.v)));
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
