// SPDX-License-Identifier: Apache-2.0
// Elementary functions of vectors. Coefficients stand in tpcore/math.h. float64, which exists for
// checks of gradients, goes to the C library lane by lane.
#pragma once

#include <type_traits>

#include "normal_table.h"
#include "simd.h"

namespace tpcore {
namespace TPCORE_ISA {

// 2^n e^r for an integral n and |r| <= ln 2 / 2.
template <int terms>
TPCORE_INLINE Vec<float> exponential_of_parts(Vec<float> n, Vec<float> r) {
  using V = Vec<float>;
  V p(kExp[terms - 1]);
  for (int i = terms - 2; i >= 0; --i) p = multiply_add(p, r, V(kExp[i]));
  return scale_by_power(multiply_add(p, r * r, r) + V(1.0f), n);
}

// e^x within 1 unit in the last place, for any x: 0 and infinity beyond the range, NaN for NaN.
TPCORE_INLINE Vec<float> exponential(Vec<float> x) {
  using V = Vec<float>;
  x = smaller(V(kExpMax), larger(V(kExpMin), x));  // in this order a NaN passes through
  const V n = nearest_integer(x * V(kLog2E));
  return exponential_of_parts<5>(n, multiply_add(n, V(-kLn2Low), multiply_add(n, V(-kLn2High), x)));
}

template <class Function>
TPCORE_INLINE Vec<double> lane_by_lane(Vec<double> x, const Function& function) {
  double lanes[Vec<double>::size];
  x.store(lanes, Full{});
  for (double& lane : lanes) lane = function(lane);
  return Vec<double>::load(lanes, Full{});
}

TPCORE_INLINE Vec<double> exponential(Vec<double> x) {
  return lane_by_lane(x, [](double lane) { return __builtin_exp(lane); });
}

// The standard normal distribution: Phi(z) and its density.
template <class V>
struct Normal {
  V cdf, density;
};

// How many bits the result is for: float32, or a type of half the size, for which shorter
// polynomials are as good (relative error 1e-4, an eighth of a unit of float16).
struct Single {
  static constexpr int exponential_terms = 5, ratio_degree = 5;
};
struct Half {
  static constexpr int exponential_terms = 3, ratio_degree = 3;
};
template <class T>
using PrecisionOf = std::conditional_t<sizeof(T) == 2, Half, Single>;

// exp(-t^2 / 2) for 0 <= t < 15. The square's own rounding, which the exponential would magnify, is
// known exactly and joins the remainder.
template <class Precision>
TPCORE_INLINE Vec<float> half_square_exponential(Vec<float> t, Vec<float> square) {
  using V = Vec<float>;
  const V half(-0.5f);
  const V n = nearest_integer(square * V(-0.5f * kLog2E));
  V r = multiply_add(n, V(-kLn2High), square * half);
  if (std::is_same_v<Precision, Single>) {
    r = multiply_add(n, V(-kLn2Low), r);
    r = multiply_add(multiply_add(t, t, V() - square), half, r);
  }
  return exponential_of_parts<Precision::exponential_terms>(n, r);
}

#if defined(TPCORE_ISA_AVX512)
// Phi(-t) exp(t^2 / 2) for 0 <= t < 15.
template <class Precision>
TPCORE_INLINE Vec<float> normal_ratio(Vec<float> t) {
  const Interval32 interval(t + Vec<float>(1.0f));
  Vec<float> ratio = interval.entry(kNormalRatio[Precision::ratio_degree]);
  for (int i = Precision::ratio_degree - 1; i >= 0; --i) {
    ratio = multiply_add(ratio, interval.offset, interval.entry(kNormalRatio[i]));
  }
  return ratio;
}
#else
template <class Precision>
TPCORE_INLINE Vec<float> normal_ratio(Vec<float> t) {
  using V = Vec<float>;
  const V u = V(1.0f) / multiply_add(t, V(kNormalTailSlope), V(1.0f));
  V ratio(kNormalTail[10]);
  for (int i = 9; i >= 0; --i) ratio = multiply_add(ratio, u, V(kNormalTail[i]));
  return ratio * u;
}
#endif

// By the tail: Phi(z) = Phi(-|z|) or 1 - Phi(-|z|). The tail keeps its relative accuracy.
template <class Precision>
TPCORE_INLINE Normal<Vec<float>> normal(Vec<float> z) {
  using V = Vec<float>;
  const V t = smaller(V(14.875f), absolute(z));  // beyond, the tail is 0; a NaN passes through
  const V square = t * t;
  const V e = half_square_exponential<Precision>(t, square);
  const V tail = normal_ratio<Precision>(t) * e;
  return {select(less(z, V()), tail, V(1.0f) - tail), e * V(kNormalDensity)};
}

template <class Precision>
TPCORE_INLINE Normal<Vec<double>> normal(Vec<double> z) {
  return {lane_by_lane(z, [](double lane) { return 0.5 * __builtin_erfc(-lane * kSqrtHalf); }),
          lane_by_lane(z, [](double lane) {
            return __builtin_exp(-0.5 * lane * lane) * 0.3989422804014326779;
          })};
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
