// SPDX-License-Identifier: Apache-2.0
// The shared-memory collectives as raw ops: check, launch, and say which rank is missing. Schemas
// stand in tpcore/_native.py.
#include "shm_ops.h"

#include "checks.h"
#include "launch.h"

namespace tpcore {
namespace {

Collective collective_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= 4, "collective=", number, "; expected 0 to 4");
  return static_cast<Collective>(number);
}

ShmCollective arguments(const Tensor& x, const Tensor& out, const Tensor& segment,
                        int64_t collective, int64_t source, int64_t rank, int64_t size,
                        int64_t lock, int64_t timeout_ms) {
  constexpr int64_t kPage = 4096;
  STD_TORCH_CHECK(
      size >= 2 && size <= 64 && rank >= 0 && rank < size && source >= 0 && source < size,
      "rank=", rank, " and source=", source, " of size=", size,
      "; expected ranks of a group of 2 to 64");
  STD_TORCH_CHECK(segment.is_cpu() && segment.is_contiguous() &&
                      segment.scalar_type() == ScalarType::Byte &&
                      segment.numel() >= (3 + 2 * size) * kPage,
                  "segment is not a contiguous uint8 tensor of at least ", (3 + 2 * size) * kPage,
                  " bytes on the CPU");
  STD_TORCH_CHECK(x.is_cpu() && out.is_cpu() && x.is_contiguous() && out.is_contiguous(),
                  "x and out must be contiguous, on the CPU");
  STD_TORCH_CHECK(x.scalar_type() == out.scalar_type(), "out differs from x in dtype");
  ShmCollective args;
  args.member = {segment.mutable_data_ptr(), segment.numel(),
                 static_cast<int32_t>(rank), static_cast<int32_t>(size),
                 static_cast<int32_t>(lock), timeout_ms};
  args.kind = collective_of(collective);
  args.source = static_cast<int32_t>(source);
  args.x = x.const_data_ptr();
  args.out = out.mutable_data_ptr();
  int64_t expected = x.numel();
  if (args.kind == Collective::kAllGather || args.kind == Collective::kBroadcast) {
    args.dtype = DType::kFloat32;
    args.count = x.numel() * x.element_size();
    if (args.kind == Collective::kAllGather) expected *= size;
  } else {
    args.dtype = dtype_of(x, "x");
    args.count = out.numel();
    if (args.kind == Collective::kReduceScatter) {
      STD_TORCH_CHECK(x.numel() % size == 0, "x has ", x.numel(), " elements, which ", size,
                      " ranks cannot share");
      expected /= size;
    }
  }
  STD_TORCH_CHECK(out.numel() == expected, "out has ", out.numel(), " elements; expected ",
                  expected);
  return args;
}

void check(const ShmFailure& failure, const ShmCollective& args) {
  if (failure.why == ShmFailure::kNone) return;
  const std::string who =
      "rank " + std::to_string(failure.rank) + " of " + std::to_string(args.member.size);
  switch (failure.why) {
    case ShmFailure::kTimedOut:
      STD_TORCH_CHECK(false, who, " has not come to this collective within ",
                      args.member.timeout_ms / 1000.0, " s");
    case ShmFailure::kEnded:
      STD_TORCH_CHECK(false, who, " has ended in the middle of a collective");
    case ShmFailure::kGaveUp:
      STD_TORCH_CHECK(false, who, " is missing: another rank has given up waiting for it");
    case ShmFailure::kDiffers:
      STD_TORCH_CHECK(false, who,
                      " called another collective, or the same with another number of "
                      "elements or dtype");
    default:
      STD_TORCH_CHECK(false, "an earlier collective of this group failed on ", who);
  }
}

}  // namespace

void shm_publish(const Tensor& x, const Tensor& out, const Tensor& segment, int64_t collective,
                 int64_t source, int64_t rank, int64_t size, int64_t lock, int64_t timeout_ms) {
  const ShmCollective args =
      arguments(x, out, segment, collective, source, rank, size, lock, timeout_ms);
  check(kernels().shm_publish(args, parallel_for), args);
}

void shm_complete(const Tensor& x, const Tensor& out, const Tensor& segment, int64_t collective,
                  int64_t source, int64_t rank, int64_t size, int64_t lock, int64_t timeout_ms) {
  const ShmCollective args =
      arguments(x, out, segment, collective, source, rank, size, lock, timeout_ms);
  check(kernels().shm_complete(args, parallel_for), args);
}

void shm_exchange(const Tensor& x, const Tensor& out, const Tensor& segment, int64_t collective,
                  int64_t source, int64_t rank, int64_t size, int64_t lock, int64_t timeout_ms) {
  const ShmCollective args =
      arguments(x, out, segment, collective, source, rank, size, lock, timeout_ms);
  check(kernels().shm_publish(args, parallel_for), args);
  check(kernels().shm_complete(args, parallel_for), args);
}

}  // namespace tpcore
