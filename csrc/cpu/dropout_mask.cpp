// SPDX-License-Identifier: Apache-2.0
// The dropout bits themselves, as a mask in memory.
#include "parallel.h"
#include "philox.h"

namespace tpcore {
namespace TPCORE_ISA {
namespace {

// A byte 0 or 1 for each bit.
void spread_bits(const uint8_t* bits, int64_t columns, uint8_t* bytes) {
  for (int64_t c = 0; c < columns; c += 8) {
    const uint64_t copies = bits[c / 8] * 0x0101010101010101u;
    const uint64_t chosen = copies & 0x8040201008040201u;  // byte k holds bit k
    const uint64_t ones = (chosen + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
    memcpy(bytes + c, &ones, static_cast<size_t>(columns - c < 8 ? columns - c : 8));
  }
}

}  // namespace

void dropout_mask(const DropoutMask& args, ParallelFor parallel_for) {
  const int64_t rows = args.batch * args.heads * args.queries;
  // Ten rounds cost about as much as moving eight bytes per column.
  parallel_rows(parallel_for, rows, 8 * args.columns, [&](int64_t begin, int64_t end) {
    const KeepBits keep(&args.key);
    Scratch scratch;
    uint8_t* bits = scratch.take<uint8_t>(bit_bytes(args.columns));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t query = row % args.queries;
      const int64_t head = row / args.queries % args.heads;
      const int64_t batch = row / args.queries / args.heads;
      keep.row(batch * args.queries + query, head, args.columns, bits);
      spread_bits(bits, args.columns, reinterpret_cast<uint8_t*>(args.keep) + row * args.columns);
    }
  });
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
