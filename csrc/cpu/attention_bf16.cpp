// SPDX-License-Identifier: Apache-2.0
// Attention over packed sequences in bfloat16, where there are instructions for its products:
// formulas in tpcore/kernels.h, the plan in attention_task.h. Probabilities, and in the backward
// their gradients, are rounded to bfloat16 before they are multiplied; sums are float32.
//
// Compiled for those instruction sets alone; whatever is not bfloat16 goes to AVX-512.
#if defined(TPCORE_ISA_AVX512_BF16) || defined(TPCORE_ISA_AMX)
#include "attention_task.h"
#include "pairs.h"

namespace tpcore {

namespace avx512 {
void packed_attention_forward(const PackedAttentionForward&, ParallelFor);
void packed_attention_backward(const PackedAttentionBackward&, ParallelFor);
}  // namespace avx512

namespace TPCORE_ISA {
namespace {

using V = Vec<float>;

// More than in float32: a tile of sums that stays in memory is loaded and stored once for them all.
constexpr int64_t kPairQueries = 64;

// Sizes of packed matrices; rows in pairs or in float32.
struct PairSizes {
  int64_t head;                // a row of d numbers, in pairs
  int64_t head_row;            // of d sums
  int64_t keys;                // `longest`, in whole depths
  int64_t key_row, key_pairs;  // a row of as many sums, or pairs: a vector more, see Sizes
  int64_t matrix;              // [longest, d], in pairs
  int64_t keep_row, keep;      // of bits, in bytes

  explicit PairSizes(const PackedAttention& input)
      : head(whole_depths(input.head_size) / 2),
        head_row(vectors_of<float>(input.head_size) * V::size),
        keys(whole_depths(input.longest)),
        key_row(keys + V::size),
        key_pairs(keys / 2 + kPanel),
        matrix(keys * head),
        keep_row(keys / 8),
        keep(input.key != nullptr ? kPairQueries * keep_row : 0) {
    static_assert(kColumnsPerVector == kDepth, "bits of whole vectors are bits of whole depths");
  }
};

class Forward {
 public:
  explicit Forward(const PackedAttentionForward& args)
      : args_(args),
        input_(args.input),
        sizes_(args.input),
        keys_(scratch_.take<Pair>(sizes_.matrix)),
        values_(scratch_.take<Pair>(sizes_.matrix)),
        queries_(scratch_.take<Pair>(kPairQueries * sizes_.head)),
        probs_(scratch_.take<Pair>(kPairQueries * sizes_.key_pairs)),
        scores_(scratch_.take<float>(kPairQueries * sizes_.key_row)),
        context_(scratch_.take<float>(kPairQueries * sizes_.head_row)),
        keep_(scratch_.take<uint8_t>(sizes_.keep)),
        keep_bits_(args.input.key) {}

  void operator()(const Task& task) const {
    const int64_t d = input_.head_size, d_all = input_.heads * d, stride = input_.qkv.row_stride;
    const BFloat16* values = part_of<BFloat16>(input_, task, kValue, 0);
    const Right<Pair> keys_t = pack_right_transposed(part_of<BFloat16>(input_, task, kKey, 0),
                                                     stride, task.length, d, keys_);
    const Right<Pair> values_r = pack_right(values, stride, task.length, d, values_);
    BFloat16* out = static_cast<BFloat16*>(args_.context) + task.first * d_all + task.head * d;
    for (int64_t first = 0; first < task.length; first += kPairQueries) {
      const QueryBlock block(input_, task, first, kPairQueries);
      pack_left(part_of<BFloat16>(input_, task, kQuery, first), stride, block.rows, d, queries_,
                sizes_.head);
      multiply_pairs(block.rows, vectors_of<float>(block.keys), pairs_of(d),
                     {queries_, sizes_.head, 1}, keys_t, scores_, sizes_.key_row, false);
      float factors[kPairQueries];
      softmax(task, block, factors);
      multiply_pairs(block.rows, vectors_of<float>(d), pairs_of(block.keys),
                     {probs_, sizes_.key_pairs, 1}, values_r, context_, sizes_.head_row, false);
      for (int64_t r = 0; r < block.rows; ++r) {
        unpack(context_ + r * sizes_.head_row, factors[r], 1, d, out + (first + r) * d_all, 0);
      }
    }
  }

 private:
  // probs = keep * exp(scale * scores - maximum); what is missing to the dropped probabilities is
  // a factor of the whole row.
  void softmax(const Task& task, const QueryBlock& block, float* factors) const {
    const int64_t statistics = task.head * input_.tokens + task.first + block.first;
    float* maxima = static_cast<float*>(args_.max) + statistics;
    float* sums = static_cast<float*>(args_.sum_exp) + statistics;
    const uint8_t* keep = keep_block_of(keep_bits_, task, block, keep_, sizes_.keep_row);
    const V scale(static_cast<float>(input_.scale)), minus_infinity(-__builtin_huge_valf());
    const int64_t whole = whole_depths(block.keys);
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t seen = block.keys_of(r);
      const float* row = scores_ + r * sizes_.key_row;
      BFloat16* probs = reinterpret_cast<BFloat16*>(probs_ + r * sizes_.key_pairs);
      const uint8_t* bits = keep ? keep + r * sizes_.keep_row : nullptr;
      V maxima_of_row[4] = {minus_infinity, minus_infinity, minus_infinity, minus_infinity};
      for_each_vector<V>(seen, [&](int64_t i, int slot, auto lanes) TPCORE_INLINE_LAMBDA {
        const V score = V::load(row + i, Full{}) * scale;
        maxima_of_row[slot] = larger(only(score, lanes, minus_infinity), maxima_of_row[slot]);
      });
      const float maximum = largest(maxima_of_row).maximum();
      const V shift(maximum);
      V partial[4];
      for_each_vector<V>(seen, [&](int64_t i, int slot, auto lanes) TPCORE_INLINE_LAMBDA {
        const V score = V::load(row + i, Full{});
        V value = only(exponential<Half>(score * scale - shift), lanes);
        partial[slot] = partial[slot] + value;
        if (bits != nullptr) value = select(V::bits(bits, i, Full{}), value, V());
        store_rounded(value, probs + i);
      });
      clear_unseen_numbers(probs, seen, whole);
      maxima[r] = maximum;
      sums[r] = total(partial).sum();
      factors[r] = static_cast<float>(input_.dropout_scale) / sums[r];
    }
  }

  static void clear_unseen_numbers(BFloat16* row, int64_t seen, int64_t whole) {
    const int64_t from = vectors_of<float>(seen) * V::size;
    if (from < whole) memset(row + from, 0, static_cast<size_t>(whole - from) * sizeof(BFloat16));
  }

  const PackedAttentionForward& args_;
  const PackedAttention& input_;
  const PairSizes sizes_;
  const Tiles tiles_;
  Scratch scratch_;
  Pair *const keys_, *const values_, *const queries_, *const probs_;
  float *const scores_, *const context_;
  uint8_t* const keep_;
  const KeepBits keep_bits_;
};

// Queries are rows throughout, as their dropout bits lie. Gradients of keys and values are sums
// over queries: as transposes, grad_k' = q' grad_s, they take grad_s as a right-hand side, whose
// pairs are two rows side by side.
class Backward {
 public:
  explicit Backward(const PackedAttentionBackward& args)
      : args_(args),
        input_(args.input),
        sizes_(args.input),
        keys_(scratch_.take<Pair>(sizes_.matrix)),
        keys_transposed_(scratch_.take<Pair>(sizes_.matrix)),
        values_transposed_(scratch_.take<Pair>(sizes_.matrix)),
        grad_keys_(scratch_.take<float>(sizes_.head_row * sizes_.key_row)),
        grad_values_(scratch_.take<float>(sizes_.head_row * sizes_.key_row)),
        queries_(scratch_.take<Pair>(kPairQueries * sizes_.head)),
        queries_transposed_(scratch_.take<Pair>(sizes_.head_row * kQueryPairs)),
        grad_queries_(scratch_.take<float>(kPairQueries * sizes_.head_row)),
        grad_context_(scratch_.take<Pair>(kPairQueries * sizes_.head)),
        grad_context_transposed_(scratch_.take<Pair>(sizes_.head_row * kQueryPairs)),
        scores_(scratch_.take<float>(kPairQueries * sizes_.key_row)),
        grads_(scratch_.take<float>(kPairQueries * sizes_.key_row)),
        prob_pairs_(scratch_.take<Pair>(kQueryPairs * sizes_.keys)),
        grad_pairs_(scratch_.take<Pair>(kQueryPairs * sizes_.keys)),
        grad_rows_(scratch_.take<Pair>(kPairQueries * sizes_.key_pairs)),
        keep_(scratch_.take<uint8_t>(sizes_.keep)),
        keep_bits_(args.input.key) {}

  void operator()(const Task& task) const {
    const int64_t d = input_.head_size, stride = input_.qkv.row_stride, length = task.length;
    const int64_t out_row = input_.heads * 3 * d, head_vectors = vectors_of<float>(d);
    const float scale = static_cast<float>(input_.scale);
    const BFloat16* keys = part_of<BFloat16>(input_, task, kKey, 0);
    const Right<Pair> keys_r = pack_right(keys, stride, length, d, keys_);
    const Right<Pair> keys_t = pack_right_transposed(keys, stride, length, d, keys_transposed_);
    const Right<Pair> values_t = pack_right_transposed(part_of<BFloat16>(input_, task, kValue, 0),
                                                       stride, length, d, values_transposed_);
    if (input_.causal) {
      // The first queries see some of the keys only.
      const size_t bytes = static_cast<size_t>(sizes_.head_row * sizes_.key_row) * sizeof(float);
      memset(grad_keys_, 0, bytes);
      memset(grad_values_, 0, bytes);
    }
    BFloat16* out = static_cast<BFloat16*>(args_.grad_qkv) + task.first * out_row;
    out += task.head * 3 * d;
    for (int64_t first = 0; first < length; first += kPairQueries) {
      const QueryBlock block(input_, task, first, kPairQueries);
      const bool add = input_.causal || first > 0;
      const int64_t rows = block.rows, key_vectors = vectors_of<float>(block.keys);
      const BFloat16* queries = part_of<BFloat16>(input_, task, kQuery, first);
      const BFloat16* grad_context = row_of<const BFloat16>(args_.grad_context, task.first + first);
      grad_context += task.head * d;
      const int64_t grad_stride = args_.grad_context.row_stride;
      pack_left(queries, stride, rows, d, queries_, sizes_.head);
      pack_left(grad_context, grad_stride, rows, d, grad_context_, sizes_.head);
      pack_left_transposed(queries, stride, rows, d, queries_transposed_, kQueryPairs);
      pack_left_transposed(grad_context, grad_stride, rows, d, grad_context_transposed_,
                           kQueryPairs);
      multiply_pairs(rows, key_vectors, pairs_of(d), {queries_, sizes_.head, 1}, keys_t, scores_,
                     sizes_.key_row, false);
      multiply_pairs(rows, key_vectors, pairs_of(d), {grad_context_, sizes_.head, 1}, values_t,
                     grads_, sizes_.key_row, false);
      const int64_t panel = whole_depths(rows) / 2 * kPanel;
      softmax_backward(task, block, panel);
      multiply_pairs(rows, head_vectors, pairs_of(block.keys), {grad_rows_, sizes_.key_pairs, 1},
                     keys_r, grad_queries_, sizes_.head_row, false);
      unpack(grad_queries_, scale, rows, d, out + first * out_row, out_row);
      multiply_pairs(d, key_vectors, pairs_of(rows), {queries_transposed_, kQueryPairs, 1},
                     {grad_pairs_, panel, kPanel}, grad_keys_, sizes_.key_row, add);
      multiply_pairs(d, key_vectors, pairs_of(rows), {grad_context_transposed_, kQueryPairs, 1},
                     {prob_pairs_, panel, kPanel}, grad_values_, sizes_.key_row, add);
    }
    unpack_transposed(grad_keys_, sizes_.key_row, scale, length, d, out + d, out_row);
    unpack_transposed(grad_values_, sizes_.key_row, 1.0f, length, d, out + 2 * d, out_row);
  }

 private:
  static constexpr int64_t kQueryPairs = kPairQueries / 2;

  // From scores = q . k and grads = grad_context . v: the dropped probabilities as prob_pairs, and
  // grad_s as grad_pairs and grad_rows.
  void softmax_backward(const Task& task, const QueryBlock& block, int64_t panel) const {
    const uint8_t* keep = keep_block_of(keep_bits_, task, block, keep_, sizes_.keep_row);
    const V factor(static_cast<float>(input_.dropout_scale));
    const int64_t whole = whole_depths(block.keys), row_pairs = pairs_of(block.rows);
    for (int64_t r = 0; r < block.rows; r += 2) {
      const float* scores[2];
      const float* grads[2];
      const uint8_t* bits[2] = {nullptr, nullptr};
      V sums[2];
      for (int64_t i = 0; i < 2; ++i) {
        scores[i] = scores_ + (r + i) * sizes_.key_row;
        grads[i] = grads_ + (r + i) * sizes_.key_row;
        if (keep != nullptr) bits[i] = keep + (r + i) * sizes_.keep_row;
        sums[i] = V(probabilities(task, block, r + i, whole, bits[i]));
      }
      BFloat16* grad_rows[2];
      for (int64_t i = 0; i < 2; ++i) {
        grad_rows[i] = reinterpret_cast<BFloat16*>(grad_rows_ + (r + i) * sizes_.key_pairs);
      }
      for (int64_t i = 0; i < whole; i += V::size) {
        const V probs[2] = {V::load(scores[0] + i, Full{}), V::load(scores[1] + i, Full{})};
        const RowPair grad(probs[0] * (V::load(grads[0] + i, Full{}) - sums[0]),
                           probs[1] * (V::load(grads[1] + i, Full{}) - sums[1]));
        const int64_t at = i / kPanel * panel + r / 2 * kPanel;
        grad.store_rows(grad_rows[0] + i, grad_rows[1] + i);
        grad.store_pairs(grad_pairs_ + at);
        const auto dropped = [&](int row) TPCORE_INLINE_LAMBDA {
          if (keep == nullptr) return probs[row];
          return select(V::bits(bits[row], i, Full{}), probs[row] * factor, V());
        };
        RowPair(dropped(0), dropped(1)).store_pairs(prob_pairs_ + at);
      }
    }
    // Rows that there are not.
    const size_t rest = static_cast<size_t>(panel - row_pairs * kPanel) * sizeof(Pair);
    for (int64_t at = row_pairs * kPanel; rest > 0 && at < whole / kPanel * panel; at += panel) {
      memset(static_cast<void*>(grad_pairs_ + at), 0, rest);
      memset(static_cast<void*>(prob_pairs_ + at), 0, rest);
    }
  }

  // Of one row: scores become probabilities, grads those of the probabilities; zeros at keys that
  // are not seen, and in a last row that there is not. Returns the sum of the products of the two.
  float probabilities(const Task& task, const QueryBlock& block, int64_t r, int64_t whole,
                      const uint8_t* bits) const {
    float* scores = scores_ + r * sizes_.key_row;
    float* grads = grads_ + r * sizes_.key_row;
    const int64_t seen = r < block.rows ? block.keys_of(r) : 0;
    V partial[4];
    if (seen > 0) {
      const int64_t statistics = task.head * input_.tokens + task.first + block.first + r;
      const V shift(static_cast<const float*>(args_.max)[statistics]);
      const V norm(1.0f / static_cast<const float*>(args_.sum_exp)[statistics]);
      const V scale(static_cast<float>(input_.scale));
      const V factor(static_cast<float>(input_.dropout_scale));
      for_each_vector<V>(seen, [&](int64_t i, int slot, auto lanes) TPCORE_INLINE_LAMBDA {
        const V score = V::load(scores + i, Full{});
        const V prob = only(exponential<Half>(score * scale - shift) * norm, lanes);
        V grad = only(V::load(grads + i, Full{}), lanes);
        if (bits != nullptr) grad = select(V::bits(bits, i, Full{}), grad * factor, V());
        partial[slot] = multiply_add(prob, grad, partial[slot]);
        prob.store(scores + i, Full{});
        grad.store(grads + i, Full{});
      });
    }
    clear_unseen(scores, seen, whole);
    clear_unseen(grads, seen, whole);
    return total(partial).sum();
  }

  const PackedAttentionBackward& args_;
  const PackedAttention& input_;
  const PairSizes sizes_;
  const Tiles tiles_;
  Scratch scratch_;
  Pair *const keys_, *const keys_transposed_, *const values_transposed_;
  float *const grad_keys_, *const grad_values_;
  Pair *const queries_, *const queries_transposed_;
  float* const grad_queries_;
  Pair *const grad_context_, *const grad_context_transposed_;
  float *const scores_, *const grads_;
  Pair *const prob_pairs_, *const grad_pairs_, *const grad_rows_;
  uint8_t* const keep_;
  const KeepBits keep_bits_;
};

}  // namespace

void packed_attention_forward(const PackedAttentionForward& args, ParallelFor parallel_for) {
  if (args.input.dtype != DType::kBFloat16) {
    return avx512::packed_attention_forward(args, parallel_for);
  }
  parallel_tasks(args.input, parallel_for, [&] { return Forward(args); });
}

void packed_attention_backward(const PackedAttentionBackward& args, ParallelFor parallel_for) {
  if (args.input.dtype != DType::kBFloat16) {
    return avx512::packed_attention_backward(args, parallel_for);
  }
  parallel_tasks(args.input, parallel_for, [&] { return Backward(args); });
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
#endif
