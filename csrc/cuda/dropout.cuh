// SPDX-License-Identifier: Apache-2.0
// The dropout bits: functions of a key and of global coordinates, equal bit for bit to those of the
// CPU. Nothing is stored; backward makes them again.
#pragma once

#include "common.cuh"

namespace tpcore {
namespace cuda {

// What a kernel takes in place of a pointer to host memory.
inline DropoutKey key_or_none(const DropoutKey* key) { return key ? *key : DropoutKey{}; }
TPCORE_DEVICE bool drops(const DropoutKey& key) { return key.row_ids != nullptr; }

// The words of the counter and the key that are the same along a row.
struct RowKey {
  uint32_t row_low, row_high, head_and_stream, key0, key1, threshold;
};

TPCORE_DEVICE RowKey row_key(const DropoutKey& key, int64_t row, int64_t head) {
  const uint64_t row_id = static_cast<uint64_t>(key.row_ids[row]);
  const uint64_t seed = static_cast<uint64_t>(*key.device_seed);
  return {static_cast<uint32_t>(row_id),
          static_cast<uint32_t>(row_id >> 32),
          static_cast<uint32_t>(key.head_offset + head) << 16 | key.stream,
          static_cast<uint32_t>(seed),
          static_cast<uint32_t>(seed >> 32),
          key.threshold};
}

// Bit i: whether column `first` + i is kept, for N columns. One counter serves four columns, so N
// columns take N / 4 counters, and one more if they do not start at a multiple of four.
template <int N>
TPCORE_DEVICE uint32_t keep_bits(const RowKey& key, int64_t first) {
  const int skip = static_cast<int>(first & 3);
  const uint32_t group = static_cast<uint32_t>(first >> 2);
  uint32_t bits = 0;
#pragma unroll
  for (int g = 0; 4 * g < N + 3; ++g) {
    if (4 * g >= N + skip) continue;
    uint32_t counter[4] = {group + static_cast<uint32_t>(g), key.row_low, key.row_high,
                           key.head_and_stream};
    philox4x32(counter, key.key0, key.key1);
#pragma unroll
    for (int w = 0; w < 4; ++w) bits |= (counter[w] >= key.threshold ? 1u : 0u) << (4 * g + w);
  }
  return bits >> skip;
}

// values[i] * scale where bit i says kept, else 0, whatever the value was.
template <class A, int N>
TPCORE_DEVICE void drop(Vector<A, N>& values, uint32_t bits, A scale) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = bits >> i & 1 ? values[i] * scale : A(0);
}

}  // namespace cuda
}  // namespace tpcore
