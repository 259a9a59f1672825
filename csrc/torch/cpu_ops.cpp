// SPDX-License-Identifier: Apache-2.0
// The CPU implementations of the raw ops, on torch's own thread pool.
#include "adamw_ops.h"
#include "attention_ops.h"
#include "launch.h"
#include "ops.h"
#include "shm_ops.h"
#include "transpose_ops.h"

namespace tpcore {

bool is_here(const Tensor& tensor) { return tensor.is_cpu(); }
const char* const kHere = "on the CPU";

namespace {

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static int64_t partial_sums(int64_t rows) { return tpcore::partial_sums(rows); }
#define TPCORE_LAUNCH(name, Arguments) \
  static void name(const Arguments& args) { kernels().name(args, parallel_for); }
  TPCORE_LAUNCHERS(TPCORE_LAUNCH)
#undef TPCORE_LAUNCH
};

}  // namespace

// Besides those of TPCORE_OPS, which every device has: from ops.h, and from the files included
// above.
// clang-format off
#define TPCORE_CPU_OPS(op)              \
  op(bias_dropout_residual_cpu_forward) \
  op(bias_dropout_residual_cpu_backward)
#define TPCORE_CPU_ONLY_OPS(op) \
  op(adamw_)                    \
  op(packed_attention_forward)  \
  op(packed_attention_backward) \
  op(transpose16)               \
  op(shm_publish)               \
  op(shm_complete)              \
  op(shm_exchange)
// clang-format on

STABLE_TORCH_LIBRARY_IMPL(tpcore, CPU, m) {
#define TPCORE_REGISTER(name) m.impl(#name, TORCH_BOX(&name<Cpu>));
  TPCORE_OPS(TPCORE_REGISTER)
  TPCORE_CPU_OPS(TPCORE_REGISTER)
#undef TPCORE_REGISTER
#define TPCORE_REGISTER(name) m.impl(#name, TORCH_BOX(&name));
  TPCORE_CPU_ONLY_OPS(TPCORE_REGISTER)
#undef TPCORE_REGISTER
}

}  // namespace tpcore

// What this library is, as JSON: {"isa": ..., "ops": [...]} or {"error": ...}.
extern "C" __attribute__((visibility("default"))) const char* tpcore_library_info() {
  static const std::string info = [] {
    if (tpcore::cpu_kernels() == nullptr) {
      return std::string("{\"error\": \"") + tpcore::cpu_kernels_error() + "\"}";
    }
    std::string ops;
#define TPCORE_LIST(name) ops += std::string(ops.empty() ? "\"" : ", \"") + #name + "\"";
    TPCORE_OPS(TPCORE_LIST)
    TPCORE_CPU_OPS(TPCORE_LIST)
    TPCORE_CPU_ONLY_OPS(TPCORE_LIST)
#undef TPCORE_LIST
    return std::string("{\"isa\": \"") + tpcore::cpu_kernels()->isa + "\", \"ops\": [" + ops + "]}";
  }();
  return info.c_str();
}
