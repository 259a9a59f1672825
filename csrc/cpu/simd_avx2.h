// SPDX-License-Identifier: Apache-2.0
// AVX2 + FMA + F16C. Included by simd.h only.
#pragma once

#include <immintrin.h>

namespace tpcore {
namespace TPCORE_ISA {

// A mask of the first `count` of eight 32-bit lanes.
TPCORE_INLINE __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
// A mask of the first `count` of four 64-bit lanes.
TPCORE_INLINE __m256i first_wide_lanes(int64_t count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
// `count` 16-bit numbers, and zeros.
TPCORE_INLINE __m128i load_shorts(const void* p, int64_t count) {
  alignas(16) uint16_t buffer[8] = {};
  memcpy(buffer, p, static_cast<size_t>(count) * 2);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}
TPCORE_INLINE void store_shorts(void* p, __m128i shorts, int64_t count) {
  alignas(16) uint16_t buffer[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), shorts);
  memcpy(p, buffer, static_cast<size_t>(count) * 2);
}
// Up to eight bytes, and zeros.
TPCORE_INLINE __m128i load_bytes(const void* p, int64_t count) {
  uint64_t bytes = 0;
  memcpy(&bytes, p, static_cast<size_t>(count));
  return _mm_cvtsi64_si128(static_cast<long long>(bytes));
}

template <>
struct Vec<float> {
  static constexpr int64_t size = 8;
  __m256 v;

  TPCORE_INLINE Vec() : v(_mm256_setzero_ps()) {}
  TPCORE_INLINE Vec(__m256 raw) : v(raw) {}
  TPCORE_INLINE explicit Vec(float value) : v(_mm256_set1_ps(value)) {}

  static TPCORE_INLINE Vec load(const float* p, Full) { return _mm256_loadu_ps(p); }
  static TPCORE_INLINE Vec load(const float* p, Partial lanes) {
    return _mm256_maskload_ps(p, first_lanes(lanes.count));
  }
  static TPCORE_INLINE Vec load(const BFloat16* p, Full) { return widen_bfloat16(load128(p)); }
  static TPCORE_INLINE Vec load(const BFloat16* p, Partial lanes) {
    return widen_bfloat16(load_shorts(p, lanes.count));
  }
  static TPCORE_INLINE Vec load(const Float16* p, Full) { return _mm256_cvtph_ps(load128(p)); }
  static TPCORE_INLINE Vec load(const Float16* p, Partial lanes) {
    return _mm256_cvtph_ps(load_shorts(p, lanes.count));
  }

  TPCORE_INLINE void stream(float* p) const { _mm256_stream_ps(p, v); }
  TPCORE_INLINE void store(float* p, Full) const { _mm256_storeu_ps(p, v); }
  TPCORE_INLINE void store(float* p, Partial lanes) const {
    _mm256_maskstore_ps(p, first_lanes(lanes.count), v);
  }
  TPCORE_INLINE void store(BFloat16* p, Full) const { store128(p, narrow_bfloat16()); }
  TPCORE_INLINE void store(BFloat16* p, Partial lanes) const {
    store_shorts(p, narrow_bfloat16(), lanes.count);
  }
  TPCORE_INLINE void store(Float16* p, Full) const { store128(p, narrow_float16()); }
  TPCORE_INLINE void store(Float16* p, Partial lanes) const {
    store_shorts(p, narrow_float16(), lanes.count);
  }

  using Mask = __m256;
  // Lanes whose byte is not zero.
  static TPCORE_INLINE Mask nonzero(const uint8_t* p, Full) { return nonzero(p, Partial{size}); }
  static TPCORE_INLINE Mask nonzero(const uint8_t* p, Partial lanes) {
    const __m256i words = _mm256_cvtepu8_epi32(load_bytes(p, lanes.count));
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(words, _mm256_setzero_si256()));
  }

  // Lanes i + [0, size) of a row of bits, i a multiple of size; no byte past the last lane is read.
  template <class Lanes>
  static TPCORE_INLINE Mask bits(const uint8_t* p, int64_t i, Lanes) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(p[i / 8]), bit);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, bit));
  }
  TPCORE_INLINE Mask sign_bits() const { return v; }  // a mask is its sign bits

  static TPCORE_INLINE Mask first(Partial lanes) {
    return _mm256_castsi256_ps(first_lanes(lanes.count));
  }
  TPCORE_INLINE float sum() const {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
  }
  TPCORE_INLINE float maximum() const {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
  }

 private:
  static TPCORE_INLINE __m128i load128(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }
  static TPCORE_INLINE void store128(void* p, __m128i raw) {
    _mm_storeu_si128(static_cast<__m128i*>(p), raw);
  }
  static TPCORE_INLINE __m256 widen_bfloat16(__m128i shorts) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(shorts), 16));
  }
  TPCORE_INLINE __m128i narrow_bfloat16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_packus_epi32(words, words);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
  TPCORE_INLINE __m128i narrow_float16() const {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

template <>
struct Vec<double> {
  static constexpr int64_t size = 4;
  __m256d v;

  TPCORE_INLINE Vec() : v(_mm256_setzero_pd()) {}
  TPCORE_INLINE Vec(__m256d raw) : v(raw) {}
  TPCORE_INLINE explicit Vec(double value) : v(_mm256_set1_pd(value)) {}

  static TPCORE_INLINE Vec load(const double* p, Full) { return _mm256_loadu_pd(p); }
  static TPCORE_INLINE Vec load(const double* p, Partial lanes) {
    return _mm256_maskload_pd(p, first_wide_lanes(lanes.count));
  }
  TPCORE_INLINE void store(double* p, Full) const { _mm256_storeu_pd(p, v); }
  TPCORE_INLINE void store(double* p, Partial lanes) const {
    _mm256_maskstore_pd(p, first_wide_lanes(lanes.count), v);
  }

  using Mask = __m256d;
  static TPCORE_INLINE Mask nonzero(const uint8_t* p, Full) { return nonzero(p, Partial{size}); }
  static TPCORE_INLINE Mask nonzero(const uint8_t* p, Partial lanes) {
    const __m256i words = _mm256_cvtepu8_epi64(load_bytes(p, lanes.count));
    return _mm256_castsi256_pd(_mm256_cmpgt_epi64(words, _mm256_setzero_si256()));
  }

  template <class Lanes>
  static TPCORE_INLINE Mask bits(const uint8_t* p, int64_t i, Lanes) {
    const __m256i bit = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i chosen = _mm256_and_si256(_mm256_set1_epi64x(p[i / 8] >> i % 8), bit);
    return _mm256_castsi256_pd(_mm256_cmpeq_epi64(chosen, bit));
  }
  TPCORE_INLINE Mask sign_bits() const { return v; }

  static TPCORE_INLINE Mask first(Partial lanes) {
    return _mm256_castsi256_pd(first_wide_lanes(lanes.count));
  }
  TPCORE_INLINE double sum() const {
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }
  TPCORE_INLINE double maximum() const {
    const __m128d half = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_max_sd(half, _mm_unpackhi_pd(half, half)));
  }
};

TPCORE_INLINE Vec<float> operator+(Vec<float> a, Vec<float> b) { return _mm256_add_ps(a.v, b.v); }
TPCORE_INLINE Vec<float> operator-(Vec<float> a, Vec<float> b) { return _mm256_sub_ps(a.v, b.v); }
TPCORE_INLINE Vec<float> operator*(Vec<float> a, Vec<float> b) { return _mm256_mul_ps(a.v, b.v); }
TPCORE_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm256_fmadd_ps(a.v, b.v, c.v);
}
TPCORE_INLINE Vec<double> operator+(Vec<double> a, Vec<double> b) {
  return _mm256_add_pd(a.v, b.v);
}
TPCORE_INLINE Vec<double> operator-(Vec<double> a, Vec<double> b) {
  return _mm256_sub_pd(a.v, b.v);
}
TPCORE_INLINE Vec<double> operator*(Vec<double> a, Vec<double> b) {
  return _mm256_mul_pd(a.v, b.v);
}
TPCORE_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm256_fmadd_pd(a.v, b.v, c.v);
}

TPCORE_INLINE Vec<float> operator/(Vec<float> a, Vec<float> b) { return _mm256_div_ps(a.v, b.v); }
TPCORE_INLINE Vec<double> operator/(Vec<double> a, Vec<double> b) {
  return _mm256_div_pd(a.v, b.v);
}
// The larger or smaller number; b where either is NaN.
TPCORE_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a.v, b.v); }
TPCORE_INLINE Vec<float> smaller(Vec<float> a, Vec<float> b) { return _mm256_min_ps(a.v, b.v); }
TPCORE_INLINE Vec<double> larger(Vec<double> a, Vec<double> b) { return _mm256_max_pd(a.v, b.v); }
TPCORE_INLINE Vec<double> smaller(Vec<double> a, Vec<double> b) { return _mm256_min_pd(a.v, b.v); }
TPCORE_INLINE __m256 less(Vec<float> a, Vec<float> b) {
  return _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ);
}
TPCORE_INLINE Vec<float> select(__m256 mask, Vec<float> yes, Vec<float> no) {
  return _mm256_blendv_ps(no.v, yes.v, mask);
}
TPCORE_INLINE Vec<double> select(__m256d mask, Vec<double> yes, Vec<double> no) {
  return _mm256_blendv_pd(no.v, yes.v, mask);
}
TPCORE_INLINE Vec<float> square_root(Vec<float> a) { return _mm256_sqrt_ps(a.v); }
TPCORE_INLINE Vec<double> square_root(Vec<double> a) { return _mm256_sqrt_pd(a.v); }
TPCORE_INLINE Vec<float> absolute(Vec<float> a) {
  return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v);
}
TPCORE_INLINE __m256d less(Vec<double> a, Vec<double> b) {
  return _mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ);
}
TPCORE_INLINE Vec<double> absolute(Vec<double> a) {
  return _mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v);
}
TPCORE_INLINE Vec<float> negated(Vec<float> a) { return _mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f)); }
TPCORE_INLINE Vec<double> negated(Vec<double> a) {
  return _mm256_xor_pd(a.v, _mm256_set1_pd(-0.0));
}
TPCORE_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm256_fmadd_ps(a.v, b.v, c.v);
}
TPCORE_INLINE Vec<float> fused_minus(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm256_fmsub_ps(a.v, b.v, c.v);
}
// 2^(k - 127) for 0 < k < 255 in the lowest bits of a, 0 for k = 0.
TPCORE_INLINE Vec<float> power_of_two(Vec<float> a) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23));
}
TPCORE_INLINE Vec<float> nearest_integer(Vec<float> a) {
  return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a * 2^n for an integral -252 <= n <= 254: in two steps, so that each power is a normal number.
TPCORE_INLINE Vec<float> scale_by_power(Vec<float> a, Vec<float> n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  const __m256 scaled = _mm256_mul_ps(a.v, _mm256_castsi256_ps(first));
  return _mm256_mul_ps(scaled, _mm256_castsi256_ps(second));
}
// (a0, b0, a1, b1, ..): the first half to a, the second to b.
TPCORE_INLINE void interleave(Vec<float>& a, Vec<float>& b) {
  const __m256 low = _mm256_unpacklo_ps(a.v, b.v), high = _mm256_unpackhi_ps(a.v, b.v);
  a = _mm256_permute2f128_ps(low, high, 0x20);
  b = _mm256_permute2f128_ps(low, high, 0x31);
}
TPCORE_INLINE void interleave(Vec<double>& a, Vec<double>& b) {
  const __m256d low = _mm256_unpacklo_pd(a.v, b.v), high = _mm256_unpackhi_pd(a.v, b.v);
  a = _mm256_permute2f128_pd(low, high, 0x20);
  b = _mm256_permute2f128_pd(low, high, 0x31);
}

// Which quarter of its octave each lane of w lies in, for tables with a column for each quarter of
// two octaves: the number is the low bit of the exponent and the high bits of the mantissa.
struct Piece {
  __m256i number;
  Vec<float> middle;

  TPCORE_INLINE Vec<float> entry(const float (&row)[8]) const {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(row), number);
  }
};
TPCORE_INLINE Piece piece_of(Vec<float> w) {
  const __m256i bits = _mm256_castps_si256(w.v);
  const __m256i left = _mm256_and_si256(bits, _mm256_set1_epi32(~0x1fffff));
  const __m256i middle = _mm256_or_si256(left, _mm256_set1_epi32(0x100000));
  return {_mm256_srli_epi32(bits, 21), _mm256_castsi256_ps(middle)};
}

struct U64 {
  static constexpr int64_t size = 4;
  __m256i v;

  TPCORE_INLINE U64() : v(_mm256_setzero_si256()) {}
  TPCORE_INLINE U64(__m256i raw) : v(raw) {}
  TPCORE_INLINE explicit U64(uint64_t value)
      : v(_mm256_set1_epi64x(static_cast<long long>(value))) {}
  static TPCORE_INLINE U64 iota(uint64_t first) {
    return _mm256_add_epi64(U64(first).v, _mm256_setr_epi64x(0, 1, 2, 3));
  }

  template <int N>
  TPCORE_INLINE U64 shift_right() const {
    return _mm256_srli_epi64(v, N);
  }
};

TPCORE_INLINE U64 operator^(U64 a, U64 b) { return _mm256_xor_si256(a.v, b.v); }
TPCORE_INLINE U64 xor3(U64 a, U64 b, U64 c) {
  return _mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v);
}
// The 64-bit products of the low words; high words are ignored.
TPCORE_INLINE U64 multiply_low_words(U64 a, U64 b) { return _mm256_mul_epu32(a.v, b.v); }

// Four bits for each lane, from the lowest: whether the low word of a, b, c, d is at least the
// threshold. With the sign bits turned, unsigned words compare as signed ones do.
TPCORE_INLINE void store_at_least(U64 a, U64 b, U64 c, U64 d, uint32_t threshold, uint8_t* p) {
  const __m256i turn = _mm256_set1_epi32(INT32_MIN);
  const __m256i limit = _mm256_set1_epi32(static_cast<int>(threshold ^ 0x80000000u));
  const auto below = [&](__m256i words) TPCORE_INLINE_LAMBDA {
    return _mm256_cmpgt_epi32(limit, _mm256_xor_si256(words, turn));
  };
  const __m256i ab = below(_mm256_blend_epi32(a.v, _mm256_slli_epi64(b.v, 32), 0xaa));
  const __m256i cd = below(_mm256_blend_epi32(c.v, _mm256_slli_epi64(d.v, 32), 0xaa));
  // Lanes 0 and 2, then lanes 1 and 3, a nibble each.
  const int even = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_unpacklo_epi64(ab, cd)));
  const int odd = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_unpackhi_epi64(ab, cd)));
  p[0] = static_cast<uint8_t>(~((even & 0x0f) | (odd & 0x0f) << 4));
  p[1] = static_cast<uint8_t>(~(even >> 4 | (odd & 0xf0)));
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
