// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 in vectors: dropout decisions, one bit each, set where an element is kept.
//
// Each 64-bit lane carries one 32-bit word of one counter. A round needs the whole 64-bit product
// of a word, which is what a lane then holds; its upper half is rubbish to the next multiplication,
// which reads low words only.
#pragma once

#include "simd.h"
#include "tpcore/kernels.h"

namespace tpcore {
namespace TPCORE_ISA {

// Independent counters in flight, in vectors: the latency of a multiplication is several times its
// throughput, and the registers hold no more.
constexpr int kInterleave = U64::size == 8 ? 4 : 3;
constexpr int64_t kColumnsPerVector = 4 * U64::size;
constexpr int64_t kColumnsPerBlock = kInterleave * kColumnsPerVector;

// The bytes that hold the bits of a row.
inline int64_t bit_bytes(int64_t columns) { return (columns + 7) / 8; }

// The decisions of one key: bit c % 8 of byte c / 8 stands for column c.
class KeepBits {
 public:
  // Null for no dropout: then nothing else may be called. Not inline, so that the round keys come
  // from memory: as loads they cost a round nothing, and there are too many for registers.
  __attribute__((noinline)) explicit KeepBits(const DropoutKey* key) : key_(key) {
    if (key == nullptr) return;
    uint32_t k0 = static_cast<uint32_t>(key->seed), k1 = static_cast<uint32_t>(key->seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      round_keys_[round][0] = k0;
      round_keys_[round][1] = k1;
      k0 += kPhiloxWeyl0;
      k1 += kPhiloxWeyl1;
    }
  }

  explicit operator bool() const { return key_ != nullptr; }

  // The first `columns` columns of a row, from key->column_offset on; bit_bytes(columns) are
  // written.
  void row(int64_t row, int64_t head, int64_t columns, uint8_t* bits) const {
    const int64_t skip = key_->column_offset % 4;
    Groups groups = first_groups(row, head, static_cast<uint64_t>(key_->column_offset / 4));
    uint8_t* const end = bits + bit_bytes(columns);
    if (skip == 0) {
      for (; end - bits >= kBlockBytes; bits += kBlockBytes) {
        block(groups, bits);
        groups.first += kColumnsPerBlock / 4;
      }
      if (bits == end) return;
      uint8_t last[kBlockBytes];
      block(groups, last);
      memcpy(bits, last, static_cast<size_t>(end - bits));
      return;
    }
    // A shard that begins inside a group of four: every byte is made of two.
    uint32_t pair = 0;
    for (bool first = true; bits < end; groups.first += kColumnsPerBlock / 4) {
      uint8_t aligned[kBlockBytes];
      block(groups, aligned);
      for (const uint8_t byte : aligned) {
        pair = pair >> 8 | uint32_t{byte} << 8;
        if (!first && bits < end) *bits++ = static_cast<uint8_t>(pair >> skip);
        first = false;
      }
    }
  }

  // The columns [0, columns), rounded up to kColumnsPerVector, of the rows first_row + [0, rows):
  // short rows share a block. Row r begins at byte r * stride.
  void rows(int64_t first_row, int64_t rows, int64_t head, int64_t columns, uint8_t* bits,
            int64_t stride) const {
    const int64_t each = (columns + kColumnsPerVector - 1) / kColumnsPerVector;
    const int64_t count = rows * each;
    for (int64_t at = 0; at < count; at += kInterleave) {
      Groups groups[kInterleave];
      uint8_t* targets[kInterleave];
      for (int i = 0; i < kInterleave; ++i) {
        const int64_t vector = at + i < count ? at + i : count - 1;
        const int64_t row = vector / each, column = vector % each * kColumnsPerVector;
        groups[i] = first_groups(first_row + row, head, static_cast<uint64_t>(column / 4));
        targets[i] = bits + row * stride + column / 8;
      }
      vectors(groups, targets);
    }
  }

 private:
  static constexpr int64_t kVectorBytes = kColumnsPerVector / 8;
  static constexpr int64_t kBlockBytes = kColumnsPerBlock / 8;

  // U64::size groups of four columns of one row: the words of the counter that are the same along
  // the row, and the first that is not.
  struct Groups {
    uint32_t row_low, row_high, head_and_stream;
    uint64_t first;
  };

  TPCORE_INLINE Groups first_groups(int64_t row, int64_t head, uint64_t group) const {
    const uint64_t row_id = static_cast<uint64_t>(key_->row_ids[row]);
    return {static_cast<uint32_t>(row_id), static_cast<uint32_t>(row_id >> 32),
            static_cast<uint32_t>(key_->head_offset + head) << 16 | key_->stream, group};
  }

  TPCORE_INLINE void block(const Groups& first, uint8_t* bits) const {
    Groups groups[kInterleave];
    uint8_t* targets[kInterleave];
    for (int i = 0; i < kInterleave; ++i) {
      groups[i] = first;
      groups[i].first += static_cast<uint64_t>(i * U64::size);
      targets[i] = bits + i * kVectorBytes;
    }
    vectors(groups, targets);
  }

  // kColumnsPerVector bits for each of the groups.
  TPCORE_INLINE void vectors(const Groups (&groups)[kInterleave],
                             uint8_t* const (&bits)[kInterleave]) const {
    const U64 multiplier0(kPhiloxMultiplier0), multiplier1(kPhiloxMultiplier1);
    U64 c0[kInterleave], c1[kInterleave], c2[kInterleave], c3[kInterleave];
    for (int i = 0; i < kInterleave; ++i) {
      // In the first two rounds only one word each depends on the column: the rest is scalar.
      const Groups& group = groups[i];
      const uint64_t row_product = uint64_t{kPhiloxMultiplier1} * group.row_high;
      const uint64_t uniform0 = row_product >> 32 ^ group.row_low ^ round_keys_[0][0];
      const uint64_t uniform_product = kPhiloxMultiplier0 * uniform0;
      const U64 product0 = multiply_low_words(U64::iota(group.first), multiplier0);
      const U64 word2 = product0.shift_right<32>() ^ U64(group.head_and_stream ^ round_keys_[0][1]);
      const U64 product1 = multiply_low_words(word2, multiplier1);
      c0[i] = product1.shift_right<32>() ^ U64(row_product ^ round_keys_[1][0]);
      c1[i] = product1;
      c2[i] = product0 ^ U64(uniform_product >> 32 ^ round_keys_[1][1]);
      c3[i] = U64(uniform_product);
    }
    for (int round = 2; round < kPhiloxRounds; ++round) {
      const U64 round_key0(round_keys_[round][0]), round_key1(round_keys_[round][1]);
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
      store_at_least(c0[i], c1[i], c2[i], c3[i], key_->threshold, bits[i]);
    }
  }

  const DropoutKey* key_;
  uint64_t round_keys_[kPhiloxRounds][2];
};

}  // namespace TPCORE_ISA
}  // namespace tpcore
