// SPDX-License-Identifier: Apache-2.0
// The dropout bits themselves, as a mask in memory: one byte written per element.
#include "columns.cuh"
#include "dropout.cuh"

namespace tpcore {
namespace cuda {
namespace {

__global__ void __launch_bounds__(kTileThreads) mask(DropoutMask args) {
  constexpr int N = kVector<uint8_t>;
  const int64_t begin = first_column<N>();
  if (begin >= args.columns) return;
  uint8_t* keep = reinterpret_cast<uint8_t*>(args.keep);
  for_each_row_of_run(args.batch * args.heads * args.queries, [&](int64_t row) {
    const ScoreRow at(row, args.heads, args.queries);
    const RowKey key = row_key(args.key, at.batch * args.queries + at.query, at.head);
    const uint32_t bits = keep_bits<N>(key, args.key.column_offset + begin);
    Packed<uint8_t, N> bytes;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      Element<1>::put(bytes.words, i, static_cast<uint8_t>(bits >> i & 1));
    }
    store(keep + row * args.columns + begin, lanes_at<N>(begin, args.columns), bytes);
  });
}

}  // namespace

Status dropout_mask(const DropoutMask& args, Stream stream) {
  const int64_t rows = args.batch * args.heads * args.queries;
  if (rows == 0 || args.columns == 0) return cudaSuccess;
  const ColumnGrid shape = column_grid(rows, args.columns, kVector<uint8_t>, kBlocksPerSm);
  return launch(mask, shape.grid, shape.block, stream, args);
}

}  // namespace cuda
}  // namespace tpcore
