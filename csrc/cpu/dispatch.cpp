// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set, once.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "tpcore/kernels.h"

#if defined(TPCORE_HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// The launchers of one instruction set, and their table.
#define TPCORE_DECLARE_ISA(isa)                                                         \
  namespace tpcore {                                                                    \
  namespace isa {                                                                       \
  void layer_norm_forward(const LayerNormForward&, ParallelFor);                        \
  void layer_norm_backward(const LayerNormBackward&, ParallelFor);                      \
  void dropout_mask(const DropoutMask&, ParallelFor);                                   \
  void transpose16(const Transpose16&, ParallelFor);                                    \
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
  static constexpr CpuKernels kKernels = {                                              \
      #isa,                                                                             \
      layer_norm_forward,                                                               \
      layer_norm_backward,                                                              \
      dropout_mask,                                                                     \
      transpose16,                                                                      \
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

// AVX-512 with attention of its own for bfloat16.
#define TPCORE_DECLARE_BF16_ISA(name)                                          \
  namespace tpcore {                                                           \
  namespace name {                                                             \
  void packed_attention_forward(const PackedAttentionForward&, ParallelFor);   \
  void packed_attention_backward(const PackedAttentionBackward&, ParallelFor); \
  static constexpr CpuKernels kKernels = [] {                                  \
    CpuKernels kernels = avx512::kKernels;                                     \
    kernels.isa = #name;                                                       \
    kernels.packed_attention_forward = packed_attention_forward;               \
    kernels.packed_attention_backward = packed_attention_backward;             \
    return kernels;                                                            \
  }();                                                                         \
  }                                                                            \
  }

#if defined(__x86_64__)
TPCORE_DECLARE_ISA(scalar)
TPCORE_DECLARE_ISA(avx2)
TPCORE_DECLARE_ISA(avx512)
#if defined(TPCORE_HAS_AVX512_BF16)
TPCORE_DECLARE_BF16_ISA(avx512_bf16)
#endif
#if defined(TPCORE_HAS_AMX)
TPCORE_DECLARE_BF16_ISA(amx)
#endif
#define TPCORE_ISA_NAMES "scalar, avx2, avx512, avx512_bf16, amx"
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

constexpr int kMostIsas = 5;

#if defined(__x86_64__)
// These builtins also ask the operating system whether it saves the wide registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("bmi2");
}
#endif
#if defined(TPCORE_HAS_AMX)
// Linux gives the tiles, which are large, to processes that ask for them.
bool has_amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// What this machine runs, from the slowest to the fastest.
int runnable(const CpuKernels* list[kMostIsas]) {
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  list[count++] = &scalar::kKernels;
  if (!has_avx2()) return count;
  list[count++] = &avx2::kKernels;
  if (!has_avx512()) return count;
  list[count++] = &avx512::kKernels;
#if defined(TPCORE_HAS_AVX512_BF16)
  if (!__builtin_cpu_supports("avx512bf16")) return count;
  list[count++] = &avx512_bf16::kKernels;
  // On Intel's processors these products are no faster than those of float32 (docs/attention.md).
  if (__builtin_cpu_is("intel")) std::swap(list[count - 1], list[count - 2]);
#endif
#if defined(TPCORE_HAS_AMX)
  if (has_amx()) list[count++] = &amx::kKernels;
#endif
#elif defined(__aarch64__)
  list[count++] = &neon::kKernels;
#else
  list[count++] = &scalar::kKernels;
#endif
  return count;
}

Choice choose() {
  const CpuKernels* list[kMostIsas];
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

// From Linux: sysconf counts the caches of a whole socket on some machines. So do some caches
// themselves: of one that hundreds of processors share, no program is left more than this.
int64_t last_level_cache_bytes() {
  constexpr int64_t kMost = int64_t{32} << 20;
  long kib = 0;
  if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    if (std::fscanf(file, "%ldK", &kib) != 1) kib = 0;
    std::fclose(file);
  }
  const int64_t bytes = int64_t{kib} << 10;
  return 0 < bytes && bytes < kMost ? bytes : kMost;
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
