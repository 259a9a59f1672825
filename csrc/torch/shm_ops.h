// SPDX-License-Identifier: Apache-2.0
// The collectives in shared memory as raw ops; registered in cpu_ops.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace tpcore {

// shm_exchange is shm_publish and shm_complete in one call.
#define TPCORE_DECLARE(name)                                                          \
  void name(const torch::stable::Tensor& x, const torch::stable::Tensor& out,         \
            const torch::stable::Tensor& segment, int64_t collective, int64_t source, \
            int64_t rank, int64_t size, int64_t lock, int64_t timeout_ms);
TPCORE_DECLARE(shm_publish)
TPCORE_DECLARE(shm_complete)
TPCORE_DECLARE(shm_exchange)
#undef TPCORE_DECLARE

}  // namespace tpcore
