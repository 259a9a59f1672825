// SPDX-License-Identifier: Apache-2.0
// Elementary functions of vectors. Coefficients stand in tpcore/math.h. float64, which exists for
// checks of gradients, goes to the C library lane by lane.
#pragma once

#include <type_traits>

#include "normal_table.h"
#include "simd.h"

namespace tpcore {
namespace TPCORE_ISA {

// e^r - 1 for |r| <= ln 2 / 2.
template <int terms>
TPCORE_INLINE Vec<float> exponential_minus_one(Vec<float> r) {
  using V = Vec<float>;
  V p(kExp[terms - 1]);
  for (int i = terms - 2; i >= 0; --i) p = multiply_add(p, r, V(kExp[i]));
  return multiply_add(p, r * r, r);
}

// e^x within 1.01 units in the last place, for any x: 0 and infinity beyond the range, NaN for NaN.
TPCORE_INLINE Vec<float> exponential(Vec<float> x) {
  using V = Vec<float>;
  x = smaller(V(kExpMax), larger(V(kExpMin), x));  // in this order a NaN passes through
  const V n = nearest_integer(x * V(kLog2E));
  const V r = multiply_add(n, V(-kLn2Low), multiply_add(n, V(-kLn2High), x));
  return scale_by_power(exponential_minus_one<5>(r) + V(1.0f), n);
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

// 1 / (1 + e^-x) = (1 + tanh(x / 2)) / 2, by the exponential that is at most 1: nothing cancels or
// overflows.
template <class A>
TPCORE_INLINE Vec<A> logistic(Vec<A> x) {
  using V = Vec<A>;
  const V one(A(1)), e = exponential(V() - absolute(x));
  return select(less(x, V()), e, one) / (one + e);
}

// The same and its derivative, with one division for both.
template <class V>
struct Logistic {
  V value, derivative;
};

template <class A>
TPCORE_INLINE Logistic<Vec<A>> logistic_with_derivative(Vec<A> x) {
  using V = Vec<A>;
  const V one(A(1)), e = exponential(V() - absolute(x));
  const V upper = one / (one + e), lower = e * upper;
  return {select(less(x, V()), lower, upper), lower * upper};
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

#if defined(TPCORE_ISA_AVX512)
// Phi(-t) exp(t^2 / 2) for 0 <= t < 15; `precise` within a unit in the last place.
template <class Precision, bool precise = false>
TPCORE_INLINE Vec<float> normal_ratio(Vec<float> t) {
  const Interval32 interval(t);
  Vec<float> ratio = interval.entry(kNormalRatio[Precision::ratio_degree]);
  for (int i = Precision::ratio_degree - 1; i >= 1; --i) {
    ratio = multiply_add(ratio, interval.offset, interval.entry(kNormalRatio[i]));
  }
  const Vec<float> left = interval.entry(kNormalRatio[0]);
  if (!precise) return multiply_add(ratio, interval.offset, left);
  return multiply_add(ratio, interval.offset, interval.entry(kNormalRatioLow)) + left;
}
#else
template <class Precision, bool precise = false>
TPCORE_INLINE Vec<float> normal_ratio(Vec<float> t) {
  using V = Vec<float>;
  const V u = V(1.0f) / multiply_add(t, V(kNormalTailSlope), V(1.0f));
  V ratio(kNormalTail[10]);
  for (int i = 9; i >= 0; --i) ratio = multiply_add(ratio, u, V(kNormalTail[i]));
  return ratio * u;
}
#endif

// e^(-t^2 / 2 - product) for 0 <= t < 15 and a small product, as 2^n (1 + e).
struct Bell {
  Vec<float> n, e;
};

// The square's own rounding, which the exponential would magnify, is known exactly and joins the
// remainder.
template <class Precision>
TPCORE_INLINE Bell bell(Vec<float> t, Vec<float> product) {
  using V = Vec<float>;
  const V half(-0.5f);
  const V square = t * t;
  const V n = nearest_integer(square * V(-0.5f * kLog2E));
  V r = multiply_add(n, V(-kLn2High), square * half);
  if (std::is_same_v<Precision, Single>) {
    r = multiply_add(n, V(-kLn2Low), r);
    r = multiply_add(square_error(t, square), half, r) - product;
  }
  return {n, exponential_minus_one<Precision::exponential_terms>(r)};
}

// Phi(z + low), where product = z * low, by the tail: Phi(z) = Phi(-|z|) or 1 - Phi(-|z|), which
// keeps its relative accuracy. Beyond 14.875 the tail is 0; a NaN passes through.
template <class Precision>
TPCORE_INLINE Vec<float> normal_cdf(Vec<float> z, Vec<float> product = Vec<float>()) {
  using V = Vec<float>;
  const V t = smaller(V(14.875f), absolute(z));
  const Bell b = bell<Precision>(t, product);
  const V ratio = normal_ratio<Precision, std::is_same_v<Precision, Single>>(t);
  const V tail = scale_by_power(multiply_add(ratio, b.e, ratio), b.n);
  return select(less(z, V()), tail, V(1.0f) - tail);
}

// Phi(z) and its density, which share an exponential.
template <class Precision>
TPCORE_INLINE Normal<Vec<float>> normal(Vec<float> z) {
  using V = Vec<float>;
  const V t = smaller(V(14.875f), absolute(z));
  const Bell b = bell<Precision>(t, V());
  const V density = scale_by_power(b.e + V(1.0f), b.n);
  const V tail = normal_ratio<Precision>(t) * density;
  return {select(less(z, V()), tail, V(1.0f) - tail), density * V(kNormalDensity)};
}

template <class Precision>
TPCORE_INLINE Vec<double> normal_cdf(Vec<double> z, Vec<double> = Vec<double>()) {
  return lane_by_lane(z, [](double lane) { return 0.5 * __builtin_erfc(-lane * kSqrtHalf); });
}

template <class Precision>
TPCORE_INLINE Normal<Vec<double>> normal(Vec<double> z) {
  return {normal_cdf<Precision>(z), lane_by_lane(z, [](double lane) {
            return __builtin_exp(-0.5 * lane * lane) * 0.3989422804014326779;
          })};
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
