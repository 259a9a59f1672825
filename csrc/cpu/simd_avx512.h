// SPDX-License-Identifier: Apache-2.0
// AVX-512 F, BW, VL, DQ, and BMI2. Included by simd.h only.
#pragma once

#include <immintrin.h>

namespace tpcore {
namespace TPCORE_ISA {

TPCORE_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << count) - 1u);
}

template <>
struct Vec<float> {
  static constexpr int64_t size = 16;
  __m512 v;

  TPCORE_INLINE Vec() : v(_mm512_setzero_ps()) {}
  TPCORE_INLINE Vec(__m512 raw) : v(raw) {}
  TPCORE_INLINE explicit Vec(float value) : v(_mm512_set1_ps(value)) {}

  static TPCORE_INLINE Vec load(const float* p, Full) { return _mm512_loadu_ps(p); }
  static TPCORE_INLINE Vec load(const float* p, Partial lanes) {
    return _mm512_maskz_loadu_ps(first_lanes(lanes.count), p);
  }
  static TPCORE_INLINE Vec load(const BFloat16* p, Full) {
    return widen_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static TPCORE_INLINE Vec load(const BFloat16* p, Partial lanes) {
    return widen_bfloat16(_mm256_maskz_loadu_epi16(first_lanes(lanes.count), p));
  }
  static TPCORE_INLINE Vec load(const Float16* p, Full) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static TPCORE_INLINE Vec load(const Float16* p, Partial lanes) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(lanes.count), p));
  }

  TPCORE_INLINE void stream(float* p) const { _mm512_stream_ps(p, v); }
  TPCORE_INLINE void store(float* p, Full) const { _mm512_storeu_ps(p, v); }
  TPCORE_INLINE void store(float* p, Partial lanes) const {
    _mm512_mask_storeu_ps(p, first_lanes(lanes.count), v);
  }
  TPCORE_INLINE void store(BFloat16* p, Full) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bfloat16());
  }
  TPCORE_INLINE void store(BFloat16* p, Partial lanes) const {
    _mm256_mask_storeu_epi16(p, first_lanes(lanes.count), narrow_bfloat16());
  }
  TPCORE_INLINE void store(Float16* p, Full) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_float16());
  }
  TPCORE_INLINE void store(Float16* p, Partial lanes) const {
    _mm256_mask_storeu_epi16(p, first_lanes(lanes.count), narrow_float16());
  }

  using Mask = __mmask16;
  // Lanes whose byte is not zero.
  static TPCORE_INLINE Mask nonzero(const uint8_t* p, Full) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm_test_epi8_mask(bytes, bytes);
  }
  static TPCORE_INLINE Mask nonzero(const uint8_t* p, Partial lanes) {
    const __m128i bytes = _mm_maskz_loadu_epi8(first_lanes(lanes.count), p);
    return _mm_test_epi8_mask(bytes, bytes);
  }

  // Lanes i + [0, size) of a row of bits, i a multiple of size; no byte past the last lane is read.
  static TPCORE_INLINE Mask bits(const uint8_t* p, int64_t i, Full) {
    uint16_t word;
    memcpy(&word, p + i / 8, sizeof word);
    return word;
  }
  static TPCORE_INLINE Mask bits(const uint8_t* p, int64_t i, Partial lanes) {
    return lanes.count > 8 ? bits(p, i, Full{}) : p[i / 8];
  }
  TPCORE_INLINE Mask sign_bits() const { return _mm512_movepi32_mask(_mm512_castps_si512(v)); }

  static TPCORE_INLINE Mask first(Partial lanes) { return first_lanes(lanes.count); }
  TPCORE_INLINE float sum() const { return _mm512_reduce_add_ps(v); }
  TPCORE_INLINE float maximum() const { return _mm512_reduce_max_ps(v); }

 private:
  // Word i of the input to the upper half of lane i: one permutation of words does it, and another
  // one brings the upper halves back.
  static TPCORE_INLINE __m512 widen_bfloat16(__m256i words) {
    const __m512i upper =
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
                                                                  11, 12, 13, 14, 15)),
                          16);
    return _mm512_castsi512_ps(
        _mm512_maskz_permutexvar_epi16(0xaaaaaaaau, upper, _mm512_castsi256_si512(words)));
  }
  // By integer arithmetic: vcvtneps2bf16 would flush denormals.
  TPCORE_INLINE __m256i narrow_bfloat16() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    rounded = _mm512_mask_add_epi32(rounded, odd, rounded, _mm512_set1_epi32(1));
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    const __m512i upper = _mm512_castsi256_si512(
        _mm256_setr_epi16(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, rounded));
  }
  TPCORE_INLINE __m256i narrow_float16() const {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

template <>
struct Vec<double> {
  static constexpr int64_t size = 8;
  __m512d v;

  TPCORE_INLINE Vec() : v(_mm512_setzero_pd()) {}
  TPCORE_INLINE Vec(__m512d raw) : v(raw) {}
  TPCORE_INLINE explicit Vec(double value) : v(_mm512_set1_pd(value)) {}

  static TPCORE_INLINE Vec load(const double* p, Full) { return _mm512_loadu_pd(p); }
  static TPCORE_INLINE Vec load(const double* p, Partial lanes) {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(lanes.count)), p);
  }
  TPCORE_INLINE void store(double* p, Full) const { _mm512_storeu_pd(p, v); }
  TPCORE_INLINE void store(double* p, Partial lanes) const {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(lanes.count)), v);
  }

  using Mask = __mmask8;
  static TPCORE_INLINE Mask nonzero(const uint8_t* p, Full) { return nonzero(p, Partial{size}); }
  static TPCORE_INLINE Mask nonzero(const uint8_t* p, Partial lanes) {
    const __m128i bytes = _mm_maskz_loadu_epi8(first_lanes(lanes.count), p);
    return static_cast<Mask>(_mm_test_epi8_mask(bytes, bytes));
  }

  template <class Lanes>
  static TPCORE_INLINE Mask bits(const uint8_t* p, int64_t i, Lanes) {
    return p[i / 8];
  }
  TPCORE_INLINE Mask sign_bits() const { return _mm512_movepi64_mask(_mm512_castpd_si512(v)); }

  static TPCORE_INLINE Mask first(Partial lanes) {
    return static_cast<Mask>(first_lanes(lanes.count));
  }
  TPCORE_INLINE double sum() const { return _mm512_reduce_add_pd(v); }
  TPCORE_INLINE double maximum() const { return _mm512_reduce_max_pd(v); }
};

TPCORE_INLINE Vec<float> operator+(Vec<float> a, Vec<float> b) { return _mm512_add_ps(a.v, b.v); }
TPCORE_INLINE Vec<float> operator-(Vec<float> a, Vec<float> b) { return _mm512_sub_ps(a.v, b.v); }
TPCORE_INLINE Vec<float> operator*(Vec<float> a, Vec<float> b) { return _mm512_mul_ps(a.v, b.v); }
TPCORE_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm512_fmadd_ps(a.v, b.v, c.v);
}
TPCORE_INLINE Vec<double> operator+(Vec<double> a, Vec<double> b) {
  return _mm512_add_pd(a.v, b.v);
}
TPCORE_INLINE Vec<double> operator-(Vec<double> a, Vec<double> b) {
  return _mm512_sub_pd(a.v, b.v);
}
TPCORE_INLINE Vec<double> operator*(Vec<double> a, Vec<double> b) {
  return _mm512_mul_pd(a.v, b.v);
}
TPCORE_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm512_fmadd_pd(a.v, b.v, c.v);
}

TPCORE_INLINE Vec<float> operator/(Vec<float> a, Vec<float> b) { return _mm512_div_ps(a.v, b.v); }
TPCORE_INLINE Vec<double> operator/(Vec<double> a, Vec<double> b) {
  return _mm512_div_pd(a.v, b.v);
}
// The larger or smaller number; b where either is NaN.
TPCORE_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return _mm512_max_ps(a.v, b.v); }
TPCORE_INLINE Vec<float> smaller(Vec<float> a, Vec<float> b) { return _mm512_min_ps(a.v, b.v); }
TPCORE_INLINE Vec<double> larger(Vec<double> a, Vec<double> b) { return _mm512_max_pd(a.v, b.v); }
TPCORE_INLINE Vec<double> smaller(Vec<double> a, Vec<double> b) { return _mm512_min_pd(a.v, b.v); }
TPCORE_INLINE __mmask16 less(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ);
}
TPCORE_INLINE Vec<float> select(__mmask16 mask, Vec<float> yes, Vec<float> no) {
  return _mm512_mask_mov_ps(no.v, mask, yes.v);
}
TPCORE_INLINE Vec<double> select(__mmask8 mask, Vec<double> yes, Vec<double> no) {
  return _mm512_mask_mov_pd(no.v, mask, yes.v);
}
TPCORE_INLINE Vec<float> square_root(Vec<float> a) { return _mm512_sqrt_ps(a.v); }
TPCORE_INLINE Vec<double> square_root(Vec<double> a) { return _mm512_sqrt_pd(a.v); }
TPCORE_INLINE Vec<float> absolute(Vec<float> a) { return _mm512_abs_ps(a.v); }
TPCORE_INLINE __mmask8 less(Vec<double> a, Vec<double> b) {
  return _mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ);
}
TPCORE_INLINE Vec<double> absolute(Vec<double> a) { return _mm512_abs_pd(a.v); }
TPCORE_INLINE Vec<float> negated(Vec<float> a) { return _mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f)); }
TPCORE_INLINE Vec<double> negated(Vec<double> a) {
  return _mm512_xor_pd(a.v, _mm512_set1_pd(-0.0));
}
TPCORE_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm512_fmadd_ps(a.v, b.v, c.v);
}
TPCORE_INLINE Vec<float> fused_minus(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm512_fmsub_ps(a.v, b.v, c.v);
}
// 2^(k - 127) for 0 < k < 255 in the lowest bits of a, 0 for k = 0.
TPCORE_INLINE Vec<float> power_of_two(Vec<float> a) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23));
}
TPCORE_INLINE Vec<float> nearest_integer(Vec<float> a) {
  return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a * 2^n for an integral n, with one rounding.
TPCORE_INLINE Vec<float> scale_by_power(Vec<float> a, Vec<float> n) {
  return _mm512_scalef_ps(a.v, n.v);
}
// (a0, b0, a1, b1, ..): the first half to a, the second to b.
TPCORE_INLINE void interleave(Vec<float>& a, Vec<float>& b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 first = _mm512_permutex2var_ps(a.v, low, b.v);
  b = _mm512_permutex2var_ps(a.v, high, b.v);
  a = first;
}
TPCORE_INLINE void interleave(Vec<double>& a, Vec<double>& b) {
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i high = _mm512_add_epi64(low, _mm512_set1_epi64(4));
  const __m512d first = _mm512_permutex2var_pd(a.v, low, b.v);
  b = _mm512_permutex2var_pd(a.v, high, b.v);
  a = first;
}

// Which quarter of its octave each lane of w lies in, for tables with a column for each quarter of
// two octaves: the number is the low bit of the exponent and the high bits of the mantissa.
struct Piece {
  __m512i number;
  Vec<float> middle;

  // The row stands in the register twice, so that the bit above the number does not matter.
  TPCORE_INLINE Vec<float> entry(const float (&row)[8]) const {
    return _mm512_permutexvar_ps(number, _mm512_broadcast_f32x8(_mm256_loadu_ps(row)));
  }
};
TPCORE_INLINE Piece piece_of(Vec<float> w) {
  const __m512i bits = _mm512_castps_si512(w.v);
  const __m512i left = _mm512_and_si512(bits, _mm512_set1_epi32(~0x1fffff));
  const __m512i middle = _mm512_or_si512(left, _mm512_set1_epi32(0x100000));
  return {_mm512_srli_epi32(bits, 21), _mm512_castsi512_ps(middle)};
}

struct U64 {
  static constexpr int64_t size = 8;
  __m512i v;

  TPCORE_INLINE U64() : v(_mm512_setzero_si512()) {}
  TPCORE_INLINE U64(__m512i raw) : v(raw) {}
  TPCORE_INLINE explicit U64(uint64_t value)
      : v(_mm512_set1_epi64(static_cast<long long>(value))) {}
  static TPCORE_INLINE U64 iota(uint64_t first) {
    return _mm512_add_epi64(U64(first).v, _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  }

  template <int N>
  TPCORE_INLINE U64 shift_right() const {
    return _mm512_srli_epi64(v, N);
  }
};

TPCORE_INLINE U64 operator^(U64 a, U64 b) { return _mm512_xor_si512(a.v, b.v); }
TPCORE_INLINE U64 xor3(U64 a, U64 b, U64 c) {
  return _mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96);
}
// The 64-bit products of the low words; high words are ignored.
TPCORE_INLINE U64 multiply_low_words(U64 a, U64 b) { return _mm512_mul_epu32(a.v, b.v); }

// Four bits for each lane, from the lowest: whether the low word of a, b, c, d is at least the
// threshold. Two words share a lane for the comparison, whose bits are then spread.
TPCORE_INLINE void store_at_least(U64 a, U64 b, U64 c, U64 d, uint32_t threshold, uint8_t* p) {
  const __m512i limit = _mm512_set1_epi32(static_cast<int>(threshold));
  const __m512i ab = _mm512_mask_shuffle_epi32(a.v, 0xaaaa, b.v, _MM_PERM_CCAA);
  const __m512i cd = _mm512_mask_shuffle_epi32(c.v, 0xaaaa, d.v, _MM_PERM_CCAA);
  const uint32_t bits = _pdep_u32(_mm512_cmpge_epu32_mask(ab, limit), 0x33333333u) |
                        _pdep_u32(_mm512_cmpge_epu32_mask(cd, limit), 0xccccccccu);
  memcpy(p, &bits, sizeof bits);
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
