// SPDX-License-Identifier: Apache-2.0
// The transpose of a matrix of 16-bit numbers.
#include "matrix_blocks.h"
#include "parallel.h"

namespace tpcore {
namespace TPCORE_ISA {
namespace {

constexpr int64_t kBlock = 32;  // rows and columns of a block: a cache line of 16-bit numbers

#if defined(TPCORE_ISA_AVX512)

// y[c, r] = x[r, c] for at most 32 rows and columns, zeros for the rest of the 32 rows. Two rows at
// a time become one of pairs, which are then transposed as 32-bit numbers: those of columns 0..3 of
// every eight, and those of 4..7.
inline void transpose_block(const uint16_t* x, int64_t x_row, uint16_t* y, int64_t y_row,
                            int64_t rows, int64_t columns) {
  Vec<float> low[16], high[16];
  const __mmask32 mask = columns < kBlock ? (1u << columns) - 1u : ~0u;
  for (int64_t i = 0; i < 16; ++i) {
    const int64_t r = 2 * i;
    const __m512i even = _mm512_maskz_loadu_epi16(r < rows ? mask : 0, x + r * x_row);
    const __m512i odd = _mm512_maskz_loadu_epi16(r + 1 < rows ? mask : 0, x + (r + 1) * x_row);
    low[i] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(even, odd));
    high[i] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(even, odd));
  }
  transpose(low);
  transpose(high);
  for (int64_t i = 0; i < 16; ++i) {
    const int64_t c = i / 4 * 8 + i % 4;
    if (c < columns) _mm512_storeu_ps(y + c * y_row, low[i].v);
    if (c + 4 < columns) _mm512_storeu_ps(y + (c + 4) * y_row, high[i].v);
  }
}

#else

inline void transpose_block(const uint16_t* x, int64_t x_row, uint16_t* y, int64_t y_row,
                            int64_t rows, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < kBlock; ++r) y[c * y_row + r] = r < rows ? x[r * x_row + c] : 0;
  }
}

#endif

}  // namespace

void transpose16(const Transpose16& args, ParallelFor parallel_for) {
  const auto* x = static_cast<const uint16_t*>(args.x.data);
  auto* y = static_cast<uint16_t*>(args.y.data);
  const int64_t across = (args.columns + kBlock - 1) / kBlock;
  const int64_t blocks = args.y.row_stride / kBlock * across;  // some may be of zeros alone
  constexpr int64_t kBytes = kBlock * kBlock * 2;
  parallel_pieces(parallel_for, blocks, kTaskBytes / kBytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / across * kBlock, c = i % across * kBlock;
      transpose_block(x + r * args.x.row_stride + c, args.x.row_stride,
                      y + c * args.y.row_stride + r, args.y.row_stride,
                      args.rows - r < kBlock ? args.rows - r : kBlock,
                      args.columns - c < kBlock ? args.columns - c : kBlock);
    }
  });
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
