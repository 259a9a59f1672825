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
LAUNCHER(dropout_mask, DropoutMask)
LAUNCHER(bias_dropout_residual_forward, BiasDropoutResidualForward)
LAUNCHER(bias_dropout_residual_backward, BiasDropoutResidualBackward)
LAUNCHER(bias_gelu_forward, BiasGeluForward)
LAUNCHER(bias_gelu_backward, BiasGeluBackward)
LAUNCHER(masked_softmax_forward, MaskedSoftmaxForward)
LAUNCHER(masked_softmax_backward, MaskedSoftmaxBackward)
LAUNCHER(cross_entropy_statistics, CrossEntropyStatistics)
LAUNCHER(cross_entropy_backward, CrossEntropyBackward)

extern "C" long partial_sums(long rows) { return tpcore::cuda::partial_sums(rows); }
