// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tpcore/math.h"

struct __half {
  uint16_t bits;
};
inline float __half2float(__half value) { return tpcore::float_from_float16(value.bits); }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
struct __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) {
  return {{tpcore::float16_bits(x)}, {tpcore::float16_bits(y)}};
}
