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

}  // namespace TPCORE_ISA
}  // namespace tpcore
