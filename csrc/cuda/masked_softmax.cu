// SPDX-License-Identifier: Apache-2.0
// Masked softmax: formulas in tpcore/kernels.h.
//
// A row of up to 32 KiB stays in the registers of its threads: forward moves 2 s bytes per score
// and the mask, 3 s with dropout (p is kept for backward), backward 3 s. Keys beyond the causal
// limit are not read. Rows are cut into vectors where memory is aligned, so that any number of keys
// moves in whole vectors. Longer rows are read three times instead.
//
// Whether a row has a live key is found out apart from its maximum: without one it is zero, but if
// all live scores are -infinity it is NaN, as the formula says.
#include "dropout.cuh"
#include "rows.cuh"

namespace tpcore {
namespace cuda {
namespace {

constexpr int kVectors = 4;          // of 16 bytes, in the registers of a thread
constexpr int kMaxRowThreads = 512;  // leaves 128 registers to a thread
constexpr int kBlockThreads = 128;   // of short rows

// A row of `keys` elements cut into vectors, the first of which may start before it.
template <int N>
struct Cut {
  int64_t keys;
  int shift;

  TPCORE_DEVICE int64_t vectors() const { return divide_up(keys + shift, N); }
  TPCORE_DEVICE int64_t begin_of(int64_t number) const { return number * N - shift; }
};

// A vector of scores on its way through forward: z is scale * score, -infinity where there is
// nothing to see, then exp(z - max), then p.
template <class T, int N>
struct Scores {
  Packed<T, N> scores;
  Packed<uint8_t, N> masked;
  Vector<Acc<T>, N> z;
};

template <class T, class Row>
__global__ void __launch_bounds__(kMaxRowThreads)
    forward(MaskedSoftmaxForward args, DropoutKey key) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ typename RowReducer<A, 2>::Scratch top_scratch;
  __shared__ typename RowReducer<A, 1>::Scratch sum_scratch;
  RowReducer<A, 2> reduce_tops(top_scratch);
  RowReducer<A, 1> reduce_sum(sum_scratch);
  const int64_t rows = args.batch * args.heads * args.queries;
  const A scale = static_cast<A>(args.scale);

  for_each_row(rows, [&](int64_t row) {
    const bool exists = row < rows;
    const ScoreRow at(exists ? row : 0, args.heads, args.queries);
    const T* scores = static_cast<const T*>(args.scores) + at.offset(args.scores_strides);
    const uint8_t* mask = args.mask ? args.mask + at.offset(args.mask_strides) : nullptr;
    int64_t live = args.keys;
    if (args.causal) live = smaller(live, larger(at.query + args.keys - args.queries + 1, 0));
    if (mask != nullptr && args.mask_strides[3] == 0) {  // all or nothing
      if (*mask) live = 0;
      mask = nullptr;
    }
    const Cut<N> cut{args.keys, misalignment<N>(scores)};
    const int64_t vectors = exists ? cut.vectors() : 0;
    const auto produce = [&](int64_t number) {
      const int64_t begin = cut.begin_of(number);
      const Lanes lanes = lanes_at<N>(begin, live);
      Scores<T, N> vector = {};
      if (lanes.first >= lanes.last) return vector;
      vector.scores = load<N>(scores + begin, lanes);
      if (mask != nullptr) vector.masked = load<N>(mask + begin, lanes);
      return vector;
    };
    Row held;
    held.fill(vectors, produce);

    A tops[2] = {-infinity<A>(), 0};  // the maximum, and 1 if any key is live
    const auto look = [&](int64_t number, Scores<T, N>& vector) {
      const Lanes lanes = lanes_at<N>(cut.begin_of(number), live);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const bool seen = i >= lanes.first && i < lanes.last && vector.masked.bits(i) == 0;
        vector.z[i] = seen ? vector.scores[i] * scale : -infinity<A>();
        tops[0] = Larger()(tops[0], vector.z[i]);
        if (seen) tops[1] = 1;
      }
    };
    held.for_each(vectors, produce, look);
    reduce_tops(tops, Larger());
    const bool dead = tops[1] == 0;
    const A top = dead ? A(0) : tops[0];

    A sum[1] = {0};
    const auto exponentiate = [&](int64_t number, Scores<T, N>& vector) {
      if (!Row::kRemembers) look(number, vector);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        vector.z[i] = exponential(vector.z[i] - top);
        sum[0] += vector.z[i];
      }
    };
    held.for_each(vectors, produce, exponentiate);
    reduce_sum(sum, Plus());
    const A norm = dead ? A(0) : A(1) / sum[0];

    T* y = static_cast<T*>(args.y) + row * args.keys;
    T* probs = static_cast<T*>(args.probs) + row * args.keys;
    held.for_each(vectors, produce, [&](int64_t number, Scores<T, N>& vector) {
      if (!Row::kRemembers) exponentiate(number, vector);
      const int64_t begin = cut.begin_of(number);
      const Lanes lanes = lanes_at<N>(begin, args.keys);
      Vector<A, N>& p = vector.z;
#pragma unroll
      for (int i = 0; i < N; ++i) p[i] *= norm;
      if (drops(key)) {
        store(probs + begin, lanes, narrow<T>(p));
        const RowKey of_row = row_key(key, at.batch * args.queries + at.query, at.head);
        const uint32_t bits = keep_bits<N>(of_row, key.column_offset + begin);
        drop(p, bits, static_cast<A>(args.dropout_scale));
      }
      store(y + begin, lanes, narrow<T>(p));
    });
  });
}

// A vector on its way through backward.
template <class T, int N>
struct ProbsAndGrad {
  Packed<T, N> probs, grad_y;
  uint32_t keep;
};

template <class T, class Row>
__global__ void __launch_bounds__(kMaxRowThreads)
    backward(MaskedSoftmaxBackward args, DropoutKey key) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ typename RowReducer<A, 1>::Scratch scratch;
  RowReducer<A, 1> reduce(scratch);
  const int64_t rows = args.batch * args.heads * args.queries;
  const A scale = static_cast<A>(args.scale);

  for_each_row(rows, [&](int64_t row) {
    const bool exists = row < rows;
    const ScoreRow at(exists ? row : 0, args.heads, args.queries);
    const T* grad_y = static_cast<const T*>(args.grad_y) + at.offset(args.grad_y_strides);
    const T* probs = static_cast<const T*>(args.probs) + at.offset(args.probs_strides);
    T* grad_scores = static_cast<T*>(args.grad_scores) + row * args.keys;
    const Cut<N> cut{args.keys, misalignment<N>(probs)};
    const int64_t vectors = exists ? cut.vectors() : 0;
    const auto produce = [&](int64_t number) {
      const int64_t begin = cut.begin_of(number);
      const Lanes lanes = lanes_at<N>(begin, args.keys);
      return ProbsAndGrad<T, N>{load<N>(probs + begin, lanes), load<N>(grad_y + begin, lanes), 0};
    };
    // keep * grad_y * dropout_scale
    const auto grad_of = [&](const ProbsAndGrad<T, N>& vector) {
      Vector<A, N> grad = widen(vector.grad_y);
      if (drops(key)) drop(grad, vector.keep, static_cast<A>(args.dropout_scale));
      return grad;
    };
    const auto fetch_bits = [&](int64_t number, ProbsAndGrad<T, N>& vector) {
      if (!drops(key)) return;
      const RowKey of_row = row_key(key, at.batch * args.queries + at.query, at.head);
      vector.keep = keep_bits<N>(of_row, key.column_offset + cut.begin_of(number));
    };
    Row held;
    held.fill(vectors, produce);

    A sum[1] = {0};
    held.for_each(vectors, produce, [&](int64_t number, ProbsAndGrad<T, N>& vector) {
      fetch_bits(number, vector);
      const Vector<A, N> grad = grad_of(vector);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[0] = multiply_add(grad[i], vector.probs[i], sum[0]);
    });
    reduce(sum, Plus());
    held.for_each(vectors, produce, [&](int64_t number, ProbsAndGrad<T, N>& vector) {
      if (!Row::kRemembers) fetch_bits(number, vector);
      const int64_t begin = cut.begin_of(number);
      Vector<A, N> grad = grad_of(vector);
#pragma unroll
      for (int i = 0; i < N; ++i) grad[i] = (grad[i] - sum[0]) * vector.probs[i] * scale;
      store(grad_scores + begin, lanes_at<N>(begin, args.keys), narrow<T>(grad));
    });
  });
}

// Launches the kernel for rows that fit in registers, or the other one.
template <int N, class Kernel, class Arguments>
Status launch_rows(Kernel fitting, Kernel longer, const Arguments& args, Stream stream) {
  const int64_t rows = args.batch * args.heads * args.queries;
  const int64_t vectors = divide_up(args.keys + N - 1, N);  // wherever the first one starts
  const dim3 block = row_block(vectors, kVectors, kMaxRowThreads, kBlockThreads);
  const dim3 grid(static_cast<unsigned>(grid_for(divide_up(rows, block.y))));
  const bool fits = vectors <= kVectors * kMaxRowThreads;
  return launch(fits ? fitting : longer, grid, block, stream, args, key_or_none(args.key));
}

}  // namespace

Status masked_softmax_forward(const MaskedSoftmaxForward& args, Stream stream) {
  if (args.batch * args.heads * args.queries * args.keys == 0) return cudaSuccess;
  return dispatch_types(args.dtype, args.dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    using V = Scores<T, kVector<T>>;
    return launch_rows<kVector<T>>(forward<T, RegisterRow<V, kVectors>>, forward<T, MemoryRow<V>>,
                                   args, stream);
  });
}

Status masked_softmax_backward(const MaskedSoftmaxBackward& args, Stream stream) {
  if (args.batch * args.heads * args.queries * args.keys == 0) return cudaSuccess;
  return dispatch_types(args.dtype, args.dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    using V = ProbsAndGrad<T, kVector<T>>;
    return launch_rows<kVector<T>>(backward<T, RegisterRow<V, kVectors>>, backward<T, MemoryRow<V>>,
                                   args, stream);
  });
}

}  // namespace cuda
}  // namespace tpcore
