// SPDX-License-Identifier: Apache-2.0
// The vector type of the CPU kernels. Each translation unit is compiled for one instruction set,
// named by the macro TPCORE_ISA, and everything in it lives in `namespace tpcore::TPCORE_ISA`:
// units for different instruction sets share no symbol, so none of them can be linked into a
// machine that lacks it.
//
//   Vec<float>, Vec<double>   arithmetic; load and store float32, bfloat16, float16, float64,
//                             converting on the way
//   U64                       64-bit lanes for Philox: each holds a 32-bit word and room for its
//                             product
//   Full, Partial{n}          how many lanes count: partial loads fill up with zeros, partial
//                             stores leave the rest of memory alone, `only` zeroes the lanes that
//                             do not count
#pragma once

#include <cstdint>
#include <cstring>

#include "tpcore/math.h"

#define TPCORE_INLINE inline __attribute__((always_inline))
#define TPCORE_INLINE_LAMBDA __attribute__((always_inline))

namespace tpcore {
namespace TPCORE_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

struct Full {};
struct Partial {
  int64_t count;  // 1 .. lanes - 1
};

template <class A>
struct Vec;

// Builtins, not <cmath>: an inline function of namespace std would be a symbol that units share.
TPCORE_INLINE float square_root(float value) { return __builtin_sqrtf(value); }
TPCORE_INLINE double square_root(double value) { return __builtin_sqrt(value); }

// The accumulation type of T.
template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};

}  // namespace TPCORE_ISA
}  // namespace tpcore

#if defined(TPCORE_ISA_AVX512)
#include "simd_avx512.h"
#elif defined(TPCORE_ISA_AVX2)
#include "simd_avx2.h"
#else
#include "simd_baseline.h"
#endif

namespace tpcore {
namespace TPCORE_ISA {

template <class A>
TPCORE_INLINE Vec<A> only(Vec<A> value, Full, Vec<A> = Vec<A>()) {
  return value;
}
template <class A>
TPCORE_INLINE Vec<A> only(Vec<A> value, Partial lanes, Vec<A> other = Vec<A>()) {
  return select(Vec<A>::first(lanes), value, other);
}

// Calls function(i, slot, lanes) for the vectors that cover [0, n): i is the first element, slot
// cycles through 0..3 so that four independent accumulators can hide the latency of an addition,
// lanes is Full{} or, at the end, Partial{n}.
template <class V, class Function>
TPCORE_INLINE void for_each_vector(int64_t n, const Function& function) {
  constexpr int64_t W = V::size;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    function(i, 0, Full{});
    function(i + W, 1, Full{});
    function(i + 2 * W, 2, Full{});
    function(i + 3 * W, 3, Full{});
  }
  for (; i + W <= n; i += W) function(i, 0, Full{});
  if (i < n) function(i, 0, Partial{n - i});
}

// Asks for the memory `ahead` elements after p. The hardware runs ahead of a loop by itself, but
// stops at the end of every page, and does not know that the next row follows the third reading of
// this one. Any address will do: nothing is read. Rows that fill the first-level cache are for the
// second.
constexpr int kFirstLevel = 3, kSecondLevel = 2;
template <int level = kFirstLevel, class T>
TPCORE_INLINE void prefetch(const T* p, int64_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) +
                                                   static_cast<uintptr_t>(ahead) * sizeof(T)),
                     0, level);
}

// The same, a fixed distance ahead, for loops whose arithmetic leaves no room to wait at the end of
// every page; to write, so that the store finds its line.
constexpr uintptr_t kPrefetchBytes = 2048;
TPCORE_INLINE void prefetch(const void* at) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(at) + kPrefetchBytes));
}
TPCORE_INLINE void prefetch_to_write(const void* at) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(at) + kPrefetchBytes), 1);
}

// A sum of products, in the four accumulators of for_each_vector. Where a product is rounded before
// it is added, float32 is summed in float64.
template <class V>
struct Dot {
  V parts[4];

  TPCORE_INLINE void add(int slot, V a, V b) { parts[slot] = multiply_add(a, b, parts[slot]); }
  TPCORE_INLINE auto sum() const { return ((parts[0] + parts[1]) + (parts[2] + parts[3])).sum(); }
};
#if !defined(TPCORE_ISA_AVX512) && !defined(TPCORE_ISA_AVX2) && !defined(__ARM_NEON)
template <>
struct Dot<Vec<float>> {
  F64x4 parts[4] = {};

  TPCORE_INLINE void add(int slot, Vec<float> a, Vec<float> b) {
    parts[slot] += __builtin_convertvector(a.v, F64x4) * __builtin_convertvector(b.v, F64x4);
  }
  TPCORE_INLINE float sum() const {
    const F64x4 all = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    return static_cast<float>((all[0] + all[1]) + (all[2] + all[3]));
  }
};
#endif

// What the four accumulators of for_each_vector come to.
template <class V>
TPCORE_INLINE V total(const V (&parts)[4]) {
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}
template <class V>
TPCORE_INLINE V largest(const V (&parts)[4]) {
  return larger(larger(parts[0], parts[1]), larger(parts[2], parts[3]));
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
