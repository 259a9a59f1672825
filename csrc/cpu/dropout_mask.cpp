// SPDX-License-Identifier: Apache-2.0
// The dropout bits themselves, as a mask in memory.
#include "parallel.h"
#include "philox.h"

namespace tpcore {
namespace TPCORE_ISA {

void dropout_mask(const DropoutMask& args, ParallelFor parallel_for) {
  const int64_t rows = args.batch * args.heads * args.queries;
  // Ten rounds cost about as much as moving eight bytes per column.
  parallel_rows(parallel_for, rows, 8 * args.columns, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t query = row % args.queries;
      const int64_t head = row / args.queries % args.heads;
      const int64_t batch = row / args.queries / args.heads;
      keep_columns(row_key(args.key, batch * args.queries + query, head), args.key.column_offset,
                   args.columns, reinterpret_cast<uint8_t*>(args.keep) + row * args.columns);
    }
  });
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
