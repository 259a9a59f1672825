// SPDX-License-Identifier: Apache-2.0
// Cross entropy on a shard of the vocabulary: formulas in tpcore/kernels.h.
//
// A row of logits is read twice, the second time from the cache: maximum and sum, then
// exponentials, whose arithmetic leaves time to fetch the next row.
#include "parallel.h"
#include "types.h"
#include "vector_math.h"

namespace tpcore {
namespace TPCORE_ISA {
namespace {

template <class A>
struct RowStatistics {
  A max, sum_exp, sum;
};

template <class T>
RowStatistics<Acc<T>> row_statistics(const T* logits, int64_t columns, int64_t row_stride) {
  using A = Acc<T>;
  using V = Vec<A>;
  const A infinity = static_cast<A>(__builtin_huge_val());
  const V lowest(-infinity);
  V maxima[4] = {lowest, lowest, lowest, lowest};
  V sums[4];
  for_each_vector<V>(columns, [&](int64_t i, int slot, auto lanes) TPCORE_INLINE_LAMBDA {
    const V value = V::load(logits + i, lanes);
    maxima[slot] = larger(only(value, lanes, lowest), maxima[slot]);
    sums[slot] = sums[slot] + value;
  });
  const A max = largest(maxima).maximum();
  // Where every logit is -infinity the sum of exponentials is 0, as it is without any column.
  const V shift(max == -infinity ? A(0) : max);
  V exponentials[4];
  for_each_vector<V>(columns, [&](int64_t i, int slot, auto lanes) TPCORE_INLINE_LAMBDA {
    prefetch<kSecondLevel>(logits + i, row_stride);
    const V value = exponential(V::load(logits + i, lanes) - shift);
    exponentials[slot] = exponentials[slot] + only(value, lanes);
  });
  return {max, total(exponentials).sum(), total(sums).sum()};
}

}  // namespace

void cross_entropy_statistics(const CrossEntropyStatistics& args, ParallelFor parallel_for) {
  const VocabularyShard& shard = args.shard;
  dispatch_types(shard.dtype, shard.dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    using A = Acc<T>;
    const int64_t bytes = shard.live * (static_cast<int64_t>(sizeof(T)) + 4);
    parallel_rows(parallel_for, shard.tokens, bytes, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* logits = row_of<T>(shard.logits, row);
        const RowStatistics<A> found = row_statistics(logits, shard.live, shard.logits.row_stride);
        const int64_t target = shard.target[row], local = target - shard.vocab_start;
        A target_logit = 0;
        if (target != shard.ignore_index) {
          if (target < 0 || target >= shard.num_classes) {
            target_logit = static_cast<A>(__builtin_nan(""));
          } else if (local >= 0 && local < shard.live) {
            target_logit = Vec<A>::load(logits + local, Partial{1}).sum();
          }
        }
        static_cast<A*>(args.max)[row] = found.max;
        static_cast<A*>(args.sum_exp)[row] = found.sum_exp;
        static_cast<A*>(args.target_logit)[row] = target_logit;
        static_cast<A*>(args.sum_logits)[row] = found.sum;
      }
    });
  });
}

void cross_entropy_backward(const CrossEntropyBackward& args, ParallelFor parallel_for) {
  const VocabularyShard& shard = args.shard;
  dispatch_types(shard.dtype, shard.dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    using A = Acc<T>;
    using V = Vec<A>;
    const int64_t bytes = shard.columns * (2 * static_cast<int64_t>(sizeof(T)) + 4);
    parallel_rows(parallel_for, shard.tokens, bytes, [&](int64_t begin, int64_t end) {
      const V smoothing(
          static_cast<A>(args.label_smoothing / static_cast<double>(shard.num_classes)));
      const V confidence(static_cast<A>(1.0 - args.label_smoothing));
      for (int64_t row = begin; row < end; ++row) {
        const T* logits = row_of<T>(shard.logits, row);
        T* grad_logits = static_cast<T*>(args.grad_logits) + row * shard.columns;
        const bool ignored = shard.target[row] == shard.ignore_index;
        const int64_t live = ignored ? 0 : shard.live;
        if (live > 0) {
          const V max(static_cast<const A*>(args.max)[row]);
          const V norm(A(1) / static_cast<const A*>(args.sum_exp)[row]);
          const V grad_loss(static_cast<const A*>(args.grad_loss)[row]);
          const auto gradient = [&](int64_t i, auto lanes) TPCORE_INLINE_LAMBDA {
            return exponential<PrecisionOf<T>>(V::load(logits + i, lanes) - max) * norm - smoothing;
          };
          for_each_vector<V>(live, [&](int64_t i, int, auto lanes) TPCORE_INLINE_LAMBDA {
            (gradient(i, lanes) * grad_loss).store(grad_logits + i, lanes);
          });
          const int64_t local = shard.target[row] - shard.vocab_start;
          if (local >= 0 && local < live) {
            const Partial one{1};
            ((gradient(local, one) - confidence) * grad_loss).store(grad_logits + local, one);
          }
        }
        memset(static_cast<void*>(grad_logits + live), 0,
               static_cast<size_t>(shard.columns - live) * sizeof(T));
      }
    });
  });
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
