// SPDX-License-Identifier: Apache-2.0
// Attention over packed sequences, forward: formulas in tpcore/kernels.h.
#include "attention_task.h"

namespace tpcore {
namespace TPCORE_ISA {
namespace {

template <class T>
class Forward {
  using A = Acc<T>;
  using V = Vec<A>;

 public:
  explicit Forward(const PackedAttentionForward& args)
      : args_(args),
        input_(args.input),
        sizes_(args.input),
        keys_(scratch_.take<A>(sizes_.matrix)),
        values_(scratch_.take<A>(sizes_.matrix)),
        queries_(scratch_.take<A>(sizes_.block)),
        context_(scratch_.take<A>(sizes_.block)),
        scores_(scratch_.take<A>(sizes_.scores)),
        keep_(scratch_.take<uint8_t>(sizes_.keep)),
        keep_bits_(args.input.key) {}

  void operator()(const Task& task) const {
    const int64_t d = input_.head_size, d_all = input_.heads * d, stride = input_.qkv.row_stride;
    const Right<A> keys =
        pack_transposed(part_of<T>(input_, task, kKey, 0), stride, task.length, d, keys_);
    pack(part_of<T>(input_, task, kValue, 0), stride, task.length, d, values_);
    T* out = static_cast<T*>(args_.context) + task.first * d_all + task.head * d;
    for (int64_t first = 0; first < task.length; first += kQueries) {
      const QueryBlock block(input_, task, first);
      pack(part_of<T>(input_, task, kQuery, first), stride, block.rows, d, queries_);
      multiply<A>(block.rows, vectors_of<A>(block.keys), d, {queries_, sizes_.head_row, 1}, keys,
                  scores_, sizes_.score_row);
      A factors[kQueries];
      softmax(task, block, factors);
      multiply<A>(block.rows, sizes_.head_vectors, block.keys, {scores_, sizes_.score_row, 1},
                  {values_, V::size, sizes_.head_row}, context_, sizes_.head_row);
      for (int64_t r = 0; r < block.rows; ++r) {
        unpack(context_ + r * sizes_.head_row, factors[r], 1, d, out + (first + r) * d_all, 0);
      }
    }
  }

 private:
  // scores = keep * exp(scale * scores - maximum); what is missing to the dropped probabilities is
  // a factor of the whole row.
  void softmax(const Task& task, const QueryBlock& block, A* factors) const {
    const int64_t statistics = task.head * input_.tokens + task.first + block.first;
    A* maxima = static_cast<A*>(args_.max) + statistics;
    A* sums = static_cast<A*>(args_.sum_exp) + statistics;
    const uint8_t* keep = keep_block_of(keep_bits_, task, block, keep_, sizes_.keep_row);
    const V scale(static_cast<A>(input_.scale)), minus_infinity(-__builtin_huge_val());
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t seen = block.keys_of(r);
      A* row = scores_ + r * sizes_.score_row;
      const uint8_t* bits = keep ? keep + r * sizes_.keep_row : nullptr;
      V maxima_of_row[4] = {minus_infinity, minus_infinity, minus_infinity, minus_infinity};
      for_each_vector<V>(seen, [&](int64_t i, int slot, auto lanes) TPCORE_INLINE_LAMBDA {
        const V score = V::load(row + i, Full{}) * scale;
        maxima_of_row[slot] = larger(only(score, lanes, minus_infinity), maxima_of_row[slot]);
      });
      const A maximum = largest(maxima_of_row).maximum();
      const V shift(maximum);
      V partial[4];
      for_each_vector<V>(seen, [&](int64_t i, int slot, auto lanes) TPCORE_INLINE_LAMBDA {
        const V score = V::load(row + i, Full{});
        V value = only(exponential<PrecisionOf<T>>(score * scale - shift), lanes);
        partial[slot] = partial[slot] + value;
        if (bits != nullptr) value = select(V::bits(bits, i, Full{}), value, V());
        value.store(row + i, Full{});
      });
      clear_unseen(row, seen, block.keys);
      maxima[r] = maximum;
      sums[r] = total(partial).sum();
      factors[r] = static_cast<A>(input_.dropout_scale) / sums[r];
    }
  }

  const PackedAttentionForward& args_;
  const PackedAttention& input_;
  const Sizes<A> sizes_;
  Scratch scratch_;
  A *const keys_, *const values_, *const queries_, *const context_, *const scores_;
  uint8_t* const keep_;
  const KeepBits keep_bits_;
};

}  // namespace

void packed_attention_forward(const PackedAttentionForward& args, ParallelFor parallel_for) {
  dispatch_types(args.input.dtype, args.input.dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    parallel_tasks(args.input, parallel_for, [&] { return Forward<T>(args); });
  });
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
