// SPDX-License-Identifier: Apache-2.0
// Sixteen-byte vectors in the compiler's own vector extension: SSE2 on any x86-64, NEON on any
// aarch64, and correct scalar code anywhere else. Included by simd.h only.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace tpcore {
namespace TPCORE_ISA {

typedef float F32x4 __attribute__((vector_size(16)));
typedef double F64x2 __attribute__((vector_size(16)));
typedef uint32_t U32x4 __attribute__((vector_size(16)));
typedef int32_t I32x4 __attribute__((vector_size(16)));
typedef int64_t I64x2 __attribute__((vector_size(16)));
typedef uint64_t U64x2 __attribute__((vector_size(16)));
typedef uint8_t U8x4 __attribute__((vector_size(4)));
typedef uint16_t U16x4 __attribute__((vector_size(8)));

template <>
struct Vec<float> {
  static constexpr int64_t size = 4;
  F32x4 v;

  TPCORE_INLINE Vec() : v{0, 0, 0, 0} {}
  TPCORE_INLINE Vec(F32x4 raw) : v(raw) {}
  TPCORE_INLINE explicit Vec(float value) : v{value, value, value, value} {}

  template <class T>
  static TPCORE_INLINE Vec load(const T* p, Full) {
    return unpack(p, 4);
  }
  template <class T>
  static TPCORE_INLINE Vec load(const T* p, Partial lanes) {
    return unpack(p, lanes.count);
  }
  template <class T>
  TPCORE_INLINE void store(T* p, Full) const {
    pack(p, 4);
  }
  template <class T>
  TPCORE_INLINE void store(T* p, Partial lanes) const {
    pack(p, lanes.count);
  }

  using Mask = I32x4;
  // Lanes whose byte is not zero.
  static TPCORE_INLINE Mask nonzero(const uint8_t* p, Full) { return nonzero(p, Partial{size}); }
  static TPCORE_INLINE Mask nonzero(const uint8_t* p, Partial lanes) {
    U8x4 bytes{0, 0, 0, 0};
    memcpy(&bytes, p, static_cast<size_t>(lanes.count));
    return __builtin_convertvector(bytes, I32x4) != 0;
  }

  // Lanes i + [0, size) of a row of bits, i a multiple of size; no byte past the last lane is read.
  template <class Lanes>
  static TPCORE_INLINE Mask bits(const uint8_t* p, int64_t i, Lanes) {
    const int32_t byte = p[i / 8] >> i % 8;
    return (I32x4{byte, byte, byte, byte} & I32x4{1, 2, 4, 8}) != 0;
  }
  TPCORE_INLINE Mask sign_bits() const { return (I32x4)v < 0; }

  static TPCORE_INLINE Mask first(Partial lanes) {
    const int32_t count = static_cast<int32_t>(lanes.count);
    return I32x4{0, 1, 2, 3} < I32x4{count, count, count, count};
  }

  TPCORE_INLINE float sum() const { return (v[0] + v[1]) + (v[2] + v[3]); }
  TPCORE_INLINE float maximum() const {
    const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
  }

 private:
  static TPCORE_INLINE Vec unpack(const float* p, int64_t count) {
    F32x4 raw{0, 0, 0, 0};
    memcpy(&raw, p, static_cast<size_t>(count) * sizeof(float));
    return raw;
  }
  static TPCORE_INLINE Vec unpack(const BFloat16* p, int64_t count) {
    U16x4 raw{0, 0, 0, 0};
    memcpy(&raw, p, static_cast<size_t>(count) * sizeof(BFloat16));
    const U32x4 bits = __builtin_convertvector(raw, U32x4) << 16;
    return (F32x4)bits;
  }
  static TPCORE_INLINE Vec unpack(const Float16* p, int64_t count) {
    F32x4 raw{0, 0, 0, 0};
    for (int64_t i = 0; i < count; ++i) raw[i] = float_from_float16(p[i].bits);
    return raw;
  }
  TPCORE_INLINE void pack(float* p, int64_t count) const {
    memcpy(p, &v, static_cast<size_t>(count) * sizeof(float));
  }
  TPCORE_INLINE void pack(BFloat16* p, int64_t count) const {
    const U32x4 bits = (U32x4)v;
    const U32x4 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const U32x4 keep = (U32x4)(v == v);
    const U16x4 raw = __builtin_convertvector((rounded & keep) | (0x7fc0u & ~keep), U16x4);
    memcpy(p, &raw, static_cast<size_t>(count) * sizeof(BFloat16));
  }
  TPCORE_INLINE void pack(Float16* p, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) p[i].bits = float16_bits(v[i]);
  }
};

template <>
struct Vec<double> {
  static constexpr int64_t size = 2;
  F64x2 v;

  TPCORE_INLINE Vec() : v{0, 0} {}
  TPCORE_INLINE Vec(F64x2 raw) : v(raw) {}
  TPCORE_INLINE explicit Vec(double value) : v{value, value} {}

  static TPCORE_INLINE Vec load(const double* p, Full) {
    F64x2 raw;
    memcpy(&raw, p, sizeof raw);
    return raw;
  }
  static TPCORE_INLINE Vec load(const double* p, Partial) { return F64x2{p[0], 0}; }
  TPCORE_INLINE void store(double* p, Full) const { memcpy(p, &v, sizeof v); }
  TPCORE_INLINE void store(double* p, Partial) const { p[0] = v[0]; }

  using Mask = I64x2;
  static TPCORE_INLINE Mask nonzero(const uint8_t* p, Full) { return -I64x2{p[0] != 0, p[1] != 0}; }
  static TPCORE_INLINE Mask nonzero(const uint8_t* p, Partial) { return -I64x2{p[0] != 0, 0}; }

  template <class Lanes>
  static TPCORE_INLINE Mask bits(const uint8_t* p, int64_t i, Lanes) {
    const int byte = p[i / 8] >> i % 8;
    return -I64x2{byte & 1, byte >> 1 & 1};
  }
  TPCORE_INLINE Mask sign_bits() const { return (I64x2)v < 0; }

  static TPCORE_INLINE Mask first(Partial) { return I64x2{-1, 0}; }

  TPCORE_INLINE double sum() const { return v[0] + v[1]; }
  TPCORE_INLINE double maximum() const { return v[0] > v[1] ? v[0] : v[1]; }
};

template <class A>
TPCORE_INLINE Vec<A> operator+(Vec<A> a, Vec<A> b) {
  return Vec<A>(a.v + b.v);
}
template <class A>
TPCORE_INLINE Vec<A> operator-(Vec<A> a, Vec<A> b) {
  return Vec<A>(a.v - b.v);
}
template <class A>
TPCORE_INLINE Vec<A> operator*(Vec<A> a, Vec<A> b) {
  return Vec<A>(a.v * b.v);
}
// a * b + c, fused where the machine can.
#if defined(__ARM_NEON)
TPCORE_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (F32x4)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v);
}
TPCORE_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (F64x2)vfmaq_f64((float64x2_t)c.v, (float64x2_t)a.v, (float64x2_t)b.v);
}
#else
template <class A>
TPCORE_INLINE Vec<A> multiply_add(Vec<A> a, Vec<A> b, Vec<A> c) {
  return Vec<A>(a.v * b.v + c.v);
}
#endif

template <class A>
TPCORE_INLINE Vec<A> operator/(Vec<A> a, Vec<A> b) {
  return Vec<A>(a.v / b.v);
}
template <class A>
TPCORE_INLINE Vec<A> select(typename Vec<A>::Mask mask, Vec<A> yes, Vec<A> no) {
  return Vec<A>(mask ? yes.v : no.v);
}
// The larger or smaller number; b where either is NaN.
template <class A>
TPCORE_INLINE Vec<A> larger(Vec<A> a, Vec<A> b) {
  return Vec<A>(a.v > b.v ? a.v : b.v);
}
template <class A>
TPCORE_INLINE Vec<A> smaller(Vec<A> a, Vec<A> b) {
  return Vec<A>(a.v < b.v ? a.v : b.v);
}
template <class A>
TPCORE_INLINE typename Vec<A>::Mask less(Vec<A> a, Vec<A> b) {
  return a.v < b.v;
}
TPCORE_INLINE Vec<float> square_root(Vec<float> a) {
  return F32x4{square_root(a.v[0]), square_root(a.v[1]), square_root(a.v[2]), square_root(a.v[3])};
}
TPCORE_INLINE Vec<double> square_root(Vec<double> a) {
  return F64x2{square_root(a.v[0]), square_root(a.v[1])};
}
TPCORE_INLINE Vec<float> absolute(Vec<float> a) { return (F32x4)((U32x4)a.v & 0x7fffffffu); }
TPCORE_INLINE Vec<double> absolute(Vec<double> a) {
  return (F64x2)((U64x2)a.v & 0x7fffffffffffffffu);
}
template <class A>
TPCORE_INLINE Vec<A> negated(Vec<A> a) {
  return Vec<A>(-a.v);
}
// a * b + c, rounded once. Without such an instruction in float64, where the product is exact.
#if defined(__ARM_NEON)
TPCORE_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
  return multiply_add(a, b, c);
}
#else
typedef double F64x4 __attribute__((vector_size(32)));
TPCORE_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
  const F64x4 exact = __builtin_convertvector(a.v, F64x4) * __builtin_convertvector(b.v, F64x4) +
                      __builtin_convertvector(c.v, F64x4);
  return __builtin_convertvector(exact, F32x4);
}
#endif
TPCORE_INLINE Vec<float> fused_minus(Vec<float> a, Vec<float> b, Vec<float> c) {
  return fused(a, b, negated(c));
}
// 2^(k - 127) for 0 < k < 255 in the lowest bits of a, 0 for k = 0.
TPCORE_INLINE Vec<float> power_of_two(Vec<float> a) { return (F32x4)((U32x4)a.v << 23); }
// Adding 1.5 * 2^23 leaves no bits for a fraction; right for |a| < 2^22.
TPCORE_INLINE Vec<float> nearest_integer(Vec<float> a) {
  const F32x4 magic = Vec<float>(12582912.0f).v;
  return (a.v + magic) - magic;
}
// a * 2^n for an integral -252 <= n <= 254: in two steps, so that each power is a normal number.
TPCORE_INLINE Vec<float> scale_by_power(Vec<float> a, Vec<float> n) {
  const I32x4 whole = __builtin_convertvector(n.v, I32x4);
  const I32x4 half = whole >> 1;
  const I32x4 first = (half + 127) << 23, second = (whole - half + 127) << 23;
  return a.v * (F32x4)first * (F32x4)second;
}
// (a0, b0, a1, b1, ..): the first half to a, the second to b.
TPCORE_INLINE void interleave(Vec<float>& a, Vec<float>& b) {
  const F32x4 first{a.v[0], b.v[0], a.v[1], b.v[1]};
  b = F32x4{a.v[2], b.v[2], a.v[3], b.v[3]};
  a = first;
}
TPCORE_INLINE void interleave(Vec<double>& a, Vec<double>& b) {
  const F64x2 first{a.v[0], b.v[0]};
  b = F64x2{a.v[1], b.v[1]};
  a = first;
}

// Which quarter of its octave each lane of w lies in, for tables with a column for each quarter of
// two octaves: the number is the low bit of the exponent and the high bits of the mantissa.
struct Piece {
#if defined(__ARM_NEON)
  uint8x16_t number;  // of bytes
#else
  U32x4 number;
#endif
  Vec<float> middle;

  TPCORE_INLINE Vec<float> entry(const float (&row)[8]) const {
#if defined(__ARM_NEON)
    return (F32x4)vqtbl2q_u8(vld1q_u8_x2(reinterpret_cast<const uint8_t*>(row)), number);
#else
    return F32x4{row[number[0]], row[number[1]], row[number[2]], row[number[3]]};
#endif
  }
};
TPCORE_INLINE Piece piece_of(Vec<float> w) {
  const U32x4 bits = (U32x4)w.v, number = bits >> 21 & 7u;
  const F32x4 middle = (F32x4)((bits & 0xffe00000u) | 0x100000u);
#if defined(__ARM_NEON)
  return {(uint8x16_t)(number * 0x04040404u + 0x03020100u), middle};
#else
  return {number, middle};
#endif
}

struct U64 {
  static constexpr int64_t size = 2;
  U64x2 v;

  TPCORE_INLINE U64() : v{0, 0} {}
  TPCORE_INLINE U64(U64x2 raw) : v(raw) {}
  TPCORE_INLINE explicit U64(uint64_t value) : v{value, value} {}
  static TPCORE_INLINE U64 iota(uint64_t first) { return U64x2{first, first + 1}; }

  template <int N>
  TPCORE_INLINE U64 shift_right() const {
    return v >> N;
  }
};

TPCORE_INLINE U64 operator^(U64 a, U64 b) { return a.v ^ b.v; }
TPCORE_INLINE U64 xor3(U64 a, U64 b, U64 c) { return a.v ^ b.v ^ c.v; }

// The 64-bit products of the low words; high words are ignored.
TPCORE_INLINE U64 multiply_low_words(U64 a, U64 b) {
#if defined(__SSE2__)
  return reinterpret_cast<U64x2>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a.v), reinterpret_cast<__m128i>(b.v)));
#elif defined(__ARM_NEON)
  return reinterpret_cast<U64x2>(vmull_u32(vmovn_u64(reinterpret_cast<uint64x2_t>(a.v)),
                                           vmovn_u64(reinterpret_cast<uint64x2_t>(b.v))));
#else
  return (a.v & 0xffffffffu) * (b.v & 0xffffffffu);
#endif
}

// Four bits for each lane, from the lowest: whether the low word of a, b, c, d is at least the
// threshold. The sign of the difference says where it is not.
TPCORE_INLINE void store_at_least(U64 a, U64 b, U64 c, U64 d, uint32_t threshold, uint8_t* p) {
  const auto below = [&](U64 words) TPCORE_INLINE_LAMBDA {
    return ((words.v & 0xffffffffu) - threshold) >> 63;
  };
  const U64x2 nibbles = below(a) | below(b) << 1 | below(c) << 2 | below(d) << 3;
  *p = static_cast<uint8_t>(~(nibbles[0] | nibbles[1] << 4));
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
