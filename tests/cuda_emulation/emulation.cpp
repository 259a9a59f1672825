// SPDX-License-Identifier: Apache-2.0
// The device: runs the blocks of a grid one after the other, the threads of a block as fibers that
// give up the processor at barriers and shuffles only. Compiled without instrumentation, so that
// its own bookkeeping looks like nothing to a sanitizer.
//
// What a barrier orders and what it does not is told to ThreadSanitizer: switching between fibers
// orders nothing, a shuffle orders nothing, a barrier orders what came before on any of its threads
// with what comes after. The turns can be taken in several orders, so that even without
// ThreadSanitizer a missing barrier shows as another result.
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <vector>

#include "cuda_runtime.h"

#if defined(EMULATION_ADDRESS)
#include <sanitizer/common_interface_defs.h>
#elif defined(EMULATION_THREAD)
#include <sanitizer/tsan_interface.h>
#endif

namespace emulation {
namespace {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 * 1024;

// Threads that wait for each other. Odd and even rounds have a mark each: a thread that runs ahead
// to the next barrier must not lend its marks to those who still leave this one.
struct Meeting {
  uint64_t round = 0;
  unsigned arrived = 0;
  char marks[2];
};

enum class Warp { kNothing, kBarrier, kExchange, kBallot };

struct WarpState {
  Meeting meeting;
  Warp kind = Warp::kNothing;
  unsigned mask = 0, lanes = 0;
  uint64_t deposited[kWarp], result[kWarp];  // of a lane, for that lane
  unsigned source[kWarp];
};

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  void* fake_stack = nullptr;    // AddressSanitizer's
  void* thread_state = nullptr;  // ThreadSanitizer's
  Place place;
  unsigned index = 0;
  bool finished = true;
  const Meeting* waits_for = nullptr;
  uint64_t round = 0;
};

struct Device {
  Fiber fibers[kMaxThreads];
  WarpState warps[kMaxThreads / kWarp];
  Meeting block;
  unsigned threads = 0, alive = 0;
  Fiber* running = nullptr;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  void* scheduler_thread = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  char start_mark = 0, end_mark = 0;
  void (*kernel)(const void*) = nullptr;
  const void* closure = nullptr;
  bool failed = false;
};

Device device;
unsigned order = 0;  // of turns: 0 ascending, 1 descending, else a shuffle of that seed
int multiprocessor_count = 1;
cudaError_t refusal = cudaSuccess;  // of the next launch
cudaError_t last_error = cudaSuccess;

void acquire([[maybe_unused]] char* mark) {
#if defined(EMULATION_THREAD)
  __tsan_acquire(mark);
#endif
}
void release([[maybe_unused]] char* mark) {
#if defined(EMULATION_THREAD)
  __tsan_release(mark);
#endif
}

void fiber_main() {
  Fiber& self = *device.running;
#if defined(EMULATION_ADDRESS)
  __sanitizer_finish_switch_fiber(nullptr, &device.scheduler_stack, &device.scheduler_stack_bytes);
#endif
  acquire(&device.start_mark);
  device.kernel(device.closure);
  release(&device.end_mark);
  self.finished = true;
  --device.alive;
#if defined(EMULATION_ADDRESS)
  __sanitizer_start_switch_fiber(nullptr, device.scheduler_stack, device.scheduler_stack_bytes);
#elif defined(EMULATION_THREAD)
  __tsan_switch_to_fiber(device.scheduler_thread, __tsan_switch_to_fiber_no_sync);
#endif
  setcontext(&device.scheduler);
}

void resume(Fiber& fiber) {
  device.running = &fiber;
#if defined(EMULATION_ADDRESS)
  __sanitizer_start_switch_fiber(&device.scheduler_fake_stack, fiber.stack, kStackBytes);
#elif defined(EMULATION_THREAD)
  __tsan_switch_to_fiber(fiber.thread_state, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&device.scheduler, &fiber.context);
#if defined(EMULATION_ADDRESS)
  __sanitizer_finish_switch_fiber(device.scheduler_fake_stack, nullptr, nullptr);
#endif
  device.running = nullptr;
}

void yield_until_next(const Meeting& meeting) {
  Fiber& self = *device.running;
  self.waits_for = &meeting;
  self.round = meeting.round;
#if defined(EMULATION_ADDRESS)
  __sanitizer_start_switch_fiber(&self.fake_stack, device.scheduler_stack,
                                 device.scheduler_stack_bytes);
#elif defined(EMULATION_THREAD)
  __tsan_switch_to_fiber(device.scheduler_thread, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&self.context, &device.scheduler);
#if defined(EMULATION_ADDRESS)
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
  self.waits_for = nullptr;
}

// Arrives, and returns when `expected` threads have. `open` runs once, on the last to arrive.
template <class Open>
void meet(Meeting& meeting, unsigned expected, bool orders_memory, const Open& open) {
  char* mark = &meeting.marks[meeting.round % 2];
  if (orders_memory) release(mark);
  if (++meeting.arrived < expected) {
    yield_until_next(meeting);
  } else {
    meeting.arrived = 0;
    open();
    ++meeting.round;
  }
  if (orders_memory) acquire(mark);
}

[[noreturn]] void die(const char* message) {
  const Place& place = device.running->place;
  fprintf(stderr, "emulation: thread (%u, %u, %u) of block (%u, %u, %u): %s\n", place.thread.x,
          place.thread.y, place.thread.z, place.block.x, place.block.y, place.block.z, message);
  abort();
}

template <class Open>
void meet_in_warp(Warp kind, unsigned mask, const Open& open) {
  WarpState& warp = device.warps[device.running->index / kWarp];
  if ((mask >> lane() & 1) == 0) die("a warp operation whose mask leaves out its caller");
  if ((mask & ~warp.lanes) != 0) die("a warp operation names lanes that do not exist");
  if (warp.meeting.arrived == 0) {
    warp.kind = kind;
    warp.mask = mask;
  }
  if (warp.kind != kind || warp.mask != mask) die("lanes of a warp meet in different operations");
  meet(warp.meeting, static_cast<unsigned>(__builtin_popcount(mask)), kind == Warp::kBarrier, open);
}

void start(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    fiber.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fiber.stack == MAP_FAILED) abort();
#if defined(EMULATION_THREAD)
    fiber.thread_state = __tsan_create_fiber(0);
#endif
  }
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack, 0, kStackBytes};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  // AddressSanitizer would take every switch for a fresh stack and forget its red zones.
  fiber.context.uc_stack = {};
  fiber.finished = false;
  fiber.waits_for = nullptr;
}

void shuffle(std::vector<unsigned>& turns, unsigned& state) {
  for (size_t i = turns.size(); i > 1; --i) {
    state = state * 1664525u + 1013904223u;
    const unsigned j = (state >> 8) % static_cast<unsigned>(i);
    const unsigned swapped = turns[i - 1];
    turns[i - 1] = turns[j];
    turns[j] = swapped;
  }
}

// Runs the block of threads that were started; false if it is stuck.
bool finish_block(std::vector<unsigned>& turns, unsigned& state) {
  release(&device.start_mark);
  while (device.alive > 0) {
    bool moved = false;
    if (order > 1) shuffle(turns, state);
    for (unsigned turn : turns) {
      Fiber& fiber = device.fibers[turn];
      if (fiber.finished) continue;
      if (fiber.waits_for != nullptr && fiber.waits_for->round == fiber.round) continue;
      resume(fiber);
      moved = true;
    }
    if (!moved) return false;
  }
  acquire(&device.end_mark);
  return true;
}

}  // namespace

const Place& here() { return device.running->place; }
unsigned lane() { return device.running->index % kWarp; }

void barrier() {
  if (device.alive < device.threads) die("a barrier that some threads have left behind");
  meet(device.block, device.threads, true, [] {});
}

void warp_barrier(unsigned mask) {
  meet_in_warp(Warp::kBarrier, mask, [] {});
}

uint64_t exchange(unsigned mask, uint64_t value, unsigned source_lane) {
  WarpState& warp = device.warps[device.running->index / kWarp];
  if ((mask >> source_lane & 1) == 0) die("a shuffle from a lane outside its mask");
  warp.deposited[lane()] = value;
  warp.source[lane()] = source_lane;
  meet_in_warp(Warp::kExchange, mask, [&] {
    for (unsigned i = 0; i < kWarp; ++i) {
      if (mask >> i & 1) warp.result[i] = warp.deposited[warp.source[i]];
    }
  });
  return warp.result[lane()];
}

unsigned ballot(unsigned mask, bool predicate) {
  WarpState& warp = device.warps[device.running->index / kWarp];
  warp.deposited[lane()] = predicate;
  meet_in_warp(Warp::kBallot, mask, [&] {
    uint64_t bits = 0;
    for (unsigned i = 0; i < kWarp; ++i) {
      if (mask >> i & 1) bits |= warp.deposited[i] << i;
    }
    for (unsigned i = 0; i < kWarp; ++i) {
      if (mask >> i & 1) warp.result[i] = bits;
    }
  });
  return static_cast<unsigned>(warp.result[lane()]);
}

cudaError_t run(const cudaLaunchConfig_t& config, void (*kernel)(const void*),
                const void* closure) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (refusal != cudaSuccess) {
    last_error = refusal;
    refusal = cudaSuccess;
    return last_error;
  }
  // The limits of every device from compute capability 3.0 on.
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || threads == 0 || threads > kMaxThreads || block.z > 64) {
    return last_error = cudaErrorInvalidConfiguration;
  }
  device.kernel = kernel;
  device.closure = closure;
  device.threads = static_cast<unsigned>(threads);
#if defined(EMULATION_THREAD)
  device.scheduler_thread = __tsan_get_current_fiber();
#endif
  std::vector<unsigned> turns(threads);
  for (unsigned i = 0; i < threads; ++i) {
    turns[i] = order == 1 ? static_cast<unsigned>(threads) - 1 - i : i;
  }
  unsigned state = order;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t turn = 0; turn < blocks; ++turn) {
    const uint64_t b = order == 1 ? blocks - 1 - turn : turn;
    device.alive = device.threads;
    device.block.arrived = 0;
    for (WarpState& warp : device.warps) warp.lanes = warp.meeting.arrived = 0;
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = device.fibers[t];
      fiber.index = t;
      fiber.place.thread = dim3{t % block.x, t / block.x % block.y, t / block.x / block.y};
      fiber.place.block =
          dim3{static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
               static_cast<unsigned>(b / grid.x / grid.y)};
      fiber.place.block_dim = block;
      fiber.place.grid_dim = grid;
      device.warps[t / kWarp].lanes |= 1u << t % kWarp;
      start(fiber);
    }
    if (!finish_block(turns, state)) {
      fprintf(stderr, "emulation: threads of a block wait for each other in different places\n");
      abort();
    }
  }
  return cudaSuccess;
}

}  // namespace emulation

using namespace emulation;

cudaError_t cudaGetDevice(int* id) {
  *id = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = multiprocessor_count;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t status = last_error;
  last_error = cudaSuccess;
  return status;
}
const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "emulated error";
}

// --- For the tests ---

extern "C" {
void emulation_set_order(unsigned value) { order = value; }
void emulation_set_multiprocessors(int count) { multiprocessor_count = count; }
void emulation_refuse_next_launch(int status) { refusal = static_cast<cudaError_t>(status); }
int emulation_last_error() { return last_error; }
}
