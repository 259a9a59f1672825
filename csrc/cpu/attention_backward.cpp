// SPDX-License-Identifier: Apache-2.0
// Attention over packed sequences, backward: formulas in tpcore/kernels.h.
//
// Probabilities are computed again from the statistics, and dropout bits from their key. Gradients
// of keys and values gather over the blocks of queries in accumulation type.
#include "attention_task.h"

namespace tpcore {
namespace TPCORE_ISA {
namespace {

template <class T>
class Backward {
  using A = Acc<T>;
  using V = Vec<A>;

 public:
  explicit Backward(const PackedAttentionBackward& args)
      : args_(args),
        input_(args.input),
        sizes_(args.input),
        keys_(scratch_.take<A>(sizes_.matrix)),
        keys_transposed_(scratch_.take<A>(sizes_.matrix)),
        values_transposed_(scratch_.take<A>(sizes_.matrix)),
        grad_keys_(scratch_.take<A>(sizes_.matrix)),
        grad_values_(scratch_.take<A>(sizes_.matrix)),
        queries_(scratch_.take<A>(sizes_.block)),
        grad_queries_(scratch_.take<A>(sizes_.block)),
        grad_context_(scratch_.take<A>(sizes_.block)),
        probs_(scratch_.take<A>(sizes_.scores)),
        grad_scores_(scratch_.take<A>(sizes_.scores)),
        keep_(scratch_.take<uint8_t>(sizes_.keep)),
        keep_bits_(args.input.key) {}

  void operator()(const Task& task) const {
    const int64_t d = input_.head_size, stride = input_.qkv.row_stride;
    const int64_t out_row = input_.heads * 3 * d, row = sizes_.head_row;
    const A scale = static_cast<A>(input_.scale);
    const T* keys = part_of<T>(input_, task, kKey, 0);
    pack(keys, stride, task.length, d, keys_);
    const Right<A> keys_t = pack_transposed(keys, stride, task.length, d, keys_transposed_);
    const Right<A> values_t = pack_transposed(part_of<T>(input_, task, kValue, 0), stride,
                                              task.length, d, values_transposed_);
    memset(grad_keys_, 0, static_cast<size_t>(task.length * row) * sizeof(A));
    memset(grad_values_, 0, static_cast<size_t>(task.length * row) * sizeof(A));
    T* out = static_cast<T*>(args_.grad_qkv) + task.first * out_row + task.head * 3 * d;
    for (int64_t first = 0; first < task.length; first += kQueries) {
      const QueryBlock block(input_, task, first);
      const int64_t key_vectors = vectors_of<A>(block.keys);
      pack(part_of<T>(input_, task, kQuery, first), stride, block.rows, d, queries_);
      pack(row_of<const T>(args_.grad_context, task.first + first) + task.head * d,
           args_.grad_context.row_stride, block.rows, d, grad_context_);
      multiply<A>(block.rows, key_vectors, d, {queries_, row, 1}, keys_t, probs_, sizes_.score_row);
      multiply<A>(block.rows, key_vectors, d, {grad_context_, row, 1}, values_t, grad_scores_,
                  sizes_.score_row);
      softmax_backward(task, block);
      multiply<A>(block.rows, sizes_.head_vectors, block.keys, {grad_scores_, sizes_.score_row, 1},
                  {keys_, V::size, row}, grad_queries_, row);
      accumulate<A>(block.keys, sizes_.head_vectors, block.rows,
                    {grad_scores_, 1, sizes_.score_row}, {queries_, V::size, row}, grad_keys_, row);
      accumulate<A>(block.keys, sizes_.head_vectors, block.rows, {probs_, 1, sizes_.score_row},
                    {grad_context_, V::size, row}, grad_values_, row);
      unpack(grad_queries_, scale, block.rows, d, out + first * out_row, out_row);
    }
    unpack(grad_keys_, scale, task.length, d, out + d, out_row);
    unpack(grad_values_, A(1), task.length, d, out + 2 * d, out_row);
  }

 private:
  // From probs = q . k and grad_scores = grad_context . v: the dropped probabilities, and grad_s.
  void softmax_backward(const Task& task, const QueryBlock& block) const {
    const uint8_t* keep = keep_block_of(keep_bits_, task, block, keep_, sizes_.keep_row);
    const int64_t statistics = task.head * input_.tokens + task.first + block.first;
    const A* maxima = static_cast<const A*>(args_.max) + statistics;
    const A* sums = static_cast<const A*>(args_.sum_exp) + statistics;
    const V scale(static_cast<A>(input_.scale)), factor(static_cast<A>(input_.dropout_scale));
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t seen = block.keys_of(r);
      A* probs = probs_ + r * sizes_.score_row;
      A* grads = grad_scores_ + r * sizes_.score_row;
      const uint8_t* bits = keep ? keep + r * sizes_.keep_row : nullptr;
      const auto dropped = [&](V value, int64_t i) TPCORE_INLINE_LAMBDA {
        return bits ? select(V::bits(bits, i, Full{}), value * factor, V()) : value;
      };
      const V shift(maxima[r]), norm(A(1) / sums[r]);
      V partial[4];
      for_each_vector<V>(seen, [&](int64_t i, int slot, auto lanes) TPCORE_INLINE_LAMBDA {
        const V score = V::load(probs + i, Full{});
        const V prob = only(exponential<PrecisionOf<T>>(score * scale - shift) * norm, lanes);
        const V grad = dropped(V::load(grads + i, Full{}), i);
        partial[slot] = multiply_add(prob, grad, partial[slot]);
        prob.store(probs + i, Full{});
        grad.store(grads + i, Full{});
      });
      const V sum(total(partial).sum());
      for_each_vector<V>(seen, [&](int64_t i, int, auto lanes) TPCORE_INLINE_LAMBDA {
        const V prob = V::load(probs + i, Full{});
        const V grad = prob * (V::load(grads + i, Full{}) - sum);
        only(grad, lanes).store(grads + i, Full{});
        dropped(prob, i).store(probs + i, Full{});
      });
      clear_unseen(probs, seen, block.keys);
      clear_unseen(grads, seen, block.keys);
    }
  }

  const PackedAttentionBackward& args_;
  const PackedAttention& input_;
  const Sizes<A> sizes_;
  Scratch scratch_;
  A *const keys_, *const keys_transposed_, *const values_transposed_;
  A *const grad_keys_, *const grad_values_;
  A *const queries_, *const grad_queries_, *const grad_context_;
  A *const probs_, *const grad_scores_;
  uint8_t* const keep_;
  const KeepBits keep_bits_;
};

}  // namespace

void packed_attention_backward(const PackedAttentionBackward& args, ParallelFor parallel_for) {
  dispatch_types(args.input.dtype, args.input.dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    parallel_tasks(args.input, parallel_for, [&] { return Backward<T>(args); });
  });
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
