// SPDX-License-Identifier: Apache-2.0
// The protocol of shm_channel.h.
//
// Waiting. Ranks that have a processor each spin, as the others are usually microseconds behind;
// who did so in vain, because of other work on the machine, spins half as long the next time (to
// find the others there already says nothing: of two on one processor every other one does), but
// from time to time as long as at first: a kernel that has put two ranks on one processor parts
// them only if it sees both wanting to run. Ranks that outnumber the processors yield to each other
// instead. Then both sleep. A sleeper announces itself in `sleepers` before the kernel compares the
// counter; the publisher advances the counter before it looks at `sleepers`. These four accesses
// are sequentially consistent, so at least one of the two sees the other: either the publisher
// wakes the sleeper, or it does not fall asleep.
#include "shm_channel.h"

#include <fcntl.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

namespace tpcore {

struct alignas(128) ShmRank {
  std::atomic<uint32_t> step;
  std::atomic<uint32_t> sleepers;   // how many ranks sleep until `step` changes
  std::atomic<int32_t> gave_up_on;  // 1 + the rank that this one has given up waiting for
  uint32_t vain_spins;              // how often in a row this rank has spun in vain; its own note
  uint64_t call[2];                 // what the two halves are part of; guarded like the halves
};
static_assert(sizeof(ShmRank) == 128, "one pair of cache lines");
static_assert(std::atomic<uint32_t>::is_always_lock_free, "processes cannot share a hidden lock");

namespace {

constexpr int64_t kPage = 4096;
constexpr int kSpins = 2000, kMaxHalvings = 6, kRetry = 16, kYields = 200;
constexpr int64_t kNapMs = 50;  // how often a sleeper looks whether the other one is alive

int64_t now_ms() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{1000} * now.tv_sec + now.tv_nsec / 1000000;
}

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

#if defined(__linux__)
void nap(std::atomic<uint32_t>& word, uint32_t seen) {
  const timespec limit{0, kNapMs * 1000000};
  syscall(SYS_futex, &word, FUTEX_WAIT, seen, &limit, nullptr, 0);
}
void wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}
#else
void nap(std::atomic<uint32_t>&, uint32_t) {
  const timespec limit{0, 100000};
  nanosleep(&limit, nullptr);
}
void wake_all(std::atomic<uint32_t>&) {}
#endif

}  // namespace

ShmChannel::ShmChannel(const ShmMember& member)
    : member_(member), ranks_(static_cast<ShmRank*>(member.segment)) {
  const int64_t lines = static_cast<int64_t>(sizeof(ShmRank)) * member.size;
  const int64_t header = (lines + kPage - 1) / kPage * kPage;
  slots_ = static_cast<char*>(member.segment) + header;
  half_bytes_ = (member.segment_bytes - header) / (2 * member.size) / kPage * kPage;
  step_ = ranks_[member.rank].step.load(std::memory_order_relaxed);
}

ShmFailure ShmChannel::publish(uint64_t call) {
  ShmRank& own = ranks_[member_.rank];
  const int32_t gave_up_on = own.gave_up_on.load(std::memory_order_relaxed);
  if (gave_up_on != 0) return {ShmFailure::kBroken, gave_up_on - 1};
  own.call[step_ % 2] = call;
  own.step.store(++step_, std::memory_order_seq_cst);
  if (own.sleepers.load(std::memory_order_seq_cst) != 0) wake_all(own.step);
  return {};
}

ShmFailure ShmChannel::wait(uint64_t call) {
  for (int rank = 0; rank < member_.size; ++rank) {
    if (rank == member_.rank) continue;
    const ShmFailure failure = wait_for(rank);
    if (failure.why != ShmFailure::kNone) return give_up(failure);
    if (ranks_[rank].call[(step_ - 1) % 2] != call) return give_up({ShmFailure::kDiffers, rank});
  }
  return {};
}

bool ShmChannel::reached(const ShmRank& other) const {
  return static_cast<int32_t>(other.step.load(std::memory_order_acquire) - step_) >= 0;
}

ShmFailure ShmChannel::wait_for(int rank) {
  static const long processors = sysconf(_SC_NPROCESSORS_ONLN);
  const bool crowded = member_.size > processors;
  uint32_t& vain_spins = ranks_[member_.rank].vain_spins;
  const int halvings = static_cast<int>(vain_spins % kRetry);
  const int spins = kSpins >> (halvings < kMaxHalvings ? halvings : kMaxHalvings);
  if (reached(ranks_[rank])) return {};  // which says nothing of spinning
  for (int i = crowded ? kYields : spins; i > 0; --i) {
    if (reached(ranks_[rank])) {
      vain_spins = 0;
      return {};
    }
    crowded ? static_cast<void>(sched_yield()) : pause_briefly();
  }
  ++vain_spins;
  return sleep_until_reached(rank);
}

ShmFailure ShmChannel::sleep_until_reached(int rank) {
  ShmRank& other = ranks_[rank];
  const int64_t deadline = now_ms() + member_.timeout_ms;
  for (;;) {
    other.sleepers.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t seen = other.step.load(std::memory_order_seq_cst);
    if (!reached(other)) nap(other.step, seen);
    other.sleepers.fetch_sub(1, std::memory_order_relaxed);
    // In this order: a rank may publish, and then end in peace.
    const int32_t gave_up_on = other.gave_up_on.load(std::memory_order_acquire);
    const bool alive = is_alive(rank);
    if (reached(other)) return {};
    if (gave_up_on != 0) return {ShmFailure::kGaveUp, gave_up_on - 1};
    if (!alive) return {ShmFailure::kEnded, rank};
    if (now_ms() >= deadline) return {ShmFailure::kTimedOut, rank};
  }
}

// Leaves word for those who wait for this rank, so that all name the same culprit.
ShmFailure ShmChannel::give_up(ShmFailure failure) {
  ranks_[member_.rank].gave_up_on.store(1 + failure.rank, std::memory_order_release);
  return failure;
}

// Each rank has locked the byte of its number. The kernel unlocks it when the process ends, even
// if its parent has not yet noticed, and a forked child does not inherit it.
bool ShmChannel::is_alive(int rank) const {
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return fcntl(member_.lock, F_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

}  // namespace tpcore
