// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tpcore/math.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {{tpcore::bfloat16_bits(x)}, {tpcore::bfloat16_bits(y)}};
}
