// SPDX-License-Identifier: Apache-2.0
// Every launcher: pointers, int64 sizes and strides, dtypes. Nothing here depends on torch.
//
// Conventions: a matrix is [rows, columns] with contiguous columns and a free row stride (in
// elements). T is the dtype of the activations, P that of the parameters (T or float), A the
// accumulation dtype: double if T is double, else float. A null pointer says that an optional
// argument is absent or a result is not wanted.
#pragma once

#include <cstdint>

struct CUstream_st;  // CUDA's

namespace tpcore {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

// A matrix, or nothing. `const` is up to the launcher: inputs are never written.
struct Matrix {
  void* data = nullptr;
  int64_t row_stride = 0;
};

// Runs body(closure, begin, end) over pieces of [0, count) of at least `grain`, on the caller's
// thread pool. Results never depend on how the pieces fall.
using ParallelBody = void (*)(const void* closure, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t count, int64_t grain, const void* closure, ParallelBody body);

// The identity of every dropout bit; see tpcore._native.dropout_keep_mask.
struct DropoutKey {
  uint64_t seed = 0;
  uint32_t threshold = 0;  // kept if and only if the random word >= threshold
  uint32_t stream = 0;
  const int64_t* row_ids = nullptr;  // contiguous, one per row
  int64_t column_offset = 0;
  int64_t head_offset = 0;
  const int64_t* device_seed = nullptr;  // CUDA: read when the kernel runs, in place of `seed`
};

// total = x + residual (only with a residual; rounded to T)
// y = (total - mean) * rstd * weight + bias,  rstd = 1 / sqrt(var + eps)
struct LayerNormForward {
  int64_t rows, columns;
  double eps;
  DType dtype, parameter_dtype;
  Matrix x;            // T [rows, columns]
  Matrix residual;     // T [rows, columns] or null
  const void* weight;  // P [columns] or null
  const void* bias;    // P [columns] or null
  void* total;         // T [rows, columns] contiguous; null without residual
  void* y;             // T [rows, columns] contiguous
  void* mean;          // A [rows]
  void* rstd;          // A [rows]
};

// With xhat = (x - mean) * rstd and g = grad_y * weight:
// grad_x = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_total
// grad_weight = sum over rows of grad_y * xhat,  grad_bias = sum over rows of grad_y
struct LayerNormBackward {
  int64_t rows, columns;
  DType dtype, parameter_dtype;
  Matrix grad_y;       // T [rows, columns]
  Matrix x;            // T [rows, columns]
  Matrix grad_total;   // T [rows, columns] or null
  const void* mean;    // A [rows]
  const void* rstd;    // A [rows]
  const void* weight;  // P [columns] or null
  void* grad_x;        // T [rows, columns] contiguous, or null
  void* grad_weight;   // A [columns] or null
  void* grad_bias;     // A [columns] or null
  void*
      partials;  // A [partial_sums(rows), 2, columns]; null if neither parameter gradient is wanted
};

// Column sums over rows are kept in this many partial sums, each over a fixed run of rows, and then
// added in a fixed order: so the result is the same bit for bit whatever the number of threads.
static inline int64_t rows_per_partial_sum(int64_t rows) {
  constexpr int64_t kMinRows = 16, kMaxSums = 64;
  const int64_t even = (rows + kMaxSums - 1) / kMaxSums;
  return even > kMinRows ? even : kMinRows;
}
static inline int64_t partial_sums(int64_t rows) {
  const int64_t each = rows_per_partial_sum(rows);
  return (rows + each - 1) / each;
}

// Phi is the distribution function of the standard normal distribution, phi its density.
enum class Gelu : int32_t {
  kErf,     // z Phi(z)
  kTanh,    // z / (1 + exp(-2 u)), u = sqrt(2 / pi) (z + 0.044715 z^3)
  kOldErf,  // z Phi(c z) with c = sqrt(2) / 1.41421
};

// y = gelu(z),  z = x + bias
struct BiasGeluForward {
  int64_t rows, columns;
  DType dtype, parameter_dtype;
  Gelu gelu;
  Matrix x;          // T [rows, columns]
  const void* bias;  // P [columns] or null
  void* y;           // T [rows, columns] contiguous
};

// grad_x = grad_y * gelu'(z),  grad_bias = sum over rows of it, before it is rounded to T
struct BiasGeluBackward {
  int64_t rows, columns;
  DType dtype, parameter_dtype;
  Gelu gelu;
  Matrix grad_y;     // T [rows, columns]
  Matrix x;          // T [rows, columns]
  const void* bias;  // P [columns] or null
  void* grad_x;      // T [rows, columns] contiguous, or null
  void* grad_bias;   // A [columns] or null
  void* partials;    // A [partial_sums(rows), columns]; null without grad_bias
};

// y = keep * (x + bias) * scale + residual, with scale = 1 / (1 - p); without a key y = x + bias +
// residual
struct BiasDropoutResidualForward {
  int64_t rows, columns;
  DType dtype, parameter_dtype;
  Matrix x;               // T [rows, columns]
  const void* bias;       // P [columns] or null
  Matrix residual;        // T [rows, columns] or null
  const DropoutKey* key;  // row_ids [rows]; null without dropout
  double scale;
  void* y;        // T [rows, columns] contiguous
  uint8_t* keep;  // CPU: [rows, (columns + 7) / 8], bit c % 8 of byte c / 8; null without dropout
};

// grad_x = keep * grad_y * scale,  grad_bias = sum over rows of it, before it is rounded to T
struct BiasDropoutResidualBackward {
  int64_t rows, columns;
  DType dtype;
  Matrix grad_y;          // T [rows, columns]
  const DropoutKey* key;  // CUDA: row_ids [rows]; null without dropout
  const uint8_t* keep;    // CPU: what forward gave; null without dropout
  double scale;
  void* grad_x;     // T [rows, columns] contiguous, or null
  void* grad_bias;  // A [columns] or null
  void* partials;   // A [partial_sums(rows), columns]; null without grad_bias
};

// p = softmax(scale * scores) over the keys that are neither masked nor, under causal, after the
// query; the last query sees the last key. y = keep * p * dropout_scale; zeros if no key is left.
struct MaskedSoftmaxForward {
  int64_t batch, heads, queries, keys;
  DType dtype;
  const void* scores;  // T [batch, heads, queries, keys], keys contiguous
  int64_t scores_strides[3];
  const uint8_t* mask;      // bool, nonzero = masked, or null
  int64_t mask_strides[4];  // 0 where broadcast; the last one 0 or 1
  double scale;
  bool causal;
  const DropoutKey* key;  // row_ids [batch, queries]; null without dropout
  double dropout_scale;
  void* y;      // T [batch, heads, queries, keys] contiguous
  void* probs;  // p, like y, on the CPU with a sign bit where it is dropped; null without dropout
};

// With g = keep * grad_y * dropout_scale: grad_scores = scale * p * (g - sum over keys of g * p)
struct MaskedSoftmaxBackward {
  int64_t batch, heads, queries, keys;
  DType dtype;
  const void* grad_y;  // T [batch, heads, queries, keys], keys contiguous
  int64_t grad_y_strides[3];
  const void* probs;  // T, likewise
  int64_t probs_strides[3];
  double scale;
  const DropoutKey* key;  // row_ids [batch, queries]; null without dropout
  double dropout_scale;
  void* grad_scores;  // T [batch, heads, queries, keys] contiguous
};

// Self-attention of every sequence over itself, for each head of the packed tokens:
// s_ij = scale * q_i . k_j over the keys j of the query's sequence, under causal j <= i only
// p_ij = exp(s_ij - max_i) / sum_exp_i,  max_i = max over j of s_ij
// context_i = sum over j of keep_ij * dropout_scale * p_ij * v_j
// The column of a dropout bit is the index of the key in its sequence.
struct PackedAttention {
  int64_t tokens, heads, head_size, sequences, longest;
  DType dtype;
  Matrix qkv;                 // T [tokens, heads * 3 * head_size], a head being [q | k | v]
  const int32_t* cu_seqlens;  // [sequences + 1]: 0, non-decreasing, tokens; steps of <= longest
  double scale;
  bool causal;
  const DropoutKey* key;  // row_ids [tokens]; null without dropout
  double dropout_scale;
};

struct PackedAttentionForward {
  PackedAttention input;
  void* context;        // T [tokens, heads * head_size] contiguous
  void *max, *sum_exp;  // A [heads, tokens] contiguous
};

// With g_ij = keep_ij * dropout_scale * grad_context_i . v_j and
// t_ij = p_ij * (g_ij - sum over j of p_ij * g_ij):
// grad_q_i = scale * sum over j of t_ij * k_j,  grad_k_j = scale * sum over i of t_ij * q_i
// grad_v_j = sum over i of keep_ij * dropout_scale * p_ij * grad_context_i
struct PackedAttentionBackward {
  PackedAttention input;
  Matrix grad_context;        // T [tokens, heads * head_size]
  const void *max, *sum_exp;  // A [heads, tokens] contiguous
  void* grad_qkv;             // T [tokens, heads * 3 * head_size] contiguous
};

// The first `live` columns of a row of logits are the classes vocab_start + [0, live) of
// num_classes.
struct VocabularyShard {
  int64_t tokens, columns, live;
  int64_t vocab_start, num_classes, ignore_index;
  DType dtype;
  Matrix logits;          // T [tokens, columns]
  const int64_t* target;  // global ids
};

// Of each row's live logits: max (-infinity if there are none), sum of exp(logit - max), the sum,
// and the logit of the target: 0 if it is not here, NaN if it is neither a class nor ignore_index.
struct CrossEntropyStatistics {
  VocabularyShard shard;
  void *max, *sum_exp, *target_logit, *sum_logits;  // A [tokens]
};

// grad = grad_loss * (exp(logit - max) / sum_exp - (1 - ls) [column is the target] - ls /
// num_classes) in live columns of rows that are not ignored, else 0; max and sum_exp are those of
// all shards.
struct CrossEntropyBackward {
  VocabularyShard shard;
  double label_smoothing;
  const void *grad_loss, *max, *sum_exp;  // A [tokens]
  void* grad_logits;                      // T [tokens, columns] contiguous
};

// y[c, r] = x[r, c] for numbers of 16 bits, and zeros up to the row stride of y
struct Transpose16 {
  int64_t rows, columns;
  Matrix x;  // [rows, columns]
  Matrix y;  // [columns, rows]; its row stride is a multiple of 32
};

// keep[b, n, q, c] = word >= threshold
struct DropoutMask {
  int64_t batch, heads, queries, columns;
  DropoutKey key;  // row_ids [batch, queries]
  bool* keep;      // [batch, heads, queries, columns] contiguous
};

// One step of AdamW, rounded as torch.optim.AdamW(fused=True) rounds it. With g = grad_factor *
// grad: w = (1 - lr * weight_decay) * weight,  m' = m + (1 - beta1) * (g - m), v' = beta2 * v + (1
// - beta2) * g^2, w' = w - lr / (1 - beta1^step) * m' / (sqrt(v') / sqrt(1 - beta2^step) + eps)
struct AdamW {
  int64_t count;
  DType dtype, grad_dtype;
  double lr, beta1, beta2, eps, weight_decay, step, grad_factor;
  const void* grad;  // P [count]
  void* weight;      // A [count], in place
  void* exp_avg;     // A [count], in place: m
  void* exp_avg_sq;  // A [count], in place: v
  void* copy;        // T [count], w' rounded, or null
};

// The shared memory of a group of ranks on one host, as one of them sees it; csrc/cpu/shm_channel.h
// says how they meet there.
struct ShmMember {
  void* segment;  // zeros at first; at least a page and two for each rank, aligned to pages
  int64_t segment_bytes;
  int32_t rank, size;  // at most 64 ranks
  int32_t lock;        // a file whose byte number r is locked as long as rank r lives
  int64_t timeout_ms;
};

enum class Collective : int32_t {
  kAllReduceSum,   // out = x_0 + x_1 + ...
  kAllReduceMax,   // out = max(x_0, x_1, ...), NaN if any is
  kReduceScatter,  // out = the rank's slice of x_0 + x_1 + ...
  kAllGather,      // out = x_0, x_1, ... one after the other
  kBroadcast,      // out = x_source
};

// One call on each rank, in the same order on all of them. shm_publish hands out as much of x as
// fits and returns at once, shm_complete waits for the others and fills out; nothing else may
// happen on the channel in between, and x must stay as it is. x and out may be the same, except in
// an all-gather.
struct ShmCollective {
  ShmMember member;
  Collective kind;
  DType dtype;     // of x and out; all-gather and broadcast: any
  int64_t count;   // elements of out; all-gather and broadcast: bytes of x
  int32_t source;  // the rank whose x is broadcast
  const void* x;
  void* out;
};

// Why a collective failed, if it did, and the rank that it failed on. The channel is of no use
// afterwards.
struct ShmFailure {
  enum Why : int32_t {
    kNone,
    kTimedOut,  // it did not come in time
    kEnded,     // it has ended, or dropped its group
    kGaveUp,    // another one gave up waiting for it
    kDiffers,   // it called another collective, or the same with another size or dtype
    kBroken,    // an earlier collective failed on it
  };
  Why why = kNone;
  int32_t rank = 0;
};

// One table per instruction set.
struct CpuKernels {
  const char* isa;
  void (*layer_norm_forward)(const LayerNormForward&, ParallelFor);
  void (*layer_norm_backward)(const LayerNormBackward&, ParallelFor);
  void (*dropout_mask)(const DropoutMask&, ParallelFor);
  void (*transpose16)(const Transpose16&, ParallelFor);
  void (*bias_dropout_residual_forward)(const BiasDropoutResidualForward&, ParallelFor);
  void (*bias_dropout_residual_backward)(const BiasDropoutResidualBackward&, ParallelFor);
  void (*bias_gelu_forward)(const BiasGeluForward&, ParallelFor);
  void (*bias_gelu_backward)(const BiasGeluBackward&, ParallelFor);
  void (*masked_softmax_forward)(const MaskedSoftmaxForward&, ParallelFor);
  void (*masked_softmax_backward)(const MaskedSoftmaxBackward&, ParallelFor);
  void (*packed_attention_forward)(const PackedAttentionForward&, ParallelFor);
  void (*packed_attention_backward)(const PackedAttentionBackward&, ParallelFor);
  void (*cross_entropy_statistics)(const CrossEntropyStatistics&, ParallelFor);
  void (*cross_entropy_backward)(const CrossEntropyBackward&, ParallelFor);
  void (*adamw)(const AdamW&, ParallelFor);
  ShmFailure (*shm_publish)(const ShmCollective&, ParallelFor);
  ShmFailure (*shm_complete)(const ShmCollective&, ParallelFor);
};

// The best table this machine can run, or the one that the environment variable TPCORE_CPU_ISA
// names; chosen once. Null if that variable names an unknown instruction set or one that this
// machine lacks: then cpu_kernels_error() says so.
const CpuKernels* cpu_kernels();
const char* cpu_kernels_error();

// Results of this many bytes or more do not stay in the cache: half of the last level.
int64_t streaming_bytes();

// Throws std::bad_alloc; a function, so that units of one instruction set hold no code of namespace
// std.
[[noreturn]] void out_of_memory();

// The same launchers for CUDA. Pointers are device pointers, except that of the key; work is queued
// on `stream` of the current device. `partials` has cuda::partial_sums(rows) in place of
// partial_sums(rows); which rows go to which sum depends on the device, and on nothing else.
namespace cuda {

using Stream = CUstream_st*;  // cudaStream_t
using Status = int;           // cudaError_t: what became of the launches, 0 if all is well

Status layer_norm_forward(const LayerNormForward&, Stream);
Status layer_norm_backward(const LayerNormBackward&, Stream);
Status dropout_mask(const DropoutMask&, Stream);
Status bias_dropout_residual_forward(const BiasDropoutResidualForward&, Stream);
Status bias_dropout_residual_backward(const BiasDropoutResidualBackward&, Stream);
Status bias_gelu_forward(const BiasGeluForward&, Stream);
Status bias_gelu_backward(const BiasGeluBackward&, Stream);
Status masked_softmax_forward(const MaskedSoftmaxForward&, Stream);
Status masked_softmax_backward(const MaskedSoftmaxBackward&, Stream);
Status cross_entropy_statistics(const CrossEntropyStatistics&, Stream);
Status cross_entropy_backward(const CrossEntropyBackward&, Stream);

int64_t partial_sums(int64_t rows);  // on the current device
const char* status_message(Status);

}  // namespace cuda
}  // namespace tpcore
