// SPDX-License-Identifier: Apache-2.0
// Elementary functions of vectors, from tpcore/math.h. float64, which exists for checks of
// gradients, goes to the C library lane by lane.
#pragma once

#include <type_traits>

#include "simd.h"
#include "tpcore/kernels.h"

namespace tpcore {
namespace TPCORE_ISA {

// For results of type T.
template <class T>
using PrecisionOf = std::conditional_t<sizeof(T) == 2, Half, Single>;

// e^x within 1.01 units in the last place (for Half: a relative error of 6e-5), for any x: 0 and
// infinity beyond the range, NaN for NaN.
template <class Precision = Single>
TPCORE_INLINE Vec<float> exponential(Vec<float> x) {
  using V = Vec<float>;
  x = smaller(V(kExpMax), larger(V(kExpMin), x));  // in this order a NaN passes through
  const V n = nearest_integer(x * V(kLog2E));
  const V r = multiply_add(n, V(-kLn2Low), multiply_add(n, V(-kLn2High), x));
  return scale_by_power(exponential_minus_one<Precision::exponential_terms>(r) + V(1.0f), n);
}

template <class Function>
TPCORE_INLINE Vec<double> lane_by_lane(Vec<double> x, const Function& function) {
  double lanes[Vec<double>::size];
  x.store(lanes, Full{});
  for (double& lane : lanes) lane = function(lane);
  return Vec<double>::load(lanes, Full{});
}

template <class Precision = Single>
TPCORE_INLINE Vec<double> exponential(Vec<double> x) {
  return lane_by_lane(x, [](double lane) { return __builtin_exp(lane); });
}

// --- GeLU and its derivative ---
// For float32 from tpcore/math.h, for float64 by their formulas.

template <Gelu kind, class Precision>
TPCORE_INLINE Vec<float> gelu(Vec<float> z) {
  if (kind == Gelu::kTanh) return gelu_tanh<Precision>(z);
  return kind == Gelu::kErf ? gelu_erf<Precision>(z) : gelu_old_erf<Precision>(z);
}
template <Gelu kind, class Precision>
TPCORE_INLINE Vec<float> gelu_slope(Vec<float> z) {
  if (kind == Gelu::kTanh) return gelu_tanh_slope<Precision>(z);
  const Vec<float> scale(static_cast<float>(kOldErfScale));
  return gelu_erf_slope<Precision>(kind == Gelu::kErf ? z : z * scale);
}

template <Gelu kind>
TPCORE_INLINE double gelu_gate(double z) {
  if (kind == Gelu::kTanh) {
    return 1 / (1 + __builtin_exp(-2 * kGeluTanhScale * z * (1 + kGeluTanhCubic * z * z)));
  }
  const double scale = kind == Gelu::kErf ? 1 : kOldErfScale;
  return 0.5 * __builtin_erfc(-z * scale * kSqrtHalf);
}
// z times the derivative of the gate.
template <Gelu kind>
TPCORE_INLINE double gelu_density(double z) {
  if (kind == Gelu::kTanh) {
    // Beyond 64 the gate is 0 or 1.
    if (!(z < 64 && -z < 64)) return z != z ? z : 0;
    const double gate = gelu_gate<kind>(z);
    const double slope = 2 * kGeluTanhScale * (1 + 3 * kGeluTanhCubic * z * z);
    return z * slope * gate * gelu_gate<kind>(-z);
  }
  const double scaled = z * (kind == Gelu::kErf ? 1 : kOldErfScale);
  const double bell = __builtin_exp(-0.5 * scaled * scaled);
  return bell == 0 ? 0 : scaled * bell * 0.3989422804014326779;
}

template <Gelu kind, class Precision>
TPCORE_INLINE Vec<double> gelu(Vec<double> z) {
  return lane_by_lane(z, [](double lane) {
    const double gate = gelu_gate<kind>(lane);
    return gate == 0 ? gate : lane * gate;
  });
}
template <Gelu kind, class Precision>
TPCORE_INLINE Vec<double> gelu_slope(Vec<double> z) {
  return lane_by_lane(z,
                      [](double lane) { return gelu_gate<kind>(lane) + gelu_density<kind>(lane); });
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
