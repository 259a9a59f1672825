// SPDX-License-Identifier: Apache-2.0
// Scalar math shared by host and device. Nothing here depends on torch.
//
// Every function has internal linkage on purpose: this header is compiled once per instruction set,
// and a weak symbol would let the linker put an AVX-512 body where a machine without AVX-512 calls
// it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define TPCORE_FUNCTION static __host__ __device__ __forceinline__
#define TPCORE_TABLE static __device__ const float
#else
#define TPCORE_FUNCTION static inline __attribute__((always_inline, unused))
#define TPCORE_TABLE static const float
#endif

#include "tpcore/normal_table.h"

namespace tpcore {

// --- Bits ---

TPCORE_FUNCTION uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

TPCORE_FUNCTION float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// bfloat16 is the upper half of a float32. Rounds to nearest, ties to even, by integer arithmetic:
// bit-equal on every instruction set, denormals included. Any NaN becomes the quiet NaN 0x7fc0.
TPCORE_FUNCTION uint16_t bfloat16_bits(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

TPCORE_FUNCTION float float_from_bfloat16(uint16_t bits) {
  return float_from_bits(static_cast<uint32_t>(bits) << 16);
}

// IEEE half precision, round to nearest even, as the F16C and NEON instructions do it.
TPCORE_FUNCTION uint16_t float16_bits(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {  // NaN: keep the upper payload, make it quiet
    return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x1ffu));
  }
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the rounded mantissa in the low bits of the sum.
    const float shifted = float_from_bits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

TPCORE_FUNCTION float float_from_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity, NaN (made quiet)
    const uint32_t payload = (magnitude & 0x3ffu) << 13;
    return float_from_bits(sign | 0x7f800000u | payload | (payload != 0 ? 0x400000u : 0u));
  }
  if (magnitude < 0x400u) {  // zero, subnormal: the integer value times 2^-24, exactly
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return float_from_bits(sign | float_bits(value));
  }
  return float_from_bits(sign | ((magnitude << 13) + 0x38000000u));
}

// --- Exponential ---
// x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts, the upper one of so few bits that n times
// it is exact. e^r = 1 + r + r^2 P(r), P minimax in relative error (3e-9).

constexpr float kExpMin = -104.0f, kExpMax = 89.0f;  // beyond, the result is 0 or infinity
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194442e-4f;
constexpr float kExp[5] = {0.49999994f, 0.166665211f, 0.0416683890f, 0.00836874545f,
                           0.00138145406f};

// kExp[i] + r kExp[i + 1] + .. up to `terms`; the table is read when this is compiled.
template <int i, int terms, class V>
TPCORE_FUNCTION V exponential_series(V r) {
  constexpr float coefficient = kExp[i];
  if constexpr (i + 1 == terms) {
    return V(coefficient);
  } else {
    return multiply_add(exponential_series<i + 1, terms>(r), r, V(coefficient));
  }
}

// e^r - 1 for |r| <= ln 2 / 2.
template <int terms, class V>
TPCORE_FUNCTION V exponential_minus_one(V r) {
  return multiply_add(exponential_series<0, terms>(r), r * r, r);
}

// --- GeLU ---
// Written once, for V: a vector of float32 of an instruction set (csrc/cpu/simd.h), or one lane of
// CUDA (csrc/cuda/common.cuh). V has + - * /, and these functions:
//   multiply_add(a, b, c)                 a b + c, rounded once where that costs nothing
//   fused(a, b, c)                        a b + c, rounded once
//   fused_minus(a, b, c)                  a b - c, rounded once
//   absolute, smaller, larger, less, select
//   power_of_two(a)                       2^(k - 127), where k < 255 are the low bits of a; 0 for 0
//   piece_of(w)                           which quarter of its octave w lies in: `middle` of the
//                                         quarter, entry(row) of a table for it
// Of the results that are normal numbers, those for Single lie within 2 units in the last place.

constexpr double kSqrtHalf = 0.70710678118654752;
constexpr double kOldErfScale = 1.41421356237309505 / 1.41421;  // NeMo's sqrt(2)
constexpr double kGeluTanhScale = 0.79788456080286536;          // sqrt(2 / pi)
constexpr double kGeluTanhCubic = 0.044715;

// What the result is for: float32, or a type of half the size, for which shorter polynomials are as
// good (relative error 1e-4, an eighth of a unit of float16).
struct Single {
  static constexpr bool single = true;
  static constexpr int exponential_terms = 5;
};
struct Half {
  static constexpr bool single = false;
  static constexpr int exponential_terms = 3;
};

// Added to a number, it leaves the nearest integer in the low bits of the sum.
constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23

// The integers n closest to x log2(e); `shifted` has n + 127 + shift in its low bits.
template <class V>
struct Octave {
  V shifted, n;
};
template <int shift, class V>
TPCORE_FUNCTION Octave<V> octave_of(V x) {
  const V to_integer(kToInteger + 127 + shift);
  const V shifted = multiply_add(x, V(kLog2E), to_integer);
  return {shifted, shifted - to_integer};
}

// By how much 2^n is made larger where n itself may be too small for a normal number.
constexpr int kTailShift = 4;
constexpr float kTailScale = 0.0625f;  // 2^-kTailShift

// The polynomial of a piece of a table, from row `first` on.
template <int first, int rows, class Piece, class V>
TPCORE_FUNCTION V polynomial(const float (&table)[rows][8], const Piece& piece, V x) {
  V sum = piece.entry(table[rows - 1]);
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int i = rows - 2; i >= first; --i) sum = multiply_add(sum, x, piece.entry(table[i]));
  return sum;
}

// The piece of normal_table.h for t >= 0, and the distance from its middle.
template <class V>
TPCORE_FUNCTION auto piece_of_tail(V t, V* offset) {
  const auto piece = piece_of(multiply_add(t, V(1 / 1.125f), V(4.0f)));
  *offset = multiply_add(piece.middle - V(4.0f), V(-1.125f), t);
  return piece;
}

// z Phi(s) = max(z, 0) - |z| Phi(-|s|), where t = |s|, in which `rest` = s * (exact s - s) was
// lost, and size = |z|. The tail Phi(-t) = e^(log Q(t) - t^2 / 2) takes one exponential, whose
// argument is put together from exact parts, and is never rounded itself.
template <class Precision, class V>
TPCORE_FUNCTION V gelu_by_tail(V z, V size, V t, V rest) {
  // There the power is 0. The first argument is the limit: a NaN passes through.
  t = smaller(V(13.2f), t);
  size = smaller(V(13.2f), size);
  V offset;
  const auto piece = piece_of_tail(t, &offset);
  const V half(-0.5f), square = t * t;
  V r, power;
  if constexpr (Precision::single) {
    const V upper = piece.entry(kLogTail[0]);
    const V lower = fused(polynomial<2>(kLogTail, piece, offset), offset, piece.entry(kLogTail[1]));
    const Octave<V> octave = octave_of<kTailShift>(multiply_add(square, half, upper + lower));
    power = power_of_two(octave.shifted);
    const V exact = multiply_add(square, half, multiply_add(octave.n, V(-kLn2High), upper));
    const V lost = multiply_add(fused_minus(t, t, square), half, V() - rest);
    r = exact + (multiply_add(octave.n, V(-kLn2Low), lower) + lost);
  } else {
    const V exponent = multiply_add(square, half, polynomial<0>(kLogTailHalf, piece, offset));
    const Octave<V> octave = octave_of<kTailShift>(exponent);
    power = power_of_two(octave.shifted);
    r = multiply_add(octave.n, V(-kLn2High - kLn2Low), exponent);
  }
  const V e = exponential_minus_one<Precision::exponential_terms>(r);
  const V part = size * power * V(-kTailScale);
  return fused(part, e, larger(V(), z) + part);
}

template <class Precision, class V>
TPCORE_FUNCTION V gelu_erf(V z) {
  const V size = absolute(z);
  return gelu_by_tail<Precision>(z, size, size, V());
}

// z Phi(c z). c z is taken in two parts: its rounding would be magnified.
template <class Precision, class V>
TPCORE_FUNCTION V gelu_old_erf(V z) {
  const V excess(static_cast<float>(kOldErfScale - 1));
  const V size = absolute(z), near = smaller(V(16.0f), size);  // infinity has no two parts
  const V scaled = fused(near, excess, near);
  return gelu_by_tail<Precision>(z, size, scaled, scaled * fused(near, excess, near - scaled));
}

// Phi(s) + s phi(s), the derivative of s Phi(s), within 2e-7.
template <class Precision, class V>
TPCORE_FUNCTION V gelu_erf_slope(V s) {
  const V t = smaller(V(13.46f), absolute(s));  // there the power is 0
  V offset;
  const auto piece = piece_of_tail(t, &offset);
  const V half(-0.5f), square = t * t;
  V r, power, ratio;
  const Octave<V> octave = octave_of<kTailShift>(square * half);
  power = power_of_two(octave.shifted);
  r = multiply_add(square, half, octave.n * V(-kLn2High));
  r = multiply_add(octave.n, V(-kLn2Low), r);
  if constexpr (Precision::single) {
    r = multiply_add(fused_minus(t, t, square), half, r);
    ratio = polynomial<0>(kSlope, piece, offset);
  } else {
    ratio = polynomial<0>(kSlopeHalf, piece, offset);
  }
  const V e = exponential_minus_one<Precision::exponential_terms>(r);
  const V part = ratio * (power * V(kTailScale));
  const V lower = multiply_add(part, e, part);
  return select(less(s, V()), lower, V(1.0f) - lower);
}

// z / (1 + e^x) with x = -2 u = z (a + b z^2), where a + b z^2, and x, are known in two parts: e^x
// magnifies the absolute error of x, which reaches 90. The upper part of a is short, so that its
// difference from the sum is exact.
constexpr double kTanhLinear = -2 * kGeluTanhScale, kTanhCubic = kTanhLinear * kGeluTanhCubic;
constexpr float kTanhLinearHigh = -1.59375f;
constexpr float kTanhLinearLow = static_cast<float>(kTanhLinear - kTanhLinearHigh);
constexpr float kTanhCubicHigh = static_cast<float>(kTanhCubic);
constexpr float kTanhCubicLow = static_cast<float>(kTanhCubic - kTanhCubicHigh);

template <class Precision, class V>
TPCORE_FUNCTION V gelu_tanh(V z) {
  const V end(-10.105f);  // the quotient is no normal number beyond; the power still is
  const V near = smaller(V(9.0f), larger(end, z)), square = near * near;
  V r, power;
  if constexpr (Precision::single) {
    const V high(kTanhLinearHigh), slope = fused(square, V(kTanhCubicHigh), high);
    V low = multiply_add(square, V(kTanhCubicLow), V(kTanhLinearLow));
    low = multiply_add(fused_minus(near, near, square), V(kTanhCubicHigh), low);
    low = fused(square, V(kTanhCubicHigh), high - slope) + low;
    const V x = near * slope;
    const Octave<V> octave = octave_of<-2>(x);
    power = power_of_two(octave.shifted);
    low = multiply_add(near, low, fused_minus(near, slope, x));
    r = multiply_add(octave.n, V(-kLn2High), x) + multiply_add(octave.n, V(-kLn2Low), low);
  } else {
    const V x = near * multiply_add(square, V(kTanhCubicHigh), V(static_cast<float>(kTanhLinear)));
    const Octave<V> octave = octave_of<-2>(x);
    power = power_of_two(octave.shifted);
    r = multiply_add(octave.n, V(-kLn2High - kLn2Low), x);
  }
  const V e = exponential_minus_one<Precision::exponential_terms>(r);
  // A quarter of both, since 1 + e^x alone could overflow where the quotient is a normal number.
  // What their sum loses at e^x = 2^24 would be half a unit.
  const V quarter(0.25f), sum = power + quarter, lost = (power - sum) + quarter;
  const V denominator = fused(power, e, lost) + sum;
  return select(less(z, end), V(), z * quarter) / denominator;
}

// Its derivative within 2e-7: the gate g = 1 / (1 + e^x) and z g' = -z x' g (1 - g), by the
// exponential that is at most 1.
template <class Precision, class V>
TPCORE_FUNCTION V gelu_tanh_slope(V z) {
  const V end(10.14f);  // there the power is 0
  const V size = smaller(end, absolute(z)), square = size * size;
  const V linear(static_cast<float>(kTanhLinear)), one(1.0f);
  const V x = size * multiply_add(square, V(kTanhCubicHigh), linear);
  const V slope = size * multiply_add(square, V(3 * kTanhCubicHigh), linear);
  const Octave<V> octave = octave_of<kTailShift>(x);
  V r = multiply_add(octave.n, V(-kLn2High), x);
  r = multiply_add(octave.n, V(-kLn2Low), r);
  const V e = exponential_minus_one<Precision::exponential_terms>(r);
  const V part = power_of_two(octave.shifted) * V(kTailScale);
  const V power = multiply_add(part, e, part);
  const V upper = one / (one + power), lower = power * upper;
  // For z < 0: lower + |z| x' lower upper, and 1 minus that for z > 0.
  const V below = multiply_add(slope * lower, upper, lower);
  return select(less(z, V()), below, one - below);
}

// --- Philox4x32-10 ---
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// counter: four words in, four random words out.
TPCORE_FUNCTION void philox4x32(uint32_t counter[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * counter[0];
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * counter[2];
    counter[0] = static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0;
    counter[2] = static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1;
    counter[1] = static_cast<uint32_t>(product1);
    counter[3] = static_cast<uint32_t>(product0);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

}  // namespace tpcore
