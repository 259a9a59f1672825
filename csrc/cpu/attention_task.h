// SPDX-License-Identifier: Apache-2.0
// What the two directions of attention over packed sequences share.
//
// A task is one head of one sequence. Its keys and values are packed once, in accumulation type and
// as the products want them; then its queries pass in blocks of kQueries, whose scores [kQueries,
// s] are all that ever exists of the s x s matrix. Tasks share nothing and each is done in a fixed
// order, so the results do not depend on the number of threads.
#pragma once

#include "matrix_blocks.h"
#include "parallel.h"
#include "philox.h"
#include "types.h"
#include "vector_math.h"

namespace tpcore {
namespace TPCORE_ISA {

constexpr int64_t kQueries = 8 * kTileRows;

struct Task {
  int64_t head, first, length;  // the sequence is the tokens first + [0, length)
};

// Some queries of a task, and the keys that the last of them sees; the others see them too, or
// under causal fewer.
struct QueryBlock {
  int64_t first, rows, keys;
  bool causal;

  QueryBlock(const PackedAttention& input, const Task& task, int64_t start, int64_t most = kQueries)
      : first(start),
        rows(task.length - start < most ? task.length - start : most),
        keys(input.causal ? start + rows : task.length),
        causal(input.causal) {}
  int64_t keys_of(int64_t row) const { return causal ? first + row + 1 : keys; }
};

// In scores: a token by itself costs about as much as this many.
inline int64_t work_of(int64_t length) { return length * (length + 64); }

// Calls make()(task) for every head of every sequence. Pieces are equal in work, not in number:
// each is the tasks whose work begins in it. All heads of a sequence come one after the other, as
// they lie in memory.
template <class Make>
void parallel_tasks(const PackedAttention& input, ParallelFor parallel_for, const Make& make) {
  const auto length_of = [&](int64_t i) { return input.cu_seqlens[i + 1] - input.cu_seqlens[i]; };
  int64_t total = 0;
  for (int64_t i = 0; i < input.sequences; ++i) total += input.heads * work_of(length_of(i));
  parallel_pieces(parallel_for, total, 1 << 14, [&](int64_t begin, int64_t end) {
    auto run = make();
    int64_t at = 0;
    for (int64_t i = 0; i < input.sequences; ++i) {
      for (int64_t head = 0; head < input.heads; ++head) {
        if (begin <= at && at < end) run(Task{head, input.cu_seqlens[i], length_of(i)});
        at += work_of(length_of(i));
      }
    }
  });
}

// Sizes of packed matrices, in elements of A.
template <class A>
struct Sizes {
  int64_t head_vectors;    // of a packed row of d numbers
  int64_t head_row;        // the same in numbers
  int64_t matrix;          // [longest, d]
  int64_t block;           // [kQueries, d]
  int64_t score_row;       // a vector more than needed, lest all rows meet in one set of the cache
  int64_t scores;          // [kQueries, longest]
  int64_t keep_row, keep;  // of bits, in bytes

  explicit Sizes(const PackedAttention& input) {
    constexpr int64_t kSize = Vec<A>::size;
    const int64_t key_vectors = vectors_of<A>(input.longest);
    head_vectors = vectors_of<A>(input.head_size);
    head_row = head_vectors * kSize;
    matrix = key_vectors * kSize * head_row;
    block = kQueries * head_row;
    score_row = (key_vectors + 1) * kSize;
    scores = kQueries * score_row;
    keep_row = (input.longest + kColumnsPerVector - 1) / kColumnsPerVector * kColumnsPerVector / 8;
    keep = input.key != nullptr ? kQueries * keep_row : 0;
  }
};

enum Part : int64_t { kQuery, kKey, kValue };

// Where q, k or v of a token of the task begins.
template <class T>
const T* part_of(const PackedAttention& input, const Task& task, Part part, int64_t token) {
  return row_of<const T>(input.qkv, task.first + token) + (3 * task.head + part) * input.head_size;
}

// The bits of a block of queries, if there is dropout.
inline const uint8_t* keep_block_of(const KeepBits& bits, const Task& task, const QueryBlock& block,
                                    uint8_t* keep, int64_t keep_row) {
  if (!bits) return nullptr;
  bits.rows(task.first + block.first, block.rows, task.head, block.keys, keep, keep_row);
  return keep;
}

// Zeros from the vector after the first `seen` keys of a row on: keys that only later queries see.
template <class A>
void clear_unseen(A* row, int64_t seen, int64_t keys) {
  const int64_t from = vectors_of<A>(seen) * Vec<A>::size;
  if (from < keys) memset(row + from, 0, static_cast<size_t>(keys - from) * sizeof(A));
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
