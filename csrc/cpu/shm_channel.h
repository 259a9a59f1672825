// SPDX-License-Identifier: Apache-2.0
// How the ranks of one host meet in shared memory: steps, waiting, and who is missing. Knows
// nothing of sums; compiled once, for no particular instruction set.
//
// The segment holds one line of counters for each rank, and for each rank a slot of two halves.
// Nobody writes into another's slot. Collectives are sequences of steps; in step k every rank
//
//     1. writes into half k % 2 of its own slot,
//     2. publishes: its counter becomes k + 1 (release),
//     3. waits until the counter of every rank is at least k + 1 (acquire),
//     4. reads the halves k % 2 of the others; it may go on reading them in 1 of step k + 1.
//
// What was written in step k is visible when it is read in step k, by the release and the acquire.
// It is not overwritten while someone reads it: a rank writes into the same half again in 1 of step
// k + 2, after 3 of step k + 1, when every counter was at least k + 2; and a rank publishes k + 2
// only after its last look at the halves of step k. So two halves are enough, a step needs one
// round of messages, and there is no barrier at the end of a collective. Counters only grow, and
// two ranks are never more than one step apart, so comparing by the sign of a 32-bit difference
// stays right when they wrap around, and a stale value cannot be taken for a new one.
//
// There is no lock and no owner: a rank that dies leaves nothing locked, and the segment has no
// name, so nothing is left behind either. That a rank is alive shows in a file lock which the
// kernel drops with its process.
#pragma once

#include "tpcore/kernels.h"

// Always: units for different instruction sets include this, and may not share a function.
#define TPCORE_SHM_INLINE __attribute__((always_inline)) inline

namespace tpcore {

// The counters of one rank; two cache lines, because processors fetch them in pairs.
struct ShmRank;

class ShmChannel {
 public:
  explicit ShmChannel(const ShmMember& member);

  TPCORE_SHM_INLINE int rank() const { return member_.rank; }
  TPCORE_SHM_INLINE int size() const { return member_.size; }
  TPCORE_SHM_INLINE int64_t half_bytes() const { return half_bytes_; }

  // The half that this rank writes in this step.
  TPCORE_SHM_INLINE char* own_half() const { return half(member_.rank, step_); }
  // The half that `rank` wrote in the step that was waited for last.
  TPCORE_SHM_INLINE const char* half_of(int rank) const { return half(rank, step_ - 1); }

  // Ends the writing of this step. `call` says which collective this is part of.
  ShmFailure publish(uint64_t call);
  // Waits until all others have published the same step, of the same call.
  ShmFailure wait(uint64_t call);

 private:
  TPCORE_SHM_INLINE char* half(int rank, uint32_t step) const {
    return slots_ + (2 * rank + static_cast<int64_t>(step % 2)) * half_bytes_;
  }
  ShmFailure wait_for(int rank);
  ShmFailure sleep_until_reached(int rank);
  ShmFailure give_up(ShmFailure failure);
  bool reached(const ShmRank& other) const;
  bool is_alive(int rank) const;

  ShmMember member_;
  ShmRank* ranks_;
  char* slots_;
  int64_t half_bytes_;
  uint32_t step_;  // how many steps this rank has published
};

}  // namespace tpcore
