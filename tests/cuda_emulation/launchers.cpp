// SPDX-License-Identifier: Apache-2.0
// The launchers under plain C names, and the sizes of what they take.
#include "tpcore/kernels.h"

#define LAUNCHER(name, Arguments)                           \
  extern "C" int name(const tpcore::Arguments* arguments) { \
    return tpcore::cuda::name(*arguments, nullptr);         \
  }                                                         \
  extern "C" long name##_size() { return sizeof(tpcore::Arguments); }

LAUNCHER(layer_norm_forward, LayerNormForward)
LAUNCHER(layer_norm_backward, LayerNormBackward)

extern "C" long partial_sums(long rows) { return tpcore::cuda::partial_sums(rows); }
