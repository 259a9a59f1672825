// SPDX-License-Identifier: Apache-2.0
// Elementary functions of vectors. Coefficients stand in tpcore/math.h. float64, which exists for
// checks of gradients, goes to the C library lane by lane.
#pragma once

#include "simd.h"

namespace tpcore {
namespace TPCORE_ISA {

// e^x within 1 unit in the last place, for any x: 0 and infinity beyond the range, NaN for NaN.
TPCORE_INLINE Vec<float> exponential(Vec<float> x) {
  using V = Vec<float>;
  x = smaller(V(kExpMax), larger(V(kExpMin), x));  // in this order a NaN passes through
  const V n = nearest_integer(x * V(kLog2E));
  const V r = multiply_add(n, V(-kLn2Low), multiply_add(n, V(-kLn2High), x));
  V p(kExp[4]);
  for (int i = 3; i >= 0; --i) p = multiply_add(p, r, V(kExp[i]));
  return scale_by_power(multiply_add(p, r * r, r) + V(1.0f), n);
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

TPCORE_INLINE Normal<Vec<float>> normal(Vec<float> z) {
  using V = Vec<float>;
  const V t = smaller(V(20.0f), absolute(z));  // beyond, the tail is 0; a NaN passes through
  const V square = t * t;
  V e = exponential(square * V(-0.5f));
  e = multiply_add(e, multiply_add(t, t, V() - square) * V(-0.5f),
                   e);  // what rounding the square lost
  const V u = V(1.0f) / multiply_add(t, V(0.5f), V(1.0f));
  V tail(kNormalTail[8]);
  for (int i = 7; i >= 0; --i) tail = multiply_add(tail, u, V(kNormalTail[i]));
  tail = tail * u * e;
  V centre(kNormalCentre[4]);
  for (int i = 3; i >= 0; --i) centre = multiply_add(centre, square, V(kNormalCentre[i]));
  centre = multiply_add(centre, z, V(0.5f));
  const V outside = select(less(z, V()), tail, V(1.0f) - tail);
  return {select(less(t, V(1.0f)), centre, outside), e * V(kNormalDensity)};
}

TPCORE_INLINE Normal<Vec<double>> normal(Vec<double> z) {
  return {lane_by_lane(z, [](double lane) { return 0.5 * __builtin_erfc(-lane * kSqrtHalf); }),
          lane_by_lane(z, [](double lane) {
            return __builtin_exp(-0.5 * lane * lane) * 0.3989422804014326779;
          })};
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
