// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set, once.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "tpcore/kernels.h"

// The launchers of one instruction set, and their table.
#define TPCORE_DECLARE_ISA(isa)                                                         \
  namespace tpcore {                                                                    \
  namespace isa {                                                                       \
  void layer_norm_forward(const LayerNormForward&, ParallelFor);                        \
  void layer_norm_backward(const LayerNormBackward&, ParallelFor);                      \
  void dropout_mask(const DropoutMask&, ParallelFor);                                   \
  void bias_dropout_residual_forward(const BiasDropoutResidualForward&, ParallelFor);   \
  void bias_dropout_residual_backward(const BiasDropoutResidualBackward&, ParallelFor); \
  void bias_gelu_forward(const BiasGeluForward&, ParallelFor);                          \
  void bias_gelu_backward(const BiasGeluBackward&, ParallelFor);                        \
  void masked_softmax_forward(const MaskedSoftmaxForward&, ParallelFor);                \
  void masked_softmax_backward(const MaskedSoftmaxBackward&, ParallelFor);              \
  void packed_attention_forward(const PackedAttentionForward&, ParallelFor);            \
  void packed_attention_backward(const PackedAttentionBackward&, ParallelFor);          \
  void cross_entropy_statistics(const CrossEntropyStatistics&, ParallelFor);            \
  void cross_entropy_backward(const CrossEntropyBackward&, ParallelFor);                \
  void adamw(const AdamW&, ParallelFor);                                                \
  ShmFailure shm_publish(const ShmCollective&, ParallelFor);                            \
  ShmFailure shm_complete(const ShmCollective&, ParallelFor);                           \
  static const CpuKernels kKernels = {                                                  \
      #isa,                                                                             \
      layer_norm_forward,                                                               \
      layer_norm_backward,                                                              \
      dropout_mask,                                                                     \
      bias_dropout_residual_forward,                                                    \
      bias_dropout_residual_backward,                                                   \
      bias_gelu_forward,                                                                \
      bias_gelu_backward,                                                               \
      masked_softmax_forward,                                                           \
      masked_softmax_backward,                                                          \
      packed_attention_forward,                                                         \
      packed_attention_backward,                                                        \
      cross_entropy_statistics,                                                         \
      cross_entropy_backward,                                                           \
      adamw,                                                                            \
      shm_publish,                                                                      \
      shm_complete,                                                                     \
  };                                                                                    \
  }                                                                                     \
  }

#if defined(__x86_64__)
TPCORE_DECLARE_ISA(scalar)
TPCORE_DECLARE_ISA(avx2)
TPCORE_DECLARE_ISA(avx512)
#define TPCORE_ISA_NAMES "scalar, avx2, avx512"
#elif defined(__aarch64__)
TPCORE_DECLARE_ISA(neon)
#define TPCORE_ISA_NAMES "neon"
#else
TPCORE_DECLARE_ISA(scalar)
#define TPCORE_ISA_NAMES "scalar"
#endif

namespace tpcore {
namespace {

struct Choice {
  const CpuKernels* kernels;
  const char* error;
};

// From the slowest to the fastest; a machine runs a prefix of the list.
int runnable(const CpuKernels* list[3]) {
  int count = 0;
#if defined(__x86_64__)
  list[count++] = &scalar::kKernels;
  // These builtins also ask the operating system whether it saves the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    list[count++] = &avx2::kKernels;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("bmi2")) {
      list[count++] = &avx512::kKernels;
    }
  }
#elif defined(__aarch64__)
  list[count++] = &neon::kKernels;
#else
  list[count++] = &scalar::kKernels;
#endif
  return count;
}

Choice choose() {
  const CpuKernels* list[3];
  const int count = runnable(list);
  const char* pinned = std::getenv("TPCORE_CPU_ISA");
  if (pinned == nullptr || *pinned == '\0') return {list[count - 1], ""};
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(list[i]->isa, pinned) == 0) return {list[i], ""};
  }
  return {nullptr,
          "the environment variable TPCORE_CPU_ISA names an instruction set that this machine or "
          "build does not "
          "have; known ones: " TPCORE_ISA_NAMES};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

// From Linux: sysconf counts the caches of a whole socket on some machines.
int64_t last_level_cache_bytes() {
  long kib = 0;
  if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    if (std::fscanf(file, "%ldK", &kib) != 1) kib = 0;
    std::fclose(file);
  }
  return kib > 0 ? int64_t{kib} << 10 : int64_t{32} << 20;
}

}  // namespace

int64_t streaming_bytes() {
  static const int64_t bytes = last_level_cache_bytes() / 2;
  return bytes;
}
const CpuKernels* cpu_kernels() { return choice().kernels; }
const char* cpu_kernels_error() { return choice().error; }
void out_of_memory() { throw std::bad_alloc(); }

}  // namespace tpcore
