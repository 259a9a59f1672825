// SPDX-License-Identifier: Apache-2.0
// As much of CUDA as the kernels use, on the CPU: a C++ compiler that finds this folder before the
// real headers compiles the .cu files as they are. Every CUDA thread is a fiber of its own (see
// emulation.cpp); barriers and shuffles are the only places where fibers take turns. So a sanitizer
// sees the kernels' own loads and stores: out of bounds, misaligned, undefined, racing.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t status);

namespace emulation {

struct Place {
  dim3 thread, block, block_dim, grid_dim;
};
const Place& here();

// Runs kernel(closure) once per thread of the grid.
cudaError_t run(const cudaLaunchConfig_t& config, void (*kernel)(const void*), const void* closure);
void barrier();
void warp_barrier(unsigned mask);
// The value of another lane of the warp; all lanes of the mask must call.
uint64_t exchange(unsigned mask, uint64_t value, unsigned source_lane);
unsigned ballot(unsigned mask, bool predicate);
unsigned lane();

}  // namespace emulation

// threadIdx.x and its like: no macros, for a launch configuration has members of these names.
template <dim3 emulation::Place::* which, unsigned dim3::* axis>
struct Coordinate {
  operator unsigned() const { return emulation::here().*which.*axis; }
};
template <dim3 emulation::Place::* which>
struct Coordinates {
  Coordinate<which, &dim3::x> x;
  Coordinate<which, &dim3::y> y;
  Coordinate<which, &dim3::z> z;
};
constexpr Coordinates<&emulation::Place::thread> threadIdx{};
constexpr Coordinates<&emulation::Place::block> blockIdx{};
constexpr Coordinates<&emulation::Place::block_dim> blockDim{};
constexpr Coordinates<&emulation::Place::grid_dim> gridDim{};

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  const auto thread = [&] { kernel(arguments...); };
  return emulation::run(
      *config, [](const void* closure) { (*static_cast<const decltype(thread)*>(closure))(); },
      &thread);
}

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline void __stwb(uint4* target, uint4 value) { *target = value; }
inline float __fdividef(float a, float b) { return a / b; }

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::warp_barrier(mask); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulation::ballot(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = emulation::exchange(mask, bits, static_cast<unsigned>(source) % 32);
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, static_cast<int>(emulation::lane()) ^ distance);
}
// Beyond the warp a lane keeps its own value.
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  const unsigned own = emulation::lane(), source = own + distance;
  return __shfl_sync(mask, value, static_cast<int>(source < 32 ? source : own));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
  const unsigned own = emulation::lane();
  return __shfl_sync(mask, value, static_cast<int>(own >= distance ? own - distance : own));
}
