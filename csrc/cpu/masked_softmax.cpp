// SPDX-License-Identifier: Apache-2.0
// Masked softmax: formulas in tpcore/kernels.h.
//
// A row of scores takes three sweeps in the first-level cache: scale, mask and maximum; exponential
// and sum; division, dropout and store. Keys after the causal limit are never read. A maximum of
// -infinity is looked into: if every key is masked the row is zero, if live scores are -infinity it
// is NaN, as the formula says.
//
// No probability is negative, so under dropout the sign of p tells backward what was dropped: ten
// rounds of Philox would cost it more than all the rest.
#include "parallel.h"
#include "philox.h"
#include "types.h"
#include "vector_math.h"

namespace tpcore {
namespace TPCORE_ISA {
namespace {

// Where row (b, n, q) is.
struct Position {
  int64_t batch, head, query;

  TPCORE_INLINE Position(int64_t row, int64_t heads, int64_t queries)
      : batch(row / queries / heads), head(row / queries % heads), query(row % queries) {}
  TPCORE_INLINE int64_t offset(const int64_t* strides) const {
    return batch * strides[0] + head * strides[1] + query * strides[2];
  }
};

// z = scale * scores, -infinity where masked; returns the maximum.
template <class T>
Acc<T> scale_and_mask(const T* scores, const uint8_t* mask, Acc<T>* z, int64_t keys, double scale) {
  using V = Vec<Acc<T>>;
  const V factor(static_cast<Acc<T>>(scale)), minus_infinity(-__builtin_huge_val());
  V maxima[4] = {minus_infinity, minus_infinity, minus_infinity, minus_infinity};
  for_each_vector<V>(keys, [&](int64_t i, int slot, auto lanes) TPCORE_INLINE_LAMBDA {
    prefetch(scores + i);
    V value = V::load(scores + i, lanes) * factor;
    if (mask != nullptr) value = select(V::nonzero(mask + i, lanes), minus_infinity, value);
    value.store(z + i, lanes);
    maxima[slot] = larger(only(value, lanes, minus_infinity), maxima[slot]);
  });
  return largest(maxima).maximum();
}

// z = exp(z - maximum); returns the sum.
template <class Precision, class A>
A exponentials(A* z, int64_t keys, A maximum) {
  using V = Vec<A>;
  const V shift(maximum);
  V sums[4];
  for_each_vector<V>(keys, [&](int64_t i, int slot, auto lanes) TPCORE_INLINE_LAMBDA {
    const V value = exponential<Precision>(V::load(z + i, lanes) - shift);
    value.store(z + i, lanes);
    sums[slot] = sums[slot] + only(value, lanes);
  });
  return total(sums).sum();
}

// Whether every byte of the mask of a row says masked. A mask that is the same along the row has
// one byte.
bool all_masked(const uint8_t* mask, int64_t bytes) {
  return memchr(mask, 0, static_cast<size_t>(bytes)) == nullptr;
}

}  // namespace

void masked_softmax_forward(const MaskedSoftmaxForward& args, ParallelFor parallel_for) {
  dispatch_types(args.dtype, args.dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    using A = Acc<T>;
    using V = Vec<A>;
    const int64_t keys = args.keys;
    const int64_t rows = args.batch * args.heads * args.queries;
    const int64_t bytes = keys * (2 * static_cast<int64_t>(sizeof(T)) + 8 + (args.key ? 8 : 0));
    parallel_rows(parallel_for, rows, bytes, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      A* z = scratch.take<A>(keys);
      uint8_t* keep = scratch.take<uint8_t>(args.key ? bit_bytes(keys) : 0);
      const KeepBits bits(args.key);
      for (int64_t row = begin; row < end; ++row) {
        const Position at(row, args.heads, args.queries);
        T* y = static_cast<T*>(args.y) + row * keys;
        T* probs = args.probs ? static_cast<T*>(args.probs) + row * keys : nullptr;
        int64_t live = keys;
        if (args.causal) {
          const int64_t limit = at.query + keys - args.queries + 1;
          live = limit < 0 ? 0 : limit < keys ? limit : keys;
        }
        const uint8_t* mask = args.mask ? args.mask + at.offset(args.mask_strides) : nullptr;
        bool dead = live == 0;
        if (mask != nullptr && args.mask_strides[3] == 0 && !dead) {
          dead = *mask != 0;
          mask = nullptr;  // all or nothing: the rest of the row needs no mask
        }
        if (!dead) {
          const T* scores = static_cast<const T*>(args.scores) + at.offset(args.scores_strides);
          const A maximum = scale_and_mask(scores, mask, z, live, args.scale);
          dead = mask != nullptr && maximum == -__builtin_huge_val() && all_masked(mask, live);
          if (!dead) {
            const V norm(A(1) / exponentials<PrecisionOf<T>>(z, live, maximum));
            const V factor(static_cast<A>(args.dropout_scale));
            if (bits) bits.row(at.batch * args.queries + at.query, at.head, live, keep);
            for_each_vector<V>(live, [&](int64_t i, int, auto lanes) TPCORE_INLINE_LAMBDA {
              prefetch_to_write(y + i);
              if (probs != nullptr) prefetch_to_write(probs + i);
              V value = V::load(z + i, lanes) * norm;
              if (probs != nullptr) {
                const auto kept = V::bits(keep, i, lanes);
                select(kept, value, negated(value)).store(probs + i, lanes);
                value = select(kept, value * factor, V());
              }
              value.store(y + i, lanes);
            });
          }
        }
        const int64_t written = dead ? 0 : live;
        const size_t rest = static_cast<size_t>(keys - written) * sizeof(T);
        memset(static_cast<void*>(y + written), 0, rest);
        if (probs != nullptr) memset(static_cast<void*>(probs + written), 0, rest);
      }
    });
  });
}

void masked_softmax_backward(const MaskedSoftmaxBackward& args, ParallelFor parallel_for) {
  dispatch_types(args.dtype, args.dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    using A = Acc<T>;
    using V = Vec<A>;
    const int64_t keys = args.keys;
    const int64_t rows = args.batch * args.heads * args.queries;
    const int64_t bytes = keys * 3 * static_cast<int64_t>(sizeof(T));
    parallel_rows(parallel_for, rows, bytes, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      A* g = scratch.take<A>(keys);
      for (int64_t row = begin; row < end; ++row) {
        const Position at(row, args.heads, args.queries);
        const T* grad_y = static_cast<const T*>(args.grad_y) + at.offset(args.grad_y_strides);
        const T* probs = static_cast<const T*>(args.probs) + at.offset(args.probs_strides);
        T* grad_scores = static_cast<T*>(args.grad_scores) + row * keys;
        const V factor(static_cast<A>(args.dropout_scale));
        Dot<V> dot;
        for_each_vector<V>(keys, [&](int64_t i, int slot, auto lanes) TPCORE_INLINE_LAMBDA {
          V prob = V::load(probs + i, lanes), grad = V::load(grad_y + i, lanes);
          if (args.key != nullptr) {
            grad = select(prob.sign_bits(), V(), grad * factor);
            prob = absolute(prob);
          }
          grad.store(g + i, lanes);
          dot.add(slot, grad, prob);
        });
        const V sum(dot.sum());
        const V scale(static_cast<A>(args.scale));
        for_each_vector<V>(keys, [&](int64_t i, int, auto lanes) TPCORE_INLINE_LAMBDA {
          V prob = V::load(probs + i, lanes);
          if (args.key != nullptr) prob = absolute(prob);
          const V grad = (V::load(g + i, lanes) - sum) * prob * scale;
          grad.store(grad_scores + i, lanes);
        });
      }
    });
  });
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
