// SPDX-License-Identifier: Apache-2.0
// What the callers of the launchers ask about the device.
#include "common.cuh"

namespace tpcore {
namespace cuda {

int64_t partial_sums(int64_t rows) { return smaller(rows, kPartialsPerSm * multiprocessors()); }

const char* status_message(Status status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

}  // namespace cuda
}  // namespace tpcore
