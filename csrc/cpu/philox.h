// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 in vectors: the dropout bits of one row.
//
// Each 64-bit lane carries one 32-bit word of one counter. A round needs the whole 64-bit product
// of a word, which is what a lane then holds; its upper half is rubbish to the next multiplication,
// which reads low words only.
#pragma once

#include "simd.h"
#include "tpcore/kernels.h"

namespace tpcore {
namespace TPCORE_ISA {

// The words of the counter and the key that are the same along a row.
struct RowKey {
  uint32_t row_low, row_high, head_and_stream, key0, key1, threshold;
};

TPCORE_INLINE RowKey row_key(const DropoutKey& key, int64_t row, int64_t head) {
  const uint64_t row_id = static_cast<uint64_t>(key.row_ids[row]);
  return {static_cast<uint32_t>(row_id),
          static_cast<uint32_t>(row_id >> 32),
          static_cast<uint32_t>(key.head_offset + head) << 16 | key.stream,
          static_cast<uint32_t>(key.seed),
          static_cast<uint32_t>(key.seed >> 32),
          key.threshold};
}

// Independent counters in flight: the latency of the multiplication is several times its
// throughput.
constexpr int kInterleave = 4;
constexpr int64_t kGroupsPerBlock = kInterleave * U64::size;
constexpr int64_t kColumnsPerBlock = 4 * kGroupsPerBlock;

// Groups of four columns of one row.
struct Groups {
  RowKey key;
  uint64_t first;
};

// keep[i][4 * g + w] = word w of the counter of group groups[i].first + g is at least the
// threshold, as bytes 0 or 1, for U64::size groups g each. Rows may differ, seed and threshold may
// not.
TPCORE_INLINE void keep_groups(const Groups (&groups)[kInterleave],
                               uint8_t* const (&keep)[kInterleave]) {
  const RowKey& common = groups[0].key;
  uint32_t k0 = common.key0 + kPhiloxWeyl0, k1 = common.key1 + kPhiloxWeyl1;
  const U64 multiplier0(kPhiloxMultiplier0), multiplier1(kPhiloxMultiplier1);
  U64 c0[kInterleave], c1[kInterleave], c2[kInterleave], c3[kInterleave];
  for (int i = 0; i < kInterleave; ++i) {
    // In the first two rounds only one word each depends on the column: the rest is scalar.
    const RowKey& key = groups[i].key;
    const uint64_t row_product = uint64_t{kPhiloxMultiplier1} * key.row_high;
    const uint32_t uniform0 = static_cast<uint32_t>(row_product >> 32) ^ key.row_low ^ common.key0;
    const uint64_t uniform_product = uint64_t{kPhiloxMultiplier0} * uniform0;
    const U64 product0 = multiply_low_words(U64::iota(groups[i].first), multiplier0);
    const U64 word2 = product0.shift_right<32>() ^ U64(key.head_and_stream ^ common.key1);
    const U64 product1 = multiply_low_words(word2, multiplier1);
    c0[i] = product1.shift_right<32>() ^ U64(static_cast<uint32_t>(row_product) ^ k0);
    c1[i] = product1;
    c2[i] = product0 ^ U64(static_cast<uint32_t>(uniform_product >> 32) ^ k1);
    c3[i] = U64(uniform_product);
  }
  for (int round = 2; round < kPhiloxRounds; ++round) {
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
    const U64 round_key0(k0), round_key1(k1);
    for (int i = 0; i < kInterleave; ++i) {
      const U64 product0 = multiply_low_words(c0[i], multiplier0);
      const U64 product1 = multiply_low_words(c2[i], multiplier1);
      c0[i] = xor3(product1.shift_right<32>(), c1[i], round_key0);
      c2[i] = xor3(product0.shift_right<32>(), c3[i], round_key1);
      c1[i] = product1;
      c3[i] = product0;
    }
  }
  for (int i = 0; i < kInterleave; ++i) {
    store_at_least(c0[i], c1[i], c2[i], c3[i], common.threshold, keep[i]);
  }
}

// The same for kGroupsPerBlock groups of one row.
TPCORE_INLINE void keep_block(const RowKey& key, uint64_t first_group, uint8_t* keep) {
  static_assert(kInterleave == 4, "the pieces of the block are written out");
  constexpr int64_t kStep = U64::size;
  keep_groups({{key, first_group},
               {key, first_group + kStep},
               {key, first_group + 2 * kStep},
               {key, first_group + 3 * kStep}},
              {keep, keep + 4 * kStep, keep + 8 * kStep, keep + 12 * kStep});
}

// keep[c] for the columns first_column + [0, columns) of a row, 0 <= first_column.
inline void keep_columns(const RowKey& key, int64_t first_column, int64_t columns, uint8_t* keep) {
  if (columns == 0) return;  // keep may be null
  const int64_t skip = first_column % 4;
  int64_t group = first_column / 4;
  // `at` is where the block of `group` starts in keep; the first block may start before it, the
  // last end after it.
  for (int64_t at = -skip; at < columns; at += kColumnsPerBlock, group += kGroupsPerBlock) {
    if (at >= 0 && at + kColumnsPerBlock <= columns) {
      keep_block(key, static_cast<uint64_t>(group), keep + at);
      continue;
    }
    uint8_t block[kColumnsPerBlock];
    keep_block(key, static_cast<uint64_t>(group), block);
    const int64_t begin = at < 0 ? -at : 0;
    const int64_t end = columns - at < kColumnsPerBlock ? columns - at : kColumnsPerBlock;
    memcpy(keep + (at + begin), block + begin, static_cast<size_t>(end - begin));
  }
}

// keep[r * stride + c] for the columns [0, columns), rounded up to kColumnsPerVector, of the rows
// first_row + [0, rows): short rows share a block.
constexpr int64_t kColumnsPerVector = 4 * U64::size;
inline void keep_rows(const DropoutKey& key, int64_t first_row, int64_t rows, int64_t head,
                      int64_t columns, uint8_t* keep, int64_t stride) {
  const int64_t each = (columns + kColumnsPerVector - 1) / kColumnsPerVector;
  const int64_t count = rows * each;
  for (int64_t at = 0; at < count; at += kInterleave) {
    Groups groups[kInterleave];
    uint8_t* targets[kInterleave];
    for (int i = 0; i < kInterleave; ++i) {
      const int64_t vector = at + i < count ? at + i : count - 1;
      const int64_t row = vector / each, column = vector % each * kColumnsPerVector;
      groups[i] = {row_key(key, first_row + row, head), static_cast<uint64_t>(column / 4)};
      targets[i] = keep + row * stride + column;
    }
    keep_groups(groups, targets);
  }
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
