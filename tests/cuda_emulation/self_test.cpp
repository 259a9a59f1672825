// SPDX-License-Identifier: Apache-2.0
// Tests of the emulation itself, and of every wrapper of csrc/cuda/common.cuh on top of it.
#include <cmath>
#include <string>
#include <vector>

#include "../../csrc/cuda/common.cuh"

namespace {

using namespace tpcore::cuda;

// What went wrong first; empty if nothing did.
std::string failure;

void expect(bool holds, const char* what) {
  if (!holds && failure.empty()) failure = what;
}

template <class Body>
void kernel(Body body) {
  body();
}

template <class Body>
void run(dim3 grid, dim3 block, Body body) {
  expect(launch(kernel<Body>, grid, block, nullptr, body) == cudaSuccess, "launch");
}

void coordinates() {
  std::vector<int> visits(2 * 3 * 5 * 7);
  int* visit = visits.data();
  run(dim3(2, 3), dim3(5, 7), [=] {
    const unsigned block = blockIdx.y * gridDim.x + blockIdx.x;
    ++visit[(block * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x];
  });
  for (int count : visits) expect(count == 1, "every thread of every block runs once");
}

void warps() {
  std::vector<unsigned> result(64 * 6);
  unsigned* out = result.data();
  run(dim3(1), dim3(64), [=] {
    const unsigned t = threadIdx.x, all = 0xffffffffu;
    out[t] = __shfl_sync(all, t, 3);
    out[64 + t] = __shfl_up_sync(all, t, 2);
    out[128 + t] = __shfl_down_sync(all, t, 5);
    out[192 + t] = __shfl_xor_sync(all, t, 9);
    out[256 + t] = __ballot_sync(all, t % 3 == 0);
    out[320 + t] = __any_sync(all, t == 40) * 2 + __all_sync(all, t < 32);
    // Half a warp on its own.
    if (t % 32 < 16) out[t] += 100 * __shfl_sync(0xffffu, t, 1);
  });
  for (unsigned t = 0; t < 64; ++t) {
    const unsigned first = t / 32 * 32, lane = t % 32;
    expect(out[t] == first + 3 + (lane < 16 ? 100 * (first + 1) : 0), "__shfl_sync");
    expect(out[64 + t] == (lane < 2 ? t : t - 2), "__shfl_up_sync");
    expect(out[128 + t] == (lane + 5 < 32 ? t + 5 : t), "__shfl_down_sync");
    expect(out[192 + t] == first + (lane ^ 9), "__shfl_xor_sync");
    unsigned thirds = 0;
    for (unsigned i = 0; i < 32; ++i) thirds |= ((first + i) % 3 == 0 ? 1u : 0u) << i;
    expect(out[256 + t] == thirds, "__ballot_sync");
    expect(out[320 + t] == (t < 32 ? 1u : 2u), "__any_sync, __all_sync");
  }
}

void reductions() {
  std::vector<double> result(4 * 32);
  double* out = result.data();
  run(dim3(1), dim3(32), [=] {
    const int t = static_cast<int>(threadIdx.x);
    out[t] = warp_reduce(static_cast<float>(t), Plus());
    out[32 + t] = warp_reduce(static_cast<double>(t % 20), Larger());
    out[64 + t] = warp_reduce(t == 7 ? NAN : -1.0f, Larger());
    out[96 + t] = Larger().none<float>() + Plus().none<float>();
  });
  for (int t = 0; t < 32; ++t) {
    expect(out[t] == 496 && out[32 + t] == 19, "warp_reduce");
    expect(out[64 + t] == -1 && out[96 + t] == -INFINITY, "the neutral element");
  }
}

// One element, through the packing of two.
template <class T>
void set(T* memory, int i, Acc<T> value) {
  const Packed<T, 2> pair = narrow<T>(Vector<Acc<T>, 2>{{value, value}});
  memcpy(memory + i, pair.words, sizeof(T));
}
template <class T>
Acc<T> get(const T* memory, int i) {
  Packed<T, 2> pair;
  memcpy(pair.words, memory + i, sizeof(T));
  return pair[0];
}

// Every number of lanes, from every side, aligned and not.
template <class T, int N>
void vectors() {
  for (int shift = 0; shift < N; ++shift) {
    for (int first = 0; first < N; ++first) {
      for (int last = first; last <= N; ++last) {
        alignas(16) T memory[3 * N], copy[3 * N];
        for (int i = 0; i < 3 * N; ++i) {
          set(memory, i, Acc<T>(i + 1));
          set(copy, i, Acc<T>(-1));
        }
        const Lanes lanes{first, last};
        const Packed<T, N> loaded = load<N>(memory + shift, lanes);
        store(copy + shift, lanes, loaded);
        for (int i = 0; i < N; ++i) {
          const bool exists = i >= first && i < last;
          expect(loaded[i] == Acc<T>(exists ? shift + i + 1 : 0), "load");
          expect(get(copy, shift + i) == Acc<T>(exists ? shift + i + 1 : -1), "store");
        }
        for (int i = 0; i < 3 * N; ++i) {
          if (i < shift || i >= shift + N) expect(get(copy, i) == -1, "store leaves alone");
        }
      }
    }
  }
  const T* nothing = nullptr;
  expect(load_or<N>(nothing, 5, Lanes{0, N}, Acc<T>(3))[N - 1] == 3, "load_or without a row");
  const Lanes tail = lanes_at<N>(7 * N, 7 * N + 1), whole = lanes_at<N>(0, int64_t{1} << 40);
  expect(tail.first == 0 && tail.last == 1 && whole.last == N, "lanes_at");
}

void scalars() {
  const Packed<BFloat16, 2> brain = narrow<BFloat16>(Vector<float, 2>{{1.00390625f, -3.0f}});
  expect(brain[0] == 1.0f && brain[1] == -3.0f, "bfloat16 rounds to even");
  const Packed<Float16, 2> half = narrow<Float16>(Vector<float, 2>{{2049.0f, -3.0f}});
  expect(half[0] == 2048.0f && half[1] == -3.0f, "float16 rounds to even");
  expect(exponential(0.0f) == 1.0f && exponential(0.0) == 1.0, "exponential");
  expect(reciprocal(4.0f) == 0.25f && reciprocal(4.0) == 0.25, "reciprocal");
  expect(square_root(9.0f) == 3.0f && square_root(9.0) == 3.0, "square_root");
  expect(multiply_add(2.0f, 3.0f, 4.0f) == 10.0f && multiply_add(2.0, 3.0, 4.0) == 10.0, "fma");
  expect(multiprocessors() >= 1 && grid_for(3) == 3, "multiprocessors, grid_for");
  expect(grid_for(int64_t{1} << 40) == 32 * multiprocessors(), "a grid has a limit");
  expect(divide_up(7, 3) == 3 && smaller(2, 3) == 2 && larger(2, 3) == 3, "integers");
}

void launches() {
  const auto nothing = [] {};
  const auto status = [&](dim3 grid, dim3 block) {
    return launch(kernel<decltype(nothing)>, grid, block, nullptr, nothing);
  };
  expect(status(dim3(0), dim3(1)) == cudaErrorInvalidConfiguration, "an empty grid");
  expect(status(dim3(1), dim3(1025)) == cudaErrorInvalidConfiguration, "a block too large");
  expect(status(dim3(1, 65536), dim3(1)) == cudaErrorInvalidConfiguration, "a grid too high");
  expect(cudaGetLastError() == cudaSuccess, "launch leaves no error for others to find");
}

}  // namespace

extern "C" const char* self_test() {
  failure.clear();
  coordinates();
  warps();
  reductions();
  vectors<float, 4>();
  vectors<BFloat16, 8>();
  vectors<Float16, 8>();
  vectors<double, 2>();
  vectors<float, 8>();
  scalars();
  launches();
  return failure.c_str();
}

// Mistakes that hang or corrupt on a device, and must end the process here.
extern "C" void misuse(int kind) {
  switch (kind) {
    case 0:
      return run(dim3(1), dim3(64), [] {
        if (threadIdx.x < 40) block_barrier();
      });
    case 1:
      return run(dim3(1), dim3(32), [] {
        if (threadIdx.x < 16) {
          warp_reduce(1.0f, Plus());
        } else {
          __syncwarp();
        }
      });
    case 2:
      return run(dim3(1), dim3(16), [] { warp_reduce(1.0f, Plus()); });
    case 3:
      return run(dim3(1), dim3(32), [] {
        if (threadIdx.x < 16) warp_reduce(1.0f, Plus());
      });
    case 4:  // a race: nothing orders the write of one warp and the read of the other
      return run(dim3(1), dim3(64), [] {
        __shared__ int cell;
        if (threadIdx.x == 0) cell = 1;
        if (threadIdx.x == 32 && cell > 1) __syncwarp(1);
      });
  }
}
