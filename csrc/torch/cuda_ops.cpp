// SPDX-License-Identifier: Apache-2.0
// The CUDA implementations of the raw ops. Kernels are queued on torch's current stream of the
// device that the first tensor is on; the seed of a dropout stays there, so that a captured graph
// replays with whatever seed is in its tensor then.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "ops.h"

namespace tpcore {

namespace accelerator = torch::stable::accelerator;

bool is_here(const Tensor& tensor) {
  return tensor.is_cuda() && tensor.get_device_index() == accelerator::getCurrentDeviceIndex();
}
const char* const kHere = "on the CUDA device of the first argument";

namespace {

cuda::Stream current_stream() {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(accelerator::getCurrentDeviceIndex(), &stream));
  return static_cast<cuda::Stream>(stream);
}

void check(cuda::Status status, const char* launcher) {
  STD_TORCH_CHECK(status == 0, "launching ", launcher, " failed: ", cuda::status_message(status));
}

struct Cuda {
  struct Guard : accelerator::DeviceGuard {
    explicit Guard(const Tensor& tensor) : DeviceGuard(tensor.get_device_index()) {}
  };
  static int64_t partial_sums(int64_t rows) { return cuda::partial_sums(rows); }
#define TPCORE_LAUNCH(name, Arguments) \
  static void name(const Arguments& args) { check(cuda::name(args, current_stream()), #name); }
  TPCORE_LAUNCHERS(TPCORE_LAUNCH)
#undef TPCORE_LAUNCH
};

}  // namespace

// Besides those of TPCORE_OPS. The CPU has a pair of its own, which saves the bits of the dropout.
// clang-format off
#define TPCORE_CUDA_OPS(op)         \
  op(bias_dropout_residual_forward) \
  op(bias_dropout_residual_backward)
// clang-format on

STABLE_TORCH_LIBRARY_IMPL(tpcore, CUDA, m) {
#define TPCORE_REGISTER(name) m.impl(#name, TORCH_BOX(&name<Cuda>));
  TPCORE_OPS(TPCORE_REGISTER)
  TPCORE_CUDA_OPS(TPCORE_REGISTER)
#undef TPCORE_REGISTER
}

}  // namespace tpcore

// What this library is, as JSON: {"isa": "cuda", "ops": [...]}.
extern "C" __attribute__((visibility("default"))) const char* tpcore_library_info() {
  static const std::string info = [] {
    std::string ops;
#define TPCORE_LIST(name) ops += std::string(ops.empty() ? "\"" : ", \"") + #name + "\"";
    TPCORE_OPS(TPCORE_LIST)
    TPCORE_CUDA_OPS(TPCORE_LIST)
#undef TPCORE_LIST
    return "{\"isa\": \"cuda\", \"ops\": [" + ops + "]}";
  }();
  return info.c_str();
}
