// SPDX-License-Identifier: Apache-2.0
// What all CUDA kernels stand on: types, 16-byte vectors, warps, launches. Every intrinsic of the
// language stands in this file; the kernels are plain C++ on top of it, which a C++ compiler with
// tests/cuda_emulation on its include path compiles as well.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "tpcore/kernels.h"
#include "tpcore/math.h"

#define TPCORE_DEVICE __device__ __forceinline__

namespace tpcore {
namespace cuda {

// --- Types ---

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulation<T>::type;

TPCORE_DEVICE float square_root(float value) { return sqrtf(value); }
TPCORE_DEVICE double square_root(double value) { return sqrt(value); }
TPCORE_DEVICE float exponential(float value) { return expf(value); }
TPCORE_DEVICE double exponential(double value) { return exp(value); }
// Of numbers far from the ends of the range: without the detour that division takes for those.
TPCORE_DEVICE float reciprocal(float value) {
  const float rough = __fdividef(1.0f, value);
  return fmaf(fmaf(-value, rough, 1.0f), rough, rough);
}
TPCORE_DEVICE double reciprocal(double value) { return 1.0 / value; }
TPCORE_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
TPCORE_DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// One number as the vector that the functions of tpcore/math.h work on.
struct Lane {
  float value;
  TPCORE_DEVICE Lane() : value(0) {}
  TPCORE_DEVICE explicit Lane(float value) : value(value) {}
};
TPCORE_DEVICE Lane operator+(Lane a, Lane b) { return Lane(a.value + b.value); }
TPCORE_DEVICE Lane operator-(Lane a, Lane b) { return Lane(a.value - b.value); }
TPCORE_DEVICE Lane operator*(Lane a, Lane b) { return Lane(a.value * b.value); }
TPCORE_DEVICE Lane operator/(Lane a, Lane b) { return Lane(a.value / b.value); }
TPCORE_DEVICE Lane multiply_add(Lane a, Lane b, Lane c) {
  return Lane(fmaf(a.value, b.value, c.value));
}
TPCORE_DEVICE Lane fused(Lane a, Lane b, Lane c) { return multiply_add(a, b, c); }
TPCORE_DEVICE Lane fused_minus(Lane a, Lane b, Lane c) {
  return Lane(fmaf(a.value, b.value, -c.value));
}
TPCORE_DEVICE Lane absolute(Lane a) { return Lane(fabsf(a.value)); }
// b where either is NaN.
TPCORE_DEVICE Lane smaller(Lane a, Lane b) { return a.value < b.value ? a : b; }
TPCORE_DEVICE Lane larger(Lane a, Lane b) { return a.value > b.value ? a : b; }
TPCORE_DEVICE bool less(Lane a, Lane b) { return a.value < b.value; }
TPCORE_DEVICE Lane select(bool mask, Lane yes, Lane no) { return mask ? yes : no; }
TPCORE_DEVICE Lane power_of_two(Lane a) { return Lane(float_from_bits(float_bits(a.value) << 23)); }
struct Piece {
  uint32_t number;
  Lane middle;
  // A row is 32 bytes of one line of the cache: the threads of a warp are served at once.
  TPCORE_DEVICE Lane entry(const float (&row)[8]) const { return Lane(row[number]); }
};
TPCORE_DEVICE Piece piece_of(Lane w) {
  const uint32_t bits = float_bits(w.value);
  return {bits >> 21 & 7u, Lane(float_from_bits((bits & 0xffe00000u) | 0x100000u))};
}

TPCORE_DEVICE double double_from_bits(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
TPCORE_DEVICE uint64_t double_bits(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
template <class A>
TPCORE_DEVICE A infinity() {
  return static_cast<A>(__builtin_huge_val());
}

TPCORE_FUNCTION int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
TPCORE_FUNCTION int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
TPCORE_FUNCTION int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// --- Vectors ---

// As many elements of the activations as the widest access moves.
constexpr int kVectorBytes = 16;
template <class T>
constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));

// N numbers to compute with.
template <class A, int N>
struct Vector {
  A values[N];
  TPCORE_DEVICE A& operator[](int i) { return values[i]; }
  TPCORE_DEVICE A operator[](int i) const { return values[i]; }
};

template <class A, int N>
TPCORE_DEVICE Vector<A, N> filled(A value) {
  Vector<A, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result[i] = value;
  return result;
}

// The bits of an element in memory, and how words of 32 bits hold several of them.
template <int bytes>
struct Element {  // 1 or 2
  using Bits = std::conditional_t<bytes == 1, uint8_t, uint16_t>;
  static constexpr int kPerWord = 4 / bytes;
  static TPCORE_DEVICE Bits get(const uint32_t* words, int i) {
    return static_cast<Bits>(words[i / kPerWord] >> 8 * bytes * (i % kPerWord));
  }
  static TPCORE_DEVICE void put(uint32_t* words, int i, Bits bits) {  // in ascending order
    const uint32_t below = i % kPerWord == 0 ? 0u : words[i / kPerWord];
    words[i / kPerWord] = below | static_cast<uint32_t>(bits) << 8 * bytes * (i % kPerWord);
  }
};
template <>
struct Element<4> {
  using Bits = uint32_t;
  static TPCORE_DEVICE Bits get(const uint32_t* words, int i) { return words[i]; }
  static TPCORE_DEVICE void put(uint32_t* words, int i, Bits bits) { words[i] = bits; }
};
template <>
struct Element<8> {
  using Bits = uint64_t;
  static TPCORE_DEVICE Bits get(const uint32_t* words, int i) {
    return static_cast<Bits>(words[2 * i + 1]) << 32 | words[2 * i];
  }
  static TPCORE_DEVICE void put(uint32_t* words, int i, Bits bits) {
    words[2 * i] = static_cast<uint32_t>(bits);
    words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
  }
};

constexpr size_t alignment_of(size_t bytes) {
  return bytes > kVectorBytes ? kVectorBytes : bytes < 4 ? 4 : bytes;
}

// N consecutive elements of T as they stand in memory. Words, not elements: a vector that has been
// asked for stays one piece, nothing waits for it, until somebody computes with it.
template <class T, int N>
struct alignas(alignment_of(sizeof(T) * N)) Packed {
  using Elements = Element<sizeof(T)>;
  static constexpr int kBytes = sizeof(T) * N;
  uint32_t words[(kBytes + 3) / 4];

  TPCORE_DEVICE Acc<T> operator[](int i) const { return number(i, static_cast<T*>(nullptr)); }
  TPCORE_DEVICE typename Elements::Bits bits(int i) const { return Elements::get(words, i); }

 private:
  TPCORE_DEVICE float number(int i, float*) const { return float_from_bits(words[i]); }
  TPCORE_DEVICE double number(int i, double*) const { return double_from_bits(bits(i)); }
  TPCORE_DEVICE float number(int i, BFloat16*) const {
    return float_from_bits(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
  }
  TPCORE_DEVICE float number(int i, Float16*) const {
    return __half2float(__ushort_as_half(bits(i)));
  }
};

template <class T, int N>
TPCORE_DEVICE Vector<Acc<T>, N> widen(const Packed<T, N>& packed) {
  Vector<Acc<T>, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result[i] = packed[i];
  return result;
}

// To T, to nearest even.
TPCORE_DEVICE void narrow(const float* from, uint32_t* to, int n, float*) {
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = float_bits(from[i]);
}
TPCORE_DEVICE void narrow(const double* from, uint32_t* to, int n, double*) {
#pragma unroll
  for (int i = 0; i < n; ++i) Element<8>::put(to, i, double_bits(from[i]));
}
TPCORE_DEVICE void narrow(const float* from, uint32_t* to, int n, BFloat16*) {
#pragma unroll
  for (int i = 0; i < n; i += 2) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(from[i], from[i + 1]);
    memcpy(to + i / 2, &pair, sizeof pair);
  }
}
TPCORE_DEVICE void narrow(const float* from, uint32_t* to, int n, Float16*) {
#pragma unroll
  for (int i = 0; i < n; i += 2) {
    const __half2 pair = __floats2half2_rn(from[i], from[i + 1]);
    memcpy(to + i / 2, &pair, sizeof pair);
  }
}
template <class T, int N>
TPCORE_DEVICE Packed<T, N> narrow(const Vector<Acc<T>, N>& vector) {
  Packed<T, N> result;
  narrow(vector.values, result.words, N, static_cast<T*>(nullptr));
  return result;
}

// Which elements of a vector exist: [first, last) of its N.
struct Lanes {
  int first, last;
};

// Those of the vector that starts at `begin` in a row of `size`. It may start before the row, and
// beyond its end: then none exists.
template <int N>
TPCORE_DEVICE Lanes lanes_at(int64_t begin, int64_t size) {
  const int64_t rest = size - begin;
  return {begin < 0 ? static_cast<int>(-begin) : 0, rest >= N ? N : static_cast<int>(rest)};
}

// How many elements before `row` the last address stands at which a vector may start: rows that are
// cut into vectors from there on move whole vectors, whatever their length and address.
template <int N, class T>
TPCORE_DEVICE int misalignment(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % N);
}

template <class V, class T>
TPCORE_DEVICE bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(V) == 0;
}

// The elements that exist, and zeros. One access, or a few of 16 bytes, if all exist and stand
// aligned; else element by element. The choice is made per access, so that any length, stride and
// address will do.
template <int N, class T>
TPCORE_DEVICE Packed<T, N> load(const T* source, Lanes lanes) {
  using V = Packed<T, N>;
  using Bits = typename V::Elements::Bits;
  if (sizeof(V) == V::kBytes && lanes.first == 0 && lanes.last == N && is_aligned<V>(source)) {
    return *reinterpret_cast<const V*>(source);
  }
  V result;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool exists = i >= lanes.first && i < lanes.last;
    V::Elements::put(result.words, i, exists ? reinterpret_cast<const Bits*>(source)[i] : Bits(0));
  }
  return result;
}

// The vector at `begin` of a row, widened; `missing` everywhere if there is no row.
template <int N, class T>
TPCORE_DEVICE Vector<Acc<T>, N> load_or(const T* row, int64_t begin, Lanes lanes, Acc<T> missing) {
  return row != nullptr ? widen(load<N>(row + begin, lanes)) : filled<Acc<T>, N>(missing);
}

// One instruction; the compiler has been seen to make four of a plain assignment.
TPCORE_DEVICE void store_16_bytes(uint4* target, const uint32_t* words) {
  __stwb(target, make_uint4(words[0], words[1], words[2], words[3]));
}

// Leaves alone what does not exist.
template <int N, class T>
TPCORE_DEVICE void store(T* target, Lanes lanes, const Packed<T, N>& packed) {
  using V = Packed<T, N>;
  using Bits = typename V::Elements::Bits;
  if (lanes.first == 0 && lanes.last == N && is_aligned<V>(target)) {
    constexpr int kWords = V::kBytes / 4;
    if constexpr (kWords % 4 == 0) {
      uint4* const quads = reinterpret_cast<uint4*>(target);
#pragma unroll
      for (int q = 0; q < kWords / 4; ++q) store_16_bytes(quads + q, packed.words + 4 * q);
    } else {
      *reinterpret_cast<V*>(target) = packed;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= lanes.first && i < lanes.last) {
      reinterpret_cast<Bits*>(target)[i] = packed.bits(i);
    }
  }
}

template <class T>
TPCORE_DEVICE T* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<T*>(matrix.data) + row * matrix.row_stride;
}

// Where row (batch, head, query) of a [batch, heads, queries, ..] tensor is.
struct ScoreRow {
  int64_t batch, head, query;

  TPCORE_DEVICE ScoreRow(int64_t row, int64_t heads, int64_t queries) {
    if ((row | heads | queries) >> 32 == 0) {  // 64-bit division is several times as slow
      const uint32_t r = static_cast<uint32_t>(row), q = static_cast<uint32_t>(queries);
      const uint32_t matrix = r / q, h = static_cast<uint32_t>(heads);
      batch = matrix / h;
      head = matrix % h;
      query = r % q;
    } else {
      batch = row / queries / heads;
      head = row / queries % heads;
      query = row % queries;
    }
  }
  TPCORE_DEVICE int64_t offset(const int64_t* strides) const {
    return batch * strides[0] + head * strides[1] + query * strides[2];
  }
};

// --- Warps ---

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarp;

struct Plus {
  template <class A>
  TPCORE_DEVICE A operator()(A a, A b) const {
    return a + b;
  }
  template <class A>
  TPCORE_DEVICE A none() const {
    return 0;
  }
};
struct Larger {  // a NaN loses; it comes back with the sum
  template <class A>
  TPCORE_DEVICE A none() const {
    return -infinity<A>();
  }
  TPCORE_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
  TPCORE_DEVICE double operator()(double a, double b) const { return fmax(a, b); }
};

// `operation` over each group of `width` lanes, a power of two, of a full warp: the same bits on
// every lane, since each step combines the same two numbers on both sides.
template <class A, class Operation>
TPCORE_DEVICE A warp_reduce(A value, Operation operation, int width = kWarp) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    if (distance >= width) continue;
    value = operation(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

TPCORE_DEVICE void block_barrier() { __syncthreads(); }

// --- Host side ---

template <class T, class P>
struct Types {
  using Activation = T;
  using Parameter = P;
};

// function(Types<T, P>{}): parameters have the dtype of the activations or, next to half precision,
// float32.
template <class Function>
Status dispatch_types(DType dtype, DType parameter_dtype, const Function& function) {
  const bool same = dtype == parameter_dtype;
  switch (dtype) {
    case DType::kFloat32:
      return function(Types<float, float>{});
    case DType::kFloat64:
      return function(Types<double, double>{});
    case DType::kBFloat16:
      return same ? function(Types<BFloat16, BFloat16>{}) : function(Types<BFloat16, float>{});
    case DType::kFloat16:
      return same ? function(Types<Float16, Float16>{}) : function(Types<Float16, float>{});
  }
  return cudaErrorInvalidValue;
}

inline int64_t multiprocessors() {
  int device = 0, count = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  return known && count > 0 ? count : 1;
}

// Sums over rows are split into at most so many per multiprocessor: each costs a write and a read
// of a row of sums.
constexpr int kPartialsPerSm = 4;
// Blocks of kTileThreads that fill a multiprocessor.
constexpr int kBlocksPerSm = 8;

// Blocks for `work` pieces that a grid-stride loop takes: enough to fill the device several times
// over, and far from the limits of a grid.
inline int64_t grid_for(int64_t work) { return smaller(work, 32 * multiprocessors()); }

// The one way to launch: kernel<<<grid, block, 0, stream>>>(arguments...). Says what became of it.
template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Stream stream,
              const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  const cudaError_t status =
      cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (status != cudaSuccess) cudaGetLastError();  // reported here, not by the next who asks
  return status;
}

}  // namespace cuda
}  // namespace tpcore
