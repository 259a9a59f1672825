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
#else
#define TPCORE_FUNCTION static inline __attribute__((always_inline, unused))
#endif

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

// --- Normal distribution, for GeLU ---
// Phi(-t) = exp(-t^2 / 2) R(u) for t >= 0, with u = 1 / (1 + 0.4 t): the tail keeps its relative
// accuracy, and one exponential serves Phi and its density. R(u) = u (c0 + c1 u + ..), minimax in
// relative error for 0 <= t <= 15 (6e-9).

constexpr float kNormalTailSlope = 0.4f;
constexpr float kNormalTail[11] = {0.159570774f,  0.15976251f,   0.131627028f,   0.100832775f,
                                   -0.063958345f, 0.214165362f,  -0.534278282f,  0.560709291f,
                                   -0.302307958f, 0.0827520654f, -0.00887521682f};
constexpr float kNormalDensity = 0.398942280f;  // 1 / sqrt(2 pi)

constexpr double kSqrtHalf = 0.70710678118654752;
constexpr double kOldErfScale = 1.41421356237309505 / 1.41421;  // NeMo's sqrt(2)
constexpr double kGeluTanhScale = 0.79788456080286536;          // sqrt(2 / pi)
constexpr double kGeluTanhCubic = 0.044715;

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
