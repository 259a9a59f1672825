// SPDX-License-Identifier: Apache-2.0
// Cross entropy on a shard of the vocabulary: formulas in tpcore/kernels.h.
//
// The statistics read each logit once (s bytes): maximum and sum of exponentials are kept together,
// and the sum is rescaled when the maximum grows. Backward reads it once and writes its gradient
// once (2 s bytes), so that both together move 6 bytes per bfloat16 logit. Rows are cut into
// vectors where memory is aligned, so that any vocabulary moves in whole vectors; a thread has
// several of them in flight. Columns that are not live are not read, nor are rows that are ignored.
#include "rows.cuh"

namespace tpcore {
namespace cuda {
namespace {

constexpr int kInFlight = 4;  // vectors of 16 bytes per thread
constexpr int kRowThreads = 512;

// The maximum m of some logits, and the sum of exp(logit - m) and of the logits.
template <class A>
struct Online {
  A max = -infinity<A>(), sum_exp = 0, sum = 0;

  // Where every logit is -infinity the sum of exponentials is 0, as it is without any.
  TPCORE_DEVICE A shift() const { return max == -infinity<A>() ? A(0) : max; }
  TPCORE_DEVICE void raise(A to) {
    if (!(to > max)) return;
    sum_exp *= exponential(max - to);  // 0 at first
    max = to;
  }
  template <class T, int N>
  TPCORE_DEVICE void add(const Packed<T, N>& logits, Lanes lanes) {
    Vector<A, N> values;
    A top = -infinity<A>();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values[i] = i >= lanes.first && i < lanes.last ? logits[i] : -infinity<A>();
      top = Larger()(top, values[i]);
    }
    raise(top);
    A exponentials = 0, logits_sum = 0;  // of a vector first: fewer roundings in a long row
#pragma unroll
    for (int i = 0; i < N; ++i) {
      exponentials += exponential(values[i] - shift());
      logits_sum += logits[i];  // missing ones are 0
    }
    sum_exp += exponentials;
    sum += logits_sum;
  }
};

template <class T>
__global__ void __launch_bounds__(kRowThreads) statistics(CrossEntropyStatistics args) {
  using A = Acc<T>;
  using V = Packed<T, kVector<T>>;
  constexpr int N = kVector<T>;
  __shared__ typename RowReducer<A, 1>::Scratch max_scratch;
  __shared__ typename RowReducer<A, 2>::Scratch sum_scratch;
  RowReducer<A, 1> reduce_max(max_scratch);
  RowReducer<A, 2> reduce_sums(sum_scratch);
  const VocabularyShard& shard = args.shard;

  for_each_row(shard.tokens, [&](int64_t row) {
    const bool exists = row < shard.tokens;
    const T* logits = row_of<T>(shard.logits, exists ? row : 0);
    const int shift = misalignment<N>(logits);
    const int64_t vectors = exists ? divide_up(shard.live + shift, N) : 0;
    Online<A> found;
    for (int64_t first = 0; first < vectors; first += kInFlight * blockDim.x) {
      const auto begin_of = [&](int64_t number) { return (first + number) * N - shift; };
      const auto produce = [&](int64_t number) {
        const int64_t begin = begin_of(number);
        return load<N>(logits + begin, lanes_at<N>(begin, shard.live));
      };
      RegisterRow<V, kInFlight> some;
      some.fill(vectors - first, produce);
      some.for_each(vectors - first, produce, [&](int64_t number, const V& vector) {
        found.add(vector, lanes_at<N>(begin_of(number), shard.live));
      });
    }
    A max[1] = {found.max};
    reduce_max(max, Larger());
    found.raise(max[0]);
    A sums[2] = {found.sum_exp, found.sum};
    reduce_sums(sums, Plus());
    if (threadIdx.x != 0 || !exists) return;

    const int64_t target = shard.target[row], local = target - shard.vocab_start;
    A target_logit = 0;
    if (target != shard.ignore_index) {
      if (target < 0 || target >= shard.num_classes) {
        target_logit = static_cast<A>(__builtin_nan(""));
      } else if (local >= 0 && local < shard.live) {
        target_logit = load<kVector<T>>(logits + local, Lanes{0, 1})[0];
      }
    }
    static_cast<A*>(args.max)[row] = max[0];
    static_cast<A*>(args.sum_exp)[row] = sums[0];
    static_cast<A*>(args.target_logit)[row] = target_logit;
    static_cast<A*>(args.sum_logits)[row] = sums[1];
  });
}

// Along y of the grid a row is split between blocks, for the case of few rows.
template <class T>
__global__ void __launch_bounds__(kRowThreads) backward(CrossEntropyBackward args) {
  using A = Acc<T>;
  using V = Packed<T, kVector<T>>;
  constexpr int N = kVector<T>;
  const VocabularyShard& shard = args.shard;
  const A smoothing = static_cast<A>(args.label_smoothing / static_cast<double>(shard.num_classes));
  const A confidence = static_cast<A>(1.0 - args.label_smoothing);

  for_each_row(shard.tokens, [&](int64_t row) {
    if (row >= shard.tokens) return;
    const T* logits = row_of<T>(shard.logits, row);
    T* grad_logits = static_cast<T*>(args.grad_logits) + row * shard.columns;
    const int64_t target = shard.target[row], local = target - shard.vocab_start;
    const int64_t live = target == shard.ignore_index ? 0 : shard.live;
    const A max = static_cast<const A*>(args.max)[row];
    const A norm = A(1) / static_cast<const A*>(args.sum_exp)[row];
    const A grad_loss = static_cast<const A*>(args.grad_loss)[row];
    const int shift = misalignment<N>(logits);
    const int64_t vectors = divide_up(shard.columns + shift, N);
    const int64_t step = static_cast<int64_t>(kInFlight) * blockDim.x;
    for (int64_t first = blockIdx.y * step; first < vectors; first += gridDim.y * step) {
      const auto begin_of = [&](int64_t number) { return (first + number) * N - shift; };
      const auto produce = [&](int64_t number) {
        const int64_t begin = begin_of(number);
        return load<N>(logits + begin, lanes_at<N>(begin, live));
      };
      RegisterRow<V, kInFlight> some;
      some.fill(vectors - first, produce);
      some.for_each(vectors - first, produce, [&](int64_t number, const V& vector) {
        const int64_t begin = begin_of(number), hit = local - begin, rest = live - begin;
        const int target_lane = hit >= 0 && hit < N ? static_cast<int>(hit) : -1;
        const int live_lanes = rest < N ? static_cast<int>(larger(rest, 0)) : N;
        Vector<A, N> grad;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          A value = exponential(vector[i] - max) * norm - smoothing;
          if (i == target_lane) value -= confidence;
          grad[i] = i < live_lanes ? value * grad_loss : A(0);
        }
        store(grad_logits + begin, lanes_at<N>(begin, shard.columns), narrow<T>(grad));
      });
    }
  });
}

dim3 block_for(int64_t vectors) { return row_block(vectors, kInFlight, kRowThreads, 128); }

}  // namespace

Status cross_entropy_statistics(const CrossEntropyStatistics& args, Stream stream) {
  if (args.shard.tokens == 0) return cudaSuccess;
  return dispatch_types(args.shard.dtype, args.shard.dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    const dim3 block = block_for(divide_up(args.shard.live, kVector<T>));
    const dim3 grid(static_cast<unsigned>(grid_for(divide_up(args.shard.tokens, block.y))));
    return launch(statistics<T>, grid, block, stream, args);
  });
}

Status cross_entropy_backward(const CrossEntropyBackward& args, Stream stream) {
  if (args.shard.tokens == 0 || args.shard.columns == 0) return cudaSuccess;
  return dispatch_types(args.shard.dtype, args.shard.dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    const int64_t vectors = divide_up(args.shard.columns, kVector<T>);
    const dim3 block = block_for(vectors);
    const int64_t blocks = grid_for(divide_up(args.shard.tokens, block.y));
    const int64_t pieces = divide_up(vectors, static_cast<int64_t>(kInFlight) * block.x);
    const int64_t splits = larger(1, smaller(pieces, 4 * multiprocessors() / blocks));
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(splits));
    return launch(backward<T>, grid, block, stream, args);
  });
}

}  // namespace cuda
}  // namespace tpcore
