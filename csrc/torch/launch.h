// SPDX-License-Identifier: Apache-2.0
// What every binding needs to call a launcher: the chosen kernels, and torch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "tpcore/kernels.h"

namespace tpcore {

inline void parallel_for(int64_t count, int64_t grain, const void* closure, ParallelBody body) {
  torch::stable::parallel_for(0, count, grain,
                              [=](int64_t begin, int64_t end) { body(closure, begin, end); });
}

inline const CpuKernels& kernels() {
  const CpuKernels* chosen = cpu_kernels();
  STD_TORCH_CHECK(chosen != nullptr, cpu_kernels_error());
  return *chosen;
}

}  // namespace tpcore
