// SPDX-License-Identifier: Apache-2.0
// Collectives over the steps of shm_channel.h. Each is a number of steps, what a rank writes into
// its half in a step, and what it reads from the halves of the others after it:
//
//     publish     write(0), publish                                     returns at once
//     complete    wait, read(0), write(1), publish, wait, read(1), ...   until the last read
//
// Sums are taken in the order of the ranks, in the accumulation dtype, and rounded once, by
// whichever rank takes them: so every rank and every run gets the same bits, whatever the size of a
// message, the number of threads or the instruction set.
#include "parallel.h"
#include "shm_channel.h"
#include "simd.h"
#include "types.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace tpcore {
namespace TPCORE_ISA {
namespace {

constexpr int64_t kLine = 64;
// A thread is worth waking for so many bytes.
constexpr int64_t kCopyBytes = 64 * 1024;
// Up to here every rank reduces everything, which takes one step; from there on each reduces its
// slice and gathers the others, which moves less.
constexpr int64_t kOneShotBytes = 32 * 1024;
constexpr int64_t kBlockBytes = 8 * 1024;  // fits the nearest cache, several times
constexpr int kMaxRanks = 64;

struct Sum {
  template <class V>
  TPCORE_INLINE V operator()(V total, V x) const {
    return total + x;
  }
};

// NaN if either is. `less` is false for a NaN; where x is not below infinity it is infinite or NaN,
// and then total * total + x is infinite unless either is NaN.
struct Max {
  template <class A>
  TPCORE_INLINE Vec<A> operator()(Vec<A> total, Vec<A> x) const {
    const Vec<A> infinity(static_cast<A>(__builtin_inf()));
    return select(less(x, infinity), select(less(total, x), x, total), total * total + x);
  }
};

int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Writes into the own half, for others to read. Ordinary stores would first fetch the lines back,
// one by one, from the caches of those who read them last; streaming stores do not. They obey no
// order of their own, so a fence puts them before the release that publishes them. `to` is aligned.
void stream(const void* from, void* to, int64_t bytes) {
  int64_t done = 0;
#if defined(__SSE2__)
  for (; done + 16 <= bytes; done += 16) {
    const void* at = static_cast<const char*>(from) + done;
    _mm_stream_si128(reinterpret_cast<__m128i*>(static_cast<char*>(to) + done),
                     _mm_loadu_si128(static_cast<const __m128i*>(at)));
  }
  _mm_sfence();
#endif
  memcpy(static_cast<char*>(to) + done, static_cast<const char*>(from) + done,
         static_cast<size_t>(bytes - done));
}

// sources[0] + sources[1] + ..., in this order.
template <class Op, int P, class T>
void reduce_piece(const T* const* sources, int ranks, int64_t begin, int64_t end, T* out) {
  using V = Vec<Acc<T>>;
  const Op op;
  for_each_vector<V>(end - begin, [&](int64_t i, int, auto lanes) TPCORE_INLINE_LAMBDA {
    V total = V::load(sources[0] + begin + i, lanes);
    for (int r = 1; r < (P ? P : ranks); ++r) {
      total = op(total, V::load(sources[r] + begin + i, lanes));
    }
    total.store(out + begin + i, lanes);
  });
}

// The same over threads, in blocks that are still in the nearest cache when they are written a
// second time, into `shared` (if any).
template <class Op, class T>
void reduce(ParallelFor parallel_for, const T* const* sources, int ranks, int64_t count, T* out,
            T* shared = nullptr) {
  constexpr int64_t block = kBlockBytes / static_cast<int64_t>(sizeof(T));
  const auto reduce_block = [&](int64_t begin, int64_t end) {
    if (ranks == 2) return reduce_piece<Op, 2>(sources, ranks, begin, end, out);
    if (ranks == 4) return reduce_piece<Op, 4>(sources, ranks, begin, end, out);
    reduce_piece<Op, 0>(sources, ranks, begin, end, out);
  };
  const int64_t blocks = (count + block - 1) / block, grain = kCopyBytes / kBlockBytes;
  parallel_pieces(parallel_for, blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * block, end = smaller_of(begin + block, count);
      reduce_block(begin, end);
      if (shared == nullptr) continue;
      stream(out + begin, shared + begin, (end - begin) * static_cast<int64_t>(sizeof(T)));
    }
  });
}

// The arguments of a collective over `count` elements, taken in chunks of `chunk` (the last one may
// be shorter).
template <class T>
struct Chunked {
  const ShmCollective& args;
  const ShmChannel& channel;
  ParallelFor parallel_for;
  int64_t count = args.count, chunk = channel.half_bytes() / static_cast<int64_t>(sizeof(T));
  const T* x = static_cast<const T*>(args.x);
  T* out = static_cast<T*>(args.out);

  Chunked(const ShmCollective& args, const ShmChannel& channel, ParallelFor parallel_for)
      : args(args), channel(channel), parallel_for(parallel_for) {}
  int64_t chunks() const { return (count + chunk - 1) / chunk; }
  int64_t begin(int64_t c) const { return c * chunk; }
  int64_t length(int64_t c) const { return smaller_of(chunk, count - c * chunk); }
  int rank() const { return channel.rank(); }
  int size() const { return channel.size(); }
  T* own_half() const { return reinterpret_cast<T*>(channel.own_half()); }
  const T* half_of(int r) const { return reinterpret_cast<const T*>(channel.half_of(r)); }
  // Into the own half.
  void put(const T* from, T* to, int64_t n) const { in_pieces(from, to, n, stream); }
  // Out of a half, or from x.
  void take(const T* from, T* to, int64_t n) const {
    if (from != to) in_pieces(from, to, n, copy);
  }

 private:
  static void copy(const void* from, void* to, int64_t bytes) {
    memcpy(to, from, static_cast<size_t>(bytes));
  }
  template <class Copy>
  void in_pieces(const T* from, T* to, int64_t n, const Copy& copy_piece) const {
    constexpr int64_t line = kLine / static_cast<int64_t>(sizeof(T));
    const int64_t lines = (n + line - 1) / line, grain = kCopyBytes / kLine;
    parallel_pieces(parallel_for, lines, grain, [&](int64_t first, int64_t last) {
      const int64_t begin = first * line, end = smaller_of(last * line, n);
      copy_piece(from + begin, to + begin, (end - begin) * static_cast<int64_t>(sizeof(T)));
    });
  }
};

// out[r] = x of rank r, for all r.
struct AllGather : Chunked<char> {
  using Chunked<char>::Chunked;
  int64_t steps() const { return chunks(); }
  void write(int64_t s) const { put(x + begin(s), own_half(), length(s)); }
  void read(int64_t s) const {
    for (int r = 0; r < size(); ++r) {
      const char* from = r == rank() ? x + begin(s) : half_of(r);
      take(from, out + r * count + begin(s), length(s));
    }
  }
};

// out = x of the source.
struct Broadcast : Chunked<char> {
  using Chunked<char>::Chunked;
  bool is_source() const { return rank() == args.source; }
  int64_t steps() const { return chunks(); }
  void write(int64_t s) const {
    if (is_source()) put(x + begin(s), own_half(), length(s));
  }
  void read(int64_t s) const {
    const char* from = is_source() ? x + begin(s) : half_of(args.source);
    take(from, out + begin(s), length(s));
  }
};

// out = the sum of x over the ranks; every rank takes all of it.
template <class T, class Op>
struct OneShotAllReduce : Chunked<T> {
  using Chunked<T>::Chunked;
  int64_t steps() const { return this->chunks(); }
  void write(int64_t s) const {
    this->put(this->x + this->begin(s), this->own_half(), this->length(s));
  }
  void read(int64_t s) const {
    const T* sources[kMaxRanks];
    for (int r = 0; r < this->size(); ++r) {
      sources[r] = r == this->rank() ? this->x + this->begin(s) : this->half_of(r);
    }
    T* out = this->out + this->begin(s);
    reduce<Op>(this->parallel_for, sources, this->size(), this->length(s), out);
  }
};

// Chunks that are split into slices, slice r for rank r to sum up. Derived classes say where the
// slices are in x; in the halves slice r starts at r * width, whatever its length.
struct Slice {
  int64_t begin, length;
};

template <class Derived, class T, class Op>
struct Sliced : Chunked<T> {
  static constexpr int64_t line = kLine / static_cast<int64_t>(sizeof(T));
  const int64_t width = this->chunk / this->size() / line * line;

  using Chunked<T>::Chunked;
  // Writes what the other ranks need of chunk c.
  void share(int64_t c) const {
    for (int r = 0; r < this->size(); ++r) {
      if (r == this->rank()) continue;
      const Slice slice = derived().slice(c, r);
      this->put(this->x + slice.begin, this->own_half() + r * width, slice.length);
    }
  }
  // Sums up the own slice of chunk c.
  void sum(int64_t c, T* out, T* shared = nullptr) const {
    const Slice slice = derived().slice(c, this->rank());
    const T* sources[kMaxRanks];
    for (int r = 0; r < this->size(); ++r) {
      sources[r] = this->half_of(r) + this->rank() * width;
    }
    sources[this->rank()] = this->x + slice.begin;
    reduce<Op>(this->parallel_for, sources, this->size(), slice.length, out, shared);
  }

 private:
  const Derived& derived() const { return static_cast<const Derived&>(*this); }
};

// out = the sum of x over the ranks: each sums up its slice, then gathers the others. Step s writes
// chunk s and, in the place of the own slice that no other rank needs, the sum of chunk s - 1.
template <class T, class Op>
struct TwoShotAllReduce : Sliced<TwoShotAllReduce<T, Op>, T, Op> {
  TwoShotAllReduce(const ShmCollective& args, const ShmChannel& channel, ParallelFor parallel_for)
      : Sliced<TwoShotAllReduce, T, Op>(args, channel, parallel_for) {
    this->chunk = this->size() * this->width;
  }
  int64_t steps() const { return this->chunks() + 1; }
  Slice slice(int64_t c, int r) const {
    const int64_t length = this->length(c), lines = this->size() * this->line;
    const int64_t width = (length + lines - 1) / lines * this->line;
    const int64_t begin = smaller_of(r * width, length);
    return {this->begin(c) + begin, smaller_of(width, length - begin)};
  }
  void write(int64_t s) const {
    if (s < this->chunks()) this->share(s);
    if (s == 0) return;
    T* out = this->out + slice(s - 1, this->rank()).begin;
    this->sum(s - 1, out, this->own_half() + this->rank() * this->width);
  }
  void read(int64_t s) const {
    if (s == 0) return;
    for (int r = 0; r < this->size(); ++r) {
      if (r == this->rank()) continue;
      const Slice from = slice(s - 1, r);
      this->take(this->half_of(r) + r * this->width, this->out + from.begin, from.length);
    }
  }
};

// out = slice r of the sum of x over the ranks, on rank r; count is the length of a slice.
template <class T, class Op>
struct ReduceScatter : Sliced<ReduceScatter<T, Op>, T, Op> {
  ReduceScatter(const ShmCollective& args, const ShmChannel& channel, ParallelFor parallel_for)
      : Sliced<ReduceScatter, T, Op>(args, channel, parallel_for) {
    this->chunk = this->width;
  }
  int64_t steps() const { return this->chunks(); }
  Slice slice(int64_t c, int r) const {
    return {r * this->count + this->begin(c), this->length(c)};
  }
  void write(int64_t s) const { this->share(s); }
  void read(int64_t s) const { this->sum(s, this->out + this->begin(s)); }
};

// Calls function(collective) with the one that the arguments ask for.
template <class Function>
ShmFailure with_collective(const ShmCollective& args, const ShmChannel& channel,
                           ParallelFor parallel_for, const Function& function) {
  if (args.kind == Collective::kAllGather) return function(AllGather(args, channel, parallel_for));
  if (args.kind == Collective::kBroadcast) return function(Broadcast(args, channel, parallel_for));
  ShmFailure failure;
  dispatch_types(args.dtype, args.dtype, [&](auto types) {
    using T = typename decltype(types)::Activation;
    const auto run = [&](auto collective) { failure = function(collective); };
    const bool small = args.count * static_cast<int64_t>(sizeof(T)) <= kOneShotBytes;
    if (args.kind == Collective::kReduceScatter) {
      run(ReduceScatter<T, Sum>(args, channel, parallel_for));
    } else if (args.kind == Collective::kAllReduceMax) {
      if (small) return run(OneShotAllReduce<T, Max>(args, channel, parallel_for));
      run(TwoShotAllReduce<T, Max>(args, channel, parallel_for));
    } else {
      if (small) return run(OneShotAllReduce<T, Sum>(args, channel, parallel_for));
      run(TwoShotAllReduce<T, Sum>(args, channel, parallel_for));
    }
  });
  return failure;
}

// What must be the same on all ranks.
uint64_t call_of(const ShmCollective& args) {
  return static_cast<uint64_t>(args.count) << 24 | static_cast<uint64_t>(args.source) << 16 |
         static_cast<uint64_t>(args.dtype) << 8 | static_cast<uint64_t>(args.kind);
}

}  // namespace

ShmFailure shm_publish(const ShmCollective& args, ParallelFor parallel_for) {
  ShmChannel channel(args.member);
  return with_collective(args, channel, parallel_for, [&](const auto& collective) -> ShmFailure {
    if (collective.steps() == 0) return {};
    collective.write(0);
    return channel.publish(call_of(args));
  });
}

ShmFailure shm_complete(const ShmCollective& args, ParallelFor parallel_for) {
  ShmChannel channel(args.member);
  const uint64_t call = call_of(args);
  return with_collective(args, channel, parallel_for, [&](const auto& collective) -> ShmFailure {
    for (int64_t step = 0; step < collective.steps(); ++step) {
      if (step > 0) {
        collective.write(step);
        const ShmFailure failure = channel.publish(call);
        if (failure.why != ShmFailure::kNone) return failure;
      }
      const ShmFailure failure = channel.wait(call);
      if (failure.why != ShmFailure::kNone) return failure;
      collective.read(step);
    }
    return {};
  });
}

}  // namespace TPCORE_ISA
}  // namespace tpcore
